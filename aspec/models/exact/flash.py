"""Exact attention with torch's own kernel: several times faster than separate products.

A piece's keys are attended to in two calls: those that all its queries see, and the rest, of which each query sees its
own ones. The results are joined in fp32. Only numbers of queries run that ``flash_probe.py`` has proven.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from aspec.models.exact.flash_probe import FLASH, Joinable, flash
from aspec.models.exact.known_recipes import recipe_for
from aspec.models.exact.paths import Piece
from aspec.models.exact.recipe import BLOCKS, Recipe
from aspec.models.exact.row_probe import ProductKind
from aspec.models.exact.scoring import Scoring

MAX_COPIED_BYTES = 4 << 20
"""Bytes of the copies of keys and values for the queries of a tree, at once."""


def flash_recipe(key: torch.Tensor, value: torch.Tensor) -> Recipe | None:
    """The proven numbers of queries for keys [B, G, S, D] and values [B, G, S, Dv]; None: do not use the kernel."""
    if not key.is_cpu or key.shape[-1] != value.shape[-1]:
        return None
    _, groups, _, width = key.shape
    recipe = recipe_for(ProductKind(FLASH, key.dtype, groups, width, width, False, False, torch.get_num_threads()))
    return None if recipe == BLOCKS else recipe


@dataclass(frozen=True, slots=True)
class Inputs:
    """A piece, its queries [H, n, D], and the keys and values [G, S, D] of its row."""

    piece: Piece
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def attend_with_flash(several: Sequence[Inputs], scoring: Scoring, recipe: Recipe) -> torch.Tensor:
    """Attention of similar pieces: all with or without ``seen``, equally many queries and other keys; a tree is alone.

    Returns [B, H, n, D].
    """
    (heads, tokens, width), groups = several[0].query.shape, len(several[0].key)
    rows = [own.query.reshape(1, groups, -1, width) for own in several]
    parts = []
    if several[0].piece.seen:
        seen = [_attend_seen(own, query, scoring, recipe) for own, query in zip(several, rows, strict=True)]
        parts.append((_joined([mixed for mixed, _ in seen]), _joined([exponent for _, exponent in seen])))
    if several[0].piece.own is None:
        keys, values = (
            torch.stack([_joined([_slots(states, part) for part in own.piece.rest], 1) for own, states in each])
            for each in ([(own, own.key) for own in several], [(own, own.value) for own in several])
        )
        repeats, dtype = heads // groups, keys.dtype
        num_rows = sum(recipe.blocks(repeats * tokens))
        bias = _joined([own.piece.rest_bias(repeats, num_rows, dtype) for own in several])
        parts.append(_attend(_joined(rows), keys, values, scoring, recipe, bias))
    else:
        parts.append(_attend_own(several[0], scoring, recipe))
    return _join(parts, scoring, tokens).reshape(len(several), heads, tokens, width)


def _attend_seen(own: Inputs, query: torch.Tensor, scoring: Scoring, recipe: Recipe) -> Joinable:
    """Attention of query [1, G, M, D] to the keys that all queries of a piece see."""
    seen = slice(own.piece.seen.start, own.piece.seen.stop)
    return _attend(query, own.key[None, :, seen], own.value[None, :, seen], scoring, recipe)


def _attend_own(own: Inputs, scoring: Scoring, recipe: Recipe) -> Joinable:
    """The rest of a tree's keys: every query is a batch with copies of its own ones."""
    (heads, tokens, width), groups = own.query.shape, len(own.key)
    slots = own.piece.rest_slots  # [n, W]
    query = own.query.view(groups, -1, tokens, width).permute(2, 0, 1, 3)  # [n, G, H / G, D]
    hidden = own.piece.rest_hidden[:, None, None].expand(-1, -1, heads // groups, -1)
    block = max(1, MAX_COPIED_BYTES // (2 * slots.shape[1] * groups * width * query.element_size()))
    made = []
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        keys, values = (_gathered(states, slots[part]) for states in (own.key, own.value))
        bias = keys.new_zeros(hidden[part].shape).masked_fill_(hidden[part], float("-inf"))
        made.append(_attend(query[part], keys, values, scoring, recipe, bias))
    mixed, exponents = (_joined(parts) for parts in zip(*made, strict=True))
    return mixed.permute(1, 2, 0, 3).reshape(1, groups, -1, width), exponents.permute(1, 2, 0).reshape(1, groups, -1)


def _gathered(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[n, G, W, D]: the states [G, S, D] in every query's slots [n, W]."""
    found = states.index_select(1, slots.flatten())
    return found.view(len(states), *slots.shape, -1).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scoring: Scoring,
    recipe: Recipe,
    bias: torch.Tensor | None = None,
) -> Joinable:
    """Attention of query [B, G, M, D] in proven numbers of queries; ``bias`` [B, 1, M or more, S], added to scores."""
    count, start, made = query.shape[2], 0, []
    sizes = recipe.blocks(count)
    if sizes == (count,):
        return flash(query, key, value, scoring.scale, bias)
    for size in sizes:
        rows, own = (None if each is None else each[:, :, start : start + size] for each in (query, bias))
        assert rows is not None
        missing = size - rows.shape[2]
        if missing:
            rows = pad(rows, (0, 0, 0, missing))
        if own is not None and own.shape[2] < size:
            own = pad(own, (0, 0, 0, size - own.shape[2]))
        mixed, exponents = flash(rows, key, value, scoring.scale, own)
        made.append((mixed[:, :, : size - missing], exponents[:, :, : size - missing]))
        start += size
    return _joined([mixed for mixed, _ in made], 2), _joined([exponent for _, exponent in made], 2)


def _join(parts: list[Joinable], scoring: Scoring, tokens: int) -> torch.Tensor:
    """The attention [B, G, M, D] to the keys of all parts and to the sinks."""
    exponents = [exponent for _, exponent in parts]
    if scoring.sinks is not None:
        batch, groups, _ = exponents[0].shape
        sinks = scoring.sinks.float().view(groups, -1).repeat_interleave(tokens, 1)
        exponents.append(sinks.expand(batch, -1, -1))
    elif len(parts) == 1:
        return parts[0][0]
    weights = torch.stack(exponents, -1).softmax(-1)
    total = parts[0][0].float().mul_(weights[..., :1])
    if len(parts) > 1:
        total.add_(parts[1][0].float().mul_(weights[..., 1:2]))
    return total.to(parts[0][0].dtype)


def _slots(states: torch.Tensor, part: range) -> torch.Tensor:
    """Some slots of [G, S, D]; the last tile may extend past the end of the cache."""
    found = states[:, part.start : part.stop]
    missing = len(part) - found.shape[1]
    return pad(found, (0, 0, 0, missing)) if missing else found


def _joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
