"""What does work cost on this machine?"""
