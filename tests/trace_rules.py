"""The rules of the Chrome trace format that viewers rely on, as one check over a file."""

import gzip
import json
from collections import defaultdict
from itertools import pairwise

REQUIRED = {
    "X": {"ts", "dur", "tid", "name"},
    "C": {"ts", "name", "args"},
    "i": {"ts", "tid", "s", "name"},
    "M": {"name"},
}
LARGEST = 2**53


def load(path):
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def check_trace(data):
    """Assert every rule; returns the events by kind."""
    assert data["displayTimeUnit"] in ("ms", "ns")
    by_kind = defaultdict(list)
    for event in data["traceEvents"]:
        kind = event["ph"]
        assert kind in REQUIRED, event
        assert {"pid"} | REQUIRED[kind] <= set(event), event
        assert all(is_number(event[key]) and 0 <= event[key] < LARGEST for key in ("ts", "dur", "id") if key in event)
        by_kind[kind].append(event)
    check_names(by_kind)
    check_order(data["traceEvents"])
    check_nesting(by_kind["X"])
    check_flows(by_kind["X"])
    for event in by_kind["C"]:
        assert event["args"], event
        assert all(is_number(value) for value in event["args"].values()), event
    assert all(event["s"] in ("t", "p", "g") for event in by_kind["i"])
    return by_kind


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_names(by_kind):
    """Every track in use has a name and a place."""
    for kind in ("thread_name", "thread_sort_index"):
        told = {(e["pid"], e["tid"]) for e in by_kind["M"] if e["name"] == kind}
        assert {(e["pid"], e["tid"]) for e in by_kind["X"] + by_kind["i"]} <= told
    assert {e["pid"] for e in by_kind["X"]} <= {e["pid"] for e in by_kind["M"] if e["name"] == "process_name"}


def check_order(events):
    """Times are relative (a run starts near 0) and never go back on a track or a counter."""
    last = defaultdict(float)
    for event in events:
        if event["ph"] != "M":
            track = (event["pid"], event["ph"] == "C" and event["name"], event.get("tid"))
            assert event["ts"] >= last[track], event
            last[track] = event["ts"]
    for pid in {e["pid"] for e in events}:
        assert min(e["ts"] for e in events if e["pid"] == pid and e["ph"] == "X") < 1e6


def check_nesting(slices):
    """Slices of a track lie inside one another or apart, never across."""
    open_until = defaultdict(list)
    for event in slices:
        stack = open_until[event["pid"], event["tid"]]
        while stack and stack[-1] <= event["ts"]:
            stack.pop()
        assert not stack or event["ts"] + event["dur"] <= stack[-1], event
        stack.append(event["ts"] + event["dur"])


def check_flows(slices):
    """Every flow leaves one slice, enters one, steps through slices between; none goes back in time."""
    flows = defaultdict(list)
    for event in slices:
        if "bind_id" in event:
            flows[event["pid"], event["bind_id"]].append(
                (event.get("flow_in", False), event.get("flow_out", False), event)
            )
    for steps in flows.values():
        ends = [(into, out) for into, out, _ in steps]
        assert ends[0] == (False, True), steps
        assert ends[-1] == (True, False), steps
        assert all(end == (True, True) for end in ends[1:-1]), steps
        assert len(steps) >= 2
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for (_, _, a), (_, _, b) in pairwise(steps))
