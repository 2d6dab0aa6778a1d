"""How do packed integers become weights?"""
