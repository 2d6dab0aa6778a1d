"""A draft method without a model: it proposes the tokens that followed earlier occurrences of the last few tokens.

Source: prompt lookup decoding (Saxena, 2023); the index is ``ngram_index.py``. Acceptance calibrates its confidences
online, so a text without repetitions soon costs almost nothing.
"""

from math import log

from aspec.errors import InternalError
from aspec.speculation.calibration import Calibration
from aspec.speculation.drafter import Drafter, DraftState
from aspec.speculation.ngram_index import merge_into
from aspec.speculation.proposal import ROOT
from aspec.speculation.tree import Tree
from aspec.tasks.task import TreeLevel, TreeStatus, WorkItem


class NgramDrafter(Drafter):
    """Proposes continuations of every row's own text, as a tree that is complete after one level of work."""

    def __init__(self, most: int | None = None) -> None:
        """At most ``most`` continuations per row; None: the width of the tree level."""
        super().__init__()
        self._most = most
        self._calibration = Calibration()

    def prefill(self, item: WorkItem) -> None:
        """Do nothing: the first proposal indexes the prompt."""

    def extend_chains(self, item: WorkItem) -> None:
        """Raises InternalError: a lookup finds whole continuations, so even a chain is planned as a tree."""
        raise InternalError("an n-gram draft grows trees only: expected a DRAFT task with a tree level")

    def grow_trees(self, item: WorkItem, growth: TreeLevel) -> tuple[TreeStatus, ...]:
        """Look up every row's last tokens; the trees are complete after that."""
        rows = zip(item.rows, growth.budgets, growth.depths, strict=True)
        return tuple(self._grow(row, self._rows[row], budget, depth, growth.width) for row, budget, depth in rows)

    def _grow(self, row: int, state: DraftState, budget: int, depth: int, width: int) -> TreeStatus:
        index = state.index
        index.extend(state.sequence.tokens[index.length :])
        tree = Tree(depth, state.sequence.end_ids, log_ngram=self._calibration.log_probability)
        tree.feed([ROOT])
        for tokens, confidences in index.propose(depth, width if self._most is None else min(self._most, width)):
            count = state.sequence.num_allowed(tokens)
            merge_into(tree, tokens[:count], [log(confidence) for confidence in confidences[:count]])
        tree.prune(budget)
        state.tree = tree
        return TreeStatus(row, tuple(tree.probabilities()), gain_bound=0.0)

    def commit(self, row: int, path: list[int], emitted: list[int]) -> None:
        """Learn from the accepted path, then drop the proposal."""
        state = self._rows[row]
        proposal, state.tree, state.proposal = state.proposal, None, None
        for place, accepted in proposal.verdicts(path) if proposal else ():
            ngram_score = proposal.ngram_score[place] if proposal else None
            if ngram_score is not None:
                self._calibration.observe(ngram_score, accepted)
