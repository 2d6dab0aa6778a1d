"""The shapes that kernels and their callers share; the package that compiles is not needed for them."""

TILE = 64  # positions of attention that are weighed together
ROWS = 4  # heads and queries that share keys, and are computed together
HIDDEN, LEAST = -1e30, -1e29  # the score of a position that is not seen, and what all others exceed
RECORD = 5 * ROWS + 4
"""Numbers that describe ROWS rows: for each row where its query, its result (-1: there is none) and its sink are, and
its first and last position; then where keys and values of the path begin, the positions that lie in the slots of the
same numbers, and where the slots of later ones are told."""

QUANTISED = 32  # inputs of a row that share a scale in products of whole numbers
