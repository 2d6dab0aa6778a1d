"""How do threads and the event loop meet?"""
