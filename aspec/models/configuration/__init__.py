"""What does the configuration of a checkpoint say: sizes, context, dtype, end tokens?"""
