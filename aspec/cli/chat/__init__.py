"""How does a conversation run in the terminal?"""
