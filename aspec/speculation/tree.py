"""The draft tree of one row: it grows best first by path probability, and the target verifies it in one pass.

Source: SpecExec (Svirschevski et al., arXiv 2406.02532), batched best-first search over the draft's paths. For a level
``frontier`` returns the nodes worth a draft forward, ``feed`` gives them their slots, ``extend`` takes the draft's
candidates for children, ``prune`` keeps the best. Nodes have two numberings: the draft's KV keeps them in the order in
which they were fed (slots; a pruned node still owns one), the target sees the kept nodes, best first (``Proposal``).
After the target's draws ``descend`` returns the part below them: the next round's tree, grown ahead.
May not go in: asyncio, clocks, randomness, tensors.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf

from aspec.errors import InternalError, NumericError
from aspec.speculation.calibration import one_of
from aspec.speculation.proposal import ROOT, Proposal

ROUNDING = 1e-3  # in nats: rounding may put a log score at most this far above 0


@dataclass(slots=True)
class Node:
    """A proposed token; mutable, because the tree scores, feeds and prunes it later."""

    token: int
    parent: int  # a smaller node index, or ROOT; never changes
    depth: int  # 1 for the children of the root; never changes
    edge: float  # log probability given that the parent is accepted, at most 0
    score: float  # the sum of the edges from the root: log path probability
    draft_score: float | None = None  # the draft's own log score, not calibrated; None: no candidate of the draft
    ngram_score: float | None = None  # the log score in an n-gram branch, not calibrated; None: in no branch
    slot: int = -1  # place in the draft's KV behind the committed tokens; -1 until it is fed
    kept: bool = True  # False after pruning; then no descendant is kept either

    @property
    def order(self) -> tuple[float, int, int, int]:
        """The sort key, best first: score, then small depth, small parent, small token id."""
        return -self.score, self.depth, self.parent, self.token


class Tree:
    """Grows one row's proposal; the kept nodes are always the best ``budget`` of all candidates so far."""

    def __init__(
        self,
        max_depth: int,
        end_ids: Collection[int] = frozenset(),
        log_probability: Callable[[float], float] | None = None,
        log_ngram: Callable[[float], float] | None = None,
    ) -> None:
        """A tree of paths of at most ``max_depth`` tokens; no token is in ``end_ids``.

        A node for an end token would gain nothing: the draw at its parent emits that token anyway.
        ``log_probability`` maps the draft's log score of a child to the log probability of its acceptance and keeps
        the order (``Calibration.log_probability``); None: use the scores as they are. ``log_ngram`` does the same
        for n-gram branches. With either, the probabilities below a node that a branch runs through add up to at most 1
        (``one_of``): a branch and the draft may both be sure, of different tokens.
        """
        self.nodes: list[Node] = []  # in order of addition, parents before children; never removed
        self.slots: list[int] = []  # the nodes fed to the draft, in that order: slot -> node
        self._max_depth = max_depth
        self._end_ids = frozenset(end_ids)
        self._log_probability, self._log_ngram = log_probability or _itself, log_ngram or _itself
        self._calibrated = not (self._log_probability is self._log_ngram is _itself)
        self._root_fed = False
        self._budget: int | None = None  # of the latest prune
        self._kept: list[int] = []  # the kept nodes, best first
        self._children: dict[tuple[int, int], int] = {}  # (parent, token) -> node, of all nodes
        self._below: dict[int, list[int]] = defaultdict(list)  # parent -> nodes, of all nodes
        self._lowered = False  # an edge, since the latest prune
        # candidates since the latest prune, (parent, token) -> (edge, draft_score); all ever, node -> (token, edge, ..)
        self._candidates: dict[tuple[int, int], tuple[float, float | None]] = {}
        self._history: dict[int, list[tuple[int, float, float]]] = {}

    def __len__(self) -> int:
        """The number of kept nodes."""
        return len(self._kept)

    # -- growth ----------------------------------------------------------------------------------------------

    def frontier(self, beams: int) -> list[int]:
        """At most ``beams`` nodes worth a draft forward, best first; only ROOT at first; empty: the tree is complete.

        Each node's parent is fed, its depth is below the maximum, and while the budget is used up a child of it could
        still beat the worst kept node. Raises InternalError before ``prune``.
        """
        self._expect_pruned()
        if not self._root_fed:
            return [ROOT] if beams > 0 and self._max_depth > 0 and self._budget != 0 else []
        worst = self._worst()
        found: list[int] = []
        for index in self._kept:
            if len(found) >= beams:
                break
            node = self.nodes[index]
            is_open = node.slot < 0 and node.depth < self._max_depth and self._is_fed(node.parent)
            if is_open and (-node.score, node.depth + 1, index, -1) < worst:  # the best order that a child could have
                found.append(index)
        return found

    def feed(self, nodes: Sequence[int]) -> list[int]:
        """Assign slots of the draft's KV to nodes, in this order, and return them; -1 for ROOT, which is committed.

        Raises InternalError for a node that is fed already or pruned, or whose parent is not fed.
        """
        for index in nodes:
            if index == ROOT:
                self._root_fed = True
                continue
            node = self.nodes[index]
            if node.slot >= 0 or not node.kept or not self._is_fed(node.parent):
                raise InternalError(f"node {index} cannot be fed: expected a kept node with a fed parent, found {node}")
            node.slot = len(self.slots)
            self.slots.append(index)
        return [self._slot(index) for index in nodes]

    def extend(self, node: int, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Take the draft's candidates at one fed node: tokens and their log scores given that node, in any order.

        Scores are at most 0 (a rounding error above 0 is cut); -inf marks a banned token. Banned tokens are left out,
        and so are candidates that could not enter a budget like the last one. The others wait for ``prune``. Raises
        NumericError for NaN and +inf, ValueError for other scores above 0, InternalError for a node that is not fed.
        """
        if not self._is_fed(node):
            raise InternalError(f"node {node} was extended before it was fed to the draft")
        if node != ROOT and (not self.nodes[node].kept or self.nodes[node].depth >= self._max_depth):
            return
        offers: dict[int, float] = {}  # token -> draft score
        for token, score in zip(tokens, scores, strict=True):
            draft_score = _checked(score)
            if draft_score > -inf and token not in self._end_ids:
                offers[token] = max(draft_score, offers.get(token, -inf))
        above, floor = self._score(node), -self._worst()[0]
        history = self._history.setdefault(node, [])
        for token, edge in self._edges(node, offers).items():
            place, offered = (node, token), offers.get(token)  # not offered: a branch alone knows it
            if offered is not None:
                history.append((token, edge, offered))
            if place in self._children or above + edge >= floor:
                before = self._candidates.get(place)
                if before is None or before[0] < edge:
                    self._candidates[place] = edge, offered

    def add_branch(self, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Add an n-gram branch: a path from the root, with the log score of each token given those before it.

        Existing nodes are shared and keep the better of both scores. The branch ends before an end token, before a
        banned one (-inf), and at the maximum depth. It may exceed the budget until the next ``prune``.
        """
        at = ROOT
        for token, score in zip(tokens, scores, strict=True):
            ngram_score = _checked(score)
            if ngram_score == -inf or token in self._end_ids or self._depth(at) >= self._max_depth:
                break
            child = self._children.get((at, token))
            if child is None:
                child = self._add(at, token, min(0.0, self._log_ngram(ngram_score)))
            node = self.nodes[child]
            node.kept = True  # it may have been pruned before; its ancestors are kept again
            node.ngram_score = ngram_score if node.ngram_score is None else max(node.ngram_score, ngram_score)
            for sibling, edge in self._edges(at, {}).items():
                self._set_edge(self._children[at, sibling], edge)
            at = child
        self._sort()

    def prune(self, budget: int) -> int:
        """Keep the best ``budget`` of all nodes and candidates; return how many candidates became nodes.

        The ancestors of a kept node are kept: no score is above its parent's, and the parent's depth is smaller.
        New nodes get indices in sort order, so the order of ``extend`` does not matter.
        """
        budget = max(0, budget)
        revived = self._merge_known()
        if self._lowered and self._budget is not None:  # what was dropped before may be among the best now
            self.reopen(self._max_depth)
            revived += self._merge_known()
        self._lowered = False
        kept = [(*self.nodes[index].order, index) for index in self._kept]
        fresh = [
            (-self._score(parent) - edge, self._depth(parent) + 1, parent, token, ROOT)
            for (parent, token), (edge, _) in self._candidates.items()
        ]
        ranked = sorted(kept + fresh)  # no two have the same parent and token, so the index is never compared
        for *_, index in ranked[budget:]:
            if index != ROOT:
                self.nodes[index].kept = False
        before = len(self.nodes)
        self._kept = [
            self._add(parent, token, *self._candidates[parent, token]) if index == ROOT else index
            for _, _, parent, token, index in ranked[:budget]
        ]
        self._candidates.clear()
        self._budget = budget
        return len(self.nodes) - before + sum(self.nodes[index].kept for index in revived)

    # -- between rounds --------------------------------------------------------------------------------------

    def reopen(self, max_depth: int) -> None:
        """Restore what pruning dropped, up to a new maximum depth: all fed nodes, and the draft's candidates at them.

        It serves a change of budget or depth. Call ``prune`` after it.
        """
        self._max_depth = max_depth
        for node in self.nodes:
            node.kept = (node.kept or node.slot >= 0) and node.depth <= max_depth  # ancestors of a fed node are fed
        self._sort()
        for parent, history in self._history.items():
            if self._depth(parent) < max_depth:
                kept = [self._children.get((parent, token)) for token, _, _ in history]
                self._candidates |= {
                    (parent, token): (edge if child is None else self.nodes[child].edge, draft_score)
                    for child, (token, edge, draft_score) in zip(kept, history, strict=True)
                    if child is None or not self.nodes[child].kept
                }

    def descend(self, tokens: Sequence[int]) -> tuple[list[int], "Tree | None"]:
        """The part of this tree below ``tokens``, which the target drew after the root.

        Returns slots of the draft's KV and a tree. The slots are those of the leading tokens that the draft has seen.
        If it has seen all of them, the tree is the part below the last one, and the list continues with the slots of
        its fed nodes; otherwise the tree is None. Its scores count from its new root. It holds all candidates that the
        draft ever scored there: call ``prune`` after it.
        """
        at, slots = ROOT, list[int]()
        for token in tokens:
            at = self._children.get((at, token), ROOT)
            if at == ROOT or self.nodes[at].slot < 0:
                return slots, None
            slots.append(self.nodes[at].slot)
        below = Tree(self._max_depth, self._end_ids, self._log_probability, self._log_ngram)
        below._root_fed = True
        places = {at: ROOT}
        for index, node in enumerate(self.nodes):
            if node.parent in places and (node.kept or node.slot >= 0):
                places[index] = below._add(places[node.parent], node.token, node.edge, node.draft_score)
                below.nodes[-1].ngram_score = node.ngram_score
        below._history = {places[node]: history for node, history in self._history.items() if node in places}
        seen = [index for index in self.slots if places.get(index, ROOT) != ROOT]
        below.feed([places[index] for index in seen])
        below.reopen(self._max_depth)
        return slots + [self.nodes[index].slot for index in seen], below

    # -- reading ---------------------------------------------------------------------------------------------

    def proposal(self) -> Proposal:
        """The kept nodes as the target verifies them. Raises InternalError before ``prune``."""
        self._expect_pruned()
        nodes = [self.nodes[index] for index in self._kept]
        places = {index: place for place, index in enumerate(self._kept)} | {ROOT: ROOT}
        return Proposal(
            tokens=tuple(node.token for node in nodes),
            parents=tuple(places[node.parent] for node in nodes),
            depths=tuple(node.depth for node in nodes),
            scores=tuple(node.score for node in nodes),
            draft_score=tuple(node.draft_score for node in nodes),
            ngram_score=tuple(node.ngram_score for node in nodes),
        )

    def path(self, node: int) -> tuple[int, ...]:
        """The tokens after the last committed one, down to a node; empty for ROOT."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.nodes[node].token)
            node = self.nodes[node].parent
        return tuple(reversed(tokens))

    def slot_parents(self) -> list[int]:
        """The parent's slot of the node in every slot, -1 for the root; the draft's attention mask is built from it."""
        return [self._slot(self.nodes[index].parent) for index in self.slots]

    def probabilities(self) -> list[float]:
        """Path probabilities of the kept nodes, descending."""
        return [exp(self.nodes[index].score) for index in self._kept]

    def gain_bound(self, beams: int) -> float:
        """Most tokens that one more level can gain: the sum of the path probabilities of the next frontier."""
        return sum(exp(self._score(index)) for index in self.frontier(beams))

    def validate(self) -> None:
        """Check the invariants; tests call it after every step. Raises AssertionError."""
        for index, node in enumerate(self.nodes):
            assert ROOT <= node.parent < index, "parents come before their children"
            assert self._children[node.parent, node.token] == index, "a parent has each token once"
            assert node.depth == self._depth(node.parent) + 1
            assert node.depth <= self._max_depth or not node.kept, "kept nodes have at most the maximum depth"
            assert node.edge <= 0.0
            assert node.score == self._score(node.parent) + node.edge
            assert node.token not in self._end_ids
            parent_kept = node.parent == ROOT or self.nodes[node.parent].kept
            assert parent_kept or not node.kept, "an ancestor of a kept node is kept"
            assert node.slot < 0 or self._slot(node.parent) < node.slot, "the parent is fed first"
        assert sorted(self._kept) == [index for index, node in enumerate(self.nodes) if node.kept]
        orders = [self.nodes[index].order for index in self._kept]
        assert all(a < b for a, b in pairwise(orders)), "the kept nodes are sorted, best first"
        assert [self.nodes[index].slot for index in self.slots] == list(range(len(self.slots)))

    # -- nodes -----------------------------------------------------------------------------------------------

    def _add(self, parent: int, token: int, edge: float, draft_score: float | None = None) -> int:
        index = len(self.nodes)
        self.nodes.append(Node(token, parent, self._depth(parent) + 1, edge, self._score(parent) + edge, draft_score))
        self._children[parent, token] = index
        self._below[parent].append(index)
        return index

    def _edges(self, parent: int, offers: Mapping[int, float]) -> dict[int, float]:
        """Log probabilities, by token, of the nodes below ``parent`` and of the draft's ``offers``: its log scores."""
        edges = {token: min(0.0, self._log_probability(score)) for token, score in offers.items()}
        branched = False
        for child in self._below.get(parent, ()):
            node, claims = self.nodes[child], [edges.get(self.nodes[child].token, -inf)]
            if node.draft_score is not None:
                claims.append(min(0.0, self._log_probability(node.draft_score)))
            if node.ngram_score is not None:
                claims.append(min(0.0, self._log_ngram(node.ngram_score)))
                branched = self._calibrated
            edges[node.token] = max(claims)
        return one_of(edges) if branched else edges

    def _merge_known(self) -> list[int]:
        """Merge candidates of existing nodes into these nodes; return the nodes that were pruned before."""
        known = [place for place in self._candidates if place in self._children]
        revived: list[int] = []
        for place in known:
            child = self._children[place]
            edge, draft_score = self._candidates.pop(place)
            if draft_score is not None:
                self.nodes[child].draft_score = draft_score
            self._set_edge(child, edge)
            if not self.nodes[child].kept and draft_score is not None:
                self.nodes[child].kept = True
                revived.append(child)
        self._kept += revived
        return revived

    def _set_edge(self, index: int, edge: float) -> None:
        """Set a node's edge, and the scores of its descendants; sort the kept nodes afterwards."""
        if edge != self.nodes[index].edge:
            self._lowered |= edge < self.nodes[index].edge
            self.nodes[index].edge = edge
            for node in self.nodes[index:]:
                node.score = self._score(node.parent) + node.edge

    def _sort(self) -> None:
        kept = (index for index, node in enumerate(self.nodes) if node.kept)
        self._kept = sorted(kept, key=lambda index: self.nodes[index].order)

    def _worst(self) -> tuple[float, int, int, int]:
        """The order of the last node inside the budget; one after all nodes while the budget is not used up."""
        if not self._budget or len(self._kept) < self._budget:
            return inf, 0, 0, 0
        return self.nodes[self._kept[self._budget - 1]].order

    def _expect_pruned(self) -> None:
        if self._candidates or (self._budget is not None and len(self._kept) > self._budget):
            raise InternalError(
                f"{len(self._kept)} nodes with {len(self._candidates)} candidates for a budget of {self._budget}: "
                f"expected prune() before the tree is read"
            )

    def _is_fed(self, index: int) -> bool:
        return self._root_fed if index == ROOT else self.nodes[index].slot >= 0

    def _slot(self, index: int) -> int:
        return -1 if index == ROOT else self.nodes[index].slot

    def _score(self, index: int) -> float:
        return 0.0 if index == ROOT else self.nodes[index].score

    def _depth(self, index: int) -> int:
        return 0 if index == ROOT else self.nodes[index].depth


def _itself(score: float) -> float:
    return score


def _checked(score: float) -> float:
    """The log score, cut at 0. Raises NumericError for NaN and +inf, ValueError for one above ``ROUNDING``."""
    if score <= 0.0:
        return score
    if score < ROUNDING:
        return 0.0
    if score < inf:
        raise ValueError(f"a log score of {score}: expected at most 0, the logarithm of a probability")
    raise NumericError(f"a log score of {score}: expected a finite number or -inf; the draft's logits are not valid")
