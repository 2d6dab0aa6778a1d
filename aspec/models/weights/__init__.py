"""How do stored tensors become the parameters of a layer?"""
