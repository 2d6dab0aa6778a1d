"""What comes before a command's own work?"""
