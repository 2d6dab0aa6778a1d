"""Which tasks run a layer, and how do its weights come?"""
