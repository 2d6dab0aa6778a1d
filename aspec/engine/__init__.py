"""How is a model opened, run and closed?"""
