"""Where do proposed tokens come from, and how likely is it that the target accepts them?"""
