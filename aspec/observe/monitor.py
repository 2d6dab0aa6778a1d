"""The monitor: observes a run on the loop's thread and makes a ``Snapshot`` when the dashboard asks for one.

It only reads: tasks when they are issued, spans when they end, the stages before the first token, the text. Every
call takes microseconds; the dashboard computes the figures.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from aspec.observe.snapshot import ExpertView, LaneView, SlotState, Snapshot
from aspec.observe.timeline import CPU, LANES, LINKS, Stops
from aspec.plan import Plan, Tier
from aspec.tasks.op import Op
from aspec.tasks.task import Decoding, ExpertLoad, Load, Span, Task
from aspec.units import format_bytes, format_part

WINDOW_S = 20.0  # work that ended earlier is dropped
RATE_ROUNDS = 8  # tokens per second are measured over this many rounds
TEXT_CHARS = 4000  # kept from the end of the text of a row
CPU_SHARE = 0.01  # the host's small tasks have a lane once they take this share of the time


class Monitor:
    """Mutable, because it follows a run. Call all methods but ``progress`` on the loop's thread.

    Its times, and those of a snapshot, are on a clock that stands still during ``stops``.
    """

    def __init__(self, stops: Stops | None = None) -> None:
        self._running_s = (Stops() if stops is None else stops).running_s
        self._begun_s: float | None = None  # the first task was issued
        self._about: tuple[str, ...] = ()
        self._stage, self._done, self._total = "index", 0, 0
        self._stage_from_s: float | None = None
        self._work: dict[str, deque[tuple[float, float, int]]] = {lane: deque() for lane in LANES}
        self._lanes: set[str] = set()  # lanes that are shown
        self._cpu_s = 0.0  # seconds of the host's small tasks
        self._running: dict[int, tuple[str, float]] = {}  # issued tasks by id: lane, time of issue
        self._slots: dict[int, tuple[SlotState, int]] = {}
        self._plan: Plan | None = None
        self._num_layers = 0
        self._prefilled = 0  # layers times tokens of prompts
        self._residency: tuple[float, ...] = ()
        self._experts = ExpertView()
        self._union: tuple[tuple[int, int | None], set[int]] = ((-1, None), set())  # of the latest pass and layer
        self._accepted: list[int] = []
        self._rounds: deque[tuple[float, int]] = deque(maxlen=RATE_ROUNDS)  # (end, tokens)
        self._num_rounds = self._tokens = self._first_tokens = 0
        self._texts: list[str] = []
        self._last_round = -1

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report a stage before the engine runs; any thread may call it."""
        if stage != self._stage:
            self._stage_from_s = None
        self._stage, self._done, self._total = stage, done, total

    def opened(self, plan: Plan, wanted_tokens: int, prompt_tokens: int = 0, about: Sequence[str] = ()) -> None:
        """The engine is open; it prefills ``prompt_tokens`` and may generate up to ``wanted_tokens``; 0: unknown."""
        layers = [[part for part in plan.parts if part.layer == layer] for layer in range(plan.num_layers)]
        self._plan, self._num_layers, self._about = plan, plan.num_layers, tuple(about)
        whole = (sum(part.nbytes for part in parts) for parts in layers)
        held = (sum(part.nbytes for part in parts if part.tier is Tier.DEVICE) for parts in layers)
        self._residency = tuple(h / max(1, w) for h, w in zip(held, whole, strict=True))
        self._slots = dict.fromkeys(range(plan.num_slots), (SlotState.FREE, -1))
        self._wanted = wanted_tokens
        self._enter_stage("prefill", prompt_tokens)

    def heard(self, text: str, row: int = 0) -> None:
        """Add a piece of the text of a row."""
        self._texts += [""] * (row + 1 - len(self._texts))
        self._texts[row] = (self._texts[row] + text)[-TEXT_CHARS:]

    def issued(self, task: Task, at_s: float) -> None:
        """Record that a task was handed to the backend, at ``at_s`` on the backend's clock."""
        at_s = self._running_s(at_s)
        self._running[task.id] = (task.op.lane, at_s)
        if self._stage_from_s is None:
            self._stage_from_s = at_s
        if self._begun_s is None:
            self._begun_s = at_s
        self._set_slot(task, SlotState.LOADING)
        if task.layer is not None:
            self._slots |= {slot: (SlotState.IN_USE, task.layer) for _, slot in task.slots}

    def __call__(self, span: Span) -> None:
        """Record a finished task."""
        task, start_s, stop_s = span.task, self._running_s(span.start_s), self._running_s(span.stop_s)
        lane, _ = self._running.pop(task.id, (task.op.lane, 0.0))
        work = self._work[lane]
        work.append((start_s, stop_s, task.nbytes))
        while work[0][1] < stop_s - WINDOW_S:
            work.popleft()
        self._show_lane(lane, stop_s, stop_s - start_s)
        self._set_slot(task, SlotState.READY)
        if task.op.ends_layer or (isinstance(task.payload, Decoding) and task.payload.frees_slot):
            self._slots |= {slot: (SlotState.FREE, -1) for _, slot in task.slots}
        if task.op.ends_layer and self._stage == "prefill" and task.item is not None:
            self._prefilled += task.item.num_tokens
            self._done = self._prefilled // self._num_layers
        if span.routed or isinstance(task.payload, ExpertLoad):
            self._add_experts(span)
        if span.outcomes:
            self._add_outcomes(span, stop_s)

    def _add_experts(self, span: Span) -> None:
        """Count a route, or an expert that was read."""
        task, seen = span.task, self._experts
        if isinstance(task.payload, ExpertLoad):
            arrived, guessed = task.payload.slot is not None, task.payload.guessed
            self._experts = replace(
                seen,
                missing=seen.missing + (arrived and not guessed),
                guessed=seen.guessed + (arrived and guessed),
                read_bytes=seen.read_bytes + task.nbytes * (task.op is Op.LOAD_EXPERT),
            )
            return
        begun = self._union[0] != (task.number, task.layer)
        if begun:
            self._union = (task.number, task.layer), set()
        union = self._union[1]
        before = len(union)
        union.update(expert for expert, _ in span.routed)
        self._experts = replace(seen, unions=seen.unions + begun, chosen=seen.chosen + len(union) - before)

    def _show_lane(self, lane: str, now_s: float, seconds: float) -> None:
        self._cpu_s += seconds if lane == CPU else 0.0
        if lane != CPU or self._cpu_s > CPU_SHARE * max(WINDOW_S, now_s - (self._begun_s or 0.0)):
            self._lanes.add(lane)

    def _set_slot(self, task: Task, state: SlotState) -> None:
        """Set the state of the slot that a load fills."""
        if isinstance(task.payload, Load) and task.payload.slot is not None:
            self._slots[task.payload.slot] = (state, task.payload.layer)

    def snapshot(self, now_s: float) -> Snapshot:
        """The state of the run at ``now_s``, seconds on the backend's clock."""
        now_s = self._running_s(now_s)
        if self._stage_from_s is None:
            self._stage_from_s = now_s
        return Snapshot(
            now_s=now_s,
            stage=self._stage,
            done=self._done,
            total=self._total,
            stage_s=now_s - self._stage_from_s,
            lanes=tuple(
                self._lane_view(lane, now_s)
                for lane in LANES
                if lane in self._lanes or (lane != CPU and self._is_running(lane))
            ),
            slots=tuple(self._slots[slot] for slot in sorted(self._slots)),
            residency=self._residency,
            experts=self._experts if self._experts.chosen else None,
            accepted=tuple(self._accepted),
            tokens=self._tokens,
            rounds=self._num_rounds,
            tokens_per_s=self._tokens_per_s(),
            tokens_per_pass=self._tokens_per_pass(),
            held=_held(self._plan) if self._plan else "",
            about=self._about,
            texts=tuple(self._texts),
        )

    def _enter_stage(self, stage: str, total: int) -> None:
        self._stage, self._done, self._total, self._stage_from_s = stage, 0, total, None

    def _is_running(self, lane: str) -> bool:
        return any(running == lane for running, _ in self._running.values())

    def _lane_view(self, lane: str, now_s: float) -> LaneView:
        work = tuple(w for w in self._work[lane] if w[1] >= now_s - WINDOW_S)
        last_s = work[-1][1] if work else 0.0
        # an in-order lane works on one task at a time: queued tasks have not begun
        starts = [at for running, at in self._running.values() if running == lane]
        running = tuple(starts) if lane in LINKS or not starts else (max(min(starts), last_s),)
        return LaneView(lane, work, running)

    def _add_outcomes(self, span: Span, stop_s: float) -> None:
        if self._stage == "prefill":
            self._enter_stage("decode", self._wanted)
            self._stage_from_s = stop_s
            self._experts = ExpertView(tokens=-sum(outcome.num_new for outcome in span.outcomes))
        new = sum(outcome.num_new for outcome in span.outcomes)
        self._experts = replace(self._experts, tokens=self._experts.tokens + new)
        for outcome in span.outcomes:
            self._tokens += outcome.num_new
            if outcome.num_proposed:
                self._accepted += [0] * (outcome.num_accepted + 1 - len(self._accepted))
                self._accepted[outcome.num_accepted] += 1
        if span.task.number == self._last_round and self._rounds:
            new += self._rounds.pop()[1]
        else:
            self._num_rounds += 1
        self._last_round = span.task.number
        self._rounds.append((stop_s, new))
        self._first_tokens = self._tokens if self._num_rounds == 1 else self._first_tokens
        self._done = self._tokens

    def _tokens_per_s(self) -> float | None:
        if len(self._rounds) < 2:
            return None
        seconds = self._rounds[-1][0] - self._rounds[0][0]
        return sum(new for _, new in list(self._rounds)[1:]) / seconds if seconds > 0 else None

    def _tokens_per_pass(self) -> float | None:
        passes = self._num_rounds - 1
        return (self._tokens - self._first_tokens) / passes if passes > 0 else None


def _held(plan: Plan) -> str:
    """The memory of a plan: bytes held of the budget, then its parts, the largest first."""
    budget = plan.budget_bytes
    held = format_part(plan.held_bytes, budget) if budget else f"{format_bytes(plan.held_bytes)} held"
    parts = sorted(plan.arithmetic.items(), key=lambda part: -part[1])
    return f"{held}: " + " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in parts if nbytes)
