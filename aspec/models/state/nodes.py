"""The nodes that a state runs through in one step, in blocks, and which of them it commits or logs.

A state is committed up to some token of its row. A log holds what every later node added to it, by slot, so that a node
is taken back by forgetting it. A step runs from the committed state through the logged nodes that its own nodes
continue, then through these. Nodes of one depth run together, those of all rows in one block.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from aspec.errors import InternalError
from aspec.io.upload import upload

Index = slice | torch.Tensor
"""Places along a dimension; a slice where they are evenly spaced, which copies nothing."""


@dataclass(frozen=True, slots=True)
class Window:
    """The nodes of one row in a step; node ``n`` is in slot ``start + n`` (see ``KVCache.step``)."""

    row: int
    start: int
    first: int  # nodes that earlier steps wrote
    count: int
    final: int  # leading tokens of the row that are never taken back
    parents: Sequence[int] | None  # of all nodes; None: a chain

    @property
    def begin(self) -> int:
        """The slot of the first new node."""
        return self.start + self.first

    @property
    def end(self) -> int:
        """The slot after the last new node."""
        return self.begin + self.count

    def parent(self, slot: int) -> int:
        """The slot that the node in a slot continues."""
        if self.parents is None or slot < self.start:
            return slot - 1
        return self.start + self.parents[slot - self.start] if self.parents[slot - self.start] >= 0 else self.start - 1


@dataclass(frozen=True, slots=True)
class Reach:
    """What is known of a row's state: it is committed up to token ``length``, the log reaches to ``end``."""

    length: int = 0
    end: int = 0

    def may_start(self, length: int) -> bool:
        """Whether a step may continue the first ``length`` tokens."""
        return self.length <= length <= self.end or not length

    def after(self, window: Window) -> "Reach":
        """The reach when a step has run."""
        base = 0 if window.begin == 0 else self.length
        return Reach(max(base, min(window.final, window.end)), window.end)


@dataclass(frozen=True, slots=True)
class Block:
    """Nodes of one depth: first those of the log, then new ones."""

    parent: int  # the block of the nodes that they continue; -1: the committed states, by row
    source: Index  # the places of these among the parent's continued nodes
    is_last: bool  # no later block continues the parent
    continued: Index | None  # places of the nodes that others continue; None: there are none
    old: slice  # of the plan's logged nodes
    new: Index | None  # tokens of the step, b * T + t; None: there are none
    num_new: int
    committed: tuple[Index, Index] | None  # places of nodes whose state is committed, and their rows


@dataclass
class NodePlan:
    """How one step runs; the same for all states that are committed up to the same tokens."""

    blocks: list[Block]
    old: tuple[torch.Tensor, torch.Tensor]  # [M] int64 rows and log places of the logged nodes, in the order of blocks
    logged: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [N] int64 tokens, rows, log places of nodes to log
    fresh: list[int]  # rows that start anew
    _paths: "_Paths"
    _taps: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def taps(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a convolution over ``size`` inputs: [N, size] int64 inputs of every token, [n] rows and their next tails
        [n, size - 1].

        Inputs are numbered: ``size - 1`` of every row's tail, the logged nodes, the tokens of the step.
        """
        if size not in self._taps:
            self._taps[size] = self._paths.taps(size)
        return self._taps[size]


@dataclass
class _Paths:
    """Where the inputs on every node's path are."""

    num_rows: int
    num_tokens: int  # of the step, padding included
    old: dict[tuple[int, int], int]  # (place of the row, slot) -> number of the logged node
    new: dict[tuple[int, int], int]  # -> token
    windows: Sequence[Window]
    bases: Sequence[int]
    device: torch.device

    def taps(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``NodePlan.taps``."""
        tails, num_old = self.num_rows * (size - 1), len(self.old)
        inputs = [[tails + num_old + token] * size for token in range(self.num_tokens)]
        rows, ends = [], []
        for place, (window, base) in enumerate(zip(self.windows, self.bases, strict=True)):
            for slot in range(window.begin, window.end):
                inputs[self.new[place, slot]] = self._inputs(place, slot, size)
            if (final := min(window.final, window.end)) > base:
                rows.append(window.row)
                ends.append(self._inputs(place, final - 1, size)[1:])
        made = (torch.tensor(inputs), torch.tensor(rows, dtype=torch.long), torch.tensor(ends, dtype=torch.long))
        return upload(made[0], self.device), upload(made[1], self.device), upload(made[2], self.device)

    def _inputs(self, place: int, slot: int, size: int) -> list[int]:
        """The last ``size`` inputs on the path to a node, its own last."""
        window, base, found = self.windows[place], self.bases[place], list[int]()
        tails, num_old = self.num_rows * (size - 1), len(self.old)
        while slot >= base and len(found) < size:
            old = self.old.get((place, slot))
            found.append(tails + old if old is not None else tails + num_old + self.new[place, slot])
            slot = window.parent(slot)
        last = window.row * (size - 1) + size - 2
        found += range(last, last - (size - len(found)), -1)
        return found[::-1]


def plan_nodes(
    windows: Sequence[Window],
    reaches: Sequence[Reach],
    *,
    width: int,
    num_rows: int,
    log_slots: int,
    most: int,
    device: torch.device,
) -> NodePlan:
    """The plan of a step over ``width`` tokens per row, in blocks of at most ``most`` nodes.

    Raises InternalError if the state of a row is not known where the step starts.
    """
    bases = [_base(window, reach) for window, reach in zip(windows, reaches, strict=True)]
    new = {
        (place, slot): place * width + slot - window.begin
        for place, window in enumerate(windows)
        for slot in range(window.begin, window.end)
    }
    blocks, old = _blocks(_Forest(windows, bases), new, most, device)
    in_log = [[windows[place].row, slot % max(1, log_slots)] for place, slot in old]
    to_log = [
        [new[place, slot], window.row, slot % max(1, log_slots)]
        for place, window in enumerate(windows)
        for slot in range(max(window.begin, window.final), window.end)
    ]
    read = upload(torch.tensor(in_log, dtype=torch.long).reshape(-1, 2), device)
    write = upload(torch.tensor(to_log, dtype=torch.long).reshape(-1, 3), device)
    fresh = [window.row for window in windows if window.begin == 0]
    paths = _Paths(num_rows, len(windows) * width, old, new, windows, bases, device)
    return NodePlan(blocks, (read[:, 0], read[:, 1]), (write[:, 0], write[:, 1], write[:, 2]), fresh, paths)


def _base(window: Window, reach: Reach) -> int:
    """The number of committed tokens whose state a step starts from."""
    base = 0 if window.begin == 0 else reach.length
    if window.begin and not base <= window.start <= window.begin <= reach.end:
        raise InternalError(
            f"row {window.row} continues token {window.start}: its state is known from {reach.length} to "
            f"{reach.end} only"
        )
    return base


Node = tuple[int, int]
"""The place of a row in the step, and a slot."""


def _blocks(
    forest: "_Forest", new: dict[Node, int], most: int, device: torch.device
) -> tuple[list[Block], dict[Node, int]]:
    """The blocks, depth first, and the numbers of the logged nodes among them."""
    windows, places = forest.windows, dict[Node, int]()
    old: dict[Node, int] = {}
    blocks: list[Block] = []
    stack = [(-1, forest.roots())]
    while stack:
        parent, nodes = stack.pop()
        nodes, rest = nodes[:most], nodes[most:]
        if rest:
            stack.append((parent, rest))
        nodes.sort(key=lambda node: node in new)
        logged = [node for node in nodes if node not in new]
        tokens = [new[node] for node in nodes[len(logged) :]]
        parents = [(at, node) for at, node in enumerate(nodes) if node in forest.children]
        below = [child for _, node in parents for child in forest.children[node]]
        kept = [(at, windows[place].row) for at, (place, slot) in enumerate(nodes) if forest.commits(place, slot)]
        source = [windows[p].row if parent < 0 else places[p, windows[p].parent(slot)] for p, slot in nodes]
        blocks.append(
            Block(
                parent,
                _index(source, device),
                is_last=not rest,
                continued=_index([at for at, _ in parents], device) if parents else None,
                old=slice(len(old), len(old) + len(logged)),
                new=_index(tokens, device) if tokens else None,
                num_new=len(tokens),
                committed=(_index([at for at, _ in kept], device), _index([row for _, row in kept], device))
                if kept
                else None,
            )
        )
        places |= {node: at for at, (_, node) in enumerate(parents)}
        old |= {node: len(old) + at for at, node in enumerate(logged)}
        if below:
            stack.append((len(blocks) - 1, below))
    return blocks, old


class _Forest:
    """The nodes that a step runs through: (place of the row, slot)."""

    def __init__(self, windows: Sequence[Window], bases: Sequence[int]) -> None:
        self.windows, self._bases = windows, bases

    def roots(self) -> list[tuple[int, int]]:
        """The nodes that continue committed states."""
        return [node for node in self._needed if self.windows[node[0]].parent(node[1]) < self._bases[node[0]]]

    def commits(self, place: int, slot: int) -> bool:
        """Whether the state behind a node is the row's new committed one."""
        window = self.windows[place]
        return slot == min(window.final, window.end) - 1

    @cached_property
    def children(self) -> dict[tuple[int, int], list[Node]]:
        """By node: the nodes that continue it."""
        found: dict[tuple[int, int], list[Node]] = {}
        for place, slot in self._needed:
            parent = self.windows[place].parent(slot)
            if parent >= self._bases[place]:
                found.setdefault((place, parent), []).append((place, slot))
        return found

    @cached_property
    def _needed(self) -> list[tuple[int, int]]:
        """In the order of rows and slots: new nodes, the nodes on their paths, and those to commit."""
        return [
            (place, slot)
            for place, window in enumerate(self.windows)
            for slot in sorted(_needed_of(window, self._bases[place]))
        ]


def _needed_of(window: Window, base: int) -> set[int]:
    needed = set(range(base, min(window.final, window.end)))
    for slot in range(window.begin, window.end):
        while slot >= base and slot not in needed:
            needed.add(slot)
            slot = window.parent(slot)
    return needed


def _index(places: list[int], device: torch.device) -> Index:
    """A slice if the places are evenly spaced and ascend."""
    step = places[1] - places[0] if len(places) > 1 else 1
    if step > 0 and all(b - a == step for a, b in itertools.pairwise(places)):
        return slice(places[0], places[-1] + 1, step)
    return upload(torch.tensor(places), device)
