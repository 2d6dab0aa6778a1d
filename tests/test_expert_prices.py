"""The price of the experts that proposals bring into a pass: learned from routes and reads, and obeyed by drafts."""

import pytest

from aspec.expert_plan import ExpertPlan, ExpertShape
from aspec.plan import Speculation
from aspec.planning.forecast import ThroughputMeter
from aspec.planning.simulation import simulate
from aspec.profiling.cost_tables import SimCosts
from aspec.tasks.experts.prices import ExpertPrices
from aspec.tasks.op import Op
from aspec.tasks.task import COMPUTE, EXPERT_DISK, ExpertLoad, LayerWork, Span, Task, WorkItem
from tests.simulate import make_plan, with_experts

MB = 1_000_000


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


class Caches:
    """Fixed contents, by layer."""

    def __init__(self, **held):
        self._held = {int(layer[1:]): set(experts) for layer, experts in held.items()}

    def held(self, layer):
        return self._held.get(layer, set())


def prices(caches=None, num_experts=(64, 64)):
    shape = ExpertShape(num_experts, 4, tuple(2 * MB * bool(number) for number in num_experts), 2 * MB)
    return ExpertPrices(ExpertPlan(shape, (0,) * len(num_experts), 4), caches or Caches())


def route(layer, tokens, routed, prefill=False):
    item = WorkItem(0, (0,), (9,), (tokens,), prefill=prefill)
    task = Task(1, Op.ROUTE, COMPUTE, 0, item=item, payload=LayerWork(layer))
    return Span(task, 0.0, 1.0, routed=tuple(routed.items()))


def read(start_s, stop_s):
    task = Task(1, Op.LOAD_EXPERT, EXPERT_DISK, 0, payload=ExpertLoad(0, 0, 2 * MB, 0))
    return Span(task, start_s, stop_s)


def test_seconds_are_those_of_the_missing_bytes_at_the_rate_of_overlapping_reads():
    own = prices()
    assert own.seconds(1) == 0.0  # nothing was read yet
    assert own.missing_bytes(1) == pytest.approx(2 * 4 * 2 * MB)
    for start_s, stop_s in ((0.0, 0.004), (0.001, 0.006), (0.002, 0.008), (9.0, 9.0)):
        own.observe(read(start_s, stop_s))
    assert own.seconds(1) == pytest.approx(16 * MB * 0.008 / (8 * MB), rel=0.05)  # 8 MB landed in 8 ms
    assert own.seconds(1) < own.seconds(3) < own.seconds(9) < 9 * own.seconds(1)


def test_held_experts_cost_nothing_and_frequencies_say_which_are_worth_most():
    caches = Caches(L0=range(4))
    own = prices(caches, (8,))
    for _ in range(300):
        own.observe(route(0, 1, {0: 1, 1: 1, 2: 1, 3: 1}))
    own.begin_round()
    assert own.missing_bytes(1) < 0.2 * 4 * 2 * MB  # half of the experts are held, but all that the text uses
    own.observe(route(0, 1, {4: 1, 5: 1, 6: 1, 7: 1}))
    before = own.missing_bytes(1)
    own.begin_round()  # prices stay as they are within a round
    assert own.missing_bytes(1) > before


def test_prompts_count_for_frequencies_only():
    own = prices(num_experts=(64,))
    exponent = own.routing.exponent
    own.observe(route(0, 400, {0: 400, 1: 400, 2: 400, 3: 400}, prefill=True))
    own.begin_round()
    assert own.routing.exponent == exponent
    assert own.routing.expected_union(0, 8) < 10.0


def tokens_per_s(cached, kind, fixed, acceptance=0.8, disk=1e9, new_tokens=240, **changes):
    plan = make_plan(
        num_layers=4,
        parts_per_layer=1,
        num_slots=4,
        resident=range(4),
        num_rows=1,
        capacity=300,
        speculation=kind,
        max_draft_tokens=0 if fixed == 0 else 64 if kind is Speculation.TREE else 24,
        fixed_draft_tokens=fixed,
        **changes,
    )
    plan = with_experts(plan, cached, 8, 64, 4, nbytes=2 * MB)
    meter = ThroughputMeter(1, new_tokens)
    costs = dict(layer_s=4e-3, layer_token_s=1e-4, draft_s=2e-3, head_s=2e-3)
    simulate(plan, SimCosts(disk_bytes_per_s=disk, acceptance=acceptance, **costs), [(16, new_tokens)], [meter])
    return meter.tokens_per_s, meter.tokens_per_pass


@pytest.mark.parametrize("kind", [slow(Speculation.CHAIN), Speculation.TREE], ids=str)
@pytest.mark.parametrize("cached", [slow(0), 12, slow(64)], ids="{} of 64 cached".format)
def test_drafts_are_as_large_as_their_experts_are_worth(cached, kind):
    fixed = {number: tokens_per_s(cached, kind, number)[0] for number in (0, 3)}
    assert tokens_per_s(cached, kind, None)[0] > 0.88 * max(fixed.values()), fixed


@pytest.mark.slow
def test_wide_trees_are_for_experts_at_hand():
    assert tokens_per_s(0, Speculation.TREE, 64)[0] < 0.7 * tokens_per_s(0, Speculation.TREE, None)[0]
    assert tokens_per_s(64, Speculation.TREE, None)[1] > tokens_per_s(0, Speculation.TREE, None)[1]


def test_speculation_ends_where_the_experts_of_proposals_cost_more_than_they_bring():
    plain, _ = tokens_per_s(0, Speculation.CHAIN, 0, acceptance=0.3, disk=2e8)
    chosen, per_pass = tokens_per_s(0, Speculation.CHAIN, None, acceptance=0.3, disk=2e8)
    assert chosen > 0.9 * plain > 1.1 * tokens_per_s(0, Speculation.CHAIN, 4, acceptance=0.3, disk=2e8)[0]
    assert per_pass < 1.3


@pytest.mark.parametrize(("disk", "least"), [(2e9, 1.15), (5e8, 0.99)])
def test_reading_ahead_of_routes_gains_where_the_disk_rests_and_ends_where_others_wait_for_it(disk, least):
    ahead, without = (
        tokens_per_s(0, Speculation.CHAIN, 0, disk=disk, new_tokens=60, prefetch_experts=prefetch)[0]
        for prefetch in (True, False)
    )
    assert ahead > least * without


def test_reading_beside_computing_costs_what_was_waited_for_it():
    own = prices(num_experts=(64,))
    for number in range(12):
        own.observe(read(number, number + 0.5))
        own.begin_round(8, 0.1)
    some = own.seconds(8)
    assert some == pytest.approx(0.2 * own.missing_bytes(8) / (4 * MB), rel=0.1)
    for number in range(12, 24):
        own.observe(read(number, number + 0.5))
        own.begin_round(1, 3.0)
    assert own.seconds(1) == pytest.approx(own.missing_bytes(1) / (4 * MB), rel=0.1), "never more than the reading"
    assert own.seconds(8) < 1.2 * some, "passes of other sizes wait in another way"
