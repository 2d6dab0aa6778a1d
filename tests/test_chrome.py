"""Chrome traces: the format's rules on every trace that is produced, and what is read back equals what was written."""

from dataclasses import replace

import pytest

from aspec.errors import UserError
from aspec.observe.chrome_trace import write_trace
from aspec.observe.recorder import Recorder
from aspec.observe.summary import summarise
from aspec.observe.timeline import Round, Slice, Timeline
from aspec.observe.trace_reading import read_trace
from aspec.planning.sim_backend import SimCosts
from aspec.planning.simulation import measured_profile, simulate
from tests.simulate import make_plan, with_experts
from tests.trace_rules import check_trace, load

HOST = SimCosts(disk_bytes_per_s=2e9, layer_s=2e-3, draft_s=1e-3)
DEVICE = SimCosts(disk_bytes_per_s=5e9, copy_bytes_per_s=20e9, layer_s=1e-3, draft_s=1e-3)


def recorded(profile=HOST, arrivals=((20, 40), (5, 12)), **changes):
    plan = make_plan(**{"num_layers": 6, "num_slots": 5, "num_rows": 2, **changes})
    recorder = Recorder()
    simulate(plan, profile, arrivals, [recorder])
    facts = {"slots": plan.num_slots, "bytes_per_pass": plan.streamed_bytes, "target": "simulated"}
    return recorder.timeline(facts)


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
@pytest.mark.parametrize(
    ("profile", "changes"),
    [
        (HOST, {}),
        (DEVICE, {}),
        (HOST, {"resident": range(12)}),
        (HOST, {"fixed_draft_tokens": 0}),
        (HOST, {"num_slots": 2}),
    ],
    ids=["host", "device", "resident", "no draft", "two slots"],
)
def test_the_format_holds_and_the_file_reads_back(tmp_path, profile, changes, name):
    timeline = recorded(profile, **changes)
    path = tmp_path / name
    count = write_trace(path, {"aspec": timeline})
    by_kind = check_trace(load(path))
    assert sum(map(len, by_kind.values())) == count
    back = read_trace(path)["aspec"]
    assert back.facts == timeline.facts
    assert len(back.slices) == len(timeline.slices)
    assert [(r.number, r.proposed, r.accepted, r.tokens) for r in back.rounds] == [
        (r.number, r.proposed, r.accepted, r.tokens) for r in timeline.rounds
    ]
    mine, theirs = summarise(timeline), summarise(back)
    assert theirs.bottleneck == mine.bottleneck
    assert theirs.tokens_per_s == pytest.approx(mine.tokens_per_s, rel=1e-3)
    assert [(use.lane, pytest.approx(use.share, abs=1e-3)) for use in mine.lanes] == [
        (use.lane, use.share) for use in theirs.lanes
    ]
    assert theirs.critical_path == pytest.approx(mine.critical_path, abs=1e-3)
    assert [stall.seconds for stall in theirs.stalls] == pytest.approx(
        [stall.seconds for stall in mine.stalls], abs=2e-6
    )


def test_what_a_trace_shows(tmp_path):
    timeline = recorded(DEVICE)
    write_trace(tmp_path / "t.json", {"aspec": timeline})
    by_kind = check_trace(load(tmp_path / "t.json"))
    titles = [e["args"]["name"] for e in by_kind["M"] if e["name"] == "thread_name"]
    assert titles[:2] == ["rounds", "disk"]
    assert {"h2d", "target", "draft", "cpu"} <= set(titles)
    counters = {e["name"] for e in by_kind["C"]}
    assert counters == {"disk GB/s", "h2d GB/s", "disk queue depth", "free slots", "accepted tokens"}
    accepted = [e["args"]["value"] for e in by_kind["C"] if e["name"] == "accepted tokens"]
    assert accepted[-1] == sum(r.accepted for r in timeline.rounds)
    free = [e["args"]["value"] for e in by_kind["C"] if e["name"] == "free slots"]
    assert 0 <= min(free) <= max(free) <= 5
    flows = [e for e in by_kind["X"] if "bind_id" in e]
    assert {e["name"].split()[0][0] for e in flows} == {"r", "c", "L"}  # read -> copy -> layer
    reads = [e for e in by_kind["X"] if e["name"].startswith("read")]
    assert all({"layer", "MB", "GB/s"} <= set(e["args"]) for e in reads)
    layers = [e for e in by_kind["X"] if e["name"] == "L3"]
    assert all({"layer", "round", "tokens"} <= set(e["args"]) for e in layers)
    rejected = [e["args"]["tokens"] for e in by_kind["i"] if e["name"].startswith("rejected")]
    assert sum(rejected) == sum(r.proposed - r.accepted for r in timeline.rounds)


def test_what_recurrent_states_took_is_inside_other_slices(tmp_path):
    slices = (
        Slice(0, "target", "L0", 0.0, 0.004, round=0, layer=0, states_s=0.003),
        Slice(1, "target", "L1", 0.004, 0.006, round=0, layer=1, cause=0),
        Slice(2, "cpu", "accept", 0.006, 0.007, round=0, cause=1, states_s=0.0002),
    )
    timeline = Timeline(slices, (Round(0, 0.0, 0.007, 4, 2, 3),))
    path = tmp_path / "trace.json"
    write_trace(path, {"aspec": timeline})
    drawn = {event["name"]: event for event in load(path)["traceEvents"] if event["name"] in ("nodes", "commit")}
    assert (drawn["nodes"]["ts"], drawn["nodes"]["dur"]) == (1000, 3000)
    assert (drawn["commit"]["ts"], drawn["commit"]["dur"]) == (6800, 200)
    back = read_trace(path)["aspec"]
    assert [s.states_s for s in back.slices] == [0.003, 0.0, 0.0002]
    assert summarise(back).states_s == (0.003, 0.0002)
    assert "recurrent states: 3.0 ms for nodes, inside layers, and 0.20 ms for commits" in summarise(back).lines()


def test_stalls_are_marked(tmp_path):
    timeline = recorded(SimCosts(disk_bytes_per_s=2e9, layer_s=2e-3, draft_s=40e-3), num_slots=3)
    write_trace(tmp_path / "t.json", {"aspec": timeline})
    marks = [e for e in check_trace(load(tmp_path / "t.json"))["i"] if e["name"] == "stall"]
    assert marks
    assert all(e["args"]["ms"] >= 1 and "waited for" in e["args"]["cause"] for e in marks)


def test_two_runs_on_one_time_base(tmp_path):
    timeline = recorded()
    measured = measured_profile(timeline)
    again = recorded(measured)
    write_trace(tmp_path / "both.json", {"aspec": timeline, "aspec simulated": again})
    check_trace(load(tmp_path / "both.json"))
    back = read_trace(tmp_path / "both.json")
    assert list(back) == ["aspec", "aspec simulated"]
    assert all(abs(t.start_s) < 1e-6 for t in back.values())


def test_a_profile_measured_from_a_run_is_the_profile_of_the_run():
    profile = SimCosts(
        disk_bytes_per_s=3e9,
        layer_s=4e-3,
        layer_token_s=5e-5,
        draft_s=1e-3,
        draft_token_s=1e-5,
        head_s=3e-3,
        embed_s=1e-4,
    )
    measured = measured_profile(recorded(profile, arrivals=((20, 200), (5, 100))))
    for name in ("disk_bytes_per_s", "layer_s", "layer_token_s", "draft_s", "draft_token_s", "head_s", "accept_s"):
        assert getattr(measured, name) == pytest.approx(getattr(profile, name), rel=0.02), name
    assert measured.copy_bytes_per_s is None
    assert 0.7 < measured.acceptance < 0.9


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"traceEvents": []}', '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": [3]}']
)
def test_anything_else_is_refused_in_one_paragraph(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"other\.json: not a trace"):
        read_trace(path)
    zipped = tmp_path / "other.json.gz"
    zipped.write_text(text)
    with pytest.raises(UserError, match=r"other\.json\.gz"):
        read_trace(zipped)


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be written"):
        write_trace(tmp_path / "none" / "t.json", {"aspec": recorded()})


def test_a_million_tasks_would_stay_under_150_mb(tmp_path):
    """On the part sizes of a 2 GB checkpoint, times and ids as long as at the millionth task; counters are capped."""
    timeline = recorded(
        arrivals=((20, 300),),
        num_layers=22,
        parts_per_layer=4,
        num_slots=9,
        num_rows=1,
        capacity=2048,
        nbytes=21_233_664,
    )
    far = [replace(s, id=s.id + 900_000, cause=s.cause + 900_000 if s.cause >= 0 else -1) for s in timeline.slices]
    far[1:] = [replace(s, start_s=s.start_s + 8000, stop_s=s.stop_s + 8000) for s in far[1:]]
    write_trace(tmp_path / "t.json", {"aspec": replace(timeline, slices=tuple(far))})
    lines = (tmp_path / "t.json").read_text().splitlines(keepends=True)
    tasks = [line for line in lines if '"ph":"X"' in line and '"round ' not in line]
    assert len(tasks) == len(far)
    marks = sum(map(len, lines)) - sum(map(len, tasks))
    assert sum(map(len, tasks)) / len(tasks) * 1e6 + marks < 150e6


@pytest.mark.parametrize("device", [False, True])
def test_a_flow_leads_from_a_router_by_the_reads_of_its_experts_to_the_end_of_the_layer(tmp_path, device):
    plan = make_plan(num_rows=2, num_slots=5, num_staging=device)
    plan = with_experts(plan, cached=1, passing=4, host=(2, 4) if device else None)
    recorder = Recorder()
    simulate(plan, DEVICE if device else HOST, ((20, 40), (5, 12)), [recorder])
    timeline = recorder.timeline({"slots": plan.num_slots, "bytes_per_pass": plan.streamed_bytes})
    write_trace(tmp_path / "trace.json", {"aspec": timeline})
    data = load(tmp_path / "trace.json")
    check_trace(data)
    flows = {}
    for event in data["traceEvents"]:
        if "bind_id" in event:
            flows.setdefault(event["bind_id"], []).append(event["name"])
    routed = [names for names in flows.values() if names[0].endswith("attention and router")]
    assert len(routed) > 20
    for first, *loads, last in routed:
        layer = first.split()[0]
        assert last == f"{layer} last experts and rest"
        assert loads
        assert all(f"{layer} expert " in name for name in loads)
    free = [event["args"]["value"] for event in data["traceEvents"] if event["name"] == "free slots"]
    assert min(free) >= 0, "an expert takes no slot of the weight stream"
