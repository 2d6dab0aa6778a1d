"""Which products does this machine compile for itself?"""
