"""Weights that are decoded on their way: beside compute, into scratch in turns, and never a wrong layer."""

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aspec.observe.timeline import merge
from aspec.plan import PlannedPart, Tier
from aspec.planning.sim_backend import DEVICE_RESOURCES, HOST_RESOURCES
from aspec.profiling.cost_tables import SimCosts
from aspec.tasks.graph import Graph
from aspec.tasks.layers.weights import Numbering, WeightStream
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.task import DECODE, DISK
from tests.simulate import make_plan, plan_of, simulate

ARRIVALS = [(0, 30, 12), (1, 200, 9), (2, 5, 20)]
MANY_LAYERS = dict(num_layers=8, parts_per_layer=1, num_slots=2, decoded=1000, in_place=False)


def spans_of(virtual, plan, resources=HOST_RESOURCES, **costs):
    spans, _, _ = virtual(lambda: simulate(plan, ARRIVALS, profile=SimCosts(**costs), resources=resources))
    return spans


def seconds(spans, *ops):
    return sum(b - a for a, b in merge((span.start_s, span.stop_s) for span in spans if span.task.op in ops))


@pytest.mark.parametrize("resources", [HOST_RESOURCES, DEVICE_RESOURCES])
def test_a_layer_is_decoded_beside_the_products_of_the_one_before(virtual, resources):
    """Decoding takes as long as products: all but the first layer of a run is hidden."""
    plan = make_plan(num_staging=2 if resources is DEVICE_RESOURCES else 0, max_draft_tokens=0, **MANY_LAYERS)
    spans = spans_of(virtual, plan, resources, disk_bytes_per_s=1e12, layer_s=0.01, layer_token_s=0.0, decode_s=0.01)
    both, decoding = seconds(spans, Op.DECODE, Op.LAYER), seconds(spans, Op.DECODE)
    assert both < 1.05 * seconds(spans, Op.LAYER) + 0.02
    assert decoding > 0.8 * seconds(spans, Op.LAYER)
    assert find_races(spans) == []


def test_a_slot_is_free_as_soon_as_its_part_is_decoded(virtual):
    """With one slot and slow products the disk reads on while a layer is computed."""
    plan = make_plan(max_draft_tokens=0, **MANY_LAYERS | {"num_slots": 1})
    spans = spans_of(virtual, plan, disk_bytes_per_s=1e9, layer_s=0.02, layer_token_s=0.0, decode_s=1e-4)
    assert seconds(spans, Op.READ, Op.LAYER) < 1.05 * seconds(spans, Op.LAYER) + 0.02
    held = make_plan(max_draft_tokens=0, **MANY_LAYERS | {"num_slots": 1, "in_place": True})
    spans = spans_of(virtual, held, disk_bytes_per_s=1e9, layer_s=0.02, layer_token_s=0.0, decode_s=1e-4)
    assert seconds(spans, Op.READ, Op.LAYER) > 1.3 * seconds(spans, Op.LAYER), "the control: layers read their slots"


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_every_layer_of_every_pass_is_decoded_once(virtual, num_layers):
    plan = make_plan(**MANY_LAYERS | {"num_layers": num_layers, "parts_per_layer": 2})
    assert plan.num_scratch == min(2, num_layers)
    spans = spans_of(virtual, plan)
    passes = 1 + max(span.task.number for span in spans if span.task.op is Op.LAYER)
    decoded = [span.task.detail for span in spans if span.task.op is Op.DECODE]
    needed = [part.index for _ in range(passes) for part in plan.parts]
    assert decoded[: len(needed)] == needed
    assert len(decoded) - len(needed) <= 2 * plan.num_scratch, "ahead of a pass that never comes"


def test_with_one_scratch_buffer_decoding_and_products_take_turns(virtual):
    plan = make_plan(max_draft_tokens=0, scratch_buffers=1, **MANY_LAYERS)
    spans = spans_of(virtual, plan, disk_bytes_per_s=1e12, layer_s=0.01, layer_token_s=0.0, decode_s=0.01)
    both = seconds(spans, Op.DECODE, Op.LAYER)
    assert both == pytest.approx(seconds(spans, Op.DECODE) + seconds(spans, Op.LAYER), rel=1e-6)
    assert find_races(spans) == []


def test_the_parts_of_a_layer_are_decoded_side_by_side():
    plan = make_plan(num_layers=3, parts_per_layer=3, num_slots=9, decoded=1000, in_place=False)
    graph = Graph(HOST_RESOURCES)
    for task in WeightStream(plan, Numbering()).fill():
        graph.add(task)
    while (read := graph.pop(DISK)) is not None:
        graph.issue(read)
        graph.complete(read)
    ready = list(iter(lambda: graph.pop(DECODE), None))
    assert [(task.layer, task.detail) for task in ready] == [(part // 3, part) for part in range(6)]


def turns_of(spans):
    """Number of a layer's decoding -> (first start of its decoding, last stop of a task that reads what it made)."""
    starts, stops = defaultdict(list), defaultdict(lambda: [0.0])
    for span in spans:
        decodes = span.task.op is Op.DECODE
        for access in span.task.writes if decodes else span.task.reads:
            kind, _, number = access.content.partition(" ")
            if kind == "decoding" and decodes:
                starts[int(number)].append(span.start_s)
            elif kind == "decoding":
                stops[int(number)].append(span.stop_s)
    return {number: (min(own), max(stops[number])) for number, own in starts.items()}


PARTS = st.lists(
    st.lists(st.tuples(st.sampled_from([Tier.DISK, Tier.DISK, Tier.DEVICE]), st.booleans(), st.booleans()), max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PARTS, st.integers(0, 4), st.sampled_from([0, 5]), st.booleans(), st.booleans(), st.integers(1, 2))
def test_any_mixture_of_parts_runs_to_its_end_without_a_race(virtual, layers, spare, drafts, split, packed, buffers):
    flat = [(layer, *own) for layer, parts in enumerate(layers) for own in parts]
    parts = tuple(
        PlannedPart(
            *(index, layer, 1000, 1000, tier, 500 * decoded, 500 * decoded, in_place),
            packed=packed and decoded and tier is Tier.DEVICE,
        )
        for index, (layer, tier, decoded, in_place) in enumerate(flat)
    )
    most = max(sum(part.layer == layer and part.tier is Tier.DISK for part in parts) for layer in range(len(layers)))
    how = {"attention_resource": "cpu", "micro_batches": 2} if split else {}
    how |= {"scratch_buffers": buffers}
    plan = plan_of(
        parts, len(layers), max(1, most + spare), 1000, num_rows=3, capacity=512, max_draft_tokens=drafts, **how
    )
    spans, _, _ = virtual(lambda: simulate(plan, ARRIVALS))
    assert find_races(spans) == []
    turns = turns_of(spans)
    for number, (start_s, _) in turns.items():  # its scratch has no reader left, whichever place of it
        assert start_s >= turns.get(number - plan.num_scratch, (0.0, 0.0))[1]
    assert sum(outcome.num_new for span in spans for outcome in span.outcomes) == sum(new for _, _, new in ARRIVALS)
