"""Attention by a kernel that is compiled on this machine, see ``compiled/attention.py``, and its proof.

The kernel reads records: for a few rows (a head's query each) that share keys, where all their operands are. They
follow from the paths, so those of a few queries are made once for all layers of a step.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from aspec.io.host_info import compiler
from aspec.models.compiled.products import attention
from aspec.models.compiled.shapes import HIDDEN, RECORD, ROWS
from aspec.models.exact.paths import MaskKind, Paths
from aspec.models.exact.recipe import COMPILED, Recipe
from aspec.models.exact.row_probe import ProductKind, share_of_seconds
from aspec.models.exact.scoring import Scoring

ATTENTION = "attention"  # the operation's name in a ProductKind: ``batch`` key heads, widths of values and keys
OTHERWISE = Recipe(1, 1)
"""Of widths for which other ways are faster, or the kernel is not proven."""

VECTOR = 16  # widths are multiples: of every number of lanes
BLOCK_TOKENS = 256  # of a row that records tell of at once
ALL = 1 << 40  # positions: no slot is told
TIMED = ((1, 320), (8, 320), (128, 768))  # queries and keys of calls that are timed
MANY, FEW = (256, 768), 64  # a call of a prompt; queries up to which kernels are used where it is slower
FASTER = 1.0  # compiled attention is used if it takes at most this share of the seconds, in the geometric mean
HEADS = 3  # of a key head, in the proof: not the rows of a record
TOLERANCE = 2**-7
NO_SINK = torch.tensor([HIDDEN])


class Layout(NamedTuple):
    """Where the operands of a call lie: strides in elements."""

    query: tuple[int, ...]  # of [B, H, T, D]
    key: tuple[int, ...]  # of [B, G, S, D]
    value: tuple[int, ...]
    made: tuple[int, ...]  # of [B, T, H, Dv]
    heads: int
    groups: int
    first: int  # token of the block
    tokens: int
    sinks: bool
    threads: int
    rows: tuple[int, ...]  # of keys and values, for each of the step's


def attend_compiled(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: tuple[Paths, ...],
    scoring: Scoring,
) -> None:
    """Write a step of query [B, H, T, D] to ``output`` [B, T, H, Dv], a block of tokens at a time."""
    heads, tokens = query.shape[1:3]
    sinks = _sinks(scoring.sinks)
    strides = query.stride(), key.stride(), value.stride(), output.stride()
    for first in range(0, tokens, BLOCK_TOKENS):
        size = min(BLOCK_TOKENS, tokens - first)
        threads = torch.get_num_threads()
        sinks_too, rows = scoring.sinks is not None, tuple(range(len(query)))
        layout = Layout(*strides, heads, key.shape[1], first, size, sinks_too, threads, rows)
        records, slots = told(paths, layout)
        attention(query, key, value, slots, sinks, records, scoring.scale, output)


def told(paths: Sequence[Paths], layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Records, int64 [items, RECORD], and the slots that they tell, int64; kept for all layers while they are few."""
    return paths[0].kept(layout, lambda: _records(paths, layout))


def _sinks(sinks: torch.Tensor | None) -> torch.Tensor:
    """fp32: the sinks of all heads, or that there is none."""
    return NO_SINK if sinks is None else sinks.float().contiguous()


def _records(paths: Sequence[Paths], layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """The records of a block, int64 [items, RECORD], and the slots that they tell, int64."""
    made, slots, told = [], [torch.zeros(1, dtype=torch.long)], 1
    for row, own in enumerate(paths):
        made.append(_records_of(row, own, layout, told))
        if own.tail is not None:
            slots.append(own.tail[layout.first : layout.first + layout.tokens].flatten())
            told += slots[-1].numel()
    whole = np.concatenate(made)
    shared = np.concatenate([np.arange(start, len(whole), layout.threads) for start in range(layout.threads)])
    return torch.from_numpy(whole[shared]), torch.cat(slots)


def _records_of(row: int, own: Paths, layout: Layout, told: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """The records of one row; ``told``: where its slots begin."""
    per_group = layout.heads // layout.groups
    positions = np.array(own.positions[layout.first : layout.first + layout.tokens], dtype=np.int64)
    starts = np.array([own.kind.first(int(position)) for position in positions], dtype=np.int64)
    together = len(positions) if own.tail is None else 1  # tokens that share their keys
    token, head = (
        np.ascontiguousarray(grid.reshape(layout.groups, len(positions) // together, together * per_group))
        for grid in np.broadcast_arrays(
            np.arange(len(positions))[None, :, None],
            np.arange(layout.heads).reshape(layout.groups, 1, per_group),
        )
    )
    missing = -token.shape[2] % ROWS
    real = np.pad(np.ones_like(token), ((0, 0), (0, 0), (0, missing)))
    token, head = (np.pad(own_grid, ((0, 0), (0, 0), (0, missing)), mode="edge") for own_grid in (token, head))
    made = np.where(real, row * layout.made[0] + (layout.first + token) * layout.made[1] + head * layout.made[2], -1)
    columns = (
        row * layout.query[0] + (layout.first + token) * layout.query[2] + head * layout.query[1],
        made,
        head if layout.sinks else np.zeros_like(head),
        starts[token],
        positions[token],
    )
    rows = np.stack([column.reshape(-1, ROWS) for column in columns], 1).reshape(-1, 5 * ROWS)
    items = token.shape[2] // ROWS  # of tokens that share their keys
    group = np.repeat(np.arange(layout.groups), len(rows) // layout.groups)
    shared = np.zeros((len(rows), RECORD - 5 * ROWS), dtype=np.int64)
    shared[:, 0] = layout.rows[row] * layout.key[0] + group * layout.key[1]
    shared[:, 1] = layout.rows[row] * layout.value[0] + group * layout.value[1]
    shared[:, 2] = ALL
    if own.tail is not None:
        place = np.tile(np.repeat(np.arange(len(positions)), items), layout.groups)
        shared[:, 2], shared[:, 3] = own.prefix, told + place * own.tail.shape[1]
    return np.concatenate([rows, shared], 1)


# -- the proof -----------------------------------------------------------------------------------------------


def attention_kind(key: torch.Tensor, value: torch.Tensor) -> ProductKind:
    """The kind of attention to keys [B, G, S, D] and values [B, G, S, Dv]."""
    widths = value.shape[-1], key.shape[-1]
    return ProductKind(ATTENTION, key.dtype, key.shape[1], *widths, False, False, torch.get_num_threads())


@torch.inference_mode()
def probe_attention(kind: ProductKind) -> Recipe:
    """COMPILED where the kernel is faster than the other ways and proven. Takes about a second.

    ``highest``: the most queries of a row for which it is used in steps that are not exact.
    """
    fits = kind.dtype == torch.bfloat16 and kind.out % VECTOR == 0 and kind.inner % VECTOR == 0
    if not fits or not compiler():
        return OTHERWISE
    try:
        if not _holds(kind) or _share(kind, TIMED) > FASTER:
            return OTHERWISE
        return COMPILED if _share(kind, [MANY]) <= FASTER else replace(COMPILED, highest=FEW)
    except (ImportError, OSError, RuntimeError):  # a build of the package that this machine can not use
        return OTHERWISE


def _share(kind: ProductKind, sizes: Sequence[tuple[int, int]]) -> float:
    """The seconds of compiled attention, as a share of those of torch's own, which is not exact."""

    pairs = []
    for given in (_operands(kind, *size) for size in sizes):
        _, query, key, value, (chain,), scoring = given
        seen, scale = ~chain.hidden, scoring.scale
        other = partial(scaled_dot_product_attention, query, key, value, seen, scale=scale, enable_gqa=True)
        pairs.append((partial(attend_compiled, *given), other))
    return share_of_seconds(pairs)


Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[Paths, ...], Scoring]
"""The arguments of ``attend_compiled``."""


def _operands(kind: ProductKind, queries: int, keys: int) -> Given:
    """A chain of queries after the other keys, and memory for its result."""
    generator = torch.Generator().manual_seed(5)
    heads, room = HEADS * kind.batch, -(-keys // 128) * 128

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(kind.dtype)

    positions = list(range(keys - queries, keys))
    paths = Paths(MaskKind(), positions, room, room, None)
    key, value = random(1, kind.batch, room, kind.inner), random(1, kind.batch, room, kind.out)
    made = torch.empty(1, queries, heads, kind.out, dtype=kind.dtype)
    return made, random(1, heads, queries, kind.inner), key, value, (paths,), Scoring(kind.inner**-0.5, None, None)


def _holds(kind: ProductKind) -> bool:
    """Whether results are close to those in fp32, and a query has the same bits alone, in a chain and in a tree."""
    made, query, key, value, (chain,), scoring = _operands(kind, 70, 200)
    attend_compiled(made, query, key, value, (chain,), scoring)
    scores = query.float() @ key.float().repeat_interleave(HEADS, 1).mT * scoring.scale
    weights = scores.masked_fill(chain.hidden, float("-inf")).softmax(-1)
    exact = (weights @ value.float().repeat_interleave(HEADS, 1)).transpose(1, 2)
    if not bool(((made.float() - exact).abs() <= TOLERANCE * (exact.abs() + 1.0)).all()):
        return False
    for token in (0, 1, 33, 69):
        alone = made.new_empty(1, 1, *made.shape[2:])
        one = replace(chain, positions=chain.positions[token : token + 1])
        attend_compiled(alone, query[:, :, token : token + 1], key, value, (one,), scoring)
        if not torch.equal(alone[:, 0], made[:, token]):
            return False
    shuffled = torch.randperm(72, generator=torch.Generator().manual_seed(3)) + 128
    moved_key, moved_value = (states.index_copy(2, shuffled, states[:, :, 128:200]) for states in (key, value))
    tree = replace(chain, prefix=128, tail=shuffled.expand(70, -1).contiguous(), num_slots=200)
    again = torch.empty_like(made)
    attend_compiled(again, query, moved_key, moved_value, (tree,), scoring)
    return torch.equal(again, made)
