"""What is read from a body and written into an answer."""
