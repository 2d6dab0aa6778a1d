"""Exact attention: a token's bits depend on its own path only, not on the other tokens of the pass.

Four rules ensure this:
- Queries are computed in pieces (``paths.py``). Which keys one product has depends on a query's own position only.
- Most keys are whole tiles that all queries of a piece see: torch's kernel attends to them (``flash.py``). Where this
  is not proven or not possible, and for the other keys, products are separate. Then a query's scores are sorted by
  position, in whole tiles, before the softmax. Trailing tiles without a visible position add only zeros.
- Weights and values are multiplied tile by tile, and the results are summed in fp32 in the order of the tiles, because
  a CPU library splits a longer product depending on its length. A tile that is a tree query's own is gathered for it.
- Every product has at least MIN_ROWS rows, because a CPU library uses other kernels for fewer rows. The inner lengths
  (a head's width, a tile) are so short that more rows change no bits, unlike in a layer's other products.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from aspec.models.exact.flash import attend_all, flash_recipe
from aspec.models.exact.scoring import Scoring
from aspec.models.paths import KEY_TILE, Own, Paths, Piece

MAX_SCORE_BYTES = 1 << 20
"""Bytes of fp32 scores in one block of query tokens on a CPU, which stays in the caches: measured, ms of 512 tokens
over 2,048 keys in blocks of 32 / 64 / 128 / 512 tokens: 28 / 33 / 32 / 50."""

MAX_GROUP_BYTES = 4 << 20
"""Bytes of scores, keys and values of the pieces that an exact step attends to together."""

SUM_WIDTH = 64
"""The tiles' results are padded to a multiple of this number of elements before they are summed: torch sums the
remainder of a width in another order, and the remainder depends on the number of tokens."""

MIN_ROWS = 16
"""Smallest number of rows of a product in exact attention. Measured on a Xeon with AMX: the last bits of fp32 products
over an inner length of 64, 128, 256 and 512 differ below 3, 6, 11 and 16 rows, and are constant from there on."""

RowPiece = tuple[int, Piece]
"""A row's number and a piece of its queries."""


def attend_exactly(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: tuple[Paths, ...],
    scoring: Scoring,
) -> None:
    """Write an exact step to ``output`` [B, T, H, Dv]. Similar pieces run as the heads of one wide row."""
    heads, groups = query.shape[1], key.shape[1]
    recipe = flash_recipe(key, value) if scoring.softcap is None else None
    pieces = [(row, piece) for row, own in enumerate(paths) for piece in own.pieces]
    if recipe is None:
        pieces = [(row, replace(piece, seen=range(0))) for row, piece in pieces]
    slot_bytes = groups * (key.shape[-1] + value.shape[-1]) * key.element_size()
    for group in _groups(pieces, heads, slot_bytes):
        queries, befores, rests = [], [], []
        for row, piece in group:
            own_query, own_key, own_value = query[row][:, piece.tokens], key[row], value[row]
            if piece.path is not None:
                own_key, own_value = own_key[:, piece.path], own_value[:, piece.path]
            if piece.seen and recipe is not None:
                seen = slice(piece.seen.start, piece.seen.stop)
                befores.append(attend_all(own_query, own_key[:, seen], own_value[:, seen], scoring.scale, recipe))
            queries.append(own_query)
            rests.append(_rest_of(own_key, own_value, piece))
        before = _joined(befores) if befores else None
        mixed = _attend_in_blocks(_joined(queries), _merge(rests), scoring.repeated(len(group)), before)
        for at, (row, piece) in enumerate(group):
            output[row, piece.tokens] = mixed[:, at * heads : (at + 1) * heads]


def _groups(pieces: list[RowPiece], heads: int, slot_bytes: int) -> Iterator[list[RowPiece]]:
    """Pieces to attend to together: of as many queries, and up to 1.5 times as many keys as the shortest, within
    MAX_GROUP_BYTES. A piece whose queries have own keys is alone."""

    def likeness(piece: Piece) -> tuple[bool, int, bool, int]:
        return piece.own is not None, piece.hidden.shape[0], bool(piece.seen), sum(map(len, piece.rest))

    together: list[RowPiece] = []
    shortest: tuple[bool, int, bool, int] = False, 0, False, 0
    for kind, (row, piece) in sorted(((likeness(own[1]), own) for own in pieces), key=lambda found: found[0]):
        *same, length = kind
        nbytes = (len(together) + 1) * length * (heads * kind[1] * 4 + slot_bytes)
        fits = nbytes <= MAX_GROUP_BYTES and length <= 1.5 * shortest[-1]
        if together and (kind[0] or same != [*shortest[:-1]] or not fits):
            yield together
            together = []
        shortest = shortest if together else kind
        together.append((row, piece))
    if together:
        yield together


def _joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


@dataclass(frozen=True, slots=True)
class _Rest:
    """Keys of which each query has its own scores: those that all queries share, then those of their own."""

    key: torch.Tensor  # [G, P, D]; with own keys: the shared ones and the slots that own ones lie in
    value: torch.Tensor  # [G, shared, Dv]
    hidden: torch.Tensor  # [..., T, P] bool
    own: Own | None  # its slots count from the start of ``own_value``
    own_value: torch.Tensor  # [G, S, Dv]

    def block(self, tokens: slice) -> "_Rest":
        """The same for some of the queries."""
        own = None if self.own is None else replace(self.own, slots=self.own.slots[tokens])
        return replace(self, own=own, hidden=self.hidden[..., tokens, :])


def _rest_of(key: torch.Tensor, value: torch.Tensor, piece: Piece) -> _Rest:
    """The keys [G, S, D] and values of a row that a piece attends to in separate products."""
    parts, own = piece.rest, piece.own
    hidden = _joined([piece.hidden[:, part.start - piece.first : part.stop - piece.first] for part in parts], 1)
    if own is not None:
        parts = [part for part in (range(part.start, min(part.stop, own.shared)) for part in parts) if part]
    shared = [[_slots(states, part) for part in parts] for states in (key, value)]
    if own is None:
        return _Rest(_joined(shared[0], 1).contiguous(), _joined(shared[1], 1), hidden, None, value)
    keys = torch.cat([*shared[0], _slots(key, range(own.start, own.stop))], 1)
    return _Rest(keys, torch.cat([value[:, :0], *shared[1]], 1), hidden, own, value)


def _slots(states: torch.Tensor, part: range) -> torch.Tensor:
    """Some slots of [G, S, D]; the last tile may extend past the end of the cache."""
    found = states[:, part.start : part.stop]
    missing = len(part) - found.shape[1]
    return pad(found, (0, 0, 0, missing)) if missing else found


def _merge(rests: list[_Rest]) -> _Rest:
    """Several chains as one row with the key heads of all: ``hidden`` [B * G, 1, T, P]."""
    if len(rests) == 1:
        return rests[0]
    groups, length = len(rests[0].key), max(rest.key.shape[1] for rest in rests)
    key, value = (
        torch.cat([_slots(states, range(length)) for states in each])
        for each in ([rest.key for rest in rests], [rest.value for rest in rests])
    )
    hidden = torch.stack([pad(rest.hidden, (0, length - rest.hidden.shape[1]), value=True) for rest in rests])
    return _Rest(key, value, hidden.repeat_interleave(groups, 0)[:, None], None, value)


def _attend_in_blocks(query: torch.Tensor, rest: _Rest, scoring: Scoring, before: torch.Tensor | None) -> torch.Tensor:
    """``_attend_rest`` in blocks of query tokens whose scores stay in the caches."""
    heads, tokens, _ = query.shape
    groups, _, value_width = rest.own_value.shape
    own_bytes = 0 if rest.own is None else rest.own.slots.shape[1] * groups * value_width * query.element_size()
    block = max(1, MAX_SCORE_BYTES // (heads * rest.hidden.shape[-1] * 4 + own_bytes))
    if tokens <= block:
        return _attend_rest(query, rest, scoring, before)
    output = query.new_empty(tokens, heads, value_width)
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        own_before = None if before is None else before[:, part]
        output[part] = _attend_rest(query[:, part], rest.block(part), scoring, own_before)
    return output


def _attend_rest(query: torch.Tensor, rest: _Rest, scoring: Scoring, before: torch.Tensor | None) -> torch.Tensor:
    """Attention of query [H, T, D] to separate keys, joined with ``before`` [H, T, Dv + 1]; returns [T, H, Dv]."""
    heads, tokens, width = query.shape
    groups, count, wide = rest.value.shape
    shared = heads // groups
    rows = _at_least_min_rows(query.reshape(groups, shared * tokens, width))
    products = torch.matmul(rows, rest.key.transpose(-1, -2))[:, : shared * tokens].view(groups, shared, tokens, -1)
    if rest.own is not None:
        own = (rest.own.slots + (count - rest.own.start)).expand(groups, shared, -1, -1)
        products = torch.cat([products[..., :count], products.gather(-1, own)], -1)
    if before is None:
        weights = scoring.weights(products, rest.hidden)
        return _mix(weights, rest).to(query.dtype).view(heads, tokens, wide).transpose(0, 1)
    exponent = before[..., -1:].view(groups, shared, tokens, 1)
    weights, beside = scoring.weights_beside(products, rest.hidden, exponent)
    mixed = _mix(weights, rest).view(heads, tokens, wide)
    mixed = mixed + before[..., :-1] * beside.reshape(heads, tokens, 1)
    return mixed.to(query.dtype).transpose(0, 1)


def _mix(weights: torch.Tensor, rest: _Rest) -> torch.Tensor:
    """The sum over tiles of weights [G, H / G, T, P] times values: [G, M, Dv], in fp32 if there are several tiles."""
    groups, shared, tokens, length = weights.shape
    wide, whole, count = rest.value.shape[-1], rest.value.shape[1] // KEY_TILE, length // KEY_TILE
    if count == whole == 1:
        return torch.matmul(_at_least_min_rows(weights.view(groups, shared * tokens, -1)), rest.value)[
            :, : shared * tokens
        ].contiguous()
    tiles = weights.view(groups, shared, tokens, count, KEY_TILE)
    padded = -(-wide // SUM_WIDTH) * SUM_WIDTH
    new = rest.value.new_empty if padded == wide else rest.value.new_zeros
    filled = new(groups, count, shared * tokens, padded)
    mixed = filled[..., :wide]
    if whole:
        _mix_shared(tiles[..., :whole, :].flatten(1, 2), rest.value, mixed[:, :whole])
    if rest.own is not None:
        mixed[:, whole:] = _mix_own(tiles[..., whole:, :], rest.own_value, rest.own.slots)
    return filled.sum(1, dtype=torch.float32)[..., :wide].contiguous()


def _at_least_min_rows(rows: torch.Tensor) -> torch.Tensor:
    """[N, M, K], padded with zeros after its M rows to at least MIN_ROWS rows."""
    missing = MIN_ROWS - rows.shape[1]
    return pad(rows, (0, 0, 0, missing)) if missing > 0 else rows


def _mix_shared(weights: torch.Tensor, value: torch.Tensor, mixed: torch.Tensor) -> None:
    """Multiply weights [G, M, n, 64] by values [G, n * 64, Dv] into ``mixed`` [G, n, M, Dv], each tile separately."""
    groups, rows, count, _ = weights.shape
    weights = _at_least_min_rows(weights.transpose(1, 2).flatten(0, 1)).view(groups, count, -1, KEY_TILE)
    if count <= groups or value.is_contiguous():
        tiles = value.reshape(groups * count, KEY_TILE, -1)
        mixed.copy_(torch.bmm(weights.flatten(0, 1), tiles).view(groups, count, -1, tiles.shape[-1])[:, :, :rows])
        return
    for group in range(groups):  # tiles and heads of a cache cannot form one batch
        tiles = value[group].reshape(count, KEY_TILE, -1)
        mixed[group] = torch.bmm(weights[group], tiles)[:, :rows]


def _mix_own(weights: torch.Tensor, value: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """Multiply weights [G, H / G, T, n, 64] by the values at each query's slots ``tail`` [T, W]: [G, n, M, Dv]."""
    groups, shared, tokens, count, _ = weights.shape
    own = value[:, tail.flatten()].reshape(groups * tokens * count, KEY_TILE, -1)
    rows = weights.permute(0, 2, 3, 1, 4).reshape(groups * tokens * count, shared, KEY_TILE)
    mixed = torch.matmul(_at_least_min_rows(rows), own)[:, :shared]
    return mixed.view(groups, tokens, count, shared, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
