"""How does a model of transformers run layer by layer, with weights that come and go?"""
