"""What is a run doing, and what was it waiting for?"""
