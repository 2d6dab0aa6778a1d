"""The size of drafts: what a pass of a size costs, learned from few and noisy samples, and what is chosen with it."""

import random
from statistics import median

import pytest

from aspec.plan import Speculation
from aspec.planning.sim_backend import SimBackend, SimCosts
from aspec.tasks.cost_model import ChainAcceptance, _beside
from aspec.tasks.draft_sizing import WIDTHS
from aspec.tasks.op import Op
from aspec.tasks.price_curve import PriceCurve
from tests.simulate import make_plan, simulate

# -- the price of a size -----------------------------------------------------------------------------------


def curve(seconds, sizes):
    """A price curve after one sample of each size, in order."""
    prices = PriceCurve()
    for size in sizes:
        prices.add(size, seconds(size))
    return prices


def test_without_a_sample_there_is_no_price():
    assert PriceCurve().seconds(1) is None


@pytest.mark.parametrize("seconds", [lambda n: 1.0, lambda n: 0.3 + 0.7 * n, lambda n: max(1.0, n / 32)])
def test_measured_sizes_have_the_price_that_was_measured(seconds):
    prices = curve(seconds, (64, 24, 16, 8, 2) * 8)
    for size in (2, 8, 16, 24, 64):
        assert prices.seconds(size) == pytest.approx(seconds(size), rel=0.15)


def test_a_price_never_falls_with_the_tokens():
    source = random.Random(1)
    prices = PriceCurve()
    for _ in range(50):
        prices.add(source.randint(1, 300), source.uniform(0.1, 3.0))
        seconds = [prices.seconds(n) for n in range(1, 1500)]
        assert seconds == sorted(seconds)


def test_what_was_flat_is_expected_to_stay_flat_and_what_rose_to_rise():
    """A size that was never run has a price that follows from all sizes that were."""
    assert curve(lambda n: 1.0, (64, 16, 24, 32)).seconds(128) < 1.2
    assert curve(float, (64, 16, 24, 32)).seconds(128) > 85
    assert curve(float, (64, 16, 24, 32)).seconds(4) < 10


def test_a_slow_minute_makes_all_sizes_dearer_and_not_only_those_that_ran_in_it():
    prices = curve(lambda n: 1.0, (1, 8, 32) * 10)
    for _ in range(10):
        prices.add(32, 2.0)
    assert prices.seconds(32) == pytest.approx(2.0, rel=0.15)
    assert prices.seconds(8) > 1.6


def test_one_sample_far_off_changes_little():
    """The first pass of a size creates kernels, another process takes the machine: either happens once."""
    prices = curve(lambda n: 1.0, (1, 8, 32) * 10)
    prices.add(16, 30.0)
    assert prices.seconds(16) < 1.6 * prices.seconds(8)


def test_what_a_plan_expects_is_a_price_until_it_is_measured():
    prices = PriceCurve()
    for size in (1, 2, 4, 8, 16, 32, 64, 128):
        prices.expect(size, 0.9 + 0.1 * size)
    assert prices.seconds(64) == pytest.approx(7.3, rel=0.2)
    prices.add(1, 2.0)
    assert prices.seconds(1) > 1.4
    for _ in range(10):
        prices.add(64, 2.2)
    assert prices.seconds(64) == pytest.approx(2.2, rel=0.15)


# -- the acceptance of a chain -----------------------------------------------------------------------------


def test_acceptance_is_learnt_by_depth():
    """Half of the chains fail at the second token; those beyond it are in a text that repeats itself, and go on."""
    chains = ChainAcceptance()
    assert chains.tokens(3) == pytest.approx([1.0, 1.8, 2.44, 2.952]), "expected at first: 0.8"
    for _ in range(200):
        chains.observe(8, 8)
        chains.observe(8, 1)
        chains.observe(0, 0)
    tokens = chains.tokens(8)
    assert tokens[:3] == pytest.approx([1.0, 2.0, 2.5], abs=0.05)
    assert tokens[8] > 5.0


# -- the chosen size beside fixed ones ---------------------------------------------------------------------

PASS_S, LAYERS = 0.3, 4
MACHINES = {
    "flat": lambda tokens: 1.0,
    "blocks": lambda tokens: float(-(-tokens // 64)),
    "knee": lambda tokens: max(1.0, 0.4 + tokens / 64),
    "slope": lambda tokens: 0.9 + 0.045 * tokens,
    "experts": lambda tokens: 0.5 + 0.5 * tokens**0.7,
}


class Machine(SimBackend):
    """A simulated machine whose passes take so long by their tokens, everything resident."""

    __slots__ = ("seconds",)

    def price(self, task):
        if task.op is Op.LAYER:
            return PASS_S / LAYERS * self.seconds(task.item.padded_tokens)
        return super().price(task)


def tokens_per_s(virtual, name, acceptance, new=150, prompt=64, **request):
    """The speed of decoding on a machine, and the proposed nodes of every pass."""
    machine = Machine(SimCosts(acceptance=acceptance, spread=0.4, draft_s=0.015 * PASS_S))
    machine.seconds = MACHINES[name]
    plan = make_plan(num_layers=LAYERS, resident=range(2 * LAYERS), num_slots=0, num_rows=1, capacity=1024, **request)
    spans, _, _ = virtual(lambda: simulate(plan, [(0, prompt, new)], machine))
    accepts = [span for span in spans if span.task.op is Op.ACCEPT]
    sizes = [outcome.num_proposed for span in accepts[1:] for outcome in span.outcomes]
    return (new - 1) / (accepts[-1].stop_s - accepts[0].stop_s), sizes


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("acceptance", [0.5, 0.8])
def test_the_automatic_size_is_as_fast_as_the_best_fixed_one(virtual, name, acceptance):
    """From the first pass on, so what it tries on the way counts."""
    tree = {"speculation": Speculation.TREE, "draft_ahead": False}
    fixed = [{**tree, "fixed_draft_tokens": n, "max_draft_tokens": n} for n in (8, 16, 32, 64)]
    chains = [{"fixed_draft_tokens": n, "max_draft_tokens": n} for n in (0, 5, 12)]
    best = max(tokens_per_s(virtual, name, acceptance, **one)[0] for one in (*fixed, *chains))
    speed, sizes = tokens_per_s(virtual, name, acceptance, **tree, fixed_draft_tokens=None, max_draft_tokens=128)
    assert speed > 0.9 * best, sizes


def expecting(name):
    """The fields of a plan that expects the prices of a machine."""
    sizes = (1, 2, 4, 8, 16, 32, 64, 129)
    return {"expected_layer_s": tuple((n, PASS_S / LAYERS * MACHINES[name](n)) for n in sizes)}


@pytest.mark.parametrize("new", [12, 30])
def test_a_short_text_gains_by_what_its_plan_expects(virtual, new):
    tree = {"speculation": Speculation.TREE, "fixed_draft_tokens": None, "max_draft_tokens": 128}
    told, sizes = tokens_per_s(virtual, "slope", 0.5, new=new, prompt=2, **tree, **expecting("slope"))
    alone, others = tokens_per_s(virtual, "slope", 0.5, new=new, prompt=2, **tree)
    assert told > 1.05 * alone, (sizes, others)
    assert max(sizes[:2]) < max(others[:2])


def test_a_wrong_expectation_is_unlearnt(virtual):
    tree = {"speculation": Speculation.TREE, "fixed_draft_tokens": None, "max_draft_tokens": 128}
    right, _ = tokens_per_s(virtual, "slope", 0.8, new=300, **tree, **expecting("slope"))
    wrong, sizes = tokens_per_s(virtual, "slope", 0.8, new=300, **tree, **expecting("flat"))
    assert wrong > 0.8 * right, sizes


def test_easy_and_hard_stretches_of_a_text_do_not_end_the_proposals(virtual):
    _, sizes = tokens_per_s(
        virtual, "flat", 0.5, speculation=Speculation.TREE, fixed_draft_tokens=None, max_draft_tokens=128
    )
    assert min(sizes[:-2]) > 0
    assert median(sizes) >= 32, "where 64 tokens cost as much as one, few nodes are a waste"


def test_passes_have_few_different_sizes(virtual):
    """Each is then measured often, and its kernels are created once."""
    _, sizes = tokens_per_s(
        virtual, "slope", 0.8, new=400, speculation=Speculation.TREE, fixed_draft_tokens=None, max_draft_tokens=128
    )
    common = [1 + size in WIDTHS for size in sizes]
    assert sum(common) > 0.85 * len(common)


def test_compute_and_stream_hide_each_other_less_the_more_alike_they_are():
    assert _beside(0.0, 0.0) == 0.0
    assert _beside(2.0, 0.0) == _beside(0.0, 2.0) == 2.0
    shares = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    seconds = [_beside(share, 1.0) for share in shares]
    assert seconds == sorted(seconds) == [_beside(1.0, share) for share in shares]
    assert seconds[1] < 1.01
    assert 1.1 < seconds[-1] < 1.25
    measured = [(0.57, 0.76, 0.79), (0.78, 0.77, 0.95), (0.97, 0.78, 1.0), (1.30, 0.75, 1.32)]
    assert all(_beside(*pair) == pytest.approx(real, rel=0.07) for *pair, real in measured)
