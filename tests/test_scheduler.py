"""The policy alone: lists of events in, lists of tasks out; and whole runs in virtual time."""

import itertools
from functools import partial

import pytest

from aspec.plan import Speculation, Tier
from aspec.planning.sim_backend import DEVICE_RESOURCES, HOST_RESOURCES, SimCosts
from aspec.tasks.layers.weights import DRAFT_AHEAD, VERIFY
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.rows import Row, prefill_items
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import (
    LayerWork,
    RequestAborted,
    RequestAdded,
    RowOutcome,
    Shutdown,
    Span,
    Started,
    Task,
    TreeStatus,
    WorkItem,
)
from tests.simulate import make_plan, simulate


def ops(decision, op):
    return [task for task in decision if task.op is op]


def assigned(decision):
    """The row changes of an answer."""
    return [change for task in ops(decision, Op.ASSIGN_ROWS) for change in task.payload.rows]


def accept(scheduler, decision, outcomes):
    """Answer every draft prefill and every ACCEPT of a decision; returns the last answer."""
    for task in ops(decision, Op.DRAFT_PREFILL):
        scheduler.handle([Span(task, 0.0, 1e-3)])
    for task in ops(decision, Op.ACCEPT):
        found = tuple(o for o in outcomes if o.row in task.item.rows)
        answer = scheduler.handle([Span(task, 0.0, 1e-3, found)])
        scheduler.validate()
    return answer


def test_slots_fill_before_anyone_arrives():
    decision = Scheduler(make_plan(num_slots=3, parts_per_layer=1)).handle([Started()])
    assert [(t.op, t.load.part, t.load.slot) for t in decision] == [(Op.READ, 0, 0), (Op.READ, 1, 1), (Op.READ, 2, 2)]


def test_a_pass_reads_every_part_once_and_the_stream_runs_on():
    scheduler = Scheduler(make_plan(num_layers=4, parts_per_layer=1, num_slots=3))
    scheduler.handle([Started()])
    decision = scheduler.handle([RequestAdded(0, 10, 5)])
    assert [t.load.part for t in ops(decision, Op.READ)] == [3, 0, 1, 2], "three loads belong to the next pass"
    assert [t.layer for t in ops(decision, Op.LAYER)] == [0, 1, 2, 3]


def test_resident_parts_are_never_read():
    scheduler = Scheduler(make_plan(num_layers=4, parts_per_layer=1, num_slots=1, resident=(0, 2)))
    started = scheduler.handle([Started()])
    decision = scheduler.handle([RequestAdded(0, 10, 5)])
    assert {t.load.part for t in (*started, *ops(decision, Op.READ))} == {1, 3}
    assert [t.slots for t in ops(decision, Op.LAYER)] == [(), ((1, 0),), (), ((3, 0),)]


def test_everything_resident_reads_nothing():
    plan = make_plan(num_layers=2, parts_per_layer=1, num_slots=0, resident=(0, 1))
    scheduler = Scheduler(plan)
    assert scheduler.handle([Started()]) == []
    assert not ops(scheduler.handle([RequestAdded(0, 4, 4)]), Op.READ)


def test_a_row_never_proposes_beyond_its_limit():
    scheduler = Scheduler(make_plan(fixed_draft_tokens=4))
    scheduler.handle([Started()])
    decision = scheduler.handle([RequestAdded(0, 10, 3)])
    decision = accept(scheduler, decision, [RowOutcome(0, 0, 0, 1, False)])
    assert len(ops(decision, Op.DRAFT)) == 1, "two tokens remain: one proposal and the bonus"
    assert ops(decision, Op.HEAD)[0].item.counts == (2,)
    decision = accept(scheduler, decision, [RowOutcome(0, 1, 1, 2, False)])
    assert [change.sequence for change in assigned(decision)] == [None], "the row is free: nothing else happens"
    assert len(decision) == 1


def test_no_draft_task_without_speculation():
    scheduler = Scheduler(make_plan(max_draft_tokens=0, fixed_draft_tokens=0))
    scheduler.handle([Started()])
    decision = scheduler.handle([RequestAdded(0, 10, 3)])
    decision = accept(scheduler, decision, [RowOutcome(0, 0, 0, 1, False)])
    assert {t.op for t in decision} == {Op.EMBED, Op.LAYER, Op.READ, Op.HEAD, Op.ACCEPT}


def test_rows_join_only_between_passes_and_share_the_next():
    scheduler = Scheduler(make_plan())
    scheduler.handle([Started()])
    first = scheduler.handle([RequestAdded(0, 10, 9)])
    assert scheduler.handle([RequestAdded(1, 12, 9)]) == [], "a pass is running"
    decision = accept(scheduler, first, [RowOutcome(0, 0, 0, 1, False)])
    layers = [t for t in ops(decision, Op.LAYER) if t.layer == 0]
    assert [t.item.prefill for t in layers] == [False, True]
    assert len(ops(decision, Op.READ)) == 8, "one stream of the weights serves both"


def test_a_full_house_waits_and_a_cancelled_row_leaves():
    scheduler = Scheduler(make_plan(num_rows=1))
    scheduler.handle([Started()])
    first = scheduler.handle([RequestAdded(0, 10, 9)])
    scheduler.handle([RequestAdded(1, 5, 2)])
    scheduler.handle([RequestAborted(0)])
    decision = accept(scheduler, first, [RowOutcome(0, 0, 0, 1, False)])
    assert [(s.row, s.sequence) for s in assigned(decision)] == [(0, None), (0, 1)]


def test_a_row_is_not_given_away_while_its_prompt_goes_through_the_draft():
    scheduler = Scheduler(make_plan(num_rows=1))
    scheduler.handle([Started()])
    first = scheduler.handle([RequestAdded(0, 10, 1)])
    scheduler.handle([RequestAdded(1, 5, 2)])
    (accepting,), (prefill,) = ops(first, Op.ACCEPT), ops(first, Op.DRAFT_PREFILL)
    assert scheduler.handle([Span(accepting, 0.0, 1e-3, (RowOutcome(0, 0, 0, 1, False),))]) == []
    decision = scheduler.handle([Span(prefill, 0.0, 1e-3)])
    assert [(s.row, s.sequence) for s in assigned(decision)] == [(0, None), (0, 1)]


def grow(scheduler, decision, probabilities, gain_bounds):
    """Answer level after level of one row's tree; returns the last answer and the number of levels."""
    for level, gain_bound in enumerate(gain_bounds):
        (task,) = decision
        assert (task.op, task.draft.step, task.growth.ahead) == (Op.DRAFT, level, False)
        decision = scheduler.handle([Span(task, 0.0, 1e-3, grown=(TreeStatus(0, tuple(probabilities), gain_bound),))])
        scheduler.validate()
        if len(decision) != 1:
            return decision, level + 1
    raise AssertionError("the tree never ended")


def decoding(**changes):
    """A scheduler whose only row has its prompt behind it, and its first tree level."""
    scheduler = Scheduler(make_plan(speculation=Speculation.TREE, draft_ahead=False, **changes))
    scheduler.handle([Started()])
    first = scheduler.handle([RequestAdded(0, 10, 30)])
    return scheduler, accept(scheduler, first, [RowOutcome(0, 0, 0, 1, False)])


def test_a_tree_grows_while_it_promises_and_the_pass_takes_what_grew():
    scheduler, decision = decoding(fixed_draft_tokens=5)
    decision, levels = grow(scheduler, decision, (0.9, 0.8, 0.5, 0.4, 0.1), (0.9, 0.5, 0.0))
    assert levels == 3
    (head,) = ops(decision, Op.HEAD)
    assert head.item.counts == (6,)
    decision = accept(scheduler, decision, [RowOutcome(0, 5, 2, 3, False)])
    assert decision[0].growth is not None, "the next round drafts again"


def test_a_tree_never_reaches_beyond_what_a_row_may_still_generate():
    _, decision = decoding()
    assert decision[0].growth.depths == (28,), "29 tokens remain: 28 proposals and the bonus"


def test_a_node_that_costs_more_than_it_brings_is_left_out():
    scheduler, decision = decoding(fixed_draft_tokens=None, max_draft_tokens=64)
    for number, (tokens, seconds) in enumerate([(1, 0.1), (2, 0.1), (4, 0.1), (8, 20.0)] * 10, 10**6):
        item = WorkItem(0, (0,), (5,), (tokens,))  # seconds of a layer: a steep knee behind 4
        layer = Task(number, Op.LAYER, "compute", 0, number=number, item=item, payload=LayerWork(0))
        scheduler.costs.observe(Span(layer, 0.0, seconds))
        scheduler.costs.end_round(number, 0.0)
    embed = Task(10**6, Op.EMBED, "compute", 0, number=77)
    scheduler.costs.observe(Span(embed, 0.0, 1e-3))
    done = Task(10**6 + 1, Op.ACCEPT, "cpu", 0, number=77, item=WorkItem(0, (0,), (5,), (1,)))
    scheduler.costs.observe(Span(done, 0.0, 1.0, (RowOutcome(0, 0, 0, 1, False),)))
    scheduler.costs.end_round(77, 1.0)  # one token per second
    decision, _ = grow(scheduler, decision, [0.9] * 20, (0.0,))
    assert 1 <= ops(decision, Op.HEAD)[0].item.counts[0] <= 5


def test_drafts_that_never_pay_are_tried_now_and_then(virtual):
    bad = SimCosts(disk_bytes_per_s=1e12, layer_s=1e-3, layer_token_s=1e-2, acceptance=0.01, draft_s=1e-2)
    plan = make_plan(speculation=Speculation.TREE, fixed_draft_tokens=None, num_rows=1)
    spans, _, _ = virtual(lambda: simulate(plan, [(0, 20, 200)], profile=bad))
    drafts = sum(span.task.op is Op.DRAFT for span in spans)
    passes = sum(span.task.op is Op.HEAD for span in spans)
    assert passes > 190
    assert 1 <= drafts < passes / 8


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("budget", [None, 1, 8])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_whole_runs_with_trees_serve_every_token_without_a_race(virtual, slots, budget, groups):
    arrivals = [(0, 20, 40), (1, 150, 30), (2, 5, 9), (3, 7, 33), (4, 1, 1)]
    plan = make_plan(num_slots=slots, speculation=Speculation.TREE, fixed_draft_tokens=budget, num_groups=groups)
    spans, scheduler, backend = virtual(lambda: simulate(plan, arrivals))
    assert sum(o.num_new for span in spans for o in span.outcomes) == sum(new for _, _, new in arrivals)
    assert max(o.num_proposed for span in spans for o in span.outcomes) > 0
    assert find_races(spans) == []
    assert backend.in_flight == 0
    assert scheduler.done


def drafting_ahead(**changes):
    """A scheduler in the midst of its first pass that verifies a tree, on a draft lane of its own."""
    plan = make_plan(speculation=Speculation.TREE, fixed_draft_tokens=5, draft_resource="draft", **changes)
    scheduler = Scheduler(plan)
    scheduler.handle([Started()])
    decision = scheduler.handle([RequestAdded(0, 10, 60)])
    decision = run_pass(scheduler, decision, RowOutcome(0, 0, 0, 1, False))
    return scheduler, *grow(scheduler, decision, (0.9, 0.8, 0.5, 0.4, 0.1), (0.9, 0.0))


def run_pass(scheduler, decision, outcome, grown=()):
    """Layer after layer, then the pass's end; returns the answer to ACCEPT."""
    for task in ops(decision, Op.DRAFT_PREFILL):
        scheduler.handle([Span(task, 0.0, 1e-3)])
    answers = [scheduler.handle([Span(task, 0.0, 1e-3)]) for task in decision if task.op in (Op.EMBED, Op.LAYER)]
    (accepting,) = [task for answer in answers for task in ops(answer, Op.ACCEPT)]
    scheduler.validate()
    return scheduler.handle([Span(accepting, 0.0, 1e-3, (outcome,), grown)])


def test_beside_the_layers_of_a_pass_the_tree_grows_on_one_level_at_a_time():
    scheduler, decision, _ = drafting_ahead()
    layers = ops(decision, Op.LAYER)
    assert ops(decision, Op.ACCEPT) == [], "the end of the pass follows what is drafted ahead"
    (ahead,) = scheduler.handle([Span(layers[0], 0.0, 1e-3)])
    assert (ahead.op, ahead.priority, ahead.growth.ahead > 0) == (Op.DRAFT, DRAFT_AHEAD, True)
    assert scheduler.handle([Span(layers[1], 0.0, 1e-3)]) == [], "a level is under way"
    (further,) = scheduler.handle([Span(ahead, 0.0, 1e-3, grown=(TreeStatus(0, (0.9,), 0.7),))])
    assert further.draft.step == ahead.draft.step + 1
    ending = scheduler.handle([Span(layers[2], 0.0, 1e-3)])
    (accepting,) = ops(ending, Op.ACCEPT)
    written = {access.buffer for access in accepting.writes}
    assert {access.buffer for access in further.writes} <= written, "it waits for the level that is under way"
    assert scheduler.handle([Span(further, 0.0, 1e-3, grown=(TreeStatus(0, (0.9,), 0.7),))]) == [], "the pass ends"


def test_what_was_grown_ahead_is_where_the_next_round_begins():
    scheduler, decision, levels = drafting_ahead()
    carried_over = TreeStatus(0, (0.9, 0.8, 0.5, 0.4, 0.2), 0.0)
    decision = run_pass(scheduler, decision, RowOutcome(0, 5, 3, 4, False), (carried_over,))
    assert ops(decision, Op.DRAFT) == [], "it is grown already"
    assert ops(decision, Op.EMBED)[0].item.counts == (6,)
    assert levels == 2


def test_a_wrong_guess_is_planted_anew():
    scheduler, decision, _ = drafting_ahead()
    decision = run_pass(scheduler, decision, RowOutcome(0, 5, 3, 4, False))
    (level,) = decision
    assert (level.op, level.priority, level.growth.ahead) == (Op.DRAFT, VERIFY, 0)


def test_on_the_target_s_own_lane_nothing_is_drafted_ahead_while_a_layer_could_run():
    scheduler = Scheduler(make_plan(speculation=Speculation.TREE, fixed_draft_tokens=5))
    loads = ops(scheduler.handle([Started()]), Op.READ)
    decision = run_pass(scheduler, scheduler.handle([RequestAdded(0, 10, 60)]), RowOutcome(0, 0, 0, 1, False))
    decision, _ = grow(scheduler, decision, (0.9, 0.8, 0.5, 0.4, 0.1), (0.9, 0.0))
    for number, load in enumerate(loads):
        scheduler.handle([Span(load, number * 1.0, number + 1.0)])  # 10 MB in a second
    (layer, *_) = ops(decision, Op.LAYER)
    needed = scheduler._stream.loads_before(1)
    missing = needed - len(loads)
    landing_s = len(loads) + missing * 1.0
    assert missing > 0
    assert scheduler.handle([Span(layer, 0.0, landing_s - 5e-4)]) == [], "a step takes a millisecond"
    assert [task.op for task in scheduler.handle([Span(layer, 0.0, landing_s - 0.5)])] == [Op.DRAFT]


@pytest.mark.parametrize("resources", [HOST_RESOURCES, DEVICE_RESOURCES])
@pytest.mark.parametrize("slots", [2, 5])
def test_drafting_ahead_changes_no_count_and_costs_no_time(virtual, resources, slots):
    """A pass of 1.5 s beside 0.9 s of drafts; acceptance as the demo pair's, greedy."""
    own = resources is DEVICE_RESOURCES
    profile = SimCosts(disk_bytes_per_s=8e7 / 1.5, layer_s=5e-3, layer_token_s=1e-5, draft_s=0.9 / 16, acceptance=0.92)
    runs = []
    for ahead in (False, True):
        plan = make_plan(
            num_slots=slots,
            num_staging=2 if own else 0,
            draft_resource="draft" if own else "compute",
            speculation=Speculation.TREE,
            max_draft_tokens=64,
            fixed_draft_tokens=64,
            max_draft_depth=16,
            draft_ahead=ahead,
            num_rows=2,
        )
        arrivals = [(0, 20, 90), (1, 60, 90)]
        run = partial(simulate, plan, arrivals, profile=profile, resources=resources)
        spans, _, _ = virtual(run)
        assert find_races(spans) == []
        assert sum(o.num_new for span in spans for o in span.outcomes) == 180
        assert any(span.task.growth.ahead for span in spans if span.task.growth) == ahead
        runs.append(max(span.stop_s for span in spans))
    assert runs[1] < runs[0] * (0.98 if own and slots == 2 else 1.01), "free slots hide drafts already"


def test_closing_waits_for_rows_unless_told_not_to():
    scheduler = Scheduler(make_plan())
    scheduler.handle([Started()])
    first = scheduler.handle([RequestAdded(0, 10, 1)])
    scheduler.handle([Shutdown()])
    assert not scheduler.done
    accept(scheduler, first, [RowOutcome(0, 0, 0, 1, False)])
    assert scheduler.done


@pytest.mark.parametrize("lengths", [(5,), (64,), (65,), (200,), (3, 60, 61, 130, 1), (64, 64, 64)])
def test_prefill_items_cover_every_prompt_exactly_once(lengths):
    rows = {i: Row(i, length, 1) for i, length in enumerate(lengths)}
    items = prefill_items(rows, 1, 64)
    assert [item.index for item in items] == list(range(1, len(items) + 1))
    covered = {i: [] for i in rows}
    for item in items:
        assert max(item.counts) * len(item.rows) <= 64, "padded size is bounded"
        for row, start, count in zip(item.rows, item.starts, item.counts, strict=True):
            covered[row] += range(start, start + count)
            assert item.samples == (start + count == lengths[row])
    assert covered == {i: list(range(length)) for i, length in enumerate(lengths)}


@pytest.mark.parametrize("slots", [2, 3, 5, 8])
@pytest.mark.parametrize("draft", [None, 0, 1, 4])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_whole_runs_serve_every_token_without_a_race(virtual, slots, draft, groups):
    arrivals = [(0, 20, 40), (1, 150, 30), (2, 5, 9), (3, 7, 33), (4, 1, 1)]
    plan = make_plan(num_slots=slots, fixed_draft_tokens=draft, num_groups=groups)
    spans, scheduler, backend = virtual(lambda: simulate(plan, arrivals))
    made = {}
    for span in spans:
        for outcome in span.outcomes:
            made[outcome.row] = made.get(outcome.row, 0) + outcome.num_new
    assert sum(made.values()) == sum(new for _, _, new in arrivals)
    assert find_races(spans) == []
    assert backend.in_flight == 0
    assert scheduler.done


def test_a_device_behind_a_link_copies_from_staging_and_from_host(virtual):
    for tier in (Tier.DISK, Tier.HOST):
        plan = make_plan(num_staging=2, tier=tier, draft_resource="draft")
        spans, _, _ = virtual(lambda plan=plan: simulate(plan, resources=DEVICE_RESOURCES))
        kinds = {span.task.op for span in spans}
        assert Op.COPY in kinds
        assert (Op.READ in kinds) == (tier is Tier.DISK)
        assert find_races(spans) == []


def test_the_stream_does_not_rest_between_passes(virtual):
    """Stream-bound, with slots for the draft's time: the disk's gaps stay below one slot's read."""
    profile = SimCosts(disk_bytes_per_s=1e9, layer_s=1e-3, draft_s=2e-3)
    plan = make_plan(num_layers=6, parts_per_layer=2, num_slots=6, nbytes=10_000_000)
    spans, _, _ = virtual(lambda: simulate(plan, [(0, 20, 60)], profile=profile))
    reads = sorted((s for s in spans if s.task.op is Op.READ), key=lambda s: s.start_s)
    gaps = [b.start_s - a.stop_s for a, b in itertools.pairwise(reads)]
    assert max(gaps) < 10_000_000 / 1e9


def test_auto_drafts_long_when_streaming_and_never_when_drafts_are_useless(virtual):
    good = SimCosts(disk_bytes_per_s=1e8, acceptance=0.9)
    spans, _, _ = virtual(lambda: simulate(make_plan(fixed_draft_tokens=None), [(0, 20, 200)], profile=good))
    long = [s.task.item.counts[0] for s in spans if s.task.op is Op.HEAD][-12:-4]
    bad = SimCosts(disk_bytes_per_s=1e12, acceptance=0.02, draft_s=0.5)
    spans, _, _ = virtual(lambda: simulate(make_plan(fixed_draft_tokens=None), [(0, 20, 200)], profile=bad))
    short = [s.task.item.counts[0] for s in spans if s.task.op is Op.HEAD][-8:]
    assert min(long) > 4
    assert max(short) <= 2
    assert sorted(short)[4] == 1
