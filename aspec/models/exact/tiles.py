"""Exact attention in separate products, tile by tile: it needs no proof and knows every kind of scores.

- A query's scores are sorted by position, in whole tiles, before the softmax. Trailing tiles without a visible position
  add only zeros.
- Weights and values are multiplied tile by tile, and the results are summed in fp32 in the order of the tiles, because
  a CPU library splits a longer product depending on its length. A tile that is a tree query's own is gathered for it.
- Every product has at least MIN_ROWS rows, because a CPU library uses other kernels for fewer rows. The inner lengths
  (a head's width, a tile) are so short that more rows change no bits, unlike in a layer's other products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from aspec.models.exact.paths import KEY_TILE, Own, Piece
from aspec.models.exact.scoring import Scoring

MAX_SCORE_BYTES = 1 << 20
"""Bytes of fp32 scores in one block of query tokens on a CPU, which stays in the caches: measured, ms of 512 tokens
over 2,048 keys in blocks of 32 / 64 / 128 / 512 tokens: 28 / 33 / 32 / 50."""

SUM_WIDTH = 64
"""The tiles' results are padded to a multiple of this number of elements before they are summed: torch sums the
remainder of a width in another order, and the remainder depends on the number of tokens."""

MIN_ROWS = 16
"""Smallest number of rows of a product in exact attention. Measured on a Xeon with AMX: the last bits of fp32 products
over an inner length of 64, 128, 256 and 512 differ below 3, 6, 11 and 16 rows, and are constant from there on."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of some queries: those that all share, then those of their own."""

    key: torch.Tensor  # [G, P, D]; with own keys: the shared ones and the slots that own ones lie in
    value: torch.Tensor  # [G, shared, Dv]
    hidden: torch.Tensor  # [..., T, P] bool
    own: Own | None
    own_value: torch.Tensor  # [G, S, Dv], in which the slots of ``own`` count

    @staticmethod
    def of(key: torch.Tensor, value: torch.Tensor, piece: Piece) -> "Keys":
        """The keys of a piece, from the states [G, S, D] of its row."""
        own, end = piece.own, piece.end if piece.own is None else piece.own.shared
        shared, values = _slots(key, piece.first, end), _slots(value, piece.first, end)
        if own is None:  # products with a cache's own memory, transposed, are slower
            return Keys(shared.contiguous(), values, piece.hidden, None, value)
        keys = torch.cat([shared, _slots(key, own.start, own.stop)], 1)
        return Keys(keys, values, piece.hidden, own, value)

    @staticmethod
    def merged(several: "Sequence[Keys]") -> "Keys":
        """The keys of several chains, as one row with the key heads of all: ``hidden`` [B * G, 1, T, P]."""
        if len(several) == 1:
            return several[0]
        groups, length = len(several[0].key), max(keys.key.shape[1] for keys in several)
        key = torch.cat([_slots(keys.key, 0, length) for keys in several])
        value = torch.cat([_slots(keys.value, 0, length) for keys in several])
        hidden = torch.stack([pad(keys.hidden, (0, length - keys.hidden.shape[1]), value=True) for keys in several])
        return Keys(key, value, hidden.repeat_interleave(groups, 0)[:, None], None, value)

    def block(self, tokens: slice) -> "Keys":
        """The same for some of the queries."""
        own = None if self.own is None else replace(self.own, slots=self.own.slots[tokens])
        return replace(self, own=own, hidden=self.hidden[..., tokens, :])


def _slots(states: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Some slots of [G, S, D]; the last tile may extend past the end of the cache."""
    found = states[:, start:stop]
    missing = stop - start - found.shape[1]
    return pad(found, (0, 0, 0, missing)) if missing else found


def attend_in_tiles(query: torch.Tensor, keys: Keys, scoring: Scoring) -> torch.Tensor:
    """Attention of query [H, T, D], in blocks of tokens whose scores stay in the caches; returns [T, H, Dv]."""
    heads, tokens, _ = query.shape
    groups, _, value_width = keys.own_value.shape
    own_bytes = 0 if keys.own is None else keys.own.slots.shape[1] * groups * value_width * query.element_size()
    block = max(1, MAX_SCORE_BYTES // (heads * keys.hidden.shape[-1] * 4 + own_bytes))
    if tokens <= block:
        return _attend_block(query, keys, scoring)
    output = query.new_empty(tokens, heads, value_width)
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        output[part] = _attend_block(query[:, part], keys.block(part), scoring)
    return output


def _attend_block(query: torch.Tensor, keys: Keys, scoring: Scoring) -> torch.Tensor:
    """One block of query tokens [H, T, D]; returns [T, H, Dv]."""
    heads, tokens, width = query.shape
    groups, whole, wide = keys.value.shape
    shared = heads // groups
    rows = _at_least_min_rows(query.reshape(groups, shared * tokens, width))
    products = torch.matmul(rows, keys.key.transpose(-1, -2))[:, : shared * tokens].view(groups, shared, tokens, -1)
    if keys.own is not None:
        own = (keys.own.slots + (whole - keys.own.start)).expand(groups, shared, -1, -1)
        products = torch.cat([products[..., :whole], products.gather(-1, own)], -1)
    mixed = _mix(scoring.weights(products, keys.hidden), keys)
    return mixed.reshape(heads, tokens, wide).transpose(0, 1)


def _mix(weights: torch.Tensor, keys: Keys) -> torch.Tensor:
    """The sum over tiles of weights [G, H / G, T, P] times values: [G, M, Dv]."""
    groups, shared, tokens, length = weights.shape
    wide, whole, count = keys.value.shape[-1], keys.value.shape[1] // KEY_TILE, length // KEY_TILE
    if count == whole == 1:  # the sum of one tile
        rows = _at_least_min_rows(weights.view(groups, shared * tokens, -1))
        return torch.matmul(rows, keys.value)[:, : shared * tokens]
    tiles = weights.view(groups, shared, tokens, count, KEY_TILE)
    padded = -(-wide // SUM_WIDTH) * SUM_WIDTH
    new = keys.value.new_empty if padded == wide else keys.value.new_zeros
    filled = new(groups, count, shared * tokens, padded)
    mixed = filled[..., :wide]
    if whole:
        _mix_shared(tiles[..., :whole, :].flatten(1, 2), keys.value, mixed[:, :whole])
    if keys.own is not None:
        mixed[:, whole:] = _mix_own(tiles[..., whole:, :], keys.own_value, keys.own.slots)
    return filled.sum(1, dtype=torch.float32)[..., :wide].to(keys.value.dtype)


def _at_least_min_rows(rows: torch.Tensor) -> torch.Tensor:
    """[N, M, K], padded with zeros after its M rows to at least MIN_ROWS rows."""
    missing = MIN_ROWS - rows.shape[1]
    return pad(rows, (0, 0, 0, missing)) if missing > 0 else rows


def _mix_shared(weights: torch.Tensor, value: torch.Tensor, mixed: torch.Tensor) -> None:
    """Multiply weights [G, M, n, 64] by values [G, n * 64, Dv] into ``mixed`` [G, n, M, Dv], each tile separately."""
    groups, rows, count, _ = weights.shape
    if rows < MIN_ROWS:
        weights = pad(weights, (0, 0, 0, 0, 0, MIN_ROWS - rows))
    if count <= groups:  # the variant with fewer products; tiles and heads of a cache cannot form one batch
        for tile in range(count):
            at = slice(tile * KEY_TILE, (tile + 1) * KEY_TILE)
            mixed[:, tile] = torch.matmul(weights[:, :, tile], value[:, at])[:, :rows]
    else:
        for group in range(groups):
            tiles = value[group].reshape(count, KEY_TILE, -1)
            mixed[group] = torch.matmul(weights[group].transpose(0, 1), tiles)[:, :rows]


def _mix_own(weights: torch.Tensor, value: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """Multiply weights [G, H / G, T, n, 64] by the values at each query's slots ``tail`` [T, W]: [G, n, M, Dv]."""
    groups, shared, tokens, count, _ = weights.shape
    own = value.index_select(1, tail.flatten()).view(groups * tokens * count, KEY_TILE, -1)
    rows = weights.permute(0, 2, 3, 1, 4).reshape(groups * tokens * count, shared, KEY_TILE)
    mixed = torch.matmul(_at_least_min_rows(rows), own)[:, :shared]
    return mixed.view(groups, tokens, count, shared, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
