"""What every draft method has in common: the interface that the engine calls, and the state of each row.

A lane's thread calls it, never the loop. The task graph orders the tasks that touch the same state.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from aspec.generation.penalties import Context
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.speculation.ngram_index import NgramIndex
from aspec.speculation.tree import Proposal, Tree
from aspec.tasks.task import Task, TreeLevel, TreeStatus, WorkItem


@dataclass(slots=True)
class DraftState:
    """What the draft keeps of an occupied row; mutable, because tasks of one row are ordered by the graph."""

    sequence: TokenSequence
    drafted: int = 0  # positions of the draft's KV that hold committed tokens or the live chain
    chain: list[int] = field(default_factory=list)
    tree: Tree | None = None  # its root is the last committed token
    proposal: Proposal | None = None  # of the tree, once it is to be verified
    budget: int = 0  # nodes that the tree may propose
    index: NgramIndex = field(default_factory=NgramIndex)  # of the row's own text
    room: tuple[int, int] = (0, 0)  # nodes and depth that its latest level had
    beams: int = 0  # likewise

    def context(self, paths: Sequence[tuple[int, ...]]) -> Context | None:
        """What leads to the positions behind some paths; None where no penalty asks."""
        return None if self.sequence.counts is None else Context(self.sequence.counts, paths)


class Drafter(ABC):
    """Proposes for the rows it is told of; a draft method is a subclass."""

    def __init__(self) -> None:
        self._rows: dict[int, DraftState] = {}

    def assign_row(self, row: int, sequence: TokenSequence | None) -> None:
        """A row changes hands; what the draft has seen of it stands until another sequence is seated."""
        if sequence is not None:
            before = self._rows.get(row)
            self._rows[row] = DraftState(sequence, min(sequence.num_cached_tokens, before.drafted if before else 0))

    @abstractmethod
    def prefill(self, item: WorkItem) -> None:
        """Take a chunk of prompts."""

    @abstractmethod
    def extend_chains(self, item: WorkItem) -> None:
        """Propose one more token for every row."""

    @abstractmethod
    def grow_trees(self, item: WorkItem, growth: TreeLevel) -> tuple[TreeStatus, ...]:
        """Grow one level of every row's tree; plant those that are none."""

    @abstractmethod
    def commit(self, row: int, path: list[int], emitted: list[int]) -> TreeStatus | None:
        """The target has drawn ``emitted``, the sequence has grown: learn from the accepted path, forget the proposal.

        Returns what stands of a tree below the last token drawn, if the draft went on there.
        """

    def clear(self, row: int) -> None:
        """A row's sequence has failed: nothing of it is kept."""
        state = self._rows[row]
        state.drafted, state.chain, state.tree, state.proposal = 0, [], None, None

    def propose(self, row: int, count: int) -> tuple[list[int], list[int] | None]:
        """The first ``count`` proposed tokens of a row, and their parents (-1: the last committed one); None: a chain.

        From now on until ``commit`` they are what is verified.
        """
        state = self._rows[row]
        if state.tree is None:
            return state.chain[:count], None
        state.proposal = state.tree.proposal().first(count)
        return self.proposed(row, count)

    def proposed(self, row: int, count: int) -> tuple[list[int], list[int] | None]:
        """What ``propose`` returned, however the tree has grown since."""
        state = self._rows[row]
        if state.proposal is None:
            return state.chain[:count], None
        return list(state.proposal.tokens), list(state.proposal.parents)

    def follow(self, row: int, drawn: list[int], count: int) -> tuple[list[int], list[int]]:
        """The accepted path, as places in the proposal, and the tokens that the target has thereby drawn."""
        state = self._rows[row]
        if state.proposal is not None:
            return state.proposal.follow(drawn)
        matches = [proposed == draw for proposed, draw in zip(state.chain[:count], drawn, strict=False)]
        accepted = matches.index(False) if False in matches else count
        return list(range(accepted)), drawn[: accepted + 1]


def pad(rows: list[list[int]]) -> torch.Tensor:
    """Token ids as [B, T] int64; shorter rows repeat their last token, whose results nobody reads."""
    width = max(len(tokens) for tokens in rows)
    return torch.tensor([tokens + [tokens[-1]] * (width - len(tokens)) for tokens in rows])


def item_of(task: Task) -> WorkItem:
    """The work item that a task computes."""
    assert task.item is not None, f"{task.label} carries no work item"
    return task.item
