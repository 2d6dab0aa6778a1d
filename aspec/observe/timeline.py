"""A run as slices on lanes, and its figures: utilisation, overlap, bottleneck, stalls, critical path.

The dashboard, ``aspec trace``, ``aspec bench`` and the tests measure only with these functions. Pure: seconds and
bytes in, figures out; a slice may come from an engine, from virtual time or from a trace file.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from aspec.tasks.op import Lane
from aspec.units import format_rate

DISK, H2D, D2H, DECODE, TARGET, DRAFT, CPU = LANES = tuple(Lane)
"""The lanes of a run, from the files to the host's small tasks."""

LINKS = (DISK, H2D)
"""The lanes that carry the weights to the device."""

BOUND: Mapping[str, str] = {
    DISK: "disk-bound",
    H2D: "link-bound",
    D2H: "bound by the link to the host",
    DECODE: "bound by decoding weights",
    TARGET: "compute-bound",
    DRAFT: "draft-bound",
    CPU: "host-bound",
}
SHORTEST_STALL_S = 1e-5  # a shorter one is the gap between two tasks
UNBOUND_BELOW = 0.6  # a lane with a smaller busy share does not bind the run

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Slice:
    """One finished task on its lane; seconds on the run's own clock."""

    id: int
    lane: str
    name: str
    start_s: float
    stop_s: float
    round: int = -1
    layer: int = -1
    part: int = -1
    tokens: int = 0
    nbytes: int = 0
    cause: int = -1  # id of the task whose end let this one start; -1: no task
    states_s: float = 0.0  # of it: nodes of recurrent layers, or on the host's lane their commits


@dataclass(frozen=True, slots=True)
class Round:
    """The result of one pass of the target, all rows together."""

    number: int
    start_s: float
    stop_s: float
    proposed: int
    accepted: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """A recorded run: slices by start, rounds by end, and facts about it (slots, bytes per pass, models)."""

    slices: tuple[Slice, ...]
    rounds: tuple[Round, ...] = ()
    facts: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def start_s(self) -> float:
        """When the first task began; 0 for an empty run."""
        return min((s.start_s for s in self.slices), default=0.0)

    @property
    def stop_s(self) -> float:
        """When the last task ended."""
        return max((s.stop_s for s in self.slices), default=0.0)

    def lane(self, name: str) -> list[Slice]:
        """The slices of one lane."""
        return [s for s in self.slices if s.lane == name]

    def work(self, start_s: float, stop_s: float) -> dict[str, list[Interval]]:
        """The busy intervals of every lane between ``start_s`` and ``stop_s``."""
        return {name: clip(((s.start_s, s.stop_s) for s in self.lane(name)), start_s, stop_s) for name in self.lanes}

    @property
    def states_s(self) -> tuple[float, float]:
        """Seconds in which recurrent layers ran their nodes, and in which accepted ones were committed."""
        return sum(s.states_s for s in self.lane(TARGET)), sum(s.states_s for s in self.lane(CPU))

    @property
    def lanes(self) -> list[str]:
        """The lanes that have slices, in their usual order."""
        present = {s.lane for s in self.slices}
        return [name for name in LANES if name in present]


@dataclass(frozen=True, slots=True)
class LaneUse:
    """The use of a lane between two times."""

    lane: str
    busy_s: float
    share: float  # busy share of the time
    nbytes: float  # that it moved in the time

    @property
    def busy_bytes_per_s(self) -> float | None:
        """The rate while the lane was busy; None if it moved no bytes."""
        return self.nbytes / self.busy_s if self.nbytes and self.busy_s > 0 else None


@dataclass(frozen=True, slots=True)
class Stall:
    """An idle time of the busiest lane."""

    lane: str
    start_s: float
    stop_s: float
    cause: str

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.stop_s - self.start_s


class Stops:
    """The times at which the process was stopped (Ctrl-Z); mutable, because it may be stopped again."""

    def __init__(self) -> None:
        self._stops: list[Interval] = []  # in order, disjoint

    def add(self, start_s: float, stop_s: float) -> None:
        """Note one stop, in seconds of ``time.perf_counter``."""
        self._stops.append((start_s, stop_s))

    def running_s(self, at_s: float) -> float:
        """The same moment on a clock that stands still while the process is stopped."""
        return at_s - sum(min(at_s, stop) - start for start, stop in self._stops if start < at_s)

    def left_out(self, timeline: Timeline) -> Timeline:
        """The timeline on that clock."""
        at = self.running_s
        slices = tuple(replace(one, start_s=at(one.start_s), stop_s=at(one.stop_s)) for one in timeline.slices)
        rounds = tuple(replace(one, start_s=at(one.start_s), stop_s=at(one.stop_s)) for one in timeline.rounds)
        return Timeline(slices, rounds, timeline.facts)


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, sorted and disjoint."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            if stop > merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
        elif stop > start:
            merged.append((start, stop))
    return merged


def clip(intervals: Iterable[Interval], start_s: float, stop_s: float) -> list[Interval]:
    """The parts of the intervals between ``start_s`` and ``stop_s``."""
    return [(max(a, start_s), min(b, stop_s)) for a, b in intervals if b > start_s and a < stop_s]


def length(merged: Iterable[Interval]) -> float:
    """The total seconds of disjoint intervals."""
    return sum(stop - start for start, stop in merged)


def shared(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Seconds that two sorted lists of disjoint intervals have in common."""
    seconds, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        seconds += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return seconds


def lane_use(lane: str, work: Iterable[tuple[float, float, int]], start_s: float, stop_s: float) -> LaneUse:
    """A lane's use between two times, from (start, stop, bytes); work at the edges counts in proportion."""
    inside = [(max(a, start_s), min(b, stop_s), b - a, n) for a, b, n in work if b > start_s and a < stop_s]
    busy = length(merge((a, b) for a, b, _, _ in inside))
    nbytes = sum(n * (b - a) / whole for a, b, whole, n in inside if whole > 0)
    return LaneUse(lane, busy, busy / (stop_s - start_s) if stop_s > start_s else 0.0, nbytes)


def hidden_share(work: Mapping[str, Sequence[Interval]]) -> float | None:
    """Overlap: the share of target and draft compute that ran while weights streamed; None if one of them is absent."""
    stream = merge(interval for lane in LINKS for interval in work.get(lane, ()))
    compute = merge(interval for lane in (TARGET, DRAFT) for interval in work.get(lane, ()))
    return shared(stream, compute) / length(compute) if stream and compute else None


def busiest(uses: Sequence[LaneUse]) -> LaneUse | None:
    """The lane with the largest busy share; of equal ones the one nearer to the files. None without lanes."""
    return max(uses, key=lambda use: (round(use.share, 2), -LANES.index(use.lane)), default=None)


def bottleneck(uses: Sequence[LaneUse]) -> str:
    """The bottleneck in words, such as ``disk-bound: 96 % of 1.80 GB/s``."""
    use = busiest(uses)
    if use is None or use.busy_s == 0:
        return "idle"
    percent = f"{100 * use.share:.0f} %"
    if use.share < UNBOUND_BELOW:
        return f"latency-bound: no lane is busy for more than {percent} of the time"
    rate = use.busy_bytes_per_s
    return f"{BOUND[use.lane]}: {percent} of {format_rate(rate)}" if rate else f"{BOUND[use.lane]}: {percent} busy"


def uses_of(timeline: Timeline, start_s: float, stop_s: float) -> list[LaneUse]:
    """The use of every lane of a run between two times."""
    return [
        lane_use(name, ((s.start_s, s.stop_s, s.nbytes) for s in timeline.lane(name)), start_s, stop_s)
        for name in timeline.lanes
    ]


def decode_stretch(timeline: Timeline) -> Interval:
    """From the end of the first round to the end of the last one; the whole run if there are fewer than two rounds."""
    if len(timeline.rounds) > 1:
        return timeline.rounds[0].stop_s, timeline.rounds[-1].stop_s
    return timeline.start_s, timeline.stop_s


def stalls(timeline: Timeline, start_s: float, stop_s: float, least_s: float = SHORTEST_STALL_S) -> list[Stall]:
    """Idle times of the busiest lane above ``least_s``, longest first; the cause is the wait of the next task."""
    use = busiest(uses_of(timeline, start_s, stop_s))
    if use is None:
        return []
    slices = timeline.lane(use.lane)
    by_id = {s.id: s for s in timeline.slices}
    begins = sorted((s.start_s, s.id) for s in slices)
    merged = merge(clip(((s.start_s, s.stop_s) for s in slices), start_s, stop_s))
    found = []
    for (_, idle_from), (idle_to, _) in pairwise(merged):
        if idle_to - idle_from > least_s:
            after = by_id[begins[bisect_left(begins, (idle_to,))][1]]
            found.append(Stall(use.lane, idle_from, idle_to, _cause_of(after, by_id.get(after.cause))))
    return sorted(found, key=lambda stall: stall.start_s - stall.stop_s)


def _cause_of(waiting: Slice, cause: Slice | None) -> str:
    if cause is None:
        return f"{waiting.name} was requested only then"
    when = f" of round {cause.round}" if cause.round >= 0 else ""
    return f"{waiting.name} waited for {cause.name}{when} on {cause.lane}"


def draft_wait_s(timeline: Timeline) -> float:
    """Seconds that ready tasks of the target waited for a draft that was already running."""
    ended = {s.id: s.stop_s for s in timeline.slices}
    drafts = merge((s.start_s, s.stop_s) for s in timeline.lane(DRAFT))
    waited = 0.0
    for work in timeline.lane(TARGET):
        ready_s = ended.get(work.cause, work.start_s)
        at = bisect_left(drafts, (work.start_s,))
        while at and drafts[at - 1][1] > ready_s:
            at -= 1
            waited += min(drafts[at][1], work.start_s) - max(drafts[at][0], ready_s)
    return waited


def critical_path(timeline: Timeline) -> dict[str, float]:
    """Seconds by lane along the chain of tasks that determined the end of the run; ``hand-off``: between tasks.

    It walks back from the last task. The predecessor of a task is the later end of two: the task that it waited for,
    and the task before it on its lane. With several tasks in flight, a task counts from the end of its predecessor.
    """
    by_id = {s.id: s for s in timeline.slices}
    ordered: dict[str, list[tuple[float, int]]] = defaultdict(list)  # by lane: (stop, id)
    for s in sorted(timeline.slices, key=lambda s: (s.stop_s, s.id)):
        ordered[s.lane].append((s.stop_s, s.id))
    seconds: dict[str, float] = defaultdict(float)
    current = max(timeline.slices, key=lambda s: (s.stop_s, s.id), default=None)
    while current is not None:
        lane = ordered[current.lane]
        at = bisect_left(lane, (current.stop_s, current.id))
        neighbour = by_id[lane[at - 1][1]] if at else None
        cause = by_id.get(current.cause)
        earlier = [s for s in (neighbour, cause) if s is not None and (s.stop_s, s.id) < (current.stop_s, current.id)]
        before = max(earlier, key=lambda s: s.stop_s, default=None)
        reached = before.stop_s if before else current.start_s
        seconds[current.lane] += current.stop_s - max(current.start_s, reached)
        seconds["hand-off"] += max(0.0, current.start_s - reached)
        current = before
    return dict(seconds)
