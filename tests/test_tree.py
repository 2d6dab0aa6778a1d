"""Draft trees: the kept nodes are the best of all paths, and the target's draws pick the path."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aspec.errors import InternalError, NumericError
from aspec.speculation.candidates import best_children
from aspec.speculation.proposal import ROOT
from aspec.speculation.tree import Tree

NAN, INF = math.nan, math.inf


pytestmark = pytest.mark.usefixtures("one_thread")


def random_draft(seed, vocab, sharpness=1.0):
    """Log probabilities of the next token as a function of the path alone."""

    def draft(path):
        source = random.Random(f"{seed} {path}")
        weights = [math.exp(sharpness * source.gauss(0, 1.5)) for _ in range(vocab)]
        return [math.log(weight / sum(weights)) for weight in weights]

    return draft


def uniform_draft(vocab):
    return lambda path: [-math.log(vocab)] * vocab


def certain_draft(vocab):
    return lambda path: [0.0 if token == 0 else -INF for token in range(vocab)]


def path_of(tree, index):
    path = []
    while index != ROOT:
        path.append(tree.nodes[index].token)
        index = tree.nodes[index].parent
    return tuple(reversed(path))


def grow(draft, budget, *, beams=10**6, width=10**6, max_depth=4, shuffle=None, tree=None, **options):
    """The whole loop of a round; ``shuffle`` changes the order of offers, which must not matter."""
    tree = Tree(max_depth, **options) if tree is None else tree
    while nodes := tree.frontier(beams):
        assert len(nodes) <= beams
        before = len(tree.slots)
        assert tree.feed(nodes) == [-1 if node == ROOT else before + i for i, node in enumerate(nodes)]
        if shuffle:
            shuffle.shuffle(nodes)
        for node in nodes:
            offers = sorted(enumerate(draft(path_of(tree, node))), key=lambda pair: (-pair[1], pair[0]))[:width]
            if shuffle:
                shuffle.shuffle(offers)
            tree.extend(node, [token for token, _ in offers], [score for _, score in offers])
        tree.prune(budget)
        tree.validate()
        assert len(tree) <= budget
    return tree


def draft_behind(draft, tokens):
    return lambda path: draft((*tokens, *path))


def children(path, vocab):
    return [(*path, token) for token in range(vocab)]


def path_score(draft, path, start):
    """The log probability of what stands behind the first ``start`` tokens."""
    return sum(draft(path[:end])[path[end]] for end in range(start, len(path)))


def proposed_slots(tree):
    return [tree.nodes[node].slot for node in tree._kept]


def kept_paths(tree):
    return {path_of(tree, index) for index, node in enumerate(tree.nodes) if node.kept}


def brute_force(draft, vocab, budget, width, max_depth):
    """The best ``budget`` of all paths within the width, by enumeration."""
    scores = {(): 0.0}
    for depth in range(max_depth):
        for path in [path for path in scores if len(path) == depth]:
            ranked = sorted(enumerate(draft(path)), key=lambda pair: (-pair[1], pair[0]))[:width]
            scores |= {(*path, token): scores[path] + edge for token, edge in ranked if edge > -INF}
    del scores[()]
    return dict(sorted(scores.items(), key=lambda pair: (-pair[1], len(pair[0])))[:budget])


# -- growth ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 5),
    budget=st.integers(1, 60),
    beams=st.sampled_from([1, 2, 3, 10**6]),
    width=st.sampled_from([1, 2, 10**6]),
    max_depth=st.integers(1, 4),
    sharpness=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_the_kept_nodes_are_the_best_of_all_paths(seed, vocab, budget, beams, width, max_depth, sharpness):
    """However few are expanded at a time: a good path's ancestors are at least as good, so none is ever lost."""
    draft = random_draft(seed, vocab, sharpness)
    tree = grow(draft, budget, beams=beams, width=width, max_depth=max_depth)
    best = brute_force(draft, vocab, budget, width, max_depth)
    assert kept_paths(tree) == set(best)
    assert 1 + sum(tree.probabilities()) == pytest.approx(1 + sum(math.exp(score) for score in best.values()))
    assert tree.probabilities() == sorted(tree.probabilities(), reverse=True)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 6),
    budget=st.integers(1, 40),
    beams=st.integers(1, 8),
    ties=st.booleans(),
)
def test_the_order_of_offers_changes_nothing(seed, vocab, budget, beams, ties):
    draft = uniform_draft(vocab) if ties else random_draft(seed, vocab)
    plain = grow(draft, budget, beams=beams)
    for start in range(3):
        other = grow(draft, budget, beams=beams, shuffle=random.Random(seed + start))
        assert other.nodes == plain.nodes
        assert other.slots == plain.slots
        assert other.proposal() == plain.proposal()


@pytest.mark.parametrize("beams", [1, 3, 100])
@pytest.mark.parametrize("budget", [1, 2, 7, 8, 9, 64, 100])
def test_uniform_drafts_never_pass_the_budget_and_ties_go_to_small_depth_parent_and_token(budget, beams):
    tree = grow(uniform_draft(8), budget, beams=beams, max_depth=3)
    assert len(tree) == budget
    expected = [path for depth in (1, 2, 3) for path in itertools.product(range(8), repeat=depth)][:budget]
    proposal = tree.proposal()
    assert [place_path(proposal, place) for place in range(budget)] == expected


@pytest.mark.parametrize("budget", [1, 3, 5, 9])
def test_a_certain_draft_makes_a_chain_of_score_zero(budget):
    tree = grow(certain_draft(4), budget, max_depth=5)
    proposal = tree.proposal()
    depth = min(budget, 5)
    assert proposal.tokens == (0,) * depth
    assert proposal.parents == tuple(range(-1, depth - 1))
    assert 1 + sum(tree.probabilities()) == 1 + depth


def test_equal_scores_are_taken_from_the_root_down():
    """Ties through log-prob 0: a deeper node never displaces a shallower one, and gives way to it."""
    scores = {(): [-1.0, -1.0], (0,): [0.0, -INF], (0, 0): [0.0, -INF], (1,): [0.0, -INF]}
    tree = grow(lambda path: scores.get(path, [-INF, -INF]), 4, beams=1)
    assert kept_paths(tree) == {(0,), (1,), (0, 0), (1, 0)}
    late = Tree(4)
    late.add_branch([0, 0, 0], [-1.0, 0.0, 0.0])
    late.feed([ROOT])
    late.extend(ROOT, [0, 1], [-1.0, -1.0])
    assert late.prune(3) == 1
    late.validate()
    assert kept_paths(late) == {(0,), (1,), (0, 0)}


def test_width_and_beams_of_one_make_a_chain():
    draft = random_draft(1, 9)
    tree = grow(draft, 6, beams=1, width=1, max_depth=6)
    proposal = tree.proposal()
    assert proposal.parents == (-1, 0, 1, 2, 3, 4)
    assert proposal.depths == (1, 2, 3, 4, 5, 6)
    assert proposed_slots(tree) == [0, 1, 2, 3, 4, -1], "the leaf was never fed"
    greedy = []
    for _ in range(6):
        row = draft(tuple(greedy))
        greedy.append(row.index(max(row)))
    assert list(proposal.tokens) == greedy


@pytest.mark.parametrize(("vocab", "width", "max_depth"), [(3, 10**6, 2), (3, 2, 3), (1, 4, 4)])
def test_a_budget_beyond_reach_takes_every_path(vocab, width, max_depth):
    tree = grow(random_draft(3, vocab), 10**4, width=width, max_depth=max_depth)
    branching = min(vocab, width)
    assert len(tree) == sum(branching**depth for depth in range(1, max_depth + 1))


def test_depth_one_needs_one_forward():
    tree = grow(random_draft(5, 40), 16, max_depth=1)
    assert set(tree.proposal().parents) == {ROOT}
    assert tree.slots == []


def test_nothing_grows_without_budget_depth_or_beams():
    assert len(grow(uniform_draft(4), 0)) == 0
    assert Tree(0).frontier(4) == []
    assert Tree(3).frontier(0) == []
    assert Tree(3).proposal().follow([7]) == ([], [7])
    assert Tree(3).probabilities() == []


def test_an_older_node_is_expanded_after_deeper_ones():
    """One beam: the better child's child is fed before the one that was passed over; slots tell that order."""
    scores = {(): [-0.5, -0.9], (0,): [-0.1, -2.0], (1,): [-0.05, -3.0]}
    tree = grow(lambda path: scores.get(path, [-9.0, -9.0]), 6, beams=1, max_depth=3)
    assert [path_of(tree, node) for node in tree.slots] == [(0,), (0, 0), (1,), (1, 0), (0, 1)]
    assert tree.slot_parents() == [-1, 0, -1, 2, 0]
    assert [place_path(tree.proposal(), place) for place in range(6)] == [(0,), (0, 0), (1,), (1, 0), (0, 1), (1, 1)]
    assert proposed_slots(tree) == [0, 1, 2, 3, 4, -1]


def test_a_pruned_node_keeps_its_slot_and_loses_its_descendants():
    tree = Tree(4)
    tree.feed(tree.frontier(9))
    tree.extend(ROOT, [0, 1], [-0.6, -0.8])
    assert tree.prune(3) == 2
    assert tree.feed(tree.frontier(9)) == [0, 1]
    tree.extend(0, [5, 6], [-0.1, -0.1])
    tree.extend(1, [7], [-0.01])
    assert tree.prune(2) == 1
    tree.validate()
    assert kept_paths(tree) == {(0,), (0, 5)}
    assert tree.slots == [0, 1]
    assert not tree.nodes[1].kept
    assert proposed_slots(tree) == [0, -1]
    assert tree.frontier(9) == [], "a child of the worst kept node cannot beat it"


def test_growth_ends_where_nothing_can_improve():
    tree = Tree(9)
    tree.feed(tree.frontier(1))
    tree.extend(ROOT, [0, 1, 2], [-0.1, -3.0, -5.0])
    tree.prune(3)
    assert tree.frontier(9) == [0, 1], "below the worst kept node there is nothing to find"
    assert tree.gain_bound(9) == pytest.approx(math.exp(-0.1) + math.exp(-3.0))
    tree.feed([0, 1])
    tree.extend(0, [0], [-8.0])
    assert tree.prune(3) == 0
    assert tree.frontier(9) == []


def test_a_later_cut_keeps_the_best_part():
    tree = grow(random_draft(11, 5), 40)
    whole = tree.proposal()
    for size in (40, 17, 3, 1, 0):
        tree.prune(size)
        tree.validate()
        cut = tree.proposal()
        assert cut.tokens == whole.tokens[:size]
        assert cut.parents == whole.parents[:size]


def test_end_tokens_are_neither_offered_nor_expanded():
    tree = grow(random_draft(2, 4), 1000, end_ids=[1, 3])
    assert {node.token for node in tree.nodes} == {0, 2}
    assert len(tree) == 2 + 4 + 8 + 16
    tree.add_branch([0, 2, 1, 0], [-0.1] * 4)
    tree.validate()
    assert len(tree) == 30


def test_banned_tokens_are_never_offered_and_damaged_scores_raise():
    tree = Tree(3)
    with pytest.raises(InternalError, match="before it was fed"):
        tree.extend(ROOT, [1], [-1.0])
    tree.feed([ROOT])
    tree.extend(ROOT, [1, 2, 3], [-INF, -0.5, 1e-6])
    for wrong in (NAN, INF):
        with pytest.raises(NumericError):
            tree.extend(ROOT, [4], [wrong])
    with pytest.raises(ValueError, match="at most 0"):
        tree.extend(ROOT, [4], [0.5])
    with pytest.raises(InternalError, match="prune"):
        tree.frontier(1)
    with pytest.raises(InternalError, match="prune"):
        tree.proposal()
    tree.prune(9)
    assert tree.proposal().tokens == (3, 2)
    assert tree.proposal().scores == (0.0, -0.5), "rounding above 0 is cut"
    tree.feed([0])
    for wrong in (0, 2):
        with pytest.raises((InternalError, IndexError)):
            tree.feed([wrong])


def test_a_token_offered_twice_stands_once_with_its_better_score():
    tree = Tree(3)
    tree.feed([ROOT])
    tree.extend(ROOT, [1, 1, 2], [-2.0, -1.0, -1.5])
    tree.extend(ROOT, [2], [-0.2])
    tree.prune(9)
    assert tree.proposal().tokens == (2, 1)
    assert tree.proposal().scores == (-0.2, -1.0)


def test_calibration_orders_the_tree_and_the_draft_score_stays_known():
    tree = grow(random_draft(4, 3), 20, log_probability=lambda score: 2.0 * score, max_depth=3)
    proposal = tree.proposal()
    for place, parent in enumerate(proposal.parents):
        above = 0.0 if parent == ROOT else proposal.scores[parent]
        assert proposal.scores[place] == pytest.approx(above + 2.0 * proposal.draft_score[place])
    assert 1 + sum(tree.probabilities()) == pytest.approx(1 + sum(map(math.exp, proposal.scores)))


def add_branches(tree, branches, source):
    for tokens in branches:
        tree.add_branch(tokens, [-source.random() * 3 for _ in tokens])
        tree.validate()


# -- branches ----------------------------------------------------------------------------------------------


def test_a_branch_shares_what_exists_and_the_draft_goes_on_from_it():
    tree = Tree(5)
    tree.add_branch([1, 2, 3], [-0.5, -0.5, -0.5])
    tree.add_branch([1, 2, 4], [-0.4, -0.9, -0.1])
    assert kept_paths(tree) == {(1,), (1, 2), (1, 2, 3), (1, 2, 4)}
    assert [tree.nodes[i].edge for i in range(3)] == [-0.4, -0.5, -0.5], "the better of two scores counts"
    tree.validate()
    assert tree.frontier(9) == [ROOT]
    tree.feed([ROOT])
    tree.extend(ROOT, [1, 9], [-0.2, -3.0])
    assert tree.prune(9) == 1, "token 1 stood there already"
    tree.validate()
    assert tree.nodes[0].score == -0.2
    assert tree.nodes[1].score == pytest.approx(-0.7), "descendants gain too"
    assert tree.frontier(9) == [0, 4], "a branch goes through the draft from its beginning"
    proposal = tree.proposal()
    by_token = dict(zip(proposal.tokens, zip(proposal.draft_score, proposal.ngram_score, strict=True), strict=True))
    assert by_token[1] == (-0.2, -0.4)
    assert by_token[9] == (-3.0, None)
    assert by_token[4] == (None, -0.1)


def test_a_branch_counts_against_the_budget_and_revives_what_was_pruned():
    tree = grow(random_draft(8, 6), 4, max_depth=3)
    worst = next(index for index, node in enumerate(tree.nodes) if node.depth == 1 and node.kept)
    first = tree.nodes[worst].token
    tree.prune(0)
    assert kept_paths(tree) == set()
    tree.prune(2)
    tree.add_branch([first, 1, 1, 1], [-0.001] * 4)
    tree.validate()
    with pytest.raises(InternalError, match="prune"):
        tree.frontier(1)
    tree.prune(2)
    tree.validate()
    assert kept_paths(tree) == {(first,), (first, 1)}


def test_a_pruned_branch_node_comes_back_when_the_draft_offers_it():
    tree = Tree(3)
    tree.add_branch([1, 2], [-0.1, -5.0])
    tree.feed([ROOT])
    tree.extend(ROOT, [3], [-1.0])
    tree.prune(2)
    assert kept_paths(tree) == {(1,), (3,)}
    tree.feed([0])
    tree.extend(0, [2], [-0.05])
    assert tree.prune(2) == 1
    tree.validate()
    assert kept_paths(tree) == {(1,), (1, 2)}


def test_a_branch_ends_at_the_depth_cap_and_at_a_banned_token():
    tree = Tree(2)
    tree.add_branch([1, 2, 3], [-0.1, -0.1, -0.1])
    tree.add_branch([4, 5], [-0.1, -INF])
    assert kept_paths(tree) == {(1,), (1, 2), (4,)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=8),
    st.integers(0, 12),
    st.integers(0, 10**6),
)
def test_branches_and_growth_together_keep_the_invariants(branches, budget, seed):
    tree, source = Tree(4), random.Random(seed)
    add_branches(tree, branches[::2], source)
    tree.prune(budget)
    grow(random_draft(seed, 4), budget, beams=2, tree=tree)
    add_branches(tree, branches[1::2], source)
    tree.prune(budget)
    tree.validate()
    grow(random_draft(seed, 4), budget, beams=2, tree=tree)
    assert len(tree) <= budget


def as_it_is(score):
    return score


def branched(tree):
    """The probability of all nodes below each node that a branch runs through."""
    through = {node.parent for node in tree.nodes if node.ngram_score is not None}
    return [sum(math.exp(node.edge) for node in tree.nodes if node.parent == parent) for parent in through]


def test_a_branch_and_a_draft_that_contradict_each_other_share_one_certainty():
    """Both are sure, of different tokens: one of them is wrong. The surer one is believed, with all that follows it."""
    tree = Tree(4, log_probability=as_it_is, log_ngram=as_it_is)
    tree.add_branch([1, 2, 3], [math.log(0.9)] * 3)
    tree.feed([ROOT])
    tree.extend(ROOT, [4, 5], [math.log(0.95), math.log(0.03)])
    tree.prune(9)
    tree.validate()
    assert max(branched(tree)) == pytest.approx(1.0)
    shares = {node.token: math.exp(node.edge) for node in tree.nodes if node.parent == ROOT}
    assert shares == pytest.approx({4: 0.95, 1: 0.05 * 0.9 / 0.93, 5: 0.05 * 0.03 / 0.93})
    deepest = next(node for node in tree.nodes if node.token == 3)
    assert math.exp(deepest.score) == pytest.approx(shares[1] * 0.9 * 0.9), "what follows a doubtful token is doubtful"
    assert tree.proposal().tokens[0] == 4
    plain = Tree(4)
    plain.add_branch([1], [math.log(0.9)])
    plain.feed([ROOT])
    plain.extend(ROOT, [4], [math.log(0.95)])
    plain.prune(9)
    assert plain.probabilities() == pytest.approx([0.95, 0.9]), "scores that nobody calibrated stay as they are"


def test_two_branches_share_one_certainty_too():
    tree = Tree(3, log_ngram=as_it_is)
    tree.add_branch([1, 2], [math.log(0.6), math.log(0.5)])
    tree.add_branch([3, 2], [math.log(0.8), math.log(0.5)])
    tree.prune(9)
    tree.validate()
    assert tree.probabilities() == pytest.approx([0.8, 0.4, 0.2, 0.1])


def test_what_a_contradicted_branch_had_displaced_comes_back():
    tree = Tree(3, log_probability=as_it_is, log_ngram=as_it_is)
    tree.add_branch([1, 1, 1], [math.log(0.9)] * 3)
    tree.feed([ROOT])
    tree.extend(ROOT, [1, 2], [math.log(0.9), math.log(0.09)])
    tree.prune(3)
    assert kept_paths(tree) == {(1,), (1, 1), (1, 1, 1)}
    tree.feed([0])
    tree.extend(0, [7], [math.log(0.99)])
    tree.prune(3)
    tree.validate()
    assert kept_paths(tree) == {(1,), (1, 7), (2,)}


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), max_size=4),
    st.integers(1, 30),
    st.integers(0, 10**6),
    st.integers(1, 4),
)
def test_what_a_branch_and_a_draft_promise_together_is_never_more_than_one_token(branches, budget, seed, beams):
    source = random.Random(seed)
    tree = Tree(4, log_probability=lambda score: 0.3 * score, log_ngram=as_it_is)
    add_branches(tree, branches, source)
    tree.prune(budget)
    grow(random_draft(seed, 5), budget, beams=beams, tree=tree)
    assert max(branched(tree), default=0.0) <= 1.0 + 1e-9
    _, below = tree.descend([tree.proposal().tokens[0]])
    if below is not None:
        below.prune(budget)
        grow(draft_behind(random_draft(seed, 5), [tree.proposal().tokens[0]]), budget, beams=beams, tree=below)
        assert max(branched(below), default=0.0) <= 1.0 + 1e-9


# -- the target's answer -----------------------------------------------------------------------------------


def place_path(proposal, place):
    path = []
    while place != ROOT:
        path.append(proposal.tokens[place])
        place = proposal.parents[place]
    return tuple(reversed(path))


def slow_walk(proposal, draws):
    """Emit draws one by one, looking each time for a node whose whole path was emitted."""
    places = {place_path(proposal, place): place for place in range(len(proposal.tokens))}
    emitted, path, draw = [], [], draws[0]
    while True:
        emitted.append(draw)
        place = places.get(tuple(emitted))
        if place is None:
            return path, emitted
        path.append(place)
        draw = draws[place + 1]


def hand_tree():
    """1 -> (2 -> 4, 3), 5: equal tokens under different parents where it hurts."""
    tree = Tree(3)
    tree.add_branch([1, 2, 4], [-0.1, -0.2, -0.3])
    tree.add_branch([1, 5], [-0.1, -0.9])
    tree.add_branch([5, 2], [-2.0, -0.1])
    return tree.proposal()


@pytest.mark.parametrize(
    ("draws", "emitted"),
    [
        ({}, [0]),
        ({(): 9}, [9]),
        ({(): 2}, [2]),  # 2 stands deeper only
        ({(): 1}, [1, 0]),
        ({(): 1, (1,): 2}, [1, 2, 0]),
        ({(): 1, (1,): 2, (1, 2): 4}, [1, 2, 4, 0]),
        ({(): 1, (1,): 2, (1, 2): 4, (1, 2, 4): 8}, [1, 2, 4, 8]),
        ({(): 1, (1,): 5, (1, 5): 2}, [1, 5, 2]),  # [5, 2] is a path from the root, not from here
        ({(): 5, (5,): 2}, [5, 2, 0]),
        ({(): 9, (1,): 2, (1, 2): 4}, [9]),
    ],
)
def test_follow_by_hand(draws, emitted):
    proposal = hand_tree()
    row = [draws.get((), 0)] + [draws.get(place_path(proposal, place), 0) for place in range(len(proposal.tokens))]
    path, tokens = proposal.follow(row)
    assert tokens == emitted
    assert [proposal.tokens[place] for place in path] == emitted[:-1]


def test_follow_wants_a_draw_for_every_node():
    with pytest.raises(ValueError, match="at each of 6 nodes"):
        hand_tree().follow([1, 2])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 3), budget=st.integers(0, 40), beams=st.integers(1, 5))
def test_follow_equals_a_slow_walk_and_knows_what_the_draft_has_seen(seed, vocab, budget, beams):
    source = random.Random(seed)
    tree = grow(random_draft(seed, vocab), budget, beams=beams, max_depth=6)
    tree.prune(source.randint(0, budget))
    proposal = tree.proposal()
    for _ in range(5):
        draws = [source.randrange(vocab) for _ in range(len(proposal.tokens) + 1)]
        path, emitted = proposal.follow(draws)
        assert (path, emitted) == slow_walk(proposal, draws)
        slots, below = tree.descend(emitted)
        standing = slots[: len(emitted)] if below is not None else slots
        assert [tree.nodes[tree.slots[slot]].token for slot in standing] == emitted[: len(standing)]
        above = [-1, *standing]
        assert [tree.slot_parents()[slot] for slot in standing] == above[: len(standing)]
        assert slots == sorted(set(slots)), "gathering keeps their order"


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 30), beams=st.integers(1, 5))
def test_what_stands_below_the_draws_is_a_tree_of_its_own(seed, budget, beams):
    """Once pruned it is what growing from there with the same forwards would have given; the KV moves with it."""
    draft = random_draft(seed, 3)
    tree = grow(draft, budget, beams=beams, max_depth=5)
    fed = {path_of(tree, node): tree.nodes[node].slot for node in tree.slots}
    source = random.Random(seed)
    for _ in range(5):
        emitted = tuple(source.randrange(3) for _ in range(source.randint(1, 3)))
        slots, below = tree.descend(emitted)
        assert (below is not None) == (emitted in fed)
        if below is None:
            continue
        below.prune(budget)
        below.validate()
        assert slots == sorted(set(slots)), "gathering keeps their order"
        behind = [fed[path] for path in sorted(fed, key=fed.get) if path[: len(emitted)] == emitted and path != emitted]
        assert slots == [fed[emitted[:end]] for end in range(1, len(emitted) + 1)] + behind
        assert [fed[emitted + path_of(below, node)] for node in below.slots] == behind
        seen = [path for path in fed if path[: len(emitted)] == emitted]
        scores = {path: path_score(draft, path, len(emitted)) for one in seen for path in children(one, 3)}
        best = sorted(scores, key=lambda path: -scores[path])[:budget]
        assert {emitted + path for path in kept_paths(below)} == set(best)
        regrown = grow(draft_behind(draft, emitted), budget, beams=beams, max_depth=5, tree=below)
        regrown.validate()


def test_a_tree_reopened_has_all_that_was_ever_offered():
    draft = random_draft(7, 5)
    tree = grow(draft, 6, max_depth=4)
    lean = tree.proposal()
    assert tree.frontier(9) == []
    tree.reopen(4)
    tree.prune(12)
    tree.validate()
    assert len(tree) == 12
    assert tree.proposal().tokens[:6] == lean.tokens
    assert tree.frontier(9), "below what is new there is room to grow"


def test_another_depth_cap_drops_what_is_deeper():
    tree = grow(uniform_draft(2), 30, max_depth=4)
    tree.reopen(2)
    tree.prune(30)
    tree.validate()
    assert max(tree.proposal().depths) == 2
    assert tree.frontier(9) == []
    tree.reopen(3)
    tree.prune(30)
    assert max(tree.proposal().depths) == 3


def test_verdicts_judge_each_child_of_what_was_accepted():
    proposal = hand_tree()
    named = {place_path(proposal, place): place for place in range(6)}
    path = [named[1,], named[1, 2]]
    told = dict(proposal.verdicts(path))
    expected = {(1,): True, (5,): False, (1, 2): True, (1, 5): False, (1, 2, 4): False}
    assert told == {named[nodes]: accepted for nodes, accepted in expected.items()}
    assert {place for place, _ in proposal.verdicts([])} == {named[1,], named[5,]}


# -- children from logits ----------------------------------------------------------------------------------


def slow_children(row, width):
    ranked = sorted(((-score, token) for token, score in enumerate(row) if score > -INF))[:width]
    return [token for _, token in ranked]


@pytest.mark.parametrize("width", [1, 2, 7, 30, 31, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_children_are_the_best_by_log_softmax(width, dtype):
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(width)).mul(3).to(dtype)
    tokens, scores = best_children(logits, width)
    assert tokens.shape == scores.shape == (6, min(width, 30))
    assert tokens.dtype == torch.int64
    expected = logits.float().log_softmax(-1)
    assert torch.allclose(scores, expected.gather(1, tokens), atol=1e-6)
    assert tokens.tolist() == [slow_children(row, width) for row in logits.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=12), st.integers(1, 14))
def test_ties_go_to_the_smaller_id(values, width):
    tokens, _ = best_children(torch.tensor([values, values], dtype=torch.float32), width)
    assert tokens.tolist() == [slow_children(values, width)] * 2


def test_banned_ids_and_padding_are_never_offered():
    logits = torch.zeros(2, 8)
    logits[0, 2:] = -INF
    logits[1, 7] = 50.0
    tokens, scores = best_children(logits, 4, limit=7)
    tree = Tree(2)
    tree.feed([ROOT])
    tree.extend(ROOT, tokens[0].tolist(), scores[0].tolist())
    tree.prune(9)
    assert tree.proposal().tokens == (0, 1)
    assert tokens[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", [NAN, INF])
def test_damaged_logits_raise(damage):
    logits = torch.zeros(3, 5)
    logits[1, 4] = damage
    with pytest.raises(NumericError):
        best_children(logits, 2)
    assert best_children(logits, 2, limit=4)[0].shape == (3, 2)
    with pytest.raises(NumericError):
        best_children(torch.full((1, 5), -INF), 2)


def test_shared_noise_ranks_by_what_the_target_will_draw():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator)
    noise = -(-torch.rand(5, 50, generator=generator).log()).log()
    tokens, scores = best_children(logits, 3, noise, temperature=0.6, sharpness=1.5, limit=38)
    perturbed = (logits[:, :38] / 0.6).log_softmax(-1) + noise[:, :38]
    assert tokens[:, 0].tolist() == perturbed.argmax(-1).tolist(), "the first child is the draft's own draw"
    assert torch.allclose(scores, (1.5 * perturbed).log_softmax(-1).gather(1, tokens), atol=1e-5)
    plain, plain_scores = best_children(logits, 3, temperature=0.6, limit=38)
    assert torch.allclose(plain_scores, (logits[:, :38] / 0.6).log_softmax(-1).gather(1, plain), atol=1e-5)
    assert best_children(logits, 0)[0].shape == (5, 0)
