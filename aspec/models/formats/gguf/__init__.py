"""How does a GGUF file become a model of transformers: its weights, configuration and tokenizer?"""
