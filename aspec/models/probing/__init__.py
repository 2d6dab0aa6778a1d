"""What is known of a model before a weight is read, from runs of its own forward on meta tensors."""
