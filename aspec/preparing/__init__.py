"""How is a checkpoint written anew, so that it streams better?"""
