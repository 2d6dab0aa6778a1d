"""How do the rows of a batch spread over several engines?"""
