"""The race detector finds what it must: every kind of conflict, planted."""

import dataclasses

import pytest

from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.task import Access, Span, Task
from tests.simulate import make_plan, simulate


def span(number, start, stop, reads=(), writes=()):
    task = Task(number, Op.LAYER, "compute", 0, tuple(Access(*r) for r in reads), tuple(Access(*w) for w in writes))
    return Span(task, start, stop)


WRITE, READ, NEXT = ("slot", "a"), ("slot", "a"), ("slot", "b")


def test_a_clean_run_is_clean():
    assert find_races([span(0, 0, 1, writes=[WRITE]), span(1, 1, 2, reads=[READ]), span(2, 2, 3, writes=[NEXT])]) == []


@pytest.mark.parametrize(
    "spans",
    [
        [span(0, 0, 1, writes=[WRITE]), span(1, 0.5, 2, reads=[READ])],
        [span(0, 0, 1, writes=[WRITE]), span(1, 1, 2, reads=[READ]), span(2, 1.5, 3, writes=[NEXT])],
        [span(0, 0, 1, writes=[WRITE]), span(1, 0.9, 2, writes=[NEXT])],
        [span(0, 0, 1, writes=[WRITE]), span(1, 2, 3, writes=[NEXT]), span(2, 4, 5, reads=[READ])],
        [span(0, 0, 1, reads=[READ])],
    ],
    ids=["read too early", "overwritten while read", "two writers", "stale content", "never written"],
)
def test_planted_races_are_found(spans):
    assert len(find_races(spans)) == 1


def test_any_shifted_span_of_a_real_trace_is_found(virtual):
    spans, _, _ = virtual(lambda: simulate(make_plan()))
    layers = [i for i, s in enumerate(spans) if s.task.op is Op.LAYER and s.task.slots]
    for i in layers[:10]:
        moved = list(spans)
        length = moved[i].stop_s - moved[i].start_s
        moved[i] = dataclasses.replace(
            moved[i], start_s=moved[i].start_s - 0.05, stop_s=moved[i].start_s - 0.05 + length
        )
        assert find_races(moved), f"layer span {i} moved to where its slot was being filled"


def overlapping(spans, earlier, later):
    """The run, but for ``earlier``, which ends in the midst of ``later``."""
    middle = (later.start_s + later.stop_s) / 2
    return [dataclasses.replace(span, stop_s=middle) if span is earlier else span for span in spans]


def first_of(spans, op, after=-1, **wanted):
    """The first task of an op behind task ``after`` whose item is as wanted."""
    of_op = (span for span in spans if span.task.op is op and span.task.id > after)
    return next(span for span in of_op if all(getattr(span.task.item, k) == v for k, v in wanted.items()))


@pytest.mark.parametrize("attention", ["compute", "cpu"])
def test_accept_moves_keys_and_values_and_says_so(virtual, attention):
    plan = make_plan(attention_resource=attention)
    spans, _, _ = virtual(lambda: simulate(plan))
    accept = first_of(spans, Op.ACCEPT, prefill=False)
    op = Op.LAYER if attention == "compute" else Op.PROJECT
    races = find_races(overlapping(spans, accept, first_of(spans, op, accept.task.id)))
    assert any(race.startswith("kv:0:0") for race in races)


@pytest.mark.parametrize("attention", ["compute", "cpu"])
def test_the_first_item_of_a_pass_binds_a_layer_and_says_so(virtual, attention):
    plan = make_plan(attention_resource=attention, resident=(6, 7))
    spans, _, _ = virtual(lambda: simulate(plan, [(0, 5, 30), (1, 100, 9), (2, 9, 9)]))
    op = Op.LAYER if attention == "compute" else Op.PROJECT
    layers = [span for span in spans if span.task.op is op and span.task.number == 0 and span.task.layer == 0]
    assert len(layers) > 1
    races = find_races(overlapping(spans, layers[0], layers[1]))
    assert any(race.startswith("weights:0") for race in races)
    touched = {access.buffer for span in spans for access in (*span.task.reads, *span.task.writes)}
    assert "weights:2" in touched
    assert "weights:3" not in touched, "a resident layer is bound once, before the run"


def test_rows_change_hands_in_a_task_that_everything_of_the_group_follows(virtual):
    spans, _, _ = virtual(lambda: simulate(make_plan(num_rows=1), [(0, 5, 9), (1, 7, 4)]))
    changes = [span for span in spans if span.task.op is Op.ASSIGN_ROWS]
    assert [[(row.row, row.sequence) for row in span.task.payload.rows] for span in changes] == [
        [(0, 0)],
        [(0, None), (0, 1)],
    ]
    for change in changes:
        embed = first_of(spans, Op.EMBED, change.task.id)
        assert any(race.startswith("sequence:0") for race in find_races(overlapping(spans, change, embed)))
