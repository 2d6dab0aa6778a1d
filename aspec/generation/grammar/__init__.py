"""What a text must match: grammars, and the tokens that one allows."""
