"""How do OpenAI's forms become sequences, and answers?"""
