"""How does a model of transformers run layer by layer, with weights that are loaded and dropped?"""
