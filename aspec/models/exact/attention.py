"""Exact attention: a token's bits depend on its own path only, not on the other tokens of the pass.

Queries are computed in pieces (``paths.py``): the keys of a call follow from the positions of its piece. Pieces run
with torch's kernel (``flash.py``) where it is proven on this machine, in separate products (``tiles.py``) elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from aspec.models.compiled import kernels
from aspec.models.exact.compiled_attention import OTHERWISE, attend_compiled, attention_kind
from aspec.models.exact.flash import Inputs, attend_with_flash, flash_recipe
from aspec.models.exact.known_recipes import recipe_for
from aspec.models.exact.paths import Paths, Piece, Seen
from aspec.models.exact.scoring import Scoring
from aspec.models.exact.tiles import Keys, attend_in_tiles

MAX_GROUP_BYTES = 4 << 20
"""Bytes that an exact step holds while it attends to several pieces together."""

MOST_REST = 512
"""Keys in one block of torch's kernel; every query must see one of them."""

RowPiece = tuple[int, Piece]
"""A row's number and a piece of its queries."""


def prove_attention(shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """Prove attention with keys and values of these (key heads, width, width of values), and compile its kernels."""
    for groups, width, value_width in shapes:
        states = (torch.empty(1, groups, 1, own, dtype=dtype, device="meta") for own in (width, value_width))
        if recipe_for(attention_kind(*states)).compiled:
            kernels.attention(width, value_width)


def attend_by_paths(
    output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Seen, scoring: Scoring
) -> bool:
    """Write a step of query [B, H, T, D] to ``output`` [B, T, H, Dv]: compiled where that is proven.

    Returns False, and writes nothing, if the step is not exact and a mask is faster.
    """
    together = all(own.stride(-1) == 1 for own in (output, query, key, value))
    fits = scoring.softcap is None and key.is_cpu and query.dtype is key.dtype and together
    recipe = recipe_for(attention_kind(key, value)) if fits else OTHERWISE
    if recipe.compiled and (seen.exact or query.shape[2] <= recipe.highest):
        attend_compiled(output, query, key, value, seen.paths(), scoring)
    elif seen.exact:
        attend_otherwise(output, query, key, value, seen.paths(), scoring)
    else:
        return False
    return True


def attend_otherwise(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: tuple[Paths, ...],
    scoring: Scoring,
) -> None:
    """The same with torch's kernel and in tiles. Similar pieces run together."""
    heads, head_bytes = query.shape[1], value.shape[-1] * value.element_size()
    slot_bytes = key.shape[1] * (key.shape[-1] + value.shape[-1]) * key.element_size()
    recipe = flash_recipe(key, value) if scoring.softcap is None else None
    quick: list[RowPiece] = []
    slow: list[RowPiece] = []
    for row, own in enumerate(paths):
        for piece in own.pieces:
            (slow if recipe is None or piece.num_rest > MOST_REST else quick).append((row, piece))

    def inputs(row: int, piece: Piece) -> Inputs:
        states = key[row], value[row]
        if piece.path is not None:
            states = states[0].index_select(1, piece.path), states[1].index_select(1, piece.path)
        return Inputs(piece, query[row, :, piece.tokens], *states)

    if recipe is not None:
        held = partial(flash_bytes, heads, slot_bytes, head_bytes)
        for group in _groups(quick, lambda piece: piece.num_rest, 1.0, held):
            mixed = attend_with_flash([inputs(*own) for own in group], scoring, recipe)
            for (row, piece), own_mixed in zip(group, mixed, strict=True):
                output[row, piece.tokens] = own_mixed.transpose(0, 1)
    for group in _groups(slow, lambda piece: piece.end - piece.first, 1.5, partial(tile_bytes, heads, slot_bytes)):
        several = [inputs(*own) for own in group]
        keys = Keys.merged([Keys.of(own.key, own.value, own.piece) for own in several])
        queries = several[0].query if len(several) == 1 else torch.cat([own.query for own in several])
        mixed = attend_in_tiles(queries, keys, scoring.repeated(len(group)))
        for at, (row, piece) in enumerate(group):
            output[row, piece.tokens] = mixed[:, at * heads : (at + 1) * heads]


def flash_bytes(heads: int, slot_bytes: int, head_bytes: int, queries: int, keys: int) -> int:
    """Bytes that torch's kernel and the join hold for a piece, besides its result: masks, results, keys in its order.

    ``slot_bytes``: of a token's keys and values; ``head_bytes``: of one head's value; ``keys``: not seen by all.
    """
    return queries * heads * (10 * head_bytes + 5 * keys) + keys * slot_bytes


def tile_bytes(heads: int, slot_bytes: int, queries: int, keys: int) -> int:
    """Likewise of separate products: scores in two orders, weights, results of every tile, two copies of the keys."""
    return queries * heads * keys * 16 + 2 * keys * slot_bytes


def _groups(
    pieces: list[RowPiece], length: Callable[[Piece], int], spread: float, held: Callable[[int, int], int]
) -> Iterator[list[RowPiece]]:
    """Pieces to attend to together: chains of several rows with equally many queries, and up to ``spread`` times as
    many keys as the shortest, within MAX_GROUP_BYTES; a piece of a tree is alone."""

    def likeness(piece: Piece) -> tuple[bool, bool, int]:
        return piece.of_tree, bool(piece.seen), piece.count

    together: list[RowPiece] = []
    for found in sorted(pieces, key=lambda own: (*likeness(own[1]), length(own[1]))):
        piece = found[1]
        if together:
            shortest = together[0][1]
            nbytes = (len(together) + 1) * held(piece.count, length(piece))
            like = not piece.of_tree and likeness(piece) == likeness(shortest) and found[0] != together[-1][0]
            if not (like and nbytes <= MAX_GROUP_BYTES and length(piece) <= spread * length(shortest)):
                yield together
                together = []
        together.append(found)
    if together:
        yield together
