"""The nodes that a state runs through in one step, and which of them it commits or logs.

A state is committed up to some token of its row. A log holds what every later node added to it, by slot, so that a node
is taken back by forgetting it. A step runs from the committed state through the logged nodes that its own nodes
continue, then through these: depth first, so that few states are held at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from aspec.errors import InternalError
from aspec.io.pinned import upload
from aspec.models.state.shapes import PIECE

Node = tuple[int, int]
"""The place of a row in the step, and a slot."""


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
class Visit:
    """One node, in the order in which they run."""

    row: int
    parent: int  # the visit that it continues; -1: the committed state of its row
    token: int  # of the step, b * T + t; -1: the node is logged
    logged: int  # its number among the logged nodes; -1: it is new
    is_final: bool  # it is one of the row's final tokens
    commits: bool  # its state is the row's new committed one
    is_last: bool  # no later visit continues its parent
    is_continued: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Nodes of one row that run at once: M logged ones, then N new ones."""

    row: int
    logged: torch.Tensor  # [M] int64 numbers of logged nodes
    tokens: torch.Tensor  # [N] int64 tokens of the step
    seen: torch.Tensor  # [M + N, M + N] bool: a node's ancestors and itself
    final: int | None  # the place of the node whose state is committed


@dataclass
class NodePlan:
    """How one step runs; the same for all states that are committed up to the same tokens."""

    visits: list[Visit]
    old: tuple[torch.Tensor, torch.Tensor]  # [M] int64 rows and log places of the logged nodes
    logged: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [N] int64 tokens, rows, log places of nodes to log
    fresh: list[int]  # rows that start anew
    _paths: "_Paths"
    _taps: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The same nodes as pieces, in the order in which they run."""
        return _pieces(self.visits, self.old[0].device)

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
    device: torch.device,
) -> NodePlan:
    """The plan of a step over ``width`` tokens per row.

    Raises InternalError if the state of a row is not known where the step starts.
    """
    bases = [_base(window, reach) for window, reach in zip(windows, reaches, strict=True)]
    new = {
        (place, slot): place * width + slot - window.begin
        for place, window in enumerate(windows)
        for slot in range(window.begin, window.end)
    }
    visits: list[Visit] = []
    old: dict[Node, int] = {}
    for place, (window, base) in enumerate(zip(windows, bases, strict=True)):
        _visit_row(visits, old, new, place, window, base)
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
    return NodePlan(visits, (read[:, 0], read[:, 1]), (write[:, 0], write[:, 1], write[:, 2]), fresh, paths)


def _base(window: Window, reach: Reach) -> int:
    """The number of committed tokens whose state a step starts from."""
    base = 0 if window.begin == 0 else reach.length
    if window.begin and not base <= window.start <= window.begin <= reach.end:
        raise InternalError(
            f"row {window.row} continues token {window.start}: its state is known from {reach.length} to "
            f"{reach.end} only"
        )
    return base


def _visit_row(
    visits: list[Visit], old: dict[Node, int], new: Mapping[Node, int], place: int, window: Window, base: int
) -> None:
    """Append the visits of one row, and number its logged nodes."""
    final = min(window.final, window.end)
    children, weights = _children(window, base)
    numbers = {base - 1: -1}
    stack = list(reversed(children.get(base - 1, [])))
    left = {slot: len(own) for slot, own in children.items()}
    while stack:
        slot = stack.pop()
        parent = max(window.parent(slot), base - 1)
        left[parent] -= 1
        numbers[slot] = len(visits)
        token = new.get((place, slot), -1)
        if token < 0:
            old[place, slot] = len(old)
        own = children.get(slot, [])
        visits.append(
            Visit(
                window.row,
                numbers[parent],
                token,
                old.get((place, slot), -1),
                is_final=slot < final,
                commits=slot == final - 1,
                is_last=not left[parent],
                is_continued=bool(own),
            )
        )
        stack += sorted(own, key=lambda child: -weights[child])  # the heaviest last: it takes over its parent's state


def _children(window: Window, base: int) -> tuple[dict[int, list[int]], dict[int, int]]:
    """By slot the slots that continue it, and the number of nodes from it on."""
    needed = set(range(base, min(window.final, window.end)))
    for slot in range(window.begin, window.end):
        while slot >= base and slot not in needed:
            needed.add(slot)
            slot = window.parent(slot)
    children: dict[int, list[int]] = {}
    weights = dict.fromkeys(needed, 1)
    for slot in sorted(needed, reverse=True):
        parent = max(window.parent(slot), base - 1)
        children.setdefault(parent, []).append(slot)
        if parent >= base:
            weights[parent] += weights[slot]
    return children, weights


def _pieces(visits: Sequence[Visit], device: torch.device) -> list[Piece]:
    """The pieces of a step, in their order. A long prompt has several."""
    by_row: dict[int, list[int]] = {}
    for number, visit in enumerate(visits):
        by_row.setdefault(visit.row, []).append(number)
    pieces = []
    for numbers in by_row.values():
        old = [n for n in numbers if visits[n].token < 0]
        new = [n for n in numbers if visits[n].token >= 0]
        num_final = sum(visits[n].is_final for n in new)
        while num_final > PIECE:
            pieces.append(_piece(visits, old, new[:PIECE], device))
            old, new, num_final = [], new[PIECE:], num_final - PIECE
        pieces.append(_piece(visits, old, new, device))
    return pieces


def _piece(visits: Sequence[Visit], old: list[int], new: list[int], device: torch.device) -> Piece:
    """One piece; it commits the state of its last final node, if it has one."""
    own = [*old, *new]
    places = {number: place for place, number in enumerate(own)}
    seen = np.eye(len(own), dtype=bool)
    for place, number in enumerate(own):
        if (parent := places.get(visits[number].parent)) is not None:
            seen[place] |= seen[parent]
    finals = [place for place, number in enumerate(own) if visits[number].is_final]
    return Piece(
        visits[own[0]].row,
        upload(torch.tensor([visits[n].logged for n in old], dtype=torch.long), device),
        upload(torch.tensor([visits[n].token for n in new], dtype=torch.long), device),
        upload(torch.from_numpy(seen), device),
        finals[-1] if finals else None,
    )
