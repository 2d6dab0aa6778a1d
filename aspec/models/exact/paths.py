"""Which keys every query of a step sees, in the order of their positions, and how queries of exact steps are split.

Queries are computed in pieces: the tokens of a row whose positions lie in the same tile. All limits of a piece follow
from this tile, so a token's product has the same lengths in every step that computes it.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

KEY_TILE = 64
"""Slots in a tile. Attention runs over whole tiles: a CPU library compiles and keeps a kernel for every new length of a
product, so fewer lengths save time and memory. Exact attention sums tile by tile."""

PIECE = 128
"""Positions of a piece. Longer pieces run faster in a prompt, shorter ones have fewer keys that not all queries see.
Measured, ms of a layer with 9 heads, 3 of keys, for 2,000 tokens in pieces of 64 / 128: 36 / 32."""

MOST_KEPT_BYTES = 16 << 10
"""Of what is kept of a few queries for the layers to come: making it costs more than its work."""

MOST_TOLD_BYTES = 1 << 20
"""Of what kernels are told of the paths of a step: less than the plan has for attention in the other ways."""


@dataclass(frozen=True, slots=True)
class MaskKind:
    """Limits which earlier positions a query may see, in addition to causality."""

    window: int | None = None  # only the last ``window`` positions
    chunk: int | None = None  # only positions of the same chunk of this size

    def narrow(self, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """``visible`` without the positions that this kind excludes; the three tensors are broadcast together."""
        if self.window is not None:
            visible = visible & (query - key < self.window)
        if self.chunk is not None:
            visible = visible & (query // self.chunk == key // self.chunk)
        return visible

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Bool: whether a query at position ``query`` may see a key at position ``key``; both are broadcast."""
        return self.narrow(query, key, key <= query)

    def first(self, query: int) -> int:
        """The first position that a query at position ``query`` may see."""
        by_window = 0 if self.window is None else query + 1 - self.window
        by_chunk = 0 if self.chunk is None else query // self.chunk * self.chunk
        return max(0, by_window, by_chunk)


@dataclass(frozen=True)
class Paths:
    """What the queries of one row see: its keys in the order of their positions, as in plain decoding.

    For every query, positions below ``prefix`` are in the slots of the same number. After them each query of a tree has
    its own path: ``tail`` [T, W] int64 is the slot of position ``prefix + w``. All three lengths are whole tiles. A
    chain has only a prefix and no tail.
    """

    kind: MaskKind
    positions: list[int]  # of every query
    num_slots: int  # slots of the row up to its last node, in whole tiles
    prefix: int
    tail: torch.Tensor | None
    device: torch.device | None = None

    @cached_property
    def hidden(self) -> torch.Tensor:
        """Bool [T, P], True where a query does not see a position; P = prefix + W."""
        length = self.prefix + (0 if self.tail is None else self.tail.shape[1])
        queries = torch.tensor(self.positions, device=self.device)[:, None]
        return ~self.kind.visible(queries, torch.arange(length, device=self.device))

    def kept(
        self, layout: Hashable, make: "Callable[[], tuple[torch.Tensor, torch.Tensor]]"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``make`` returns for a layout: kept for the layers to come while all together is small."""
        found = self._kept.get(layout)
        if found is None:
            found = make()
            if sum(own.nbytes for told in (found, *self._kept.values()) for own in told) <= MOST_TOLD_BYTES:
                self._kept[layout] = found
        return found

    @cached_property
    def _kept(self) -> "dict[Hashable, Told]":
        return {}

    @cached_property
    def pieces(self) -> "tuple[Piece, ...]":
        """The queries, split by the tile of their position."""
        tiles: dict[int, list[int]] = {}
        for token, position in enumerate(self.positions):
            tiles.setdefault(position // PIECE, []).append(token)
        parts = [(tile, all_[at : at + PIECE]) for tile, all_ in tiles.items() for at in range(0, len(all_), PIECE)]
        return tuple(piece for part in parts for piece in self._split(*part))

    def _split(self, tile: int, tokens: list[int]) -> "Iterator[Piece]":
        """The piece of some tokens; a piece per token if their paths part before the tokens' last two tiles."""
        start, end = tile * PIECE, (tile + 1) * PIECE
        first = self.kind.first(start) // KEY_TILE * KEY_TILE
        seen = range(whole_tiles(self.kind.first(end - 1)), start - KEY_TILE) or range(0)
        chosen = _chosen(tokens)
        hidden = self.hidden[chosen, first:end]
        if self.tail is None:
            yield Piece(chosen, first, seen, end, None, None, hidden)
        elif seen and seen.stop > self.prefix:
            committed = torch.arange(self.prefix, device=self.tail.device)
            for at, token in enumerate(tokens):
                path = torch.cat([committed, self.tail[token, : end - self.prefix]])
                yield Piece(slice(token, token + 1), first, seen, end, path, None, hidden[at : at + 1])
        else:
            shared = max(self.prefix, first)
            own = Own(self.prefix, shared, self.num_slots, self.tail[chosen, shared - self.prefix : end - self.prefix])
            yield Piece(chosen, first, seen, end, None, own, hidden)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the queries of a step see in layers of one kind, in two forms; each is made when it is first asked for."""

    exact: bool  # the step is
    paths: Callable[[], tuple[Paths, ...]]  # of every row
    mask: Callable[[], torch.Tensor]  # bool [B, 1, T, S]: True where a query sees a slot


Told = tuple[torch.Tensor, torch.Tensor]
"""What a kernel is told of paths."""


@dataclass(frozen=True, slots=True)
class Own:
    """The last keys of a tree's queries, which differ: ``slots`` [n, W] of the positions from ``shared`` on.

    They lie in the slots from ``start`` to ``stop``.
    """

    start: int
    shared: int
    stop: int
    slots: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """Queries of one row in one tile of positions. Their keys are at positions from ``first`` up to ``end``.

    ``first`` and ``end`` and ``seen`` depend on the tile only. Every query of the tile sees all of ``seen``, which are
    whole tiles; they end a tile before the queries' own, so that a tree seldom has its own slots there.
    """

    tokens: slice | list[int]  # of the row's queries
    first: int
    seen: range
    end: int
    path: torch.Tensor | None  # [end]: the slots of all positions; None: the slots of the same numbers
    own: Own | None  # None: no query has keys of its own
    hidden: torch.Tensor  # [n, end - first] bool

    @property
    def of_tree(self) -> bool:
        """Whether queries have keys that are not in the slots of a chain."""
        return self.path is not None or self.own is not None

    @property
    def count(self) -> int:
        """Number of queries."""
        return len(self.hidden)

    @property
    def num_rest(self) -> int:
        """Number of keys that are not ``seen``."""
        return self.end - self.first - len(self.seen)

    @cached_property
    def rest(self) -> list[range]:
        """The positions that are not ``seen``."""
        if not self.seen:
            return [range(self.first, self.end)]
        return [part for part in (range(self.first, self.seen.start), range(self.seen.stop, self.end)) if part]

    @cached_property
    def rest_hidden(self) -> torch.Tensor:
        """[n, W] bool over the positions of ``rest``."""
        found = [self.hidden[:, part.start - self.first : part.stop - self.first] for part in self.rest]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def rest_bias(self, repeats: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """[1, 1, R, W]: 0 where a query sees a position of ``rest``, else minus infinity; a small one is kept.

        The queries come ``repeats`` times, as those of several heads do, then rows that see all, up to ``num_rows``.
        """
        key = repeats, num_rows, dtype
        found = self._biases.get(key)
        if found is None:
            found = self.hidden.new_zeros((1, 1, num_rows, self.num_rest), dtype=dtype)
            found[0, 0, : repeats * self.count].masked_fill_(self.rest_hidden.repeat(repeats, 1), float("-inf"))
            if found.nbytes <= MOST_KEPT_BYTES:
                self._biases[key] = found
        return found

    @cached_property
    def _biases(self) -> dict[tuple[int, int, torch.dtype], torch.Tensor]:
        return {}

    @cached_property
    def rest_slots(self) -> torch.Tensor:
        """[n, W] int64: every query's slots of the positions of ``rest``, of a tree."""
        assert self.own is not None, "queries with keys of their own"
        positions = [position for part in self.rest for position in part if position < self.own.shared]
        common = torch.tensor(positions, dtype=torch.long, device=self.hidden.device)
        return torch.cat([common.expand(self.count, -1), self.own.slots], 1)


def _chosen(tokens: list[int]) -> slice | list[int]:
    """The same tokens, as a slice if they are consecutive."""
    start, stop = tokens[0], tokens[-1] + 1
    return slice(start, stop) if stop - start == len(tokens) else tokens


def whole_tiles(length: int) -> int:
    """``length`` rounded up to whole tiles."""
    return -(-length // KEY_TILE) * KEY_TILE
