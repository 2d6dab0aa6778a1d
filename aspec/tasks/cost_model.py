"""Running estimates of what work costs, fed by spans: how the policy sizes drafts from measured seconds.

Pure policy: it is handed seconds, it never reads a clock. In virtual time the same estimates come from the
simulated spans, so a plan is judged by the code that will run it.
"""

from dataclasses import dataclass, field

from aspec.plan import Plan
from aspec.tasks.op import Cost, Op
from aspec.tasks.task import COMPUTE, LayerWork, Span, Task

SMOOTHING = 0.2  # weight of a new sample; about the last ten samples count
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # token counts from which a layer's seconds are kept together

STEPS = (*range(1, 32), *range(32, 128, 4), *range(128, 1025, 32))  # token counts between which a pass costs a line


def expected_tokens(acceptance: float, num_draft: int) -> float:
    """Expected tokens of a round for a chain of ``num_draft`` independent proposals, the bonus token included.

    (1 - p^(n+1)) / (1 - p), and n + 1 at p = 1: monotone in p and in n (Leviathan et al., 2023, eq. 1).
    """
    if acceptance >= 1.0:
        return float(num_draft + 1)
    return (1.0 - acceptance ** (num_draft + 1)) / (1.0 - acceptance)


class Average:
    """An exponentially weighted mean that starts at its first sample."""

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self.value: float | None = None  # None until the first sample
        self._smoothing = smoothing

    def add(self, sample: float) -> None:
        """Take one more sample."""
        self.value = sample if self.value is None else self.value + self._smoothing * (sample - self.value)


@dataclass(slots=True)
class _SplitLayer:
    """A layer of a pass whose items go through it in three tasks each; mutable, because each one adds to it."""

    key: tuple[int, int] = (-1, -1)  # pass and layer
    items: int = 0  # that have finished it
    tokens: int = 0
    compute_s: float = 0.0
    aside_s: dict[Op, float] = field(default_factory=dict)  # by what has a lane of its own

    @property
    def seconds(self) -> float:
        """What it takes: several items attend beside each other's computing, one waits for its own attention."""
        asides = self.aside_s.values()
        return max([self.compute_s, *asides]) if self.items > 1 else self.compute_s + sum(asides)


class CostModel:
    """Seconds per layer by token count, per draft step and per head; bytes per second of the weight stream."""

    def __init__(self) -> None:
        self._layer = {bucket: (Average(), Average()) for bucket in BUCKETS}  # tokens and seconds
        self._mean = {cost: Average() for cost in Cost}
        self._link = Average()
        self._link_free_s = 0.0  # when the latest load landed
        self._landed, self._landed_s = 0, 0.0  # loads in their slots, and when the latest got there
        self._tokens_per_s = Average()  # over the rounds, all rows together
        self._pieces: dict[str, dict[Op, float]] = {}  # by item: seconds of its projections, its attention, the way
        self._split = _SplitLayer()  # the latest
        self._round_start_s: dict[int, float] = {}  # of those that have not ended
        self._round_tokens: dict[int, int] = {}  # of rows that decode
        self._round_end_s = 0.0  # of the latest; rounds of several groups overlap
        self._accepted, self._refused = 4.0, 1.0  # decayed counts; the prior says p = 0.8

    def observe(self, span: Span) -> None:
        """Learn from one finished task."""
        seconds, task = span.stop_s - span.start_s, span.task
        if task.filled_slot is not None:
            self._landed, self._landed_s = self._landed + 1, span.stop_s
        if task.op is Op.LAYER:
            self._learn_layer(task.num_tokens, seconds)
        elif isinstance(task.payload, LayerWork):
            self._learn_split(task, task.payload.layer, seconds)
        elif task.op.cost is Cost.DISK:
            busy = span.stop_s - max(span.start_s, self._link_free_s)  # loads in flight overlap
            if busy > 0:
                self._link.add(task.nbytes / busy)
            self._link_free_s = max(self._link_free_s, span.stop_s)
        else:
            self._mean[task.op.cost].add(seconds)
        if task.op in (Op.DRAFT, Op.EMBED):
            self._round_start_s.setdefault(task.number, span.start_s)
        for outcome in span.outcomes:
            self._learn_acceptance(outcome.num_proposed, outcome.num_accepted)
        if task.item is not None and not task.item.prefill and span.outcomes:
            num_new = sum(outcome.num_new for outcome in span.outcomes)
            self._round_tokens[task.number] = self._round_tokens.get(task.number, 0) + num_new

    def end_round(self, number: int, stop_s: float) -> None:
        """All rows of a pass are back: what it brought, since it began or since the round before it ended."""
        start_s = max(self._round_start_s.pop(number, stop_s), self._round_end_s)
        tokens = self._round_tokens.pop(number, 0)
        self._round_end_s = stop_s
        if tokens and stop_s > start_s:
            self._tokens_per_s.add(tokens / (stop_s - start_s))

    @property
    def acceptance(self) -> float:
        """The chance that one more proposal is accepted, given that those before it were."""
        return self._accepted / (self._accepted + self._refused)

    @property
    def tokens_per_s(self) -> float:
        """The running speed of decoding; 0 before it is known."""
        return self._tokens_per_s.value or 0.0

    @property
    def draft_step_s(self) -> float:
        """Seconds of one draft step; 0 before it is known."""
        return self._mean[Cost.DRAFT].value or 0.0

    def seconds_until(self, loads: int, load_bytes: int, now_s: float) -> float:
        """How long after ``now_s`` load number ``loads`` will have landed at the present rate; 0 if it has."""
        rate, missing = self._link.value, loads - self._landed
        if rate is None or missing <= 0:
            return 0.0
        return max(0.0, self._landed_s + missing * load_bytes / rate - now_s)

    def round_seconds(self, plan: Plan, drafted_s: float, most: int) -> list[tuple[int, float]]:
        """(tokens, seconds) of rounds that verify up to ``most`` tokens after drafting for ``drafted_s``.

        By the present estimates; empty before any is known.
        """
        if self._layer_seconds(1) is None:
            return []
        counts = sorted({*(n for n in STEPS if n < most), most})
        return [(n, self._round_seconds(plan, n, drafted_s)) for n in counts]

    def level_seconds(self, plan: Plan, elapsed_s: float, num_tokens: int) -> float:
        """What one more draft step costs a round that has drafted for ``elapsed_s``.

        Nothing while the stream goes on beside it, into slots that are free while no layer runs.
        """
        step, rate = self._mean[Cost.DRAFT].value or 0.0, self._link.value
        compute = plan.num_layers * (self._layer_seconds(num_tokens) or 0.0)
        streams = rate is not None and compute < plan.streamed_bytes / rate
        return 0.0 if streams and rate and elapsed_s + step <= plan.spare_bytes / rate else step

    def best_draft_tokens(self, plan: Plan, num_rows: int) -> int:
        """The chain length, 0 .. ``plan.max_draft_tokens``, that makes most tokens per second by the estimates."""
        most = plan.max_draft_tokens
        draft = self._mean[Cost.DRAFT].value or 0.0
        if self._layer_seconds(num_rows) is None:
            return min(4, most)
        return max(
            range(most + 1),
            key=lambda n: (
                expected_tokens(self.acceptance, n) / self._round_seconds(plan, num_rows * (n + 1), n * draft)
            ),
        )

    def _round_seconds(self, plan: Plan, num_tokens: int, draft_s: float) -> float:
        """Of a pass over so many tokens, and of its drafts as far as nothing hides them."""
        rate = self._link.value or float("inf")
        compute = plan.num_layers * (self._layer_seconds(num_tokens) or 0.0)
        stream = plan.streamed_bytes / rate
        aside = (self._mean[Cost.HEAD].value or 0.0) + (self._mean[Cost.EMBED].value or 0.0)
        if plan.num_groups > 1:  # other groups' passes hide all that compute has room for
            shared = plan.draft_resource == COMPUTE
            return max(compute + aside + (draft_s if shared else 0.0), stream, draft_s) + 1e-6
        aside += draft_s
        hidden = min(aside, plan.spare_bytes / rate)  # the stream fills free slots meanwhile
        return max(compute + hidden, stream) + aside - hidden + 1e-6

    def _layer_seconds(self, num_tokens: int) -> float | None:
        """Seconds of one layer for a token count, from the nearest counts that were measured.

        Below all of them it is taken as proportional: hopeful, so that fewer tokens are tried and then measured. Above
        it goes on as between the last two; with one alone twice as many are hoped to cost the same.
        """
        known = [(t.value, s.value) for t, s in self._layer.values() if t.value is not None and s.value is not None]
        if not known:
            return None
        below = [pair for pair in known if pair[0] <= num_tokens]
        above = [pair for pair in known if pair[0] > num_tokens]
        if not below:
            return above[0][1] * num_tokens / above[0][0]
        if not above and len(below) == 1:
            return below[0][1] * max(1.0, num_tokens / (2 * below[0][0]))
        if not above:
            (low, low_s), (high, high_s) = below[-2:]
            return high_s + max(0.0, high_s - low_s) / (high - low) * (num_tokens - high)
        (low, low_s), (high, high_s) = below[-1], above[0]
        return low_s + (high_s - low_s) * (num_tokens - low) / (high - low)

    def _learn_layer(self, num_tokens: int, seconds: float) -> None:
        tokens, mean_s = self._layer[_bucket(num_tokens)]
        tokens.add(num_tokens)
        mean_s.add(seconds)

    def _learn_split(self, task: Task, layer: int, seconds: float) -> None:
        """A layer in pieces: it is learned as a whole, over the items of its pass, when the next one ends."""
        assert task.item is not None
        name = task.item.name
        if not task.op.ends_layer:
            self._pieces.setdefault(name, {})[task.op] = seconds
            return
        if self._split.key != (task.number, layer):
            if self._split.items:
                self._learn_layer(self._split.tokens, self._split.seconds)
            self._split = _SplitLayer((task.number, layer))
        self._split.items += 1
        self._split.tokens += task.num_tokens
        self._split.compute_s += seconds
        for op, piece_s in self._pieces.pop(name, {}).items():
            if op.lane is task.op.lane:
                self._split.compute_s += piece_s
            else:
                self._split.aside_s[op] = self._split.aside_s.get(op, 0.0) + piece_s

    def _learn_acceptance(self, num_proposed: int, num_accepted: int) -> None:
        if num_proposed == 0:
            return
        decay = 0.98
        self._accepted = self._accepted * decay + num_accepted
        self._refused = self._refused * decay + (num_accepted < num_proposed)


def _bucket(num_tokens: int) -> int:
    """The largest kept count that is not above ``num_tokens``."""
    return max((b for b in BUCKETS if b <= num_tokens), default=BUCKETS[0])
