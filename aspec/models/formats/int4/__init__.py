"""How are weights of 4 bits multiplied without decoding them?"""
