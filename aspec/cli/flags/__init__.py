"""What can be asked of a command: its options, how they are read, and which of them exclude each other?"""
