"""What is a run doing, and what does it wait for?"""
