"""The common part of all draft methods: the interface that the engine calls, and the draft's state of each row.

A lane's thread calls it, never the loop. The task graph orders the tasks that touch the same state.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from aspec.generation.sequence import Sequence as TokenSequence
from aspec.speculation.ngram_index import NgramIndex
from aspec.speculation.proposal import Proposal
from aspec.speculation.tree import Tree
from aspec.tasks.task import Task, TreeLevel, TreeStatus, WorkItem


@dataclass(slots=True)
class DraftState:
    """The draft's state of an occupied row; mutable, and safe: the task graph orders the tasks of one row."""

    sequence: TokenSequence
    drafted: int = 0  # positions of the draft's KV that hold committed tokens or the chain
    chain: list[int] = field(default_factory=list)
    tree: Tree | None = None  # its root is the last committed token
    proposal: Proposal | None = None  # of the tree; None until ``propose``
    budget: int = 0  # most nodes that the tree may propose
    index: NgramIndex = field(default_factory=NgramIndex)  # of the row's own text
    room: tuple[int, int] = (0, 0)  # (most nodes, maximum depth) of the tree's latest level
    beams: int = 0  # of the tree's latest level


class Drafter(ABC):
    """Proposes tokens for the assigned rows; each draft method is a subclass."""

    def __init__(self) -> None:
        self._rows: dict[int, DraftState] = {}

    def assign_row(self, row: int, sequence: TokenSequence | None) -> None:
        """Assign a row to a sequence; None frees the row, and its KV in the draft stays until the next sequence."""
        if sequence is not None:
            before = self._rows.get(row)
            self._rows[row] = DraftState(sequence, min(sequence.num_cached_tokens, before.drafted if before else 0))

    @abstractmethod
    def prefill(self, item: WorkItem) -> None:
        """Process a chunk of prompts."""

    @abstractmethod
    def extend_chains(self, item: WorkItem) -> None:
        """Propose one more token for every row."""

    @abstractmethod
    def grow_trees(self, item: WorkItem, growth: TreeLevel) -> tuple[TreeStatus, ...]:
        """Grow one level of every row's tree; start a tree where there is none."""

    @abstractmethod
    def commit(self, row: int, path: list[int], emitted: list[int]) -> TreeStatus | None:
        """Learn from the accepted ``path``, then drop the proposal; ``emitted`` are already part of the sequence.

        Returns the status of the tree below the last token drawn; None if the draft has grown none there.
        """

    def clear(self, row: int) -> None:
        """Drop all state of a row whose sequence has failed."""
        state = self._rows[row]
        state.drafted, state.chain, state.tree, state.proposal = 0, [], None, None

    def propose(self, row: int, count: int) -> tuple[list[int], list[int] | None]:
        """The first ``count`` proposed tokens of a row, and their parents (-1: the last committed one); None: a chain.

        The target verifies these tokens; they stay the proposal until ``commit``.
        """
        state = self._rows[row]
        if state.tree is None:
            return state.chain[:count], None
        state.proposal = state.tree.proposal().first(count)
        return self.proposed(row, count)

    def proposed(self, row: int, count: int) -> tuple[list[int], list[int] | None]:
        """The result of the latest ``propose``; later growth of the tree does not change it."""
        state = self._rows[row]
        if state.proposal is None:
            return state.chain[:count], None
        return list(state.proposal.tokens), list(state.proposal.parents)

    def follow(self, row: int, drawn: list[int], count: int) -> tuple[list[int], list[int]]:
        """The accepted path, as places in the proposal, and the emitted tokens: the path's and the draw after it."""
        state = self._rows[row]
        if state.proposal is not None:
            return state.proposal.follow(drawn)
        matches = [proposed == draw for proposed, draw in zip(state.chain[:count], drawn, strict=False)]
        accepted = matches.index(False) if False in matches else count
        return list(range(accepted)), drawn[: accepted + 1]


def pad(rows: list[list[int]]) -> torch.Tensor:
    """Token ids as [B, T] int64; shorter rows repeat their last token, and those results are not used."""
    width = max(len(tokens) for tokens in rows)
    return torch.tensor([tokens + [tokens[-1]] * (width - len(tokens)) for tokens in rows])


def item_of(task: Task) -> WorkItem:
    """The work item that a task computes."""
    assert task.item is not None, f"{task.label} carries no work item"
    return task.item
