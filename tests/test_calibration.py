"""Acceptance learnt from verdicts, and the size of a tree chosen by measured cost."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aspec.speculation import calibration as calibration_module
from aspec.speculation.calibration import Calibration, one_of
from aspec.speculation.proposal import ROOT
from aspec.speculation.tree import Tree
from aspec.tasks.cost_model import expected_tokens
from aspec.tasks.draft_sizing import another_level, most_profitable, sizes

INF = math.inf
GRID = [math.log(p) for p in (1e-6, 0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999)] + [0.0]


def learn(calibration, truth, rounds, seed=0, scores=(0.03, 0.1, 0.3, 0.6, 0.9)):
    """``rounds`` of one verdict per score, accepted with the chance ``truth`` gives."""
    source = random.Random(seed)
    for _ in range(rounds):
        for p in scores:
            calibration.observe(math.log(p), source.random() < truth(p))


# -- calibration -------------------------------------------------------------------------------------------


def test_without_observations_the_draft_is_believed():
    calibration = Calibration()
    for p in [i / 1000 for i in range(1, 1000)] + [1e-9, 1e-5, 1.0]:
        assert calibration.probability(math.log(p)) == pytest.approx(p, rel=1e-6, abs=0.0015)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-30.0, 0.0), st.booleans()), max_size=300))
def test_estimates_ascend_and_stay_inside_whatever_is_observed(verdicts):
    calibration = Calibration()
    for log_score, accepted in verdicts:
        calibration.observe(log_score, accepted)
    grid = sorted({*GRID, *(log_score for log_score, _ in verdicts), -40.0, -300.0, *(-i / 7 for i in range(60))})
    estimates = [calibration.probability(log_score) for log_score in grid]
    assert all(0.0 < estimate <= 1.0 for estimate in estimates)
    for (low, below), (high, above) in itertools.pairwise(zip(grid, estimates, strict=True)):
        assert below < above or high - low < 1e-6, "pooled buckets keep the draft's order"
    for log_score, estimate in zip(grid, estimates, strict=True):
        assert calibration.log_probability(log_score) == math.log(estimate) <= 0.0


def test_extreme_scores_do_not_overflow():
    calibration = Calibration()
    for log_score in (-INF, -1e9, -800.0, -1e-300, 0.0):
        calibration.observe(log_score, True)
    assert calibration.probability(-INF) == 0.0
    assert calibration.log_probability(-INF) == -INF
    assert calibration.log_probability(-1e9) == -1e9
    assert -0.01 < calibration.log_probability(0.0) < 0.0


@pytest.mark.parametrize(
    "truth",
    [lambda p: p, lambda p: p**2, lambda p: math.sqrt(p), lambda p: 0.3 * p, lambda p: 0.5],
    ids=["honest", "bold", "shy", "scaled", "constant"],
)
def test_it_converges_to_the_truth(truth):
    mean = dict.fromkeys((0.03, 0.1, 0.3, 0.6, 0.9), 0.0)
    for seed in range(10):
        calibration = Calibration()
        learn(calibration, truth, 400, seed)
        for p in mean:
            mean[p] += calibration.probability(math.log(p)) / 10
    for p, found in mean.items():
        assert found == pytest.approx(truth(p), abs=0.06)


def test_ten_rounds_of_a_chain_teach_most_of_it():
    """A draft that claims 0.9 and is right half the time: 4 proposals a round, judged to the first refusal."""
    errors = []
    for seed in range(20):
        calibration, source = Calibration(), random.Random(seed)
        for _ in range(10):
            for _ in range(4):
                accepted = source.random() < 0.5
                calibration.observe(math.log(0.9), accepted)
                if not accepted:
                    break
        errors.append(calibration.probability(math.log(0.9)) - 0.5)
    assert abs(sum(errors) / len(errors)) < 0.05, "0.4 at the start"
    assert max(errors) < 0.35


def test_a_hostile_draft_is_soon_not_believed():
    calibration = Calibration()
    for _ in range(10):
        for p in (0.9, 0.05):
            calibration.observe(math.log(p), False)
    assert calibration.probability(math.log(0.9)) < 0.2
    for _ in range(200):
        calibration.observe(math.log(0.9), False)
    assert calibration.probability(math.log(0.9)) < 0.06


def test_it_follows_a_drift():
    calibration = Calibration()
    learn(calibration, lambda p: p, 300)
    learn(calibration, lambda p: 0.1, 60, seed=1)
    assert calibration.probability(math.log(0.9)) < 0.5, "60 verdicts later the old ones weigh a third"
    learn(calibration, lambda p: 0.1, 200, seed=2)
    assert calibration.probability(math.log(0.9)) < 0.25
    learn(calibration, lambda p: p, 260, seed=3)
    assert calibration.probability(math.log(0.9)) == pytest.approx(0.9, abs=0.12)


def test_the_same_verdicts_give_the_same_estimates():
    first, second = Calibration(), Calibration()
    for calibration in (first, second):
        learn(calibration, lambda p: p, 50)
        calibration.probability(-1.0)
        learn(calibration, lambda p: p, 50, seed=9)
    assert [first.probability(x) for x in GRID] == [second.probability(x) for x in GRID]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(0, 9), st.floats(-20.0, 0.0), max_size=8))
def test_of_contradicting_claims_the_best_is_believed(claims):
    shares = one_of(claims)
    assert shares.keys() == claims.keys()
    if sum(map(math.exp, claims.values())) <= 1.0:
        assert shares == claims
        return
    assert sum(map(math.exp, shares.values())) <= 1.0 + 1e-5 * len(claims)
    best = min(claims, key=lambda key: (-claims[key], key))
    assert shares[best] == claims[best]
    assert all(shares[key] <= claims[key] for key in claims), "nobody is believed more than he claims"
    others = sorted(claims.keys() - {best}, key=lambda key: claims[key])
    assert all(shares[a] <= shares[b] for a, b in itertools.pairwise(others)), "their order stays"


def test_a_chain_is_priced_as_the_product():
    calibration = Calibration()
    for _ in range(500):
        calibration.observe(math.log(0.6), True)
        calibration.observe(math.log(0.6), True)
        calibration.observe(math.log(0.6), True)
        calibration.observe(math.log(0.6), False)
    chance = calibration.probability(math.log(0.6))
    tree = Tree(5, log_probability=calibration.log_probability)
    while nodes := tree.frontier(1):
        tree.feed(nodes)
        tree.extend(nodes[0], [3], [math.log(0.6)])
        tree.prune(5)
    assert chance == pytest.approx(0.75, abs=0.03)
    assert 1 + sum(tree.probabilities()) == pytest.approx(expected_tokens(chance, 5))


def test_verdicts_of_real_rounds_calibrate_a_bold_draft():
    """Trees grown with the estimates, a target that agrees less than the draft claims: expectation meets outcome."""
    source, calibration, vocab = random.Random(5), Calibration(), 8
    claimed, emitted = [], []
    for step in range(400):
        tree = Tree(5, log_probability=calibration.log_probability)
        laws = {}
        while nodes := tree.frontier(4):
            tree.feed(nodes)
            for node in nodes:
                weights = [math.exp(2.0 * source.gauss(0, 1)) for _ in range(vocab)]
                laws[node] = [weight / sum(weights) for weight in weights]
                tree.extend(node, range(vocab), [math.log(p) for p in laws[node]])
            tree.prune(24)
        proposal = tree.proposal()
        true = [[0.6 * p + 0.4 / vocab for p in laws.get(node, [1 / vocab] * vocab)] for node in (ROOT, *tree._kept)]
        path, tokens = proposal.follow([source.choices(range(vocab), law)[0] for law in true])
        for place, accepted in proposal.verdicts(path):
            calibration.observe(proposal.draft_score[place], accepted)
        if step >= 100:
            claimed.append(1 + sum(tree.probabilities()))
            emitted.append(len(tokens))
    assert sum(claimed) / len(claimed) == pytest.approx(sum(emitted) / len(emitted), rel=0.08)


# -- size --------------------------------------------------------------------------------------------------


def chosen(probabilities, rate, cost):
    return most_profitable(sizes(probabilities, cost), rate).nodes


def test_the_most_profitable_size_at_the_ends():
    (none,) = sizes([[]], lambda width: 1.0)
    assert (none.nodes, none.profit(5.0)) == (0, -5.0)
    assert chosen([[0.5, 0.1]], 0.0, lambda width: 1.0) == 2, "seconds without a price: everything pays"
    assert chosen([[0.5, 0.1]], 1e9, float) == 0
    assert chosen([[0.5, 0.0]], 0.0, float) == 1, "a node without hope is not worth its memory"
    assert another_level(1.0, 2.0, 0.4)
    assert not another_level(1.0, 2.0, 0.5)


def test_nodes_beyond_a_jump_pay_for_it_together():
    def cost(width):
        return 1.0 + 0.3 * (width > 8)

    assert chosen([[0.1] * 15], 1.0, cost) == 15
    assert chosen([[0.1] * 15], 4.0, cost) == 7


def test_all_rows_are_as_wide_as_the_widest_so_its_width_costs_all_of_them():
    certain, hopeless = [1.0] * 7, [0.01] * 7
    assert chosen([certain], 1.0, lambda width: 0.9 * width) == 7
    assert chosen([certain, hopeless], 1.0, lambda width: 2 * 0.9 * width) == 0
    assert chosen([certain, hopeless], 1.0, lambda width: 2 * 0.4 * width) == 7


MODELS = {
    "flat": lambda tokens: 1.0,
    "linear": lambda tokens: 1.0 + 0.01 * tokens,
    "knee": lambda tokens: 1.0 + 0.03 * max(0, tokens - 16),
    "convex": lambda tokens: 1.0 + 0.0005 * tokens**2,
    "steps": lambda tokens: 1.0 + 0.25 * ((tokens - 1) // 16),
    "two cores": lambda tokens: 0.61 + 0.0045 * tokens,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decay", [0.5, 0.8, 0.95])
def test_the_running_rate_leads_to_the_best_fixed_size(name, decay):
    """Rounds choose by the rate of the rounds before; the rate settles where tokens per second are most."""
    seconds, probabilities = MODELS[name], [decay ** (1 + n // 3) for n in range(200)]

    def made(size):
        return (1 + sum(probabilities[:size])) / seconds(size + 1)

    rate, chosen_sizes = 0.0, []
    for _ in range(30):
        chosen_sizes.append(chosen([probabilities], rate, seconds))
        rate += 0.3 * (made(chosen_sizes[-1]) - rate)
    best = max(made(size) for size in range(201))
    assert made(chosen_sizes[-1]) >= 0.98 * best


def test_a_verdict_in_the_middle_of_an_estimate_does_no_harm(monkeypatch):
    """On a device the verdicts come from another lane than the drafts."""
    own, plain = Calibration(), calibration_module._interpolate

    def interrupted(score):
        own._log_odds = None  # as ``observe`` leaves it
        return plain(score)

    monkeypatch.setattr(calibration_module, "_interpolate", interrupted)
    for _ in range(3):
        assert 0.0 < own.probability(-0.5) < 1.0
