"""The monitor: observes a run on the loop's thread and makes a ``Snapshot`` when the dashboard asks for one.

It only reads: tasks when they are issued, spans when they end, the stages before the first token, the text. Every
call takes microseconds; the dashboard computes the figures.
"""

from collections import deque

from aspec.observe.snapshot import LaneView, SlotState, Snapshot
from aspec.observe.timeline import LANES, LINKS
from aspec.plan import Plan, Tier
from aspec.tasks.task import LayerWork, Load, Span, Task

WINDOW_S = 20.0  # work that ended earlier is dropped
RATE_ROUNDS = 8  # tokens per second are measured over this many rounds
TEXT_CHARS = 4000  # kept from the end of the generated text


class Monitor:
    """Mutable, because it follows a run. Call all methods but ``progress`` on the loop's thread."""

    def __init__(self) -> None:
        self._stage, self._done, self._total = "index", 0, 0
        self._stage_from_s: float | None = None
        self._work: dict[str, deque[tuple[float, float, int]]] = {lane: deque() for lane in LANES}
        self._lanes: set[str] = set()  # lanes that have done any work
        self._running: dict[int, tuple[str, float]] = {}  # issued tasks by id: lane, time of issue
        self._slots: dict[int, tuple[SlotState, int]] = {}
        self._plan: Plan | None = None
        self._layer_bytes: tuple[int, ...] = ()
        self._residency: tuple[float, ...] = ()
        self._accepted: list[int] = []
        self._rounds: deque[tuple[float, int]] = deque(maxlen=RATE_ROUNDS)  # (end, tokens)
        self._num_rounds = self._tokens = self._first_tokens = 0
        self._text = ""
        self._last_round = -1

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report a stage before the engine runs; any thread may call it."""
        if stage != self._stage:
            self._stage_from_s = None
        self._stage, self._done, self._total = stage, done, total

    def opened(self, plan: Plan, wanted_tokens: int) -> None:
        """The engine is open; the run may generate up to ``wanted_tokens`` tokens."""
        layers = [[part for part in plan.parts if part.layer == layer] for layer in range(plan.num_layers)]
        self._plan = plan
        self._layer_bytes = tuple(sum(part.nbytes for part in parts) for parts in layers)
        held = (sum(part.nbytes for part in parts if part.tier is Tier.DEVICE) for parts in layers)
        self._residency = tuple(h / max(1, whole) for h, whole in zip(held, self._layer_bytes, strict=True))
        self._slots = dict.fromkeys(range(plan.num_slots), (SlotState.FREE, -1))
        self._wanted = wanted_tokens
        self._enter_stage("prefill", sum(self._layer_bytes))

    def heard(self, text: str) -> None:
        """Add a piece of generated text."""
        self._text = (self._text + text)[-TEXT_CHARS:]

    def issued(self, task: Task, at_s: float) -> None:
        """Record that a task was handed to the backend, at ``at_s`` on the backend's clock."""
        self._running[task.id] = (task.op.lane, at_s)
        if self._stage_from_s is None:
            self._stage_from_s = at_s
        self._set_slot(task, SlotState.LOADING)
        if isinstance(task.payload, LayerWork):
            self._slots |= {slot: (SlotState.IN_USE, task.payload.layer) for _, slot in task.payload.slots}

    def __call__(self, span: Span) -> None:
        """Record a finished task."""
        task = span.task
        lane, _ = self._running.pop(task.id, (task.op.lane, 0.0))
        self._lanes.add(lane)
        work = self._work[lane]
        work.append((span.start_s, span.stop_s, task.nbytes))
        while work[0][1] < span.stop_s - WINDOW_S:
            work.popleft()
        self._set_slot(task, SlotState.READY)
        if task.op.ends_layer and isinstance(task.payload, LayerWork):
            self._slots |= {slot: (SlotState.FREE, -1) for _, slot in task.payload.slots}
            if self._stage == "prefill":
                self._done = max(self._done, sum(self._layer_bytes[: task.payload.layer + 1]))
        if span.outcomes:
            self._add_outcomes(span)

    def _set_slot(self, task: Task, state: SlotState) -> None:
        """Set the state of the slot that a load fills."""
        if isinstance(task.payload, Load) and task.payload.slot is not None:
            self._slots[task.payload.slot] = (state, task.payload.layer)

    def snapshot(self, now_s: float) -> Snapshot:
        """The state of the run at ``now_s``, seconds on the backend's clock."""
        if self._stage_from_s is None:
            self._stage_from_s = now_s
        return Snapshot(
            now_s=now_s,
            stage=self._stage,
            done=self._done,
            total=self._total,
            stage_s=now_s - self._stage_from_s,
            lanes=tuple(
                self._lane_view(lane, now_s) for lane in LANES if lane in self._lanes or self._is_running(lane)
            ),
            slots=tuple(self._slots[slot] for slot in sorted(self._slots)),
            residency=self._residency,
            accepted=tuple(self._accepted),
            tokens=self._tokens,
            rounds=self._num_rounds,
            tokens_per_s=self._tokens_per_s(),
            tokens_per_pass=self._tokens_per_pass(),
            held=self._plan.describe() if self._plan else "",
            text=self._text,
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

    def _add_outcomes(self, span: Span) -> None:
        if self._stage == "prefill":
            self._enter_stage("decode", self._wanted)
            self._stage_from_s = span.stop_s
        for outcome in span.outcomes:
            self._tokens += outcome.num_new
            if outcome.num_proposed:
                self._accepted += [0] * (outcome.num_accepted + 1 - len(self._accepted))
                self._accepted[outcome.num_accepted] += 1
        new = sum(outcome.num_new for outcome in span.outcomes)
        if span.task.number == self._last_round and self._rounds:
            new += self._rounds.pop()[1]
        else:
            self._num_rounds += 1
        self._last_round = span.task.number
        self._rounds.append((span.stop_s, new))
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
