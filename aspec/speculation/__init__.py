"""Who proposes tokens, and how likely are they?"""
