"""Which experts are read when, and which ones stay?"""
