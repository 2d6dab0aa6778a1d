"""What does a layer keep of every row, beside keys and values, and how is it taken back?"""
