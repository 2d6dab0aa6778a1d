"""Experts that are read on demand: the cache of a layer, the tasks of a pass, and the same bits as whole layers."""

import random

import pytest

from aspec.errors import DeadlockError, InternalError
from aspec.plan import Speculation
from aspec.planning.sim_backend import DEVICE_RESOURCES, SimBackend, SimCosts
from aspec.tasks.experts.cache import ExpertCache
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.task import NOTHING
from tests.simulate import asking, make_plan, simulate, trace_hash, with_experts

# -- the cache of a layer ----------------------------------------------------------------------------------


def test_one_slot_holds_the_latest_expert():
    cache = ExpertCache([7])
    assert cache.place([3]).admitted == {3: 7}
    assert cache.place([3]).held == {3: 7}
    second = cache.place([4])
    assert second.admitted == {4: 7}
    assert 3 not in cache


def test_an_expert_of_the_same_pass_is_never_pushed_out():
    cache = ExpertCache([0, 1])
    first = cache.place([5, 6, 7, 8])
    assert first.admitted == {5: 0, 6: 1}
    assert first.beyond == (7, 8)
    again = cache.place([5, 9])
    assert again.held == {5: 0}
    assert again.admitted == {9: 1}


def test_a_pass_over_every_expert_leaves_what_was_chosen_again():
    cache = ExpertCache(range(10))
    for _ in range(2):
        cache.place([0, 1, 2, 3])
    cache.place(range(40, 60))
    assert all(expert in cache for expert in range(4))
    assert cache.place([0, 1]).held.keys() == {0, 1}


def test_a_cache_without_slots_holds_nothing():
    assert ExpertCache([]).place([1, 2]).beyond == (1, 2)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8, 16])
def test_no_slot_holds_two_experts_whatever_is_chosen(num_slots):
    dice, cache, inside = random.Random(num_slots), ExpertCache(range(num_slots)), {}
    for _ in range(200):
        chosen = dice.sample(range(16), dice.randint(1, 16))
        placed = cache.place(chosen)
        cache.validate()
        assert sorted([*placed.held, *placed.admitted, *placed.beyond]) == sorted(chosen)
        assert all(inside[slot] == expert for expert, slot in placed.held.items()), "it is where it was read to"
        inside |= {slot: expert for expert, slot in placed.admitted.items()}
        assert len({*placed.held.values(), *placed.admitted.values()}) == len(placed.held) + len(placed.admitted)
        if placed.beyond:
            assert len(placed.held) + len(placed.admitted) == num_slots or num_slots > 1


# -- the tasks of a pass -----------------------------------------------------------------------------------

ARRIVALS = [(0, 20, 24), (1, 100, 12), (2, 5, 9), (3, 3, 3), (4, 70, 2)]


@pytest.mark.parametrize(
    "shape", [{}, {"num_groups": 2}, {"speculation": Speculation.TREE}, {"max_draft_tokens": 0}], ids=str
)
@pytest.mark.parametrize(("cached", "passing"), [(0, 1), (1, 1), (3, 2), (8, 5)])
def test_no_race_and_no_deadlock_with_any_number_of_slots(virtual, shape, cached, passing):
    plan = with_experts(make_plan(**shape), cached, passing, dense=(1,))
    spans, scheduler, _ = virtual(lambda: simulate(plan, ARRIVALS))
    assert find_races(spans) == []
    assert scheduler.done
    routed = [span.task for span in spans if span.task.op is Op.ROUTE]
    assert {task.layer for task in routed} == {0, 2, 3}
    assert len(routed) == sum(span.task.op is Op.COMBINE for span in spans)


@pytest.mark.parametrize("host", [(0, 1), (2, 3), (8, 1)])
def test_experts_go_through_host_memory_to_a_device_and_those_that_stay_there_are_not_read_again(virtual, host):
    plan = with_experts(make_plan(num_staging=2, draft_resource="draft"), 1, 2, host=host)
    spans, _, _ = virtual(lambda: simulate(plan, ARRIVALS, resources=DEVICE_RESOURCES))
    assert find_races(spans) == []
    reads = [(span.task.layer, span.task.detail) for span in spans if span.task.op is Op.LOAD_EXPERT]
    copies = [(span.task.layer, span.task.detail) for span in spans if span.task.op is Op.COPY_EXPERT]
    assert set(reads) == set(copies)
    assert host[0] or len(reads) == len(copies)
    assert host[0] < 2 or len(reads) < len(copies)
    assert host[0] < 8 or len(reads) == len(set(reads))


def test_an_expert_is_computed_once_for_every_item_that_chose_it(virtual):
    spans, _, _ = virtual(lambda: simulate(with_experts(make_plan(), 1, 2), ARRIVALS))
    chosen, computed = {}, {}
    for span in spans:
        key = span.task.number, span.task.layer, span.task.item
        if span.task.op is Op.ROUTE:
            chosen[key] = sorted(expert for expert, _ in span.routed)
        elif span.task.op in (Op.EXPERTS, Op.COMBINE):
            computed.setdefault(key, []).extend(expert for expert, _ in span.task.payload.experts)
    assert {key: sorted(experts) for key, experts in computed.items()} == chosen


def test_an_expert_that_stays_is_read_once(virtual):
    spans, _, _ = virtual(lambda: simulate(with_experts(make_plan(), cached=8), ARRIVALS))
    loads = [(span.task.layer, span.task.payload.expert) for span in spans if span.task.op is Op.LOAD_EXPERT]
    assert len(loads) == len(set(loads)) > 8


def test_other_weights_stream_on_while_a_route_is_awaited(virtual):
    spans, _, _ = virtual(lambda: simulate(with_experts(make_plan(num_slots=6)), profile=SimCosts(layer_s=0.1)))
    route = next(span for span in spans if span.task.op is Op.ROUTE and span.task.layer == 2)
    assert any(span.task.op is Op.READ and route.start_s < span.stop_s < route.stop_s for span in spans)


def test_experts_are_read_before_weights_that_wait_for_their_turn(virtual):
    plan = with_experts(make_plan(num_slots=8), cached=0, passing=8)
    spans, _, _ = virtual(lambda: simulate(plan, profile=SimCosts(disk_bytes_per_s=1e8)))
    assert all(span.stop_s - span.start_s < 0.02 for span in spans if span.task.op is Op.LOAD_EXPERT)


def test_the_same_run_twice_is_the_same_trace(virtual):
    plan = with_experts(make_plan())
    assert len({trace_hash(virtual(lambda: simulate(plan, ARRIVALS))[0]) for _ in range(2)}) == 1


def test_a_route_without_experts_is_an_error_that_names_it(virtual):
    class Forgetful(SimBackend):
        def _report(self, task):
            return NOTHING if task.op is Op.ROUTE and task.layer == 2 else super()._report(task)

    plan = with_experts(make_plan())
    backend = Forgetful(SimCosts(), experts=plan.experts.shape)
    with pytest.raises(InternalError, match="L2 attention and router of pass 0 came back without a route"):
        virtual(lambda: simulate(plan, backend=backend))


def test_a_route_that_never_comes_back_is_an_error_that_names_it(virtual, monkeypatch):
    monkeypatch.setattr("aspec.tasks.passes.Emission.take_route", lambda *_: None)
    with pytest.raises(DeadlockError, match=r"the routes of L0 in pass 0 for 0\.0"):
        virtual(lambda: simulate(with_experts(make_plan())))


# -- experts read before their route -------------------------------------------------------------------------


def is_guess(span):
    return span.task.op in (Op.LOAD_EXPERT, Op.COPY_EXPERT) and span.task.payload.guessed


def resting(**changes):
    """A plan whose other weights are resident, so the disk rests; its caches hold less than a pass chooses."""
    return with_experts(make_plan(**{"resident": range(8), "num_slots": 0, **changes}), cached=2, passing=8)


@pytest.mark.parametrize("changes", [{}, {"resident": (), "num_slots": 4}], ids=["resident", "streamed"])
def test_what_the_last_pass_chose_is_read_while_nothing_else_is(virtual, changes):
    spans, scheduler, _ = virtual(lambda: simulate(resting(**changes), ARRIVALS))
    guesses = [span for span in spans if is_guess(span)]
    wanted = [span for span in spans if span.task.op.loads and not is_guess(span)]
    counts = scheduler.expert_counts
    assert counts.guessed == len(guesses) >= counts.used > 0
    assert counts.wasted_bytes == (counts.guessed - counts.used) * 1_000_000
    for guess in guesses:
        earlier = (one for one in wanted if one.task.id < guess.task.id)
        assert all(one.stop_s <= guess.start_s for one in earlier), "it is read beside what is needed"
    assert find_races(spans) == []


def test_without_prefetching_every_read_follows_a_route(virtual):
    spans, scheduler, _ = virtual(lambda: simulate(asking(resting(), prefetch_experts=False), ARRIVALS))
    assert not any(map(is_guess, spans))
    assert scheduler.expert_counts.guessed == 0


def test_a_guess_saves_a_read_and_changes_no_computed_expert(virtual):
    def run(prefetch):
        spans, scheduler, _ = virtual(
            lambda: simulate(asking(resting(max_draft_tokens=0), prefetch_experts=prefetch), ARRIVALS)
        )
        computed = {}
        for span in spans:
            if span.task.op in (Op.EXPERTS, Op.COMBINE):
                own = computed.setdefault((span.task.number, span.task.layer, span.task.item), set())
                own |= {expert for expert, _ in span.task.payload.experts}
        return computed, sum(span.task.op is Op.LOAD_EXPERT and not is_guess(span) for span in spans), scheduler

    (with_guesses, reads, scheduler), (without, more_reads, _) = run(True), run(False)
    assert with_guesses == without
    assert reads == more_reads - scheduler.expert_counts.used


@pytest.mark.parametrize("passing", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [{}, {"num_groups": 2}, {"speculation": Speculation.TREE}], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_guesses_race_with_nothing(virtual, shape, passing, on_device):
    plan = make_plan(resident=range(8), num_slots=0, num_staging=on_device, **shape)
    plan = with_experts(plan, cached=1, passing=passing, host=(4, passing) if on_device else None)
    options = {"resources": DEVICE_RESOURCES} if on_device else {}
    spans, scheduler, _ = virtual(lambda: simulate(plan, ARRIVALS, **options))
    assert find_races(spans) == []
    assert scheduler.done
    assert any(map(is_guess, spans)) == (passing > 1)
