"""What will routers choose, and what does reading it cost?"""
