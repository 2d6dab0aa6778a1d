"""How do OpenAI's requests become sequences, and sequences answers?"""
