"""Products whose bits depend on the token only: in which sizes a pass is multiplied, and the proof of those sizes."""
