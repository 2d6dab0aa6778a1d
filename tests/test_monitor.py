"""The monitor: what a run looks like from outside at any moment of it, in virtual time."""

from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest

from aspec.observe.console import Console, progress_line
from aspec.observe.monitor import Monitor
from aspec.observe.snapshot import SlotState, Snapshot
from aspec.observe.timeline import Stops
from aspec.planning.sim_backend import SimCosts
from aspec.planning.simulation import simulate
from aspec.tasks.op import Op
from tests.simulate import make_plan, with_experts

COVER = SimpleNamespace(covers=True, leave="")
PROFILE = SimCosts(disk_bytes_per_s=2e9, layer_s=2e-3, draft_s=1e-3)


def watched(plan, arrivals, profile=PROFILE):
    """A snapshot at every event of a run, and the spans."""
    monitor, spans, seen = Monitor(), [], []
    monitor.opened(plan, sum(new for _, new in arrivals), sum(prompt for prompt, _ in arrivals))

    def finished(span):
        monitor(span)
        spans.append(span)
        seen.append(monitor.snapshot(span.stop_s))

    def issued(task, at_s):
        monitor.issued(task, at_s)
        seen.append(monitor.snapshot(at_s))

    simulate(plan, profile, arrivals, [finished], [issued])
    return seen, spans


def test_snapshots_add_up_to_the_run():
    plan = make_plan(num_slots=5, resident={0, 3}, num_rows=2)
    seen, spans = watched(plan, ((20, 40), (6, 9)))
    last = seen[-1]
    outcomes = [outcome for span in spans for outcome in span.outcomes]
    assert last.tokens == last.done == 49
    assert last.total == 49
    assert last.rounds == len({span.task.number for span in spans if span.outcomes})
    assert sum(last.accepted) == sum(outcome.num_proposed > 0 for outcome in outcomes)
    assert sum(n * times for n, times in enumerate(last.accepted)) == sum(o.num_accepted for o in outcomes)
    assert last.residency == (0.5, 0.5, 0.0, 0.0)
    assert last.tokens_per_pass > 1
    busy = {lane.name: sum(b - a for a, b, _ in lane.work) for lane in last.lanes}
    assert busy.keys() == {"disk", "target", "draft"}, "the host's tasks take no time"
    reads = [span for span in spans if span.task.op is Op.READ]
    assert abs(busy["disk"] - sum(s.stop_s - s.start_s for s in reads)) < 1e-9


def test_experts_are_counted_while_decoding():
    plan = with_experts(make_plan(resident=range(8), num_slots=0, num_rows=1), cached=1, passing=4)
    seen, spans = watched(plan, ((20, 40),))
    decoding = [span for span in spans if span.task.item is not None and not span.task.item.prefill and span.routed]
    begun_s = next(span.stop_s for span in spans if span.outcomes)
    loads = [span.task for span in spans if span.task.op is Op.LOAD_EXPERT and span.stop_s > begun_s]
    experts = seen[-1].experts
    assert experts.unions == len(decoding)
    assert experts.chosen == sum(len(span.routed) for span in decoding)
    assert experts.missing == sum(not task.payload.guessed for task in loads) > 0
    assert experts.guessed == sum(task.payload.guessed for task in loads) > 0
    assert experts.read_bytes == sum(task.nbytes for task in loads)
    assert experts.tokens == 39
    held = 1 - experts.missing / experts.chosen
    assert experts.facts[0] == f"{held:.0%} in memory"
    assert watched(make_plan(num_rows=1), ((20, 4),))[0][-1].experts is None


def test_slots_go_from_loading_to_ready_to_in_use():
    plan = make_plan(num_slots=5, num_rows=1)
    seen, _ = watched(plan, ((20, 12),))
    states = {state for snapshot in seen for state, _ in snapshot.slots}
    assert states == set(SlotState)
    for snapshot in seen:
        assert len(snapshot.slots) == 5
        assert all((layer == -1) == (state is SlotState.FREE) for state, layer in snapshot.slots)
        loading = [lane.running for lane in snapshot.lanes if lane.name == "disk"]
        if loading:
            assert len(loading[0]) == sum(state is SlotState.LOADING for state, _ in snapshot.slots)


def test_the_stages_before_the_first_token():
    monitor = Monitor()
    monitor.progress("load", 10, 100)
    assert (monitor.snapshot(1.0).stage, monitor.snapshot(4.0).stage_s) == ("load", 3.0)
    plan = make_plan(num_layers=4, parts_per_layer=2, nbytes=10_000_000)
    seen, _ = watched(plan, ((20, 12),))
    prefill = [s for s in seen if s.stage == "prefill"]
    assert {s.done for s in prefill} == {0, *accumulate([5] * 4)}, "prompt tokens through each of 4 layers"
    assert {s.total for s in prefill} == {20}
    assert all(a.done <= b.done for a, b in pairwise(prefill))
    assert [s.stage for s in seen] == ["prefill"] * len(prefill) + ["decode"] * (len(seen) - len(prefill))


def test_a_lane_in_order_runs_one_task_however_many_are_queued():
    seen, _ = watched(make_plan(num_rows=1), ((20, 12),))
    assert all(len(lane.running) <= 1 for s in seen for lane in s.lanes if lane.name == "target")
    assert any(len(lane.running) > 1 for s in seen for lane in s.lanes if lane.name == "disk")


def test_stopped_seconds_are_not_busy():
    stops = Stops()
    plan = make_plan(num_slots=5, num_rows=1)
    plain, stopped = Monitor(), Monitor(stops)
    for monitor in (plain, stopped):
        monitor.opened(plan, 40)
    later_s = 0.0

    def finished(span):
        nonlocal later_s
        start_s = span.start_s + later_s
        if span.task.number == 3 and not later_s:  # a stop within this task
            later_s = 100.0
            stops.add(start_s, start_s + later_s)
        plain(span)
        stopped(replace(span, start_s=start_s, stop_s=span.stop_s + later_s))

    simulate(plan, PROFILE, ((20, 40),), [finished])
    one, other = plain.snapshot(2.0), stopped.snapshot(2.0 + later_s)
    assert later_s
    assert other.now_s == pytest.approx(one.now_s)
    assert other.tokens_per_s == pytest.approx(one.tokens_per_s)
    for ours, theirs in zip(other.lanes, one.lanes, strict=True):
        assert [tuple(work) for work in ours.work] == [pytest.approx(work) for work in theirs.work]


def test_the_text_of_each_row_is_kept_apart():
    monitor = Monitor()
    for text, row in (("a", 0), ("x", 2), ("b", 0), ("y" * 9000, 2)):
        monitor.heard(text, row)
    first, second, third = monitor.snapshot(0.0).texts
    assert (first, second) == ("ab", "")
    assert set(third) == {"y"}


def test_the_memory_is_told_as_held_of_the_budget():
    plan = make_plan(num_rows=1, arithmetic={"KV cache": 64 << 20, "slots": 130 << 20})
    monitor = Monitor()
    monitor.opened(plan, 1)
    assert monitor.snapshot(0.0).held == "194 MiB held: slots 130 MiB + KV cache 64.00 MiB"
    monitor.opened(replace(plan, request=replace(plan.request, budget_bytes=200 << 20)), 1)
    assert monitor.snapshot(0.0).held == "194 of 200 MiB: slots 130 MiB + KV cache 64.00 MiB"


def test_the_host_has_a_lane_where_its_tasks_take_time():
    slow = replace(PROFILE, accept_s=5e-2)
    seen, _ = watched(make_plan(num_rows=1), ((20, 40),), slow)
    assert "cpu" in {lane.name for lane in seen[-1].lanes}
    assert "cpu" not in {lane.name for lane in watched(make_plan(num_rows=1), ((20, 40),))[0][-1].lanes}


def test_progress_in_one_line():
    monitor = Monitor()
    assert progress_line(monitor.snapshot(0.0)) is None
    assert progress_line(monitor.snapshot(3.0)) == "index ..."
    monitor.progress("load", 0, 4 << 30)
    monitor.snapshot(10.0)
    monitor.progress("load", 1 << 30, 4 << 30)
    assert progress_line(monitor.snapshot(15.0)) == "load: 1.00 GiB of 4.00 GiB, 15 s left"
    prefill = Snapshot(9.0, "prefill", 500, 2000, 2.0)
    assert progress_line(prefill) == "prefill: 500 of 2000 prompt tokens, 250.0 tokens/s, 6 s left"
    seen, _ = watched(make_plan(num_rows=1), ((20, 40),))
    line = progress_line(seen[-1])
    assert line.startswith("decode: 40 of at most 40 tokens, ")
    assert "tokens/s" in line
    assert "disk-bound" in line or "compute-bound" in line or "latency-bound" in line


def test_what_is_said_under_a_dashboard_comes_out_behind_it(capsys, monkeypatch):
    console = Console()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with console.shown(COVER):
        console.note("later")
        console.write("text")
        assert capsys.readouterr() == ("", "")
    out, err = capsys.readouterr()
    assert out == "text\n"
    assert "aspec: later" in err


def test_text_goes_on_to_a_pipe_under_a_dashboard(capsys):
    console = Console()
    with console.shown(COVER):
        console.write("text")
        assert capsys.readouterr().out == "text"
    assert capsys.readouterr().out == ""
