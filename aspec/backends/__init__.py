"""Which machine runs the tasks?"""
