"""What do the streams and the screen of a terminal take?"""
