"""What is one request: its parameters, its tokens, its text, its cost?"""
