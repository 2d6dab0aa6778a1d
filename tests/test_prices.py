"""Prices: lines exact at their points, monotone in tokens and context; experts; what the simulation makes of them."""

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from aspec.models.model import Model
from aspec.plan import Speculation
from aspec.planning.sim_backend import DEVICE_RESOURCES, SimBackend, SimCosts
from aspec.planning.simulation import fitted_acceptance
from aspec.planning.simulation import simulate as run_simulation
from aspec.profiling import overheads
from aspec.profiling.cost_tables import Attention, CostTable, PiecewiseLinear
from aspec.profiling.hardware import AttentionRates, Hardware, Processor
from aspec.profiling.model_shape import LayerShape, ModelShape, shape_of, touched_experts
from aspec.profiling.roofline import ACCEPTANCE, model_cost, prices, weight_seconds
from aspec.profiling.stopwatch import cold_seconds_each, measure_handover
from aspec.tasks.cost_model import expected_tokens
from aspec.tasks.op import Op
from aspec.tasks.task import (
    COMPUTE,
    CPU,
    DECODE,
    Decoding,
    DraftStep,
    LayerWork,
    RowAssignment,
    RowChanges,
    Task,
    TreeLevel,
    WorkItem,
)
from tests import tiny
from tests.compat import few
from tests.simulate import make_plan, simulate

MEASURED = Processor(
    flop_per_s={"bfloat16": 4e11},
    memory_bytes_per_s=1e10,
    layer_s=3e-4,
    exact_layer_s=8e-4,
    element_s=1e-9,
    mask_pair_s=1e-9,
    weight_s={"bfloat16": ((1, 1e-10), (16, 1.2e-10), (64, 2e-10), (256, 4e-10))},
    exact_weight_s={"bfloat16": ((64, 2e-10), (128, 4e-10), (256, 8e-10))},
    attention=AttentionRates(6e-5, 1e-6, 4e-10, 2e-9, 2e-11),
    exact_attention=AttentionRates(1e-5, 1e-4, 5e-10, 2e-9, 2e-11, 3e-8),
)
HERE = Hardware(name="here", disk_bytes_per_s=1e9, cpu=MEASURED, read_contention=1.1)
CARD = Hardware(
    name="card",
    disk_bytes_per_s=7e9,
    h2d_bytes_per_s=25e9,
    cpu=MEASURED,
    device=Processor(flop_per_s={"bfloat16": 1.6e14}, memory_bytes_per_s=1e12),
)
DENSE = LayerShape(project_bytes=12 << 20, rest_bytes=76 << 20, wide=18304)
SPARSE = LayerShape(project_bytes=12 << 20, rest_bytes=8 << 20, wide=9000, expert_bytes=20 << 20, experts=8, active=2)


def model(*layers, **changes):
    facts = dict(hidden=2048, vocab=32000, heads=16, kv_heads=4, width=128, value_width=128, head_bytes=131 << 20)
    return ModelShape(layers or (DENSE,) * 4, **{**facts, **changes})


def item(rows=1, start=100, count=1, prefill=False):
    return WorkItem(0, tuple(range(rows)), (start,) * rows, (count,) * rows, prefill)


def task(op, work, **changes):
    resource = CPU if op in (Op.ATTEND, Op.ACCEPT) else COMPUTE
    return Task(0, op, resource, 0, item=work, payload=payload_of(op, **changes))


def payload_of(op, slots=(), **changes):
    return DraftStep(0, **changes) if op is Op.DRAFT else LayerWork(0, slots, **changes)


# -- lines ---------------------------------------------------------------------------------------------------


def test_a_line_is_exact_at_its_points_and_straight_between():
    line = PiecewiseLinear(((1, 3.3e-3), (16, 4.7e-3), (64, 0.1)))
    for count, seconds in line.points:
        assert line.at(count) == seconds
    assert line.at(0.5) == 3.3e-3
    assert line.at(40) == pytest.approx((4.7e-3 + 0.1) / 2)
    assert line.at(112) == pytest.approx(0.1 + (0.1 - 4.7e-3))  # the last piece goes on
    assert PiecewiseLinear(((5, 2.0),)).at(99) == 2.0


def test_a_line_may_rise_with_every_count():
    line = PiecewiseLinear(((64, 1.0), (128, 2.5)), each_s=0.5)
    assert line.at(96) == 1.75 + 0.5 * 96


@pytest.mark.parametrize("points", [(), ((2, 1.0), (1, 2.0)), ((1, 1.0), (1, 2.0))])
def test_a_line_without_order_is_refused(points):
    with pytest.raises(ValueError, match="ascending"):
        PiecewiseLinear(points)


# -- monotone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", [HERE, CARD, Hardware()], ids=lambda h: h.name)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("layer", [DENSE, SPARSE], ids=["dense", "experts"])
def test_prices_never_fall_with_tokens_or_context(hardware, exact, layer):
    cost_table = prices(model(layer), model(DENSE), hardware, exact=exact).cost_table
    for op in (Op.LAYER, Op.PROJECT, Op.ATTEND, Op.FFN, Op.HEAD, Op.EMBED, Op.DRAFT, Op.DRAFT_PREFILL):
        by_tokens = [
            cost_table.seconds(task(op, item(count=count))) for count in (*range(1, 140), 200, 300, 1000, 3000)
        ]
        by_context = [cost_table.seconds(task(op, item(start=start))) for start in range(0, 4000, 50)]
        by_rows = [cost_table.seconds(task(op, item(rows))) for rows in range(1, 40)]
        for seconds in (by_tokens, by_context, by_rows):
            assert all(a <= b + 1e-15 for a, b in pairwise(seconds)), op
            assert seconds[0] > 0
        if op in (Op.LAYER, Op.ATTEND, Op.DRAFT, Op.DRAFT_PREFILL):
            assert by_context[-1] > by_context[0]


def test_a_layer_is_the_sum_of_its_three():
    for cpu_attention in (False, True):
        cost_table = prices(model(), None, CARD, cpu_attention=cpu_attention).cost_table
        for work in (item(), item(3, 500, 7), item(1, 0, 300, prefill=True)):
            whole, *thirds = (
                cost_table.seconds(task(op, work)) - cost_table.task_s
                for op in (Op.LAYER, Op.PROJECT, Op.ATTEND, Op.FFN)
            )
            assert whole == pytest.approx(sum(thirds))
    flat = SimBackend(SimCosts(layer_s=5e-3, layer_token_s=1e-4))
    pieces = sum(flat.price(task(op, item())) for op in (Op.PROJECT, Op.ATTEND, Op.FFN))
    assert pieces == pytest.approx(flat.price(task(Op.LAYER, item())))
    assert flat.price(task(Op.PROJECT, item())) == pytest.approx(5.1e-3 / 4)
    assert flat.price(task(Op.ATTEND, item())) == pytest.approx(5.1e-3 / 4)


def test_attention_on_the_host_is_the_cpus_and_the_way_there_is_the_links():
    card = replace(CARD, d2h_bytes_per_s=20e9)
    on_device, on_host = (prices(model(), None, card, cpu_attention=c) for c in (False, True))
    work = task(Op.ATTEND, item(4, 2000, 8))
    assert on_host.cost_table.seconds(work) > on_device.cost_table.seconds(work)
    assert on_host.cost_table.seconds(work) == prices(model(), None, HERE).cost_table.seconds(work)
    machine = SimBackend(on_host, DEVICE_RESOURCES)
    out, back = (task(op, item(4, 2000, 8), nbytes=10_000_000) for op in (Op.SEND, Op.RETURN))
    assert machine.price(out) == pytest.approx(on_host.cost_table.task_s + 1e7 / 20e9)
    assert machine.price(back) == pytest.approx(on_host.cost_table.task_s + 1e7 / 25e9)
    assert SimBackend(replace(on_host, d2h_bytes_per_s=None)).price(out) == machine.price(back), "one way as the other"


def test_exact_rows_attend_over_their_own_keys_and_the_others_over_the_longest():
    ragged = WorkItem(0, (0, 1), (1000, 0), (1, 1))
    one = Attention(key_s=1.0, exact=True)
    assert one.seconds(ragged) == 1024 + 64
    assert replace(one, exact=False).seconds(ragged) == 2 * 1024
    tree = Attention(own_pair_s=1.0, exact=True)
    assert tree.seconds(item(1, 100, 8), tree=True) == 8 * 64  # 36 committed behind whole tiles, 8 deep
    assert tree.seconds(item(1, 120, 10), tree=True) == 10 * 128
    assert tree.seconds(item(1, 100, 8)) == tree.seconds(item(1, 100, 1), tree=True) == 0
    assert tree.seconds(item(1, 100, 8, prefill=True), tree=True) == 0


def test_products_count_padding():
    ragged = WorkItem(0, (0, 1, 2), (5, 5, 5), (1, 9, 2))
    assert ragged.padded_tokens == 27
    layer = prices(model(), None, HERE).cost_table.target.layers[0]
    assert layer.rest.at(27) > layer.rest.at(ragged.num_tokens)


# -- what prices are made of ---------------------------------------------------------------------------------


def test_a_table_is_read_off_and_without_one_the_slower_of_two_counts():
    assert weight_seconds(MEASURED, "bfloat16", 1) == 1e-10
    assert weight_seconds(MEASURED, "bfloat16", 40) == pytest.approx(1.6e-10)
    assert weight_seconds(MEASURED, "bfloat16", 512) == pytest.approx(4e-10 + 256 * 2e-10 / 192)
    assert weight_seconds(MEASURED, "bfloat16", 128, exact=True) == 4e-10
    bare = Processor(flop_per_s={"bfloat16": 1e12}, memory_bytes_per_s=1e10)
    assert weight_seconds(bare, "bfloat16", 1) == 1e-10
    assert weight_seconds(bare, "bfloat16", 1000) == pytest.approx(1e-9)


def test_the_draw_and_the_head_are_paid_by_row():
    cost_table = prices(model(), None, HERE, sampled=True).cost_table
    quiet = prices(model(), None, HERE).cost_table
    assert cost_table.target.draw_s > quiet.target.draw_s > 0
    chunk, decode = item(2, 0, 50, prefill=True), item(2, 100, 50)
    assert quiet.seconds(task(Op.HEAD, chunk)) < quiet.seconds(task(Op.HEAD, decode))


def test_decoding_is_paid_by_the_bytes_that_it_makes():
    cost_table = prices(model(), None, HERE).cost_table
    work = Decoding(part=0, layer=0, nbytes=88 << 20, slot=0, scratch=0)
    seconds = cost_table.seconds(Task(1, Op.DECODE, DECODE, 0, payload=work))
    assert seconds == pytest.approx(cost_table.task_s + (88 << 20) / MEASURED.copy_rate)


# -- experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "active", "tokens"), [(4, 1, 3), (4, 2, 2), (5, 2, 3), (3, 3, 2), (6, 2, 1)])
def test_the_union_of_experts_equals_counting_all_choices(experts, active, tokens):
    choices = [frozenset(chosen) for chosen in combinations(range(experts), active)]
    unions = [frozenset()]
    for _ in range(tokens):
        unions = [union | chosen for union in unions for chosen in choices]
    assert touched_experts(experts, active, tokens) == pytest.approx(sum(map(len, unions)) / len(unions))


def test_a_pass_reads_the_experts_that_its_tokens_meet():
    cost = model_cost(model(SPARSE), HERE)
    few, many = (cost.layers[0].rest.at(n) for n in (1, 64))
    two = 2 * (20 << 20) * 1e-10
    assert few == pytest.approx(8 * 2**20 * 1e-10 + two, rel=0.1)
    assert many > 8 * (20 << 20) * 1e-10  # nearly all of them, 16 rows each
    dense = model_cost(model(replace(SPARSE, rest_bytes=168 << 20, experts=0)), HERE).layers[0].rest
    assert many < dense.at(64)  # which would run all 64 rows through everything


def test_steps_of_a_layer_with_experts_on_demand_cost_more_than_the_layer():
    routed = replace(HERE, cpu=replace(MEASURED, routed_s=1e-3, experts_s=2e-3, expert_s=3e-4))
    plain, more = (prices(model(SPARSE), None, hardware).cost_table for hardware in (HERE, routed))

    def added(op, **changes):
        return more.seconds(task(op, item(), **changes)) - plain.seconds(task(op, item(), **changes))

    assert added(Op.ROUTE) == pytest.approx(1e-3)
    assert added(Op.EXPERTS, experts=((0, 0),)) == pytest.approx(2e-3)
    assert added(Op.COMBINE) == pytest.approx(2 * 3e-4), "its experts were computed before"
    assert added(Op.COMBINE, experts=((0, 0), (1, 1))) == pytest.approx(2e-3 + 2 * 3e-4)
    assert added(Op.LAYER) == pytest.approx(2 * 3e-4), "as a whole it has no steps"


def test_a_model_that_the_last_cache_holds_costs_the_interpreter_less():
    cold = replace(MEASURED, cached_share=0.4, last_cache_bytes=32 << 20)
    small, large = model(replace(DENSE, project_bytes=1 << 20, rest_bytes=1 << 20), head_bytes=1 << 20), model(DENSE)
    for shape, share in ((small, 0.4), (large, 1.0)):
        costs = [model_cost(shape, replace(HERE, cpu=own)).layers[0].rest.at(1) for own in (MEASURED, cold)]
        assert costs[0] - costs[1] == pytest.approx((1 - share) * MEASURED.layer_s / 2)


# -- descriptions of models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe", "deepseek_v3", "phi3"])
def test_a_shape_holds_every_matrix_of_the_layers_once(family, tmp_path):
    built = Model(tiny.build(tmp_path, family), dtype=torch.bfloat16)
    shape = shape_of(built)
    for layer, module in zip(shape.layers, built.layer_modules, strict=True):
        total = sum(p.numel() * p.element_size() for p in module.parameters() if p.dim() >= 2)
        assert layer.dense_bytes + layer.experts * layer.expert_bytes == total
        assert 0 < layer.project_bytes < total
    assert shape.dtype == "bfloat16"
    assert (shape.vocab, shape.head_bytes) == (built.vocab_size, built.vocab_size * shape.hidden * 2)
    routed = shape.layers[-1]
    if family in ("mixtral", "qwen2_moe", "deepseek_v3"):
        assert (routed.experts, routed.active) == ({"deepseek_v3": 8}.get(family, 4), 2)
    else:
        assert (routed.experts, routed.expert_bytes) == (0, 0)
    simulated = prices(shape, shape, HERE, exact=True)
    assert simulated.cost_table.seconds(task(Op.LAYER, item())) > 0


def test_projections_are_told_from_the_rest(tmp_path):
    shape = shape_of(Model(tiny.build(tmp_path, "llama"), dtype=torch.float32))
    hidden, heads, width = 64, 4, 16
    assert shape.layers[0].project_bytes == 4 * hidden * width * (heads + 2 * 2)
    assert shape.layers[0].rest_bytes == 4 * (hidden * hidden + 3 * hidden * 96)
    assert (shape.heads, shape.kv_heads, shape.width, shape.kv_bytes) == (4, 2, 16, 2 * 32 * 4)


# -- in the simulation ---------------------------------------------------------------------------------------


def seconds_of_run(profile, **changes):
    spans = []
    plan = make_plan(num_layers=4, parts_per_layer=1, nbytes=88 << 20, **changes)
    run_simulation(plan, profile, [(20, 24)], [spans.append])
    return max(span.stop_s for span in spans), spans


@pytest.mark.parametrize("hardware", [HERE, CARD], ids=lambda h: h.name)
def test_the_real_scheduler_runs_on_prices(hardware):
    target, draft = model(), model(LayerShape(1 << 18, 1 << 20), head_bytes=1 << 20)
    profile = prices(target, draft, hardware, exact=True, tree=True)
    assert profile.copy_bytes_per_s == hardware.h2d_bytes_per_s
    chain_s, spans = seconds_of_run(profile)
    layers = [span for span in spans if span.task.op is Op.LAYER]
    assert len({round(span.stop_s - span.start_s, 9) for span in layers if span.task.item.prefill}) >= 1
    tree_s, _ = seconds_of_run(profile, speculation=Speculation.TREE, fixed_draft_tokens=None)
    alone_s, _ = seconds_of_run(profile, max_draft_tokens=0, fixed_draft_tokens=None)
    assert 0 < chain_s < alone_s
    assert 0 < tree_s < alone_s


def test_what_computes_beside_reads_is_slower():
    slow, fast = (prices(model(), None, replace(HERE, read_contention=factor)) for factor in (1.5, 1.0))
    changes = dict(max_draft_tokens=0, fixed_draft_tokens=None)
    for profile, factors in ((fast, (1.0, 1.0)), (slow, (1.0, 1.5))):
        _, spans = seconds_of_run(profile, **changes)
        layers = [span for span in spans if span.task.op is Op.LAYER and not span.task.item.prefill]
        found = [(s.stop_s - s.start_s) / profile.cost_table.seconds(s.task) for s in layers]
        assert all(factors[0] - 1e-6 <= ratio <= factors[1] + 1e-6 for ratio in found)
        assert max(found) == pytest.approx(factors[1])  # the disk never rests: it is the bottleneck


def test_what_waits_for_a_task_waits_for_the_loop_and_a_busy_lane_does_not():
    def added_s(disk_bytes_per_s):
        """What the loop's seconds add to a run, and its spans."""
        free = prices(model(), None, replace(HERE, disk_bytes_per_s=disk_bytes_per_s))
        busy = replace(free, cost_table=replace(free.cost_table, handover_s=2e-3))
        (free_s, _), (busy_s, spans) = (seconds_of_run(profile) for profile in (free, busy))
        return busy_s - free_s, spans

    streaming_s, spans = added_s(1e9)
    passes = sum(span.task.op is Op.ACCEPT for span in spans)
    assert 0 < streaming_s < 2e-3 * passes, "the disk goes on beside it"
    computing_s, _ = added_s(1e15)
    assert 2e-3 * passes <= computing_s < 2e-3 * len(spans), "the next pass waits for what was accepted"


def test_calls_that_follow_one_another_are_timed_each_with_cold_caches():
    order = []
    found = cold_seconds_each({"one": lambda: order.append(1), "two": lambda: order.append(2)})
    assert order[:4] == [1, 2, 1, 2]
    assert set(found) == {"one", "two"}
    assert min(found.values()) > 0


def test_steps_of_experts_are_measured_with_the_code_that_runs_them():
    with torch.inference_mode():
        found = overheads._with_routes(replace(MEASURED, layer_s=0.0, product_s=0.0), torch.bfloat16)
    assert found.routed_s > 0
    assert found.experts_s + found.expert_s > 0


def test_a_hand_over_is_measured_with_threads_and_a_loop():
    assert 1e-6 < measure_handover() < 1.0


def test_a_task_for_which_no_tariff_is_set_costs_what_it_did():
    flat = SimCosts(draft_s=1e-3)
    assert flat.cost_table is None
    assert SimBackend(flat).price(task(Op.DRAFT, item())) == 1e-3


def test_a_lookup_costs_the_interpreter_alone():
    cost_table = CostTable(prices(model(), None, HERE).cost_table.target, node_s=1e-5)
    growth = TreeLevel(8, 8, (16,), (8,))
    assert cost_table.seconds(task(Op.DRAFT, item(1, 10, 8), growth=growth)) == pytest.approx(8e-5)


# -- acceptance ----------------------------------------------------------------------------------------------


def test_expected_tokens_grow_with_acceptance_and_length():
    chances = [i / 50 for i in range(51)]
    for length in range(1, 12):
        by_chance = [expected_tokens(p, length) for p in chances]
        assert all(a < b for a, b in pairwise(by_chance))
        assert (by_chance[0], by_chance[-1]) == (1.0, length + 1)
    assert all(expected_tokens(0.5, n) < expected_tokens(0.5, n + 1) for n in range(20))


@pytest.mark.parametrize(("acceptance", "length"), [(0.0, 3), (0.3, 4), (ACCEPTANCE, 4), (0.95, 8), (1.0, 5)])
def test_the_formula_the_dice_and_the_simulation_agree(acceptance, length):
    rounds, dice = 4000, random.Random(7)
    thrown = [1 + next((n for n in range(length) if dice.random() >= acceptance), length) for _ in range(rounds)]
    backend = SimBackend(SimCosts(acceptance=acceptance, seed=3))
    backend._report(Task(0, Op.ASSIGN_ROWS, CPU, 0, payload=RowChanges((RowAssignment(0, 5),))))
    simulated, position = [], 0
    for _ in range(rounds):
        outcome, _ = backend._accept(0, position, length + 1)
        simulated.append(outcome.num_new)
        position += outcome.num_new
    expected = expected_tokens(acceptance, length)
    for found in (thrown, simulated):
        mean = sum(found) / rounds
        deviation = (sum((n - mean) ** 2 for n in found) / rounds / rounds) ** 0.5
        assert abs(mean - expected) <= 4 * deviation + 1e-12


@pytest.mark.parametrize("speculation", few([Speculation.CHAIN, Speculation.TREE], 1))
def test_an_acceptance_is_found_again_from_tokens_per_pass(virtual, speculation):
    plan = make_plan(num_rows=8, speculation=speculation, fixed_draft_tokens=6, fixed_draft_depth=6, capacity=2048)
    profile = SimCosts(acceptance=0.6, spread=0.3)
    spans, _, _ = virtual(lambda: simulate(plan, [(row, 2, 300) for row in range(8)], profile=profile))
    outcomes = [outcome for span in spans for outcome in span.outcomes][8:]
    per_pass = sum(outcome.num_new for outcome in outcomes) / len(outcomes)
    assert fitted_acceptance(plan, replace(profile, acceptance=0.9), per_pass) == pytest.approx(0.6, abs=0.03)
