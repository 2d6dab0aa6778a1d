"""The draft tree of one row: grown best-first by path probability, verified in one pass, followed by the draws.

Source: SpecExec (Svirschevski et al., arXiv 2406.02532), batched best-first search over the draft's paths. A level:
``frontier`` names the nodes worth a draft forward, ``feed`` gives them their slots, ``extend`` takes the children
the draft offers, ``prune`` keeps the best. Nodes have two numberings: the draft's KV keeps them in the order they
were fed (slots; a pruned node still owns one), the target sees those that were kept, best first (``Proposal``).
Once the target has drawn, ``descend`` leaves what stands below its draws: the next round's tree, grown ahead.
May not go in: asyncio, clocks, randomness, tensors.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf

from aspec.errors import InternalError, NumericError

ROOT = -1  # the last committed token: the parent of the first nodes
ROUNDING = 1e-3  # in nats: how far above 0 a log score may stand by rounding alone


@dataclass(slots=True)
class Node:
    """A proposed token; mutable, because it is scored, fed and pruned after it was added."""

    token: int
    parent: int  # a smaller node index, or ROOT; never changes
    depth: int  # 1 for the children of the root; never changes
    edge: float  # log probability given that the parent is accepted, at most 0
    score: float  # the sum of the edges from the root
    draft_score: float | None = None  # the draft's own log score, before any calibration; None: it made no offer
    ngram_score: float | None = None  # the log score of a branch that came without the draft; None: in no branch
    slot: int = -1  # place in the draft's KV behind the committed tokens; -1 until it is fed
    kept: bool = True  # False once pruned; then no descendant is kept either

    @property
    def order(self) -> tuple[float, int, int, int]:
        """What nodes are sorted by, best first: score, then small depth, small parent, small token id."""
        return -self.score, self.depth, self.parent, self.token


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the target verifies: N nodes, best first, parents before children; any prefix of it is a tree as well."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]  # places in this proposal, ROOT for the last committed token
    depths: tuple[int, ...]  # 1 for the children of the root: the position behind the last committed token
    scores: tuple[float, ...]  # log path probabilities, descending
    draft_score: tuple[float | None, ...]  # the draft's log score of each node given its parent, as the draft gave it
    ngram_score: tuple[float | None, ...]  # the same of branches that came without the draft

    def first(self, num_nodes: int) -> "Proposal":
        """The best ``num_nodes`` of it: a tree as well, since parents come before their children."""
        cut = slice(num_nodes)
        return Proposal(
            self.tokens[cut],
            self.parents[cut],
            self.depths[cut],
            self.scores[cut],
            self.draft_score[cut],
            self.ngram_score[cut],
        )

    def follow(self, draws: Sequence[int]) -> tuple[list[int], list[int]]:
        """The accepted path (places in this proposal) and the emitted tokens: the path's and the one drawn after it.

        ``draws[0]`` is the target's token after the last committed one, ``draws[1 + i]`` the one after node ``i``.
        Every emitted token is the target's own draw at its own prefix, whatever the tree.
        """
        if len(draws) != len(self.tokens) + 1:
            raise ValueError(f"expected a draw at the root and at each of {len(self.tokens)} nodes, found {len(draws)}")
        children = {(parent, self.tokens[place]): place for place, parent in enumerate(self.parents)}
        at, path, emitted = ROOT, [], [draws[0]]
        while (child := children.get((at, draws[at + 1]))) is not None:
            at = child
            path.append(child)
            emitted.append(draws[child + 1])
        return path, emitted

    def verdicts(self, path: Sequence[int]) -> list[tuple[int, bool]]:
        """(place, accepted) of each node whose parent was accepted: all that a verified path tells of the draft."""
        accepted = {ROOT, *path}
        return [(place, place in accepted) for place, parent in enumerate(self.parents) if parent in accepted]


class Tree:
    """Grows one row's proposal; the kept nodes are always the best ``budget`` of all paths offered so far."""

    def __init__(
        self,
        max_depth: int,
        end_ids: Collection[int] = frozenset(),
        log_probability: Callable[[float], float] | None = None,
        log_ngram: Callable[[float], float] | None = None,
    ) -> None:
        """A tree of paths of at most ``max_depth`` tokens, none of which is in ``end_ids``.

        A node for a token that ends the sequence would gain nothing: the draw at its parent emits that token anyway.
        ``log_probability`` maps the draft's log score of a child to the log chance of its acceptance, in ascending
        order (``Calibration.log_probability``); without it scores are taken as they are. ``log_ngram`` does so for
        branches that come without the draft.
        """
        self.nodes: list[Node] = []  # in order of addition, parents before children; nothing is ever removed
        self.slots: list[int] = []  # the nodes fed to the draft, in that order: slot -> node
        self._max_depth = max_depth
        self._end_ids = frozenset(end_ids)
        self._log_probability, self._log_ngram = log_probability, log_ngram
        self._root_fed = False
        self._budget: int | None = None  # of the latest prune
        self._kept: list[int] = []  # the kept nodes, best first
        self._children: dict[tuple[int, int], int] = {}  # (parent, token) -> node, of all nodes
        self._offers: dict[
            tuple[int, int], tuple[float, float]
        ] = {}  # (parent, token) -> (edge, draft_score), unpruned
        self._offered: dict[int, list[tuple[int, float, float]]] = {}  # node -> (token, edge, draft_score), all ever

    def __len__(self) -> int:
        """Kept nodes."""
        return len(self._kept)

    # -- growth ----------------------------------------------------------------------------------------------

    def frontier(self, beams: int) -> list[int]:
        """At most ``beams`` nodes worth a draft forward, best first; ROOT alone at first; empty: the tree is grown.

        Their parents have been fed, they are above the depth cap, and a child of theirs could still beat the worst
        kept node if the budget is used up.
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
            waits = node.slot < 0 and node.depth < self._max_depth and self._is_fed(node.parent)
            if waits and (-node.score, node.depth + 1, index, -1) < worst:  # the best place a child could take
                found.append(index)
        return found

    def feed(self, nodes: Sequence[int]) -> list[int]:
        """The draft's slots of nodes that go through it now, in this order; -1 for ROOT, which is committed."""
        for index in nodes:
            if index == ROOT:
                self._root_fed = True
                continue
            node = self.nodes[index]
            if node.slot >= 0 or not node.kept or not self._is_fed(node.parent):
                raise InternalError(f"node {index} cannot be fed: expected a kept node, its parent fed, found {node}")
            node.slot = len(self.slots)
            self.slots.append(index)
        return [self._slot(index) for index in nodes]

    def extend(self, node: int, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Take the draft's offers at one fed node: tokens and their log scores given that node, in any order.

        Scores are at most 0 (rounding above is cut); -inf marks a banned token, which is left out, as is what could
        not enter a budget like the last one. The others wait for ``prune``. Raises NumericError for NaN and +inf.
        """
        if not self._is_fed(node):
            raise InternalError(f"node {node} was extended before it was fed to the draft")
        if node != ROOT and (not self.nodes[node].kept or self.nodes[node].depth >= self._max_depth):
            return
        above, floor = self._score(node), -self._worst()[0]
        offers = self._offered.setdefault(node, [])
        for token, score in zip(tokens, scores, strict=True):
            draft_score, place = _checked(score), (node, token)
            if draft_score == -inf or token in self._end_ids:
                continue
            edge = draft_score if self._log_probability is None else min(0.0, self._log_probability(draft_score))
            offers.append((token, edge, draft_score))
            if above + edge < floor and place not in self._children:
                continue
            if place not in self._offers or draft_score > self._offers[place][1]:
                self._offers[place] = edge, draft_score

    def add_branch(self, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Add a path from the root that came without the draft, with its log score at each token given those before.

        Nodes that exist are shared and keep the better of both scores. The branch ends at an end token or at the
        depth cap. The budget may be passed until the next ``prune``.
        """
        at = ROOT
        for token, score in zip(tokens, scores, strict=True):
            ngram_score = _checked(score)
            if ngram_score == -inf or token in self._end_ids or self._depth(at) >= self._max_depth:
                break
            edge = ngram_score if self._log_ngram is None else min(0.0, self._log_ngram(ngram_score))
            child = self._children.get((at, token))
            if child is None:
                child = self._add(at, token, edge)
            node = self.nodes[child]
            node.kept = True  # it may have been pruned before; its ancestors are kept again by now
            node.ngram_score = ngram_score if node.ngram_score is None else max(node.ngram_score, ngram_score)
            self._raise_edge(child, edge)
            at = child
        self._sort()

    def prune(self, budget: int) -> int:
        """Keep the best ``budget`` of all nodes and offers; returns how many of the offers became nodes.

        Ancestor-closed by construction: no score is above its parent's, and the parent's depth is smaller. Numbers
        follow the nodes' order, so they do not depend on the order of ``extend``.
        """
        budget = max(0, budget)
        revived = self._settle_known()
        kept = [(*self.nodes[index].order, index) for index in self._kept]
        fresh = [
            (-self._score(parent) - edge, self._depth(parent) + 1, parent, token, ROOT)
            for (parent, token), (edge, _) in self._offers.items()
        ]
        ranked = sorted(kept + fresh)  # no two have the same parent and token, so the index never decides
        for *_, index in ranked[budget:]:
            if index != ROOT:
                self.nodes[index].kept = False
        before = len(self.nodes)
        self._kept = [
            self._add(parent, token, *self._offers[parent, token]) if index == ROOT else index
            for _, _, parent, token, index in ranked[:budget]
        ]
        self._offers.clear()
        self._budget = budget
        return len(self.nodes) - before + sum(self.nodes[index].kept for index in revived)

    # -- between rounds --------------------------------------------------------------------------------------

    def reopen(self, max_depth: int) -> None:
        """Take back all that pruning dropped, up to another depth cap: what the draft has seen, and its offers there.

        For a larger budget than before; ``prune`` follows.
        """
        self._max_depth = max_depth
        for node in self.nodes:
            node.kept = (node.kept or node.slot >= 0) and node.depth <= max_depth  # ancestors of what is fed are fed
        self._sort()
        for parent, offers in self._offered.items():
            if self._depth(parent) < max_depth:
                kept = [self._children.get((parent, token)) for token, _, _ in offers]
                self._offers |= {
                    (parent, token): (edge, draft_score)
                    for child, (token, edge, draft_score) in zip(kept, offers, strict=True)
                    if child is None or not self.nodes[child].kept
                }

    def descend(self, tokens: Sequence[int]) -> tuple[list[int], "Tree | None"]:
        """The target drew ``tokens`` behind the root: what of this tree outlives them.

        Returns the draft's slots of those tokens, as far as it has seen them, and then the tree below the last one,
        followed in the list by the slots of its nodes; None where the draft has not seen them all. Scores are as if
        that token had been the root. Everything is there again that the draft ever draft_score: ``prune`` follows.
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
        below._offered = {places[node]: offers for node, offers in self._offered.items() if node in places}
        seen = [index for index in self.slots if places.get(index, ROOT) != ROOT]
        below.feed([places[index] for index in seen])
        below.reopen(self._max_depth)
        return slots + [self.nodes[index].slot for index in seen], below

    # -- what has grown --------------------------------------------------------------------------------------

    def proposal(self) -> Proposal:
        """The kept nodes as the target verifies them."""
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
        """The tokens from behind the last committed one to a node; of ROOT none."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.nodes[node].token)
            node = self.nodes[node].parent
        return tuple(reversed(tokens))

    def slot_parents(self) -> list[int]:
        """For every slot that of the node's parent, -1 for the root: the ancestry the draft's mask is built from."""
        return [self._slot(self.nodes[index].parent) for index in self.slots]

    def probabilities(self) -> list[float]:
        """Path probabilities of the kept nodes, descending."""
        return [exp(self.nodes[index].score) for index in self._kept]

    def gain_bound(self, beams: int) -> float:
        """The most tokens one more level can gain: the probability that the next frontier is reached at all."""
        return sum(exp(self._score(index)) for index in self.frontier(beams))

    def validate(self) -> None:
        """Check the invariants; tests call it after every step."""
        for index, node in enumerate(self.nodes):
            assert ROOT <= node.parent < index, "parents come before their children"
            assert self._children[node.parent, node.token] == index, "no token stands twice under one parent"
            assert node.depth == self._depth(node.parent) + 1
            assert node.depth <= self._max_depth or not node.kept, "kept nodes are above the depth cap"
            assert node.edge <= 0.0
            assert node.score == self._score(node.parent) + node.edge
            assert node.token not in self._end_ids
            parent_kept = node.parent == ROOT or self.nodes[node.parent].kept
            assert parent_kept or not node.kept, "an ancestor of a kept node is kept"
            assert node.slot < 0 or self._slot(node.parent) < node.slot, "the draft saw the parent first"
        assert sorted(self._kept) == [index for index, node in enumerate(self.nodes) if node.kept]
        orders = [self.nodes[index].order for index in self._kept]
        assert all(a < b for a, b in pairwise(orders)), "the kept nodes stand best first"
        assert [self.nodes[index].slot for index in self.slots] == list(range(len(self.slots)))

    # -- nodes -----------------------------------------------------------------------------------------------

    def _add(self, parent: int, token: int, edge: float, draft_score: float | None = None) -> int:
        index = len(self.nodes)
        self.nodes.append(Node(token, parent, self._depth(parent) + 1, edge, self._score(parent) + edge, draft_score))
        self._children[parent, token] = index
        return index

    def _settle_known(self) -> list[int]:
        """Take the offers that name an existing node off the list; returns those among them that were pruned."""
        known = [place for place in self._offers if place in self._children]
        revived: list[int] = []
        for place in known:
            child = self._children[place]
            edge, self.nodes[child].draft_score = self._offers.pop(place)
            self._raise_edge(child, edge)
            if not self.nodes[child].kept:
                self.nodes[child].kept = True
                revived.append(child)
        self._kept += revived
        return revived

    def _raise_edge(self, index: int, edge: float) -> None:
        """Let a node and its descendants gain from a better score; the kept nodes are to be sorted afterwards."""
        if edge > self.nodes[index].edge:
            self.nodes[index].edge = edge
            for node in self.nodes[index:]:
                node.score = self._score(node.parent) + node.edge

    def _sort(self) -> None:
        kept = (index for index, node in enumerate(self.nodes) if node.kept)
        self._kept = sorted(kept, key=lambda index: self.nodes[index].order)

    def _worst(self) -> tuple[float, int, int, int]:
        """The order of the last node inside the budget; while there is room, one that everything comes before."""
        if not self._budget or len(self._kept) < self._budget:
            return inf, 0, 0, 0
        return self.nodes[self._kept[self._budget - 1]].order

    def _expect_pruned(self) -> None:
        if self._offers or (self._budget is not None and len(self._kept) > self._budget):
            raise InternalError(
                f"{len(self._kept)} nodes with {len(self._offers)} offers for a budget of {self._budget}: expected "
                f"prune() before the tree is read"
            )

    def _is_fed(self, index: int) -> bool:
        return self._root_fed if index == ROOT else self.nodes[index].slot >= 0

    def _slot(self, index: int) -> int:
        return -1 if index == ROOT else self.nodes[index].slot

    def _score(self, index: int) -> float:
        return 0.0 if index == ROOT else self.nodes[index].score

    def _depth(self, index: int) -> int:
        return 0 if index == ROOT else self.nodes[index].depth


def _checked(score: float) -> float:
    """A log score, at most 0. Raises NumericError for NaN and +inf, ValueError for what rounding does not explain."""
    if score <= 0.0:
        return score
    if score < ROUNDING:
        return 0.0
    if score < inf:
        raise ValueError(f"a log score of {score}: expected at most 0, a probability's logarithm")
    raise NumericError(f"a log score of {score}: expected a finite number or -inf; the draft's logits are damaged")
