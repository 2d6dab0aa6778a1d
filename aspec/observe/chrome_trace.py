"""Chrome trace JSON: writes timelines to a file for Perfetto and chrome://tracing; ``trace_reading`` reads it back.

A lane with several tasks in flight gets several tracks, so slices on a track do not overlap; those of recurrent states
are inside others. Times are whole
microseconds from the first task; start and stop are rounded alike, so neighbours still meet. Format: "Trace Event
Format", Google, 2016: X slices (``bind_id`` joins them to flows), C counters, i instants, M names.
"""

import gzip
import heapq
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aspec.errors import UserError
from aspec.observe.timeline import (
    CPU,
    D2H,
    DISK,
    H2D,
    LINKS,
    TARGET,
    Slice,
    Timeline,
    decode_stretch,
    stalls,
)
from aspec.tasks.op import Op

ROUNDS = "rounds"
ROUNDS_TRACK = 1
TRACKS_PER_LANE = 16  # the track ids of a lane start at a multiple of this
COUNTER_STEPS = 1000  # most values of a counter
SHORTEST_STEP_S = 0.02  # between two values of a counter
STALL_S = 1e-3  # a shorter stall gets no mark
MOST_STALLS = 1000  # marked, the longest ones

TEXT_FACTS = ("version", "target", "draft")

Event = tuple[int, int, str]  # microseconds, rank among events of the same time, JSON

NODES, COMMIT = "nodes", "commit"  # names of what recurrent states took, inside other slices
EXPERT = re.compile(r"L[0-9]+ expert [0-9]+$")  # names of slices that load an expert
LOADS = tuple(op for op in Op if op.loads)  # a load's slice name begins with one of these


def write_trace(path: Path, processes: Mapping[str, Timeline]) -> int:
    """Write one process per timeline, each from time 0; gzip if the name ends in .gz. Return the number of events.

    Raises UserError if the file cannot be written.
    """
    try:
        with _open(path) as file:
            return _write(file, processes)
    except OSError as error:
        raise UserError(f"{path}: the trace cannot be written: {error.strerror}. Choose another path.") from error


def _open(path: Path) -> IO[str]:
    """Open a trace file for writing."""
    if path.suffix == ".gz":
        return gzip.open(path, "wt", compresslevel=1, encoding="utf-8")
    return path.open("w", encoding="utf-8")


def _write(file: IO[str], processes: Mapping[str, Timeline]) -> int:
    file.write('{"displayTimeUnit":"ms","otherData":')
    file.write(json.dumps({name: dict(timeline.facts) for name, timeline in processes.items()}))
    file.write(',"traceEvents":[\n')
    separator, count = "", 0
    for pid, (name, timeline) in enumerate(processes.items(), start=1):
        for line in _events(pid, name, timeline):
            file.write(separator + line)
            separator = ",\n"
            count += 1
    file.write("\n]}\n")
    return count


def _events(pid: int, name: str, timeline: Timeline) -> Iterator[str]:
    """The events of one process: its names, then its slices and marks in order of time."""
    tracks = assign_tracks(timeline)
    yield _named(pid, 0, "process_name", name)
    for track, title in sorted({ROUNDS_TRACK: ROUNDS, **_titles(timeline, tracks)}.items()):
        yield _named(pid, track, "thread_name", title)
        yield f'{{"ph":"M","pid":{pid},"tid":{track},"name":"thread_sort_index","args":{{"sort_index":{track}}}}}'
    zero = timeline.start_s
    served = list(_layer_loads(timeline))
    marks = sorted([*_counters(timeline, served), *_stalls(timeline)])
    streams = (
        _slices(timeline, tracks, _flows(timeline, served)),
        _states(timeline, tracks),
        _rounds(timeline),
        ((_micros(at - zero), 1, text) for at, text in marks),
    )
    for micros, _, text in heapq.merge(*streams):
        yield f'{{"pid":{pid},"ts":{micros},{text}}}'


def _named(pid: int, tid: int, kind: str, name: str) -> str:
    return f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"{kind}","args":{{"name":{json.dumps(name)}}}}}'


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)


def assign_tracks(timeline: Timeline) -> dict[int, int]:
    """The track of every slice, by slice id: the lowest free track of its lane."""
    tracks: dict[int, int] = {}
    for index, lane in enumerate(timeline.lanes, start=1):
        free: list[int] = []
        busy: list[tuple[float, int]] = []  # (stop, track)
        made = 0
        for s in timeline.lane(lane):
            while busy and busy[0][0] <= s.start_s:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if not free:
                heapq.heappush(free, index * TRACKS_PER_LANE + made)
                made += 1
            tracks[s.id] = heapq.heappop(free)
            heapq.heappush(busy, (s.stop_s, tracks[s.id]))
    return tracks


def _titles(timeline: Timeline, tracks: Mapping[int, int]) -> dict[int, str]:
    """The name of every track: its lane, with a number if the lane has several tracks."""
    used = set(tracks.values())
    titles: dict[int, str] = {}
    for index, lane in enumerate(timeline.lanes, start=1):
        own = sorted(track for track in used if track // TRACKS_PER_LANE == index)
        titles |= {track: f"{lane} {n}" if len(own) > 1 else lane for n, track in enumerate(own)}
    return titles


def _slices(timeline: Timeline, tracks: Mapping[int, int], flows: Mapping[int, str]) -> Iterator[Event]:
    """The tasks' slices. ``after`` is the id of the task that let this one start; only such tasks show their ``id``."""
    zero = timeline.start_s
    named = {s.cause for s in timeline.slices}
    for s in timeline.slices:
        start = _micros(s.start_s - zero)
        dur = _micros(s.stop_s - zero) - start
        own = f'"id":{s.id},' if s.id in named else ""
        layer = f'"layer":{s.layer},' if s.layer >= 0 else ""
        after = f',"after":{s.cause}' if s.cause >= 0 else ""
        if s.nbytes:
            rate = s.nbytes / max(s.stop_s - s.start_s, 1e-9) / 1e9
            what = f'"MB":{s.nbytes / 1e6:.6g},"GB/s":{rate:.2f}'
            what += f',"round":{s.round},"tokens":{s.tokens}' if s.round >= 0 else ""
        else:
            what = f'"round":{s.round},"tokens":{s.tokens}'
        flow = flows.get(s.id, "")
        states = _micros(s.states_s)
        inside = f',"states_us":{states}' if states else ""
        args = f"{{{own}{layer}{what}{after}{inside}}}"
        yield start, 0, f'"tid":{tracks[s.id]},"ph":"X","dur":{dur},"name":"{s.name}"{flow},"args":{args}'


def _states(timeline: Timeline, tracks: Mapping[int, int]) -> list[Event]:
    """Slices inside those of layers and of ``accept``, drawn at their ends: what recurrent states took."""
    return sorted(
        (
            _micros(s.stop_s - timeline.start_s) - micros,
            1,
            f'"tid":{tracks[s.id]},"ph":"X","dur":{micros},"name":"{COMMIT if s.lane == CPU else NODES}","args":{{}}',
        )
        for s in timeline.slices
        if (micros := _micros(s.states_s))
    )


def _rounds(timeline: Timeline) -> Iterator[Event]:
    """The top track: one slice per round, and a mark where proposals were rejected."""
    zero = timeline.start_s
    for r in timeline.rounds:
        start, stop = _micros(r.start_s - zero), _micros(r.stop_s - zero)
        args = f'"round":{r.number},"proposed":{r.proposed},"accepted":{r.accepted},"tokens":{r.tokens}'
        name = f'"name":"round {r.number}"'
        yield start, 0, f'"tid":{ROUNDS_TRACK},"ph":"X","dur":{stop - start},{name},"args":{{{args}}}'
        if rejected := r.proposed - r.accepted:
            args = f'{{"round":{r.number},"tokens":{rejected}}}'
            yield stop, -1, f'"tid":{ROUNDS_TRACK},"ph":"i","s":"t","name":"rejected {rejected}","args":{args}'


@dataclass(frozen=True, slots=True)
class _LayerLoads:
    """The loads that one layer of one pass used, in order of arrival, and the extent of that layer's slices."""

    loads: tuple[Slice, ...]
    first: Slice  # the layer's first slice
    stop_s: float  # end of the layer's last slice: its slots are free from then on


def _layer_loads(timeline: Timeline) -> Iterator[_LayerLoads]:
    """The loads of each layer in each pass: loads of its parts that arrived since its previous pass."""
    landed: dict[int, list[Slice]] = defaultdict(list)
    layers: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    for s in timeline.slices:
        if s.lane == TARGET and s.layer >= 0:
            layers[s.round, s.layer].append(s)
    loads = iter(sorted(_loads(timeline), key=lambda s: s.stop_s))
    next_load = next(loads, None)
    for (_, layer), slices in sorted(layers.items(), key=lambda pair: pair[1][0].start_s):
        while next_load is not None and next_load.stop_s <= slices[0].start_s:
            landed[next_load.layer].append(next_load)
            next_load = next(loads, None)
        if own := landed.pop(layer, None):
            yield _LayerLoads(tuple(own), slices[0], max(s.stop_s for s in slices))


def _loads(timeline: Timeline) -> list[Slice]:
    """The slices that load parts into slots."""
    links = timeline.lane(H2D if H2D in timeline.lanes else DISK)
    return [s for s in links if s.part >= 0 and not EXPERT.search(s.name)]


def _expert_flows(timeline: Timeline) -> dict[int, str]:
    """One flow per routed layer and pass: router -> loads of its experts -> the layer's end.

    Loads overlap and a flow cannot: it steps through as many as follow one another. All of them name what they came
    ``after``.
    """
    loads: dict[int, list[Slice]] = defaultdict(list)
    for s in timeline.slices:
        if s.lane in LINKS and EXPERT.search(s.name):
            loads[s.layer].append(s)
    ends = {(s.round, s.layer): s for s in reversed(timeline.slices) if s.name == Op.COMBINE.label(s.layer, None)}
    flows: dict[int, str] = {}
    routes = {(s.round, s.layer): s for s in timeline.slices if s.name == Op.ROUTE.label(s.layer, None)}
    for key, route in routes.items():
        if (end := ends.get(key)) is not None:
            chain = [route]
            for s in sorted(loads[route.layer], key=lambda load: load.stop_s):
                if chain[-1].stop_s <= s.start_s and s.stop_s <= end.start_s:
                    chain.append(s)
            flows |= dict(_chain([*chain, end], end.id)) if len(chain) > 1 else {}
    return flows


def _chain(slices: Sequence[Slice], flow: int) -> Iterator[tuple[int, str]]:
    """A flow along some slices: by slice id, its JSON."""
    for s in slices:
        into = ',"flow_in":true' if s is not slices[0] else ""
        out = ',"flow_out":true' if s is not slices[-1] else ""
        yield s.id, f',"bind_id":{flow}{into}{out}'


def _flows(timeline: Timeline, served: Iterable[_LayerLoads]) -> dict[int, str]:
    """By slice id, the JSON of its flow: one per layer and pass, along its last load, read -> copy -> layer; where
    experts are read on demand along these, and the rest of the layer's weights has none."""
    reads: dict[int, list[Slice]] = defaultdict(list)
    if H2D in timeline.lanes:
        for s in timeline.lane(DISK):
            reads[s.part].append(s)
    flows = _expert_flows(timeline)
    for use in served:
        if use.first.id in flows:
            continue
        load = use.loads[-1]
        source = next((s for s in reversed(reads[load.part]) if s.stop_s <= load.start_s), None)
        flows |= dict(_chain([s for s in (source, load, use.first) if s is not None], use.first.id))
    return flows


def _counters(timeline: Timeline, served: Iterable[_LayerLoads]) -> Iterator[tuple[float, str]]:
    """Counters: GB/s of every link, free slots, reads in flight, accepted tokens; one value at each change."""
    start, stop = timeline.start_s, timeline.stop_s
    step = max(SHORTEST_STEP_S, (stop - start) / COUNTER_STEPS)
    steps = int((stop - start) / step) + 1
    at = [start + i * step for i in range(steps)]
    for lane in (name for name in (*LINKS, D2H) if name in timeline.lanes):
        yield from _counter(f"{lane} GB/s", at, _rates(timeline.lane(lane), start, step, steps))
    reads = [change for s in timeline.lane(DISK) for change in ((s.start_s, 1), (s.stop_s, -1))]
    if reads:
        yield from _counter("disk queue depth", at, _sampled(reads, at))
    if slots := int(timeline.facts.get("slots", 0)):
        changes = [change for use in served for change in ((use.stop_s, len(use.loads)),)]
        changes += [(s.start_s, -1) for s in _loads(timeline)]
        yield from _counter("free slots", at, [slots + value for value in _sampled(changes, at)])
    total = 0
    for r in timeline.rounds:
        total += r.accepted
        yield r.stop_s, _value("accepted tokens", total)


def _counter(name: str, at: list[float], values: list[float]) -> Iterator[tuple[float, str]]:
    before: float | None = None
    for seconds, value in zip(at, values, strict=True):
        if value != before:
            yield seconds, _value(name, value)
        before = value


def _value(name: str, value: float) -> str:
    return f'"ph":"C","name":"{name}","args":{{"value":{value:g}}}'


def _rates(slices: Iterable[Slice], start: float, step: float, steps: int) -> list[float]:
    """GB/s in every step; the bytes of a slice are spread evenly over its time."""
    nbytes = [0.0] * steps
    for s in slices:
        first, last = int((s.start_s - start) / step), min(steps - 1, int((s.stop_s - start) / step))
        whole = max(s.stop_s - s.start_s, 1e-9)
        for i in range(first, last + 1):
            inside = min(s.stop_s, start + (i + 1) * step) - max(s.start_s, start + i * step)
            nbytes[i] += s.nbytes * max(0.0, inside) / whole
    return [round(n / step / 1e9, 3) for n in nbytes]


def _sampled(changes: Iterable[tuple[float, int]], at: list[float]) -> list[float]:
    """The running sum of changes at the times ``at``."""
    values: list[float] = []
    pending, total = iter(sorted(changes)), 0
    change = next(pending, None)
    for seconds in at:
        while change is not None and change[0] <= seconds:
            total += change[1]
            change = next(pending, None)
        values.append(total)
    return values


def _stalls(timeline: Timeline) -> Iterator[tuple[float, str]]:
    """A mark at each stall of the busiest lane."""
    for stall in stalls(timeline, *decode_stretch(timeline), STALL_S)[:MOST_STALLS]:
        track = TRACKS_PER_LANE * (1 + timeline.lanes.index(stall.lane))
        args = f'{{"ms":{stall.seconds * 1e3:.1f},"cause":{json.dumps(stall.cause)}}}'
        yield stall.start_s, f'"tid":{track},"ph":"i","s":"t","name":"stall","args":{args}'
