"""In which blocks of rows an exact product is computed, so that a row's bits do not depend on the rows beside it.

A CPU library chooses other kernels, or splits the inner length differently, for other numbers of rows. ``row_probe.py``
finds out on this machine which numbers of rows give equal bits; a recipe uses only those. Pure policy: numbers in,
numbers out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

BLOCK_ROWS = 64
"""Rows of every block where nothing is proven: the same number always runs the same kernel."""

PACK_BLOCKS, SMALL_BLOCK = 4, 64
"""Weights are packed for a product of at least so many blocks that have fewer than SMALL_BLOCK rows on average.
Measured, ms, [5632, 2048] in bf16, one thread, with AMX: packing takes 3.5, blocks of 32 rows 1.7 each from plain
weights, blocks of 128 rows 2.7 from packed ones."""

MOST_PACKED_BYTES = 128 << 20
"""Bytes of the largest weight that is packed: a packed copy is memory beside the plan's weights while it is made."""

BLOCK_COST = 32
"""Cost of a block beside that of its rows, in rows: the weights are read once per block."""

TYPICAL = ((1, 3), (16, 2), (64, 1), (512, 1))
"""Rows of a product, and how much such products count: steps, verified chains, trees, prompts."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Proven numbers of rows: all from ``lowest`` to ``highest``, and ``larger`` ones, descending.

    ``widening``: how the product is computed in its place, in bf16 on a processor that has no instructions for it.
    ``compiled``: by a kernel of this machine, for any number of rows at once; ``highest`` is then the most queries of
    attention in steps that are not exact. ``integers``: by one that multiplies weights of 4 bits in whole numbers.
    """

    lowest: int
    highest: int
    larger: tuple[int, ...] = ()
    packing: "Packing | None" = None
    widening: "Widening | None" = None
    compiled: bool = False
    integers: bool = False

    def blocks(self, count: int) -> tuple[int, ...]:
        """Rows of every block for ``count`` rows; the last block may have more rows than are left."""
        return _blocks(self, count)

    def packs(self, count: int) -> bool:
        """Whether it pays to pack plain weights for one product of ``count`` rows."""
        num_blocks = len(self.blocks(count))
        return self.packing is not None and num_blocks >= PACK_BLOCKS and count < SMALL_BLOCK * num_blocks


@dataclass(frozen=True, slots=True)
class Packing:
    """Weights in the library's own order for ``hint`` rows, and the recipe of products with them.

    ``faster``: even one row is multiplied faster than with plain weights, so it pays to keep weights packed.
    """

    hint: int
    recipe: Recipe
    faster: bool


@dataclass(frozen=True, slots=True)
class Widening:
    """The recipe of products in panels of fp32 (``panels.py``), and from how many rows on they are faster."""

    recipe: Recipe
    from_rows: int


BLOCKS = Recipe(BLOCK_ROWS, BLOCK_ROWS)
"""What needs no proof."""

COMPILED = Recipe(1, 1 << 20, compiled=True)
"""Of kernels, which compute every row by itself."""

IN_INTEGERS = replace(COMPILED, integers=True)


@lru_cache(4096)
def _blocks(recipe: Recipe, count: int) -> tuple[int, ...]:
    sizes: list[int] = []
    for size in (*recipe.larger, recipe.highest):
        sizes += [size] * (count // size)
        count %= size
    return (*sizes, max(count, recipe.lowest)) if count else tuple(sizes)


def cost(recipe: Recipe) -> float:
    """How much more the typical products cost than without blocks, all together; lower is better."""
    return sum(
        weight * sum(BLOCK_COST + size for size in recipe.blocks(count)) / (BLOCK_COST + count)
        for count, weight in TYPICAL
    )


def candidates(kinds: Sequence[object], larger: Sequence[tuple[int, object]], wanted: object = None) -> list[Recipe]:
    """Recipes, the cheapest first.

    ``kinds``: for 1, 2, 3 ... rows the kind of bits that the rows have. ``larger``: (number of rows, kind) of single
    larger numbers. ``wanted``: the only kind that may be used; None: any one.
    """
    found, start = [], 1
    for kind, run in groupby(kinds):
        stop = start + len(list(run)) - 1
        more = tuple(sorted((size for size, own in larger if own == kind), reverse=True))
        if wanted is None or kind == wanted:
            found.append(Recipe(start, stop, more))
        start = stop + 1
    return sorted(found, key=cost)
