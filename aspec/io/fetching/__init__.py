"""How do the files of a model come from the hub?"""
