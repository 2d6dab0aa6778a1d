"""How does a layer run whose experts are read one by one?"""
