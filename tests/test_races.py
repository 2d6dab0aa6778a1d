"""The race detector finds what it must: every kind of conflict, planted."""

import dataclasses

import pytest

from aspec.races import find_races
from aspec.tasks.op import Op
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
