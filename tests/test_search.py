"""The search for a plan: what is varied, what is pruned, and that the best one wins."""

import itertools

import pytest

from aspec.errors import BudgetError
from aspec.plan import SPARE_SLOTS, PlannedPart, PlanRequest, Speculation, Tier
from aspec.planning.placement import NUM_STAGING, Footprint, make_plan
from aspec.planning.search import Forecast, SearchSpace, rows_for, search

MIB = 1 << 20
REQUEST = PlanRequest(budget_bytes=64 * MIB, num_rows=1, capacity=255)
SPACE = SearchSpace(
    rows=(1, 4, 16, 64),
    speculations=((None, 0), (Speculation.CHAIN, 24), (Speculation.TREE, 128)),
    caps=(4, 8),
)


def footprint(request, kv=1024):
    parts = tuple(PlannedPart(i, i // 2, 4 * MIB, 4 * MIB) for i in range(24))
    return Footprint(parts, 12, {"rest": 2 * MIB}, kv)


def forecast(seconds):
    return Forecast(tokens_per_s=1.0, prefill_s=0.1, job_s=seconds, tokens_per_pass=1.0, bottleneck="disk")


def cost(plan):
    """A landscape with one valley: 16 rows, 2 groups, chains of at most 8, 3 slots."""
    seconds = 10.0 + abs(plan.num_rows - 16) + 3 * abs(plan.num_groups - 2)
    seconds += 5 * (plan.speculation is not Speculation.CHAIN or not plan.max_draft_tokens)
    return seconds + abs(plan.max_draft_tokens - 8) / 10 + abs(plan.num_slots - 3) / 10


def test_the_best_plan_is_found():
    found = search(REQUEST, SPACE, footprint, lambda plan: 0.0, lambda plan: forecast(cost(plan)))
    plan = found.best.plan
    assert (plan.num_rows, plan.num_groups, plan.speculation) == (16, 2, Speculation.CHAIN)
    assert cost(plan) == min(cost(one.plan) for one in found.found)
    assert [one.forecast.job_s for one in found.found] == sorted(one.forecast.job_s for one in found.found)


def test_what_cannot_be_better_is_not_run():
    ran = []

    def run(plan):
        ran.append(plan)
        return forecast(cost(plan))

    everything = search(REQUEST, SPACE, footprint, lambda plan: 0.0, run)
    before = len(ran)
    ran.clear()
    pruned = search(REQUEST, SPACE, footprint, lambda plan: 0.9 * cost(plan), run)
    assert len(ran) < before / 2
    assert pruned.num_pruned > 0
    assert pruned.best.forecast == everything.best.forecast


def test_plans_that_do_not_fit_are_left_out_and_none_at_all_is_refused():
    tight = PlanRequest(budget_bytes=30 * MIB, num_rows=1, capacity=255)
    found = search(
        tight, SPACE, lambda w: footprint(w, kv=1 << 16), lambda plan: 0.0, lambda plan: forecast(cost(plan))
    )
    assert found.num_too_large > 0
    assert all(one.plan.held_bytes <= 30 * MIB for one in found.found)
    with pytest.raises(BudgetError, match="too small"):
        search(
            PlanRequest(budget_bytes=8 * MIB, num_rows=1, capacity=255),
            SPACE,
            footprint,
            lambda plan: 0.0,
            lambda plan: forecast(1.0),
        )


def test_what_is_fixed_stays():
    fixed = SearchSpace(rows=(4,), groups=(2,), speculations=((Speculation.TREE, 16),), caps=())
    found = search(REQUEST, fixed, footprint, lambda plan: 0.0, lambda plan: forecast(cost(plan)))
    shapes = {(one.plan.num_rows, one.plan.num_groups, one.plan.max_draft_tokens) for one in found.found}
    assert shapes == {(4, 2, 16)}
    assert {one.plan.num_slots for one in found.found} == {2 + spare for spare in (1, SPARE_SLOTS, 10)}


@pytest.mark.parametrize("prompts", [1, 3, 64, 65, 10_000])
def test_all_prompts_at_once_are_worth_a_look(prompts):
    rows = rows_for(prompts)
    assert rows[-1] == min(prompts, 2048)
    assert all(a < b for a, b in itertools.pairwise(rows))


@pytest.mark.parametrize("host", [0, 10, 40, 200])
def test_a_device_streams_from_host_memory_first(host):
    plan = make_plan(footprint(REQUEST), PlanRequest(32 * MIB, 1, 255, host_bytes=host * MIB))
    hosted = [part for part in plan.parts if part.tier is Tier.HOST]
    on_disk = [part for part in plan.parts if part.tier is Tier.DISK]
    assert plan.num_staging == NUM_STAGING
    assert plan.draft_resource == "draft"
    assert sum(plan.host_arithmetic.values()) <= max(host * MIB, NUM_STAGING * 4 * MIB)
    assert bool(on_disk) == (host < 100)
    assert len(hosted) == len(plan.streamed) - len(on_disk)


def test_kv_beside_the_cpu_counts_against_the_host():
    wide = footprint(REQUEST, kv=1 << 16)
    on_device = make_plan(wide, PlanRequest(64 * MIB, 2, 255, host_bytes=200 * MIB))
    on_host = make_plan(wide, PlanRequest(64 * MIB, 2, 255, host_bytes=200 * MIB, attention_resource="cpu"))
    assert on_device.arithmetic["KV cache"] == on_host.host_arithmetic["KV cache"] == 2 * 256 << 16
    assert on_host.arithmetic["KV cache"] == 0
    assert on_host.streamed_bytes < on_device.streamed_bytes, "what KV leaves free keeps layers resident"
    with pytest.raises(BudgetError, match="host memory of 8"):
        make_plan(wide, PlanRequest(64 * MIB, 2, 255, host_bytes=8 * MIB, attention_resource="cpu"))


def test_another_form_of_proposals_must_be_clearly_faster_while_acceptance_is_a_guess():
    def best(usual, seconds):
        space = SearchSpace(rows=(1,), groups=(1,), speculations=SPACE.speculations, slots=(), usual=usual)
        return search(REQUEST, space, footprint, lambda _: 0.0, lambda plan: forecast(seconds[plan.speculation])).best

    close = {Speculation.TREE: 14.0, Speculation.CHAIN: 10.0}
    far = {Speculation.TREE: 16.0, Speculation.CHAIN: 10.0}
    assert best(Speculation.TREE, close).plan.speculation is Speculation.TREE
    assert best(Speculation.TREE, far).plan.speculation is Speculation.CHAIN
    assert best(None, close).plan.speculation is Speculation.CHAIN
