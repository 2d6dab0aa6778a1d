"""Runs of the real scheduler and executor on a simulated machine, in virtual time.

A profile (``SimCosts``) holds the costs of the machine. It comes from a file, for hardware that is not at hand, or
from the spans of a run, so that the simulation can be compared with the run.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from statistics import median

from aspec.observe.timeline import CPU, D2H, DISK, DRAFT, H2D, TARGET, Slice, Timeline, lane_use
from aspec.plan import Plan
from aspec.planning.coarsening import coarse
from aspec.planning.placement import NUM_STAGING
from aspec.planning.sim_backend import DEVICE_RESOURCES, HOST_RESOURCES, SimBackend
from aspec.planning.virtual_time import VirtualTimeLoop
from aspec.profiling.cost_tables import SimCosts
from aspec.profiling.hardware import Hardware, TaskSeconds
from aspec.tasks.executor import Executor, IssueObserver, Observer
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import DRAFT_COMPUTE, RequestAdded, RowOutcome, Shutdown

FIT_ROWS, FIT_TOKENS = 4, 300  # of a simulation that is fitted to a run: rows, new tokens per row
FIT_TASKS = 24  # in a pass of it: acceptance does not depend on how many layers share the seconds
FIT_STEPS = 7  # times that a fit halves the range of its number

Arrival = tuple[int, int]
"""Prompt tokens of a sequence, and the most new tokens that it may get."""


def simulate(
    plan: Plan,
    profile: SimCosts,
    arrivals: Iterable[Arrival],
    observers: Sequence[Observer] = (),
    issue_observers: Sequence[IssueObserver] = (),
) -> None:
    """Run all sequences to their end; every one arrives at the start. Blocks."""

    async def main() -> None:
        machine = HOST_RESOURCES if profile.copy_bytes_per_s is None else DEVICE_RESOURCES
        backend = SimBackend(profile, machine, experts=None if plan.experts is None else plan.experts.shape)
        executor = Executor(Scheduler(plan_for(plan, profile)), backend, observers, issue_observers)
        for sequence, (prompt_tokens, new_tokens) in enumerate(arrivals):
            executor.post(RequestAdded(sequence, prompt_tokens, new_tokens))
        executor.post(Shutdown())
        try:
            await executor.run()
        finally:
            await backend.close()

    loop = VirtualTimeLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def plan_for(plan: Plan, profile: SimCosts) -> Plan:
    """The plan on the machine of a profile: a device behind a link gets its reads through staging buffers."""
    if profile.copy_bytes_per_s is None or plan.num_staging:
        return plan
    return replace(plan, num_staging=NUM_STAGING, draft_resource=DRAFT_COMPUTE)


def tasks_profile(machine: Hardware, tasks: TaskSeconds) -> SimCosts:
    """The profile of a machine whose file gives the seconds of tasks; the models' shapes do not count."""
    return SimCosts(
        disk_bytes_per_s=machine.disk_bytes_per_s,
        copy_bytes_per_s=machine.h2d_bytes_per_s,
        d2h_bytes_per_s=machine.d2h_bytes_per_s,
        **asdict(tasks),
    )


def task_seconds(profile: SimCosts) -> TaskSeconds:
    """The opposite of ``tasks_profile``: the fields of a profile that a machine's file keeps under ``tasks``."""
    return TaskSeconds(**{field.name: getattr(profile, field.name) for field in fields(TaskSeconds)})


def fitted_acceptance(plan: Plan, profile: SimCosts, tokens_per_pass: float) -> float:
    """The acceptance, 0 to 1, with which a simulated plan makes as many tokens per pass of a row as a run did.

    It is fitted for trees as well as for chains: the accepted tokens of a tree depend on how the tree grew.
    """
    return _fitted(plan, lambda number: replace(profile, acceptance=number), 1.0, tokens_per_pass)


def fitted_spread(plan: Plan, profile: SimCosts, tokens_per_pass: float) -> float:
    """The spread (value of second choices) with which trees make so many tokens per pass, given the acceptance."""
    return _fitted(plan, lambda number: replace(profile, spread=number), profile.acceptance, tokens_per_pass)


def _fitted(plan: Plan, profile_with: Callable[[float], SimCosts], most: float, tokens_per_pass: float) -> float:
    """The number in 0..most whose profile gives so many tokens per pass, by bisection: tokens grow with the number."""
    low, high = 0.0, most
    request = replace(plan.request, num_rows=FIT_ROWS, num_groups=1, capacity=FIT_TOKENS + 2, draft_context=None)
    roomy = replace(plan, request=request)  # long rows, so that their ends and that of the draft's context count little
    for _ in range(FIT_STEPS):
        middle = (low + high) / 2
        outcomes: list[RowOutcome] = []
        small, profile = coarse(roomy, replace(profile_with(middle), end_probability=0.0), FIT_TASKS)
        arrivals = [(2, FIT_TOKENS)] * FIT_ROWS
        simulate(small, profile, arrivals, [lambda span, seen=outcomes: seen.extend(span.outcomes)])  # type: ignore[misc]
        decoded = outcomes[FIT_ROWS:]  # the first outcomes are those of the prompts
        simulated = sum(o.num_new for o in decoded) / max(1, len(decoded))
        low, high = (middle, high) if simulated < tokens_per_pass else (low, middle)
    return (low + high) / 2


def measured_profile(timeline: Timeline) -> SimCosts:
    """The profile of a recorded run's machine: rates of its links while busy, median seconds of every task."""
    layer_s, layer_token_s = _fitted_line([s for lane in (TARGET, CPU) for s in timeline.lane(lane) if s.layer >= 0])
    drafts = [s for s in timeline.lane(DRAFT) if s.name != "draft_prefill"]
    draft_s = _median_seconds(drafts)
    prefills = [s for s in timeline.lane(DRAFT) if s.name == "draft_prefill" and s.tokens]
    per_token = [max(0.0, s.stop_s - s.start_s - draft_s) / s.tokens for s in prefills]
    accepted = sum(r.accepted for r in timeline.rounds)
    refused = sum(r.accepted < r.proposed for r in timeline.rounds)
    default = SimCosts()
    return SimCosts(
        disk_bytes_per_s=_busy_rate(timeline, DISK) or default.disk_bytes_per_s,
        copy_bytes_per_s=_busy_rate(timeline, H2D),
        d2h_bytes_per_s=_busy_rate(timeline, D2H),
        layer_s=layer_s,
        layer_token_s=layer_token_s,
        draft_s=draft_s,
        draft_token_s=median(per_token) if per_token else 0.0,
        head_s=_median_seconds([s for s in timeline.lane(TARGET) if s.name == "head"]),
        embed_s=_median_seconds([s for s in timeline.lane(TARGET) if s.name == "embed"]),
        accept_s=_median_seconds([s for s in timeline.lane(CPU) if s.name == "accept"]),
        acceptance=accepted / (accepted + refused) if accepted + refused else default.acceptance,
    )


def _busy_rate(timeline: Timeline, lane: str) -> float | None:
    """Bytes per second of a lane while it is busy: its loads of parts; for D2H, all its work."""
    work = [(s.start_s, s.stop_s, s.nbytes) for s in timeline.lane(lane) if s.part >= 0 or lane == D2H]
    return lane_use(lane, work, timeline.start_s, timeline.stop_s).busy_bytes_per_s


def _median_seconds(slices: Sequence[Slice]) -> float:
    return median(s.stop_s - s.start_s for s in slices) if slices else 0.0


def _fitted_line(slices: Sequence[Slice]) -> tuple[float, float]:
    """Seconds of a layer: a constant, and a slope per token. Least squares over the medians by token count."""
    counts = sorted({s.tokens for s in slices})
    points = [(count, _whole_layer([s for s in slices if s.tokens == count])) for count in counts]
    if len(points) < 2:
        return (points[0][1] if points else 0.0), 0.0
    weights = [sum(s.tokens == count for s in slices) for count in counts]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    covariance = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    variance = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = max(0.0, covariance / variance)
    return max(0.0, mean_y - slope * mean_x), slope


def _whole_layer(slices: Sequence[Slice]) -> float:
    """Seconds of one layer, from slices of whole layers or of the pieces of split layers."""
    pieces = {s.name.partition(" ")[2] for s in slices}  # for example ``attention``; empty for a whole layer
    return sum(_median_seconds([s for s in slices if s.name.partition(" ")[2] == piece]) for piece in pieces)
