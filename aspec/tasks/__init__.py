"""Tasks, the graph that orders them, and what a pass is made of."""
