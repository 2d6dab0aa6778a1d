"""What fits into memory, and which plan is fastest?"""
