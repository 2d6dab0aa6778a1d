"""Intervals, utilisation, bottleneck, stalls and the critical path; the recorder that feeds them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspec.observe.recorder import _RECORD, BLOCK_SPANS, Recorder
from aspec.observe.summary import summarise
from aspec.observe.timeline import (
    Round,
    Slice,
    Timeline,
    bottleneck,
    clip,
    critical_path,
    decode_stretch,
    draft_wait_s,
    hidden_share,
    lane_use,
    length,
    merge,
    shared,
    stalls,
    uses_of,
)
from aspec.planning.sim_backend import DEVICE_RESOURCES, SimCosts
from aspec.tasks.op import Op
from aspec.tasks.task import Load, RowOutcome, Span, Task
from tests.simulate import make_plan, simulate

intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda p: (float(p[0]), float(p[0] + p[1]))))


def seconds(found):
    return {second for start, stop in found for second in range(int(start), int(stop))}


@given(intervals, intervals)
def test_interval_maths_agrees_with_sets_of_seconds(first, second):
    a, b = merge(first), merge(second)
    assert seconds(a) == seconds(first)
    assert all(x[1] < y[0] for x, y in pairwise(a))
    assert length(a) == len(seconds(first))
    assert shared(a, b) == len(seconds(first) & seconds(second))
    assert seconds(clip(a, 10.0, 20.0)) == seconds(first) & set(range(10, 20))


def test_lane_use_counts_what_lies_inside():
    use = lane_use("disk", [(-1.0, 1.0, 100), (0.5, 1.5, 40), (3.0, 9.0, 60)], 0.0, 4.0)
    assert use.busy_s == 2.5
    assert use.share == 2.5 / 4
    assert use.nbytes == 50 + 40 + 10
    assert use.busy_bytes_per_s == 40
    assert lane_use("target", [(0.0, 1.0, 0)], 0.0, 2.0).busy_bytes_per_s is None


def test_the_bottleneck_in_words():
    disk, target = lane_use("disk", [(0.0, 0.96, 1_920_000_000)], 0, 1), lane_use("target", [(0.0, 0.5, 0)], 0, 1)
    assert bottleneck([disk, target]) == "disk-bound: 96 % of 2.00 GB/s"
    assert bottleneck([target]) == "latency-bound: no lane is busy for more than 50 % of the time"
    assert bottleneck([lane_use("draft", [(0.0, 1.0, 0)], 0, 1)]) == "draft-bound: 100 % busy"
    assert bottleneck([]) == bottleneck([lane_use("cpu", [], 0, 1)]) == "idle"


def test_the_target_waits_for_a_draft_that_runs_already():
    def work(number, lane, start, stop, cause=-1):
        return Slice(number, lane, "", start, stop, cause=cause)

    slices = [work(0, "disk", 0.0, 2.0), work(1, "draft", 1.0, 4.0), work(2, "draft", 4.0, 5.0)]
    assert draft_wait_s(Timeline((*slices, work(3, "target", 5.0, 6.0, cause=0)))) == 3.0, "ready at 2, begun at 5"
    assert draft_wait_s(Timeline((*slices, work(3, "target", 5.0, 6.0, cause=2)))) == 0.0, "it needs that draft"
    assert draft_wait_s(Timeline((*slices, work(3, "target", 2.0, 6.0, cause=0)))) == 0.0, "a lane of its own"
    assert draft_wait_s(Timeline((*slices, work(3, "target", 4.5, 6.0)))) == 0.0, "nothing is known of it"


def test_hidden_share():
    work = {"disk": [(0.0, 1.0), (2.0, 3.0)], "target": [(0.5, 1.5)], "draft": [(2.0, 2.5)]}
    assert hidden_share(work) == 1.0 / 1.5
    assert hidden_share({"target": [(0.0, 1.0)]}) is None


def test_stalls_name_what_was_waited_for():
    slices = (
        Slice(0, "disk", "read 0", 0.0, 1.0, nbytes=1),
        Slice(1, "target", "L0", 1.0, 1.8, round=3, layer=0, cause=0),
        Slice(2, "disk", "read 1", 1.9, 3.0, nbytes=1, cause=1),
        Slice(3, "disk", "read 2", 3.1, 4.0, nbytes=1),
    )
    found = stalls(Timeline(slices), 0.0, 4.0)
    assert [round(stall.seconds, 6) for stall in found] == [0.9, 0.1]
    assert found[0].cause == "read 1 waited for L0 of round 3 on target"
    assert found[1].cause == "read 2 was requested only then"
    assert stalls(Timeline(slices), 0.0, 4.0, least_s=0.5) == found[:1]
    assert stalls(Timeline(()), 0.0, 1.0) == []


def test_the_critical_path_follows_causes_and_lanes():
    slices = (
        Slice(0, "disk", "read 0", 0.0, 2.0, nbytes=1),
        Slice(1, "disk", "read 1", 1.0, 3.0, nbytes=1),  # in flight beside the first: counts from its end
        Slice(2, "target", "L0", 2.0, 2.5, cause=0),
        Slice(3, "target", "L1", 3.25, 4.0, cause=1),
        Slice(4, "cpu", "accept", 4.0, 4.5, cause=3),
    )
    path = critical_path(Timeline(slices))
    assert path == {"cpu": 0.5, "target": 0.75, "hand-off": 0.25, "disk": 3.0}
    assert sum(path.values()) == 4.5
    assert critical_path(Timeline(())) == {}


@pytest.mark.parametrize(("decoding", "ceiling"), [(4.0, 0.5), (1.0, 0.8)], ids=["decoding binds", "the disk binds"])
def test_the_ceiling_is_the_slower_of_link_and_decoding(decoding, ceiling):
    slices = (
        Slice(0, "disk", "read", 1.0, 3.5, nbytes=20),
        Slice(1, "decode", "decode", 1.0, 1.0 + decoding, nbytes=9),
    )
    rounds = (Round(0, 0.0, 1.0, 0, 0, 1), Round(1, 1.0, 6.0, 1, 1, 2))
    assert summarise(Timeline(slices, rounds, {"bytes_per_pass": 20})).ceiling_tokens_per_s == pytest.approx(ceiling)


@pytest.mark.parametrize("resources", [None, DEVICE_RESOURCES], ids=["host", "device"])
def test_a_simulated_run_adds_up(virtual, resources):
    profile = SimCosts(layer_s=1e-3, draft_s=1e-3, copy_bytes_per_s=20e9 if resources else None)
    extra = {"num_staging": 3, "draft_resource": "draft"} if resources else {}
    plan = make_plan(num_layers=6, num_slots=5, num_rows=1, **extra)
    more = {"resources": resources} if resources else {}

    async def main():
        return await simulate(plan, ((0, 20, 40),), profile=profile, **more)

    spans, _, _ = virtual(main)
    recorder = Recorder()
    for span in spans:
        recorder(span)
    timeline = recorder.timeline({"bytes_per_pass": plan.streamed_bytes})
    assert len(timeline.slices) == len(spans) == len(recorder)
    summary = summarise(timeline)
    assert summary.tokens == 40
    assert summary.rounds == sum(span.task.op is Op.ACCEPT for span in spans)
    total = sum(summary.critical_path.values())
    assert total == pytest.approx(timeline.stop_s - timeline.start_s)
    assert summary.bottleneck.startswith("disk-bound")
    assert summary.critical_path["disk"] > 0.9 * total
    assert summary.critical_path.get("hand-off", 0.0) < 1e-6  # virtual time hands over at once
    assert summary.tokens_per_s == pytest.approx(summary.ceiling_tokens_per_s, rel=0.03)
    by_id = {s.id: s for s in timeline.slices}
    for s in timeline.slices:  # nothing starts before what let it start has ended, or, on the same stream, has begun
        if s.cause in by_id:
            cause = by_id[s.cause]
            assert s.start_s >= (cause.start_s if resources else cause.stop_s) - 1e-9 or cause.lane != "disk"
    assert "\n".join(summary.lines())
    assert summary.as_dict()["lanes"]["disk"]["share"] > 0.9


def span(number, start, outcomes=()):
    return Span(Task(number, Op.ACCEPT, "cpu", 0, number=number), start, start + 0.5, outcomes)


@pytest.mark.parametrize("far", [2**31 - 1, 2**31, 2**32, 2**40])
def test_the_recorder_takes_ids_of_a_run_of_weeks(far):
    recorder = Recorder()
    for number in (far, far + 1):
        task = Task(number, Op.READ, "disk", 0, number=number, payload=Load(3, 1, 1 << 40))
        recorder(Span(task, 0.0, 1.0, cause=number - 1))
    recorder(Span(Task(far + 2, Op.ACCEPT, "cpu", 0, number=far), 1.0, 2.0, cause=-1))
    slices = recorder.timeline().slices
    assert [(s.id, s.cause) for s in slices] == [(far, far - 1), (far + 1, far), (far + 2, -1)]
    assert slices[-1].round == far
    assert _RECORD.size <= 64, "bytes that every task costs: README's number"


def test_the_recorder_keeps_the_last_spans_and_merges_a_passes_items():
    recorder = Recorder(max_spans=100)
    for number in range(3 * BLOCK_SPANS):
        recorder(span(number, float(number), (RowOutcome(0, 2, 1, 2, False), RowOutcome(1, 0, 0, 1, False))))
    assert len(recorder) == 100
    timeline = recorder.timeline()
    assert [s.id for s in timeline.slices] == list(range(3 * BLOCK_SPANS - 100, 3 * BLOCK_SPANS))
    assert timeline.rounds[-1] == Round(
        3 * BLOCK_SPANS - 1, 3 * BLOCK_SPANS - 1.5, 3 * BLOCK_SPANS - 0.5, proposed=2, accepted=1, tokens=3
    )
    assert all(r.start_s >= timeline.start_s for r in timeline.rounds)
    recorder.clear()
    assert len(recorder) == 0
    assert recorder.timeline().slices == ()
    assert decode_stretch(recorder.timeline()) == (0.0, 0.0)
    assert uses_of(recorder.timeline(), 0.0, 1.0) == []
