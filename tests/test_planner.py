"""Plans from byte sizes: what is resident, how many slots, and the arithmetic of a refusal."""

import itertools
from dataclasses import replace

import pytest

from aspec.errors import BudgetError
from aspec.plan import SPARE_SLOTS, PlannedPart, PlanRequest, Tier
from aspec.planning.placement import Footprint, make_plan
from aspec.tasks.cost_model import CostModel, expected_tokens
from aspec.tasks.op import Op
from aspec.tasks.task import Span, Task, WorkItem

MIB = 1 << 20


def footprint(num_layers=8, per_layer=2, size=4 * MIB, rest=2 * MIB, kv=1024):
    parts = tuple(PlannedPart(i, i // per_layer, size, size) for i in range(num_layers * per_layer))
    return Footprint(parts, num_layers, {"rest": rest}, kv)


def request(budget, rows=1, capacity=1023):
    return PlanRequest(budget, rows, capacity)


def test_everything_resident_when_it_fits():
    plan = make_plan(footprint(), request(100 * MIB))
    assert plan.streamed == ()
    assert plan.num_slots == 0


@pytest.mark.parametrize("budget", range(12, 66, 3))
def test_every_plan_stays_inside_its_budget_and_uses_it(budget):
    plan = make_plan(footprint(), request(budget * MIB))
    assert plan.held_bytes <= budget * MIB
    assert plan.streamed
    assert plan.num_slots >= 2, "a layer's parts must be loaded together"
    assert budget * MIB - plan.held_bytes < 4 * MIB or not plan.streamed, "room for another resident part is not wasted"


def test_resident_parts_are_spread_over_the_pass():
    plan = make_plan(footprint(), request((3 + (2 + SPARE_SLOTS) * 4 + 4 * 4) * MIB))
    resident = [part.index for part in plan.parts if part.tier is Tier.DEVICE]
    assert len(resident) == 4
    assert all(b - a >= 3 for a, b in itertools.pairwise(resident))


@pytest.mark.parametrize("cap", [0, 9, 20, 1000])
def test_a_cap_on_resident_layers_is_kept(cap):
    plan = make_plan(footprint(), PlanRequest(1000 * MIB, 1, 1023, resident_bytes=cap * MIB))
    resident = sum(part.size for part in plan.parts if part.tier is Tier.DEVICE)
    assert resident <= cap * MIB
    assert resident > cap * MIB - 4 * MIB or cap == 1000


def packed_footprint(**changes):
    """Parts of 4 MiB that are decoded to 16 MiB: layers of 32 MiB."""
    whole = footprint(**changes)
    decoded = dict(scratch_bytes=16 * MIB, decoded_bytes=16 * MIB, in_place=False)
    return replace(whole, parts=tuple(replace(part, **decoded) for part in whole.parts))


def test_scratch_is_for_two_layers_where_they_fit_and_for_one_otherwise():
    least = 3 + 2 * 4 + 32
    for budget, number in ((least, 1), (least + 31, 1), (least + 32, 2)):
        plan = make_plan(packed_footprint(), request(budget * MIB))
        assert plan.num_scratch == number
        assert plan.arithmetic["scratch"] == number * plan.scratch_bytes == number * 32 * MIB
    with pytest.raises(BudgetError, match=f"at least {least}MiB") as caught:
        make_plan(packed_footprint(), request(least * MIB - 1))
    assert "scratch 32.0" in str(caught.value)


def test_resident_parts_stay_as_stored_or_decoded_as_the_request_says():
    """3 MiB are held by every plan; 7 slots have 28 MiB and two layers' scratch 64 MiB."""
    asked = request((3 + 28 + 64 + 20) * MIB)
    decoded = make_plan(packed_footprint(), asked)
    packed = make_plan(packed_footprint(), replace(asked, keep_packed=True))
    for plan, number in ((decoded, 1), (packed, 5)):
        resident = [part for part in plan.parts if part.tier is Tier.DEVICE]
        assert len(resident) == number
        assert plan.arithmetic["resident layers"] == sum(part.resident_bytes for part in resident)
        assert plan.held_bytes <= asked.budget_bytes
    assert decoded.decoding == decoded.streamed
    assert packed.decoding == packed.parts
    everything = make_plan(packed_footprint(), replace(asked, budget_bytes=(3 + 64 + 64) * MIB, keep_packed=True))
    assert everything.streamed == ()
    assert everything.decoding == everything.parts
    plain = make_plan(packed_footprint(), replace(asked, budget_bytes=300 * MIB, keep_packed=True))
    assert plain.decoding == (), "what fits decoded is never decoded again"
    assert plain.arithmetic["scratch"] == 0


def test_a_part_that_cannot_be_decoded_again_is_resident_decoded():
    whole = packed_footprint()
    merged = replace(whole, parts=tuple(replace(part, repeatable=part.index > 0) for part in whole.parts))
    plan = make_plan(merged, replace(request((3 + 64 + 64 + 16) * MIB), keep_packed=True))
    assert [part.packed for part in plan.parts] == [part.index > 0 for part in plan.parts]


@pytest.mark.parametrize(("size", "budget"), [(2, 300), (90, 130), (300, 700)])
def test_memory_through_which_parts_are_loaded_is_that_of_slots_where_it_suffices(size, budget):
    plan = make_plan(replace(packed_footprint(), loading_bytes=size * MIB), request(budget * MIB))
    slots = plan.num_slots * plan.slot_bytes
    largest = max(size * MIB, 4 * MIB if len(plan.streamed) < len(plan.parts) else 0)
    assert plan.arithmetic["loading"] == max(0, largest - slots)
    assert plan.held_bytes <= budget * MIB


def test_a_budget_too_small_says_what_would_fit():
    with pytest.raises(BudgetError, match="at least 11MiB") as caught:
        make_plan(footprint(), request(5 * MIB))
    message = str(caught.value)
    assert "rest 2.00 MiB" in message
    assert "KV cache" in message
    assert "2 slots of 4.00 MiB" in message
    make_plan(footprint(), request(11 * MIB))
    with pytest.raises(BudgetError):
        make_plan(footprint(), request(11 * MIB - 1))


def test_expected_tokens_is_monotone_and_exact_at_the_ends():
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    values = [[expected_tokens(p / 20, n) for n in range(12)] for p in range(21)]
    for row, above in itertools.pairwise(values):
        assert all(a <= b for a, b in zip(row, above, strict=True)), "monotone in acceptance"
    assert all(a <= b for row in values for a, b in itertools.pairwise(row)), "monotone in length"


def test_a_chain_is_not_lengthened_on_the_hope_that_tokens_cost_nothing():
    """Layers of 64, 128 and 192 tokens were seen: those of more cost more, as far as anybody knows."""
    plan, costs = (
        make_plan(footprint(), replace(request(20 * MIB, rows=64, capacity=31), max_draft_tokens=24)),
        CostModel(),
    )
    for number, (tokens, seconds) in enumerate([(64, 0.027), (128, 0.050), (192, 0.065)] * 4):
        item = WorkItem(0, tuple(range(64)), (0,) * 64, (tokens // 64,) * 64)
        costs.observe(Span(Task(0, Op.LAYER, "compute", 0, number=number, item=item), 0.0, seconds))
        costs.end_round(number, 0.0)
    assert costs.best_draft_tokens(plan, 64) <= 3
    assert costs.round_seconds(plan, 768, 0.0) > 2 * costs.round_seconds(plan, 256, 0.0)
    assert costs.round_seconds(plan, 256, 0.0) > costs.round_seconds(plan, 192, 0.0)
