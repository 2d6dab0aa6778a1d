"""aspec's attention: grouped-query products under an explicit bool mask, softmax in fp32.

It is registered with transformers under the name "aspec", for attention and for masks: transformers gives no mask,
without a warning, to a function that has no mask function. It supports soft caps, attention sinks and value heads of
another width. On a CPU it is several times faster than masked sdpa, which repeats the keys per query head.

An exact step (``KVCache.exact``) has ``Paths`` instead of a mask. A token's bits then depend on its own path only, not
on the other tokens of the pass. Three rules ensure this:
- A query's scores are sorted by position, in whole tiles, before the softmax. Trailing tiles without a visible
  position add only zeros.
- Weights and values are multiplied tile by tile, and the results are summed in fp32 in the order of the tiles, because
  a CPU library splits a longer product depending on its length. A tile that is a tree query's own is gathered for it.
- Every product has at least MIN_ROWS rows, because a CPU library uses other kernels for fewer rows. The inner lengths
  (a head's width, a tile) are so short that more rows change no bits, unlike in a layer's other products.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import handle_torch_function, has_torch_function_unary
from transformers import AttentionInterface, AttentionMaskInterface

from aspec.models.hf_compat import sdpa_mask
from aspec.models.kv_cache import KEY_TILE, Paths

NAME = "aspec"
MAX_SCORE_BYTES, DEVICE_SCORE_BYTES = 1 << 20, 64 << 20
"""Bytes of fp32 scores in one block of query tokens, on a CPU and on a device. On a CPU a block stays in the
caches: measured, ms of 512 tokens over 2,048 keys in blocks of 32 / 64 / 128 / 512 tokens: 28 / 33 / 32 / 50. A device
is faster with fewer launches."""

MAX_GROUP_BYTES = 4 << 20
"""Bytes of scores, keys and values of the rows that an exact step attends to together."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | tuple[Paths, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, T, D] over key [B, G, S, D] and value [B, G, S, Dv]; returns [B, T, H, Dv].

    ``attention_mask`` is bool [B, 1, T, S], True where visible, and every query sees at least one key; in an exact
    step it is the paths of every row.
    ``s_aux`` [H]: a learned logit per head that takes part in the softmax and adds no value (attention sink).
    ``out`` [B, T, H, Dv] receives the result; None: new memory.
    The function holds about ``temporary_bytes`` besides the result while it runs. A torch function mode can intercept
    it like torch's own functions (``split_layer.py``).
    """
    if has_torch_function_unary(query):
        arguments = (module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux)
        result: tuple[torch.Tensor, None] = handle_torch_function(attend, (query,), *arguments)
        return result
    batch, heads, tokens, width = query.shape
    scoring = _Scoring(width**-0.5 if scaling is None else scaling, softcap, s_aux)
    output = query.new_empty(batch, tokens, heads, value.shape[-1]) if out is None else out
    if isinstance(attention_mask, tuple):
        _attend_exactly(output, query, key, value, attention_mask, scoring)
        return output, None
    if scoring.plain and query.is_cpu and width == value.shape[-1]:
        mixed = scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scoring.scale, enable_gqa=heads != key.shape[1]
        )
        return output.copy_(mixed.transpose(1, 2)), None
    block = _block_tokens(batch * heads * key.shape[2], MAX_SCORE_BYTES if query.is_cpu else DEVICE_SCORE_BYTES)
    for start in range(0, tokens, block):
        stop = min(tokens, start + block)
        mask = attention_mask[:, :, start:stop]
        output[:, start:stop] = _attend_block(query[:, :, start:stop], key, value, mask, scoring)
    return output, None


def temporary_bytes(batch: int, heads: int, tokens: int, length: int, max_bytes: int = MAX_SCORE_BYTES) -> int:
    """Bytes that ``attend`` holds for T = ``tokens`` and S = ``length``: scores, weights, and a cast of one of them.

    ``max_bytes``: bytes of scores in one block of query tokens.
    """
    return 3 * min(tokens, _block_tokens(batch * heads * length, max_bytes)) * batch * heads * length * 4


def temporary_bytes_exact(batch: int, heads: int, tokens: int, length: int, slot_bytes: int) -> int:
    """Bytes that ``attend`` holds in an exact step of ``batch`` rows with ``tokens`` tokens in total.

    ``slot_bytes``: bytes of keys and values in one slot. Besides scores, weights and a cast, an exact step holds the
    scores in a second order, or the result of every tile, and a copy of a row's keys. Rows run one after another, or
    several together with copies of their keys and values.
    """
    together = min(MAX_GROUP_BYTES, length * (heads * tokens * 4 + batch * slot_bytes)) if batch > 1 else 0
    return max(temporary_bytes(1, heads, tokens, length), 3 * together) * 4 // 3 + length * slot_bytes


def _block_tokens(scores_per_token: int, max_bytes: int) -> int:
    """Number of query tokens in one block of scores."""
    return max(1, max_bytes // (scores_per_token * 4))


SUM_WIDTH = 64
"""The tiles' results are padded to a multiple of this number of elements before they are summed: torch sums the
remainder of a width in another order, and the remainder depends on the number of tokens."""

MIN_ROWS = 16
"""Smallest number of rows of a product in exact attention. Measured on a Xeon with AMX: the last bits of fp32 products
over an inner length of 64, 128, 256 and 512 differ below 3, 6, 11 and 16 rows, and are constant from there on."""


@dataclass(frozen=True, slots=True)
class _Scoring:
    """How products of queries and keys become weights."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None  # [H]

    def repeated(self, count: int) -> "_Scoring":
        """The same scoring for the heads of ``count`` rows."""
        return replace(self, sinks=None if self.sinks is None else self.sinks.repeat(count))

    @property
    def plain(self) -> bool:
        """Whether weights are a softmax of the scaled products and nothing else."""
        return self.softcap is None and self.sinks is None

    def weights(self, products: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Softmax in fp32 of [..., G, H / G, T, S] without the ``hidden`` keys (broadcast), in the products' dtype.

        It overwrites ``products``. Plain weights are scaled in the products' own dtype, as transformers does it: half
        the memory traffic of fp32 scores.
        """
        if self.plain:
            scaled = products if self.scale == 1.0 else products.mul_(self.scale)
            return scaled.masked_fill_(hidden, float("-inf")).softmax(-1)
        scores = products.float().mul_(self.scale)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        scores.masked_fill_(hidden, float("-inf"))
        if self.sinks is not None:
            groups, shared = scores.shape[-4:-2]
            sinks = self.sinks.float().view(groups, shared, 1, 1).expand(*scores.shape[:-1], 1)
            return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(products.dtype)
        return scores.softmax(-1).to(products.dtype)


def _attend_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scoring: _Scoring
) -> torch.Tensor:
    """One block of query tokens; returns [B, T, H, Dv]."""
    batch, heads, tokens, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    shared = heads // groups
    grouped = query.reshape(batch, groups, shared * tokens, width)
    products = torch.matmul(grouped, key.transpose(-1, -2)).view(batch, groups, shared, tokens, length)
    weights = scoring.weights(products, ~mask[:, :, None])
    mixed = torch.matmul(weights.reshape(batch, groups, shared * tokens, length), value)
    return mixed.view(batch, heads, tokens, value.shape[-1]).transpose(1, 2)


def _attend_exactly(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: tuple[Paths, ...],
    scoring: _Scoring,
) -> None:
    """Write an exact step to ``output`` [B, T, H, Dv]. Chains of similar length run as the heads of one wide row."""
    _, heads, tokens, _ = query.shape
    groups, width = key.shape[1], key.shape[-1] + value.shape[-1]
    for rows in _row_groups(paths, heads * tokens * 4 + groups * width * key.element_size()):
        if len(rows) == 1:
            (row,) = rows
            output[row] = _attend_row(query[row], key[row], value[row], paths[row], scoring)
            continue
        merged = _merge_chains([paths[row] for row in rows], groups)
        keys, values = (torch.cat([states[row, :, : merged.num_slots] for row in rows]) for states in (key, value))
        mixed = _attend_row(query[rows].flatten(0, 1), keys, values, merged, scoring.repeated(len(rows)))
        output[rows] = mixed.view(tokens, len(rows), heads, -1).transpose(0, 1)


def _row_groups(paths: tuple[Paths, ...], bytes_per_slot: int) -> Iterator[list[int]]:
    """Rows to attend together: chains up to 1.5 times as long as the shortest, within MAX_GROUP_BYTES; a tree alone."""
    together: list[int] = []
    for row in sorted(range(len(paths)), key=lambda row: (paths[row].tail is None, paths[row].num_slots)):
        length = paths[row].num_slots
        fits = (len(together) + 1) * length * bytes_per_slot <= MAX_GROUP_BYTES
        if together and not (fits and paths[row].tail is None and length <= 1.5 * paths[together[0]].num_slots):
            yield together
            together = []
        together.append(row)
        if paths[row].tail is not None:
            yield together
            together = []
    if together:
        yield together


def _merge_chains(paths: list[Paths], groups: int) -> Paths:
    """Several chains as one row with ``groups`` key heads per chain: ``hidden`` [B * G, 1, T, P]."""
    length = paths[-1].num_slots  # the longest
    hidden = torch.stack([pad(own.hidden, (0, length - own.prefix), value=True) for own in paths])
    return Paths(length, length, None, hidden.repeat_interleave(groups, 0)[:, None])


def _attend_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, paths: Paths, scoring: _Scoring
) -> torch.Tensor:
    """One row of an exact step: query [H, T, D], key [G, S, D], value [G, S, Dv]; returns [T, H, Dv]."""
    heads, tokens, _ = query.shape
    groups, length, value_width = value.shape
    if paths.num_slots > length:  # the last tile extends past the end of the cache
        key, value = (pad(states, (0, 0, 0, paths.num_slots - length)) for states in (key, value))
    tail_bytes = 0 if paths.tail is None else paths.tail.shape[1] * groups * value_width * value.element_size()
    key = key[:, : paths.num_slots].contiguous()  # products with a cache's own memory, transposed, are slower
    block = max(1, MAX_SCORE_BYTES // (heads * paths.hidden.shape[-1] * 4 + tail_bytes))
    if tokens <= block:
        return _attend_paths(query, key, value, paths, scoring)
    output = query.new_empty(tokens, heads, value_width)
    for start in range(0, tokens, block):
        own = slice(start, start + block)
        tail = None if paths.tail is None else paths.tail[own]
        part = replace(paths, tail=tail, hidden=paths.hidden[..., own, :])
        output[own] = _attend_paths(query[:, own], key, value, part, scoring)
    return output


def _attend_paths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, paths: Paths, scoring: _Scoring
) -> torch.Tensor:
    """One block of query tokens of a row of an exact step: query [H, T, D], key [G, num_slots, D], value [G, S, Dv]."""
    heads, tokens, width = query.shape
    groups, prefix = key.shape[0], paths.prefix
    shared = heads // groups
    rows = _at_least_min_rows(query.reshape(groups, shared * tokens, width))
    products = torch.matmul(rows, key.transpose(-1, -2))[:, : shared * tokens].view(groups, shared, tokens, -1)
    if paths.tail is not None:
        own = paths.tail.expand(groups, shared, -1, -1)
        products = torch.cat([products[..., :prefix], products.gather(-1, own)], -1)
    weights = scoring.weights(products, paths.hidden)
    tiles = weights.view(groups, shared, tokens, -1, KEY_TILE)  # [G, H / G, T, P / 64, 64]
    wide, whole = value.shape[-1], prefix // KEY_TILE
    if tiles.shape[3] == 1 and whole == 1:  # the sum of one tile
        mixed = torch.matmul(_at_least_min_rows(weights.view(groups, shared * tokens, -1)), value[:, :KEY_TILE])
        return mixed[:, : shared * tokens].reshape(heads, tokens, wide).transpose(0, 1)
    padded = -(-wide // SUM_WIDTH) * SUM_WIDTH
    new = value.new_empty if padded == wide else value.new_zeros
    filled = new(groups, tiles.shape[3], shared * tokens, padded)
    mixed = filled[..., :wide]
    _mix_shared(tiles[..., :whole, :].flatten(1, 2), value[:, :prefix], mixed[:, :whole])
    if paths.tail is not None:
        mixed[:, whole:] = _mix_own(tiles[..., whole:, :], value, paths.tail)
    summed = filled.sum(1, dtype=torch.float32)[..., :wide]
    return summed.to(value.dtype).reshape(heads, tokens, wide).transpose(0, 1)


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
    own = value[:, tail.flatten()].reshape(groups * tokens * count, KEY_TILE, -1)
    rows = weights.permute(0, 2, 3, 1, 4).reshape(groups * tokens * count, shared, KEY_TILE)
    mixed = torch.matmul(_at_least_min_rows(rows), own)[:, :shared]
    return mixed.view(groups, tokens, count, shared, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
