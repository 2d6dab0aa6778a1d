"""The policy alone: lists of events in, lists of tasks out; and whole runs in virtual time."""

import itertools

import pytest

from aspec.io.sim import DEVICE_RESOURCES, Profile
from aspec.plan import Speculation, Tier
from aspec.races import find_races
from aspec.scheduler import Row, Scheduler, prefill_items
from aspec.tasks.task import Arrived, Cancelled, Closing, Grown, Op, RowOutcome, Span, Started, Task, WorkItem
from tests.simulate import make_plan, simulate


def ops(decision, op):
    return [task for task in decision.tasks if task.op is op]


def accept(scheduler, decision, outcomes):
    """Answer every draft prefill and every ACCEPT of a decision; returns the last answer."""
    for task in ops(decision, Op.DRAFT_PREFILL):
        scheduler.handle(Span(task, 0.0, 1e-3))
    for task in ops(decision, Op.ACCEPT):
        found = tuple(o for o in outcomes if o.row in task.item.rows)
        answer = scheduler.handle(Span(task, 0.0, 1e-3, found))
        scheduler.validate()
    return answer


def test_slots_fill_before_anyone_arrives():
    decision = Scheduler(make_plan(num_slots=3, parts_per_layer=1)).handle(Started())
    assert [(t.op, t.part, t.slot) for t in decision.tasks] == [(Op.READ, 0, 0), (Op.READ, 1, 1), (Op.READ, 2, 2)]


def test_a_pass_reads_every_part_once_and_the_stream_runs_on():
    scheduler = Scheduler(make_plan(num_layers=4, parts_per_layer=1, num_slots=3))
    scheduler.handle(Started())
    decision = scheduler.handle(Arrived(0, 10, 5))
    assert [t.part for t in ops(decision, Op.READ)] == [3, 0, 1, 2], "three loads belong to the next pass"
    assert [t.layer for t in ops(decision, Op.LAYER)] == [0, 1, 2, 3]


def test_resident_parts_are_never_read():
    scheduler = Scheduler(make_plan(num_layers=4, parts_per_layer=1, num_slots=1, resident=(0, 2)))
    started = scheduler.handle(Started())
    decision = scheduler.handle(Arrived(0, 10, 5))
    assert {t.part for t in (*started.tasks, *ops(decision, Op.READ))} == {1, 3}
    assert [t.slots for t in ops(decision, Op.LAYER)] == [(), ((1, 0),), (), ((3, 0),)]


def test_everything_resident_reads_nothing():
    plan = make_plan(num_layers=2, parts_per_layer=1, num_slots=0, resident=(0, 1))
    scheduler = Scheduler(plan)
    assert scheduler.handle(Started()).tasks == ()
    assert not ops(scheduler.handle(Arrived(0, 4, 4)), Op.READ)


def test_a_row_never_proposes_beyond_its_limit():
    scheduler = Scheduler(make_plan(fixed_draft_tokens=4))
    scheduler.handle(Started())
    decision = scheduler.handle(Arrived(0, 10, 3))
    decision = accept(scheduler, decision, [RowOutcome(0, 0, 0, 1, False)])
    assert len(ops(decision, Op.DRAFT)) == 1, "two tokens remain: one proposal and the bonus"
    assert ops(decision, Op.HEAD)[0].item.counts == (2,)
    decision = accept(scheduler, decision, [RowOutcome(0, 1, 1, 2, False)])
    assert decision.tasks == ()
    assert decision.seatings[0].sequence is None


def test_no_draft_task_without_speculation():
    scheduler = Scheduler(make_plan(max_draft_tokens=0, fixed_draft_tokens=0))
    scheduler.handle(Started())
    decision = scheduler.handle(Arrived(0, 10, 3))
    decision = accept(scheduler, decision, [RowOutcome(0, 0, 0, 1, False)])
    assert {t.op for t in decision.tasks} == {Op.EMBED, Op.LAYER, Op.READ, Op.HEAD, Op.ACCEPT}


def test_rows_join_only_between_passes_and_share_the_next():
    scheduler = Scheduler(make_plan())
    scheduler.handle(Started())
    first = scheduler.handle(Arrived(0, 10, 9))
    assert scheduler.handle(Arrived(1, 12, 9)).tasks == (), "a pass is running"
    decision = accept(scheduler, first, [RowOutcome(0, 0, 0, 1, False)])
    layers = [t for t in ops(decision, Op.LAYER) if t.layer == 0]
    assert [t.item.prefill for t in layers] == [False, True]
    assert len(ops(decision, Op.READ)) == 8, "one stream of the weights serves both"


def test_a_full_house_waits_and_a_cancelled_row_leaves():
    scheduler = Scheduler(make_plan(num_rows=1))
    scheduler.handle(Started())
    first = scheduler.handle(Arrived(0, 10, 9))
    scheduler.handle(Arrived(1, 5, 2))
    scheduler.handle(Cancelled(0))
    decision = accept(scheduler, first, [RowOutcome(0, 0, 0, 1, False)])
    assert [(s.row, s.sequence) for s in decision.seatings] == [(0, None), (0, 1)]


def test_a_row_is_not_given_away_while_its_prompt_goes_through_the_draft():
    scheduler = Scheduler(make_plan(num_rows=1))
    scheduler.handle(Started())
    first = scheduler.handle(Arrived(0, 10, 1))
    scheduler.handle(Arrived(1, 5, 2))
    (accepting,), (prefill,) = ops(first, Op.ACCEPT), ops(first, Op.DRAFT_PREFILL)
    assert scheduler.handle(Span(accepting, 0.0, 1e-3, (RowOutcome(0, 0, 0, 1, False),))).seatings == ()
    seatings = scheduler.handle(Span(prefill, 0.0, 1e-3)).seatings
    assert [(s.row, s.sequence) for s in seatings] == [(0, None), (0, 1)]


def grow(scheduler, decision, probabilities, promises):
    """Answer level after level of one row's tree; returns the last answer and the number of levels."""
    for level, promise in enumerate(promises):
        (task,) = decision.tasks
        assert (task.op, task.growth.level) == (Op.DRAFT, level)
        decision = scheduler.handle(Span(task, 0.0, 1e-3, grown=(Grown(0, tuple(probabilities), promise),)))
        scheduler.validate()
        if len(decision.tasks) != 1:
            return decision, level + 1
    raise AssertionError("the tree never ended")


def decoding(**changes):
    """A scheduler whose only row has its prompt behind it, and its first tree level."""
    scheduler = Scheduler(make_plan(speculation=Speculation.TREE, **changes))
    scheduler.handle(Started())
    first = scheduler.handle(Arrived(0, 10, 30))
    return scheduler, accept(scheduler, first, [RowOutcome(0, 0, 0, 1, False)])


def test_a_tree_grows_while_it_promises_and_the_pass_takes_what_grew():
    scheduler, decision = decoding(fixed_draft_tokens=5)
    decision, levels = grow(scheduler, decision, (0.9, 0.8, 0.5, 0.4, 0.1), (0.9, 0.5, 0.0))
    assert levels == 3
    (head,) = ops(decision, Op.HEAD)
    assert head.item.counts == (6,)
    decision = accept(scheduler, decision, [RowOutcome(0, 5, 2, 3, False)])
    assert decision.tasks[0].growth.level == 0, "the next round drafts again"


def test_a_tree_never_reaches_beyond_what_a_row_may_still_generate():
    _, decision = decoding()
    assert decision.tasks[0].growth.depths == (28,), "29 tokens remain: 28 proposals and the bonus"


def test_a_node_that_costs_more_than_it_brings_is_left_out():
    scheduler, decision = decoding(fixed_draft_tokens=None, max_draft_tokens=64)
    for tokens, seconds in ((1, 0.1), (2, 0.1), (4, 0.1), (8, 30.0)):  # seconds of a layer: a steep knee behind 4
        item = WorkItem(0, (0,), (5,), (tokens,))
        scheduler.costs.observe(Span(Task(10**6 + tokens, Op.LAYER, "compute", 0, item=item, layer=0), 0.0, seconds))
    embed = Task(10**6, Op.EMBED, "compute", 0, number=77)
    scheduler.costs.observe(Span(embed, 0.0, 1e-3))
    done = Task(10**6 + 1, Op.ACCEPT, "cpu", 0, number=77, item=WorkItem(0, (0,), (5,), (1,)))
    scheduler.costs.observe(Span(done, 0.0, 1.0, (RowOutcome(0, 0, 0, 1, False),)))  # one token per second
    decision, _ = grow(scheduler, decision, [0.9] * 20, (0.0,))
    assert 1 <= ops(decision, Op.HEAD)[0].item.counts[0] <= 5


def test_drafts_that_never_pay_are_tried_now_and_then(virtual):
    bad = Profile(disk_bytes_per_s=1e12, layer_s=1e-3, layer_token_s=1e-2, acceptance=0.01, draft_s=1e-2)
    plan = make_plan(speculation=Speculation.TREE, fixed_draft_tokens=None, num_rows=1)
    spans, _, _ = virtual(lambda: simulate(plan, [(0, 20, 200)], profile=bad))
    drafts = sum(span.task.op is Op.DRAFT for span in spans)
    passes = sum(span.task.op is Op.HEAD for span in spans)
    assert passes > 190
    assert 1 <= drafts < passes / 8


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("budget", [None, 1, 8])
def test_whole_runs_with_trees_serve_every_token_without_a_race(virtual, slots, budget):
    arrivals = [(0, 20, 40), (1, 150, 30), (2, 5, 9), (3, 7, 33), (4, 1, 1)]
    plan = make_plan(num_slots=slots, speculation=Speculation.TREE, fixed_draft_tokens=budget)
    spans, scheduler, backend = virtual(lambda: simulate(plan, arrivals))
    assert sum(o.num_new for span in spans for o in span.outcomes) == sum(new for _, _, new in arrivals)
    assert max(o.num_proposed for span in spans for o in span.outcomes) > 0
    assert find_races(spans) == []
    assert backend.in_flight == 0
    assert scheduler.done


def test_closing_waits_for_rows_unless_told_not_to():
    scheduler = Scheduler(make_plan())
    scheduler.handle(Started())
    first = scheduler.handle(Arrived(0, 10, 1))
    scheduler.handle(Closing())
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
def test_whole_runs_serve_every_token_without_a_race(virtual, slots, draft):
    arrivals = [(0, 20, 40), (1, 150, 30), (2, 5, 9), (3, 7, 33), (4, 1, 1)]
    plan = make_plan(num_slots=slots, fixed_draft_tokens=draft)
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
    profile = Profile(disk_bytes_per_s=1e9, layer_s=1e-3, draft_s=2e-3)
    plan = make_plan(num_layers=6, parts_per_layer=2, num_slots=6, nbytes=10_000_000)
    spans, _, _ = virtual(lambda: simulate(plan, [(0, 20, 60)], profile=profile))
    reads = sorted((s for s in spans if s.task.op is Op.READ), key=lambda s: s.start_s)
    gaps = [b.start_s - a.stop_s for a, b in itertools.pairwise(reads)]
    assert max(gaps) < 10_000_000 / 1e9


def test_auto_drafts_long_when_streaming_and_never_when_drafts_are_useless(virtual):
    good = Profile(disk_bytes_per_s=1e8, acceptance=0.9)
    spans, _, _ = virtual(lambda: simulate(make_plan(fixed_draft_tokens=None), [(0, 20, 200)], profile=good))
    long = [s.task.item.counts[0] for s in spans if s.task.op is Op.HEAD][-12:-4]
    bad = Profile(disk_bytes_per_s=1e12, acceptance=0.02, draft_s=0.5)
    spans, _, _ = virtual(lambda: simulate(make_plan(fixed_draft_tokens=None), [(0, 20, 200)], profile=bad))
    short = [s.task.item.counts[0] for s in spans if s.task.op is Op.HEAD][-8:]
    assert min(long) > 4
    assert max(short) <= 2
    assert sorted(short)[4] == 1
