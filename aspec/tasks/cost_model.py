"""Running estimates of the seconds of each kind of work, learned from spans; the policy sizes drafts with them.

Pure policy: it receives seconds and never reads a clock. In virtual time the same estimates come from simulated
spans, so the code that runs a plan also judges it.
"""

from dataclasses import dataclass, field

from aspec.plan import Plan
from aspec.tasks.op import Cost, Op
from aspec.tasks.task import COMPUTE, LayerWork, Span, Task

SMOOTHING = 0.2  # weight of a new sample; about the last ten samples count
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # lower bounds, in tokens, of the averages of layer seconds

COUNTS = (*range(1, 32), *range(32, 128, 4), *range(128, 1025, 32))  # token counts at which a pass is estimated


def expected_tokens(acceptance: float, num_draft: int) -> float:
    """Expected tokens of a round for a chain of ``num_draft`` independent proposals, including the bonus token.

    (1 - p^(n+1)) / (1 - p), and n + 1 at p = 1: monotone in p and in n (Leviathan et al., 2023, eq. 1).
    """
    if acceptance >= 1.0:
        return float(num_draft + 1)
    return (1.0 - acceptance ** (num_draft + 1)) / (1.0 - acceptance)


class Average:
    """An exponentially weighted mean, which starts at its first sample."""

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self.value: float | None = None  # None until the first sample
        self._smoothing = smoothing

    def add(self, sample: float) -> None:
        """Add one sample."""
        self.value = sample if self.value is None else self.value + self._smoothing * (sample - self.value)


@dataclass(slots=True)
class _SplitLayer:
    """A split layer of one pass; mutable, because every task of every item adds its seconds."""

    key: tuple[int, int] = (-1, -1)  # pass and layer
    items: int = 0  # items that have finished the layer
    tokens: int = 0
    compute_s: float = 0.0
    parallel_s: dict[Op, float] = field(default_factory=dict)  # seconds of each op that runs on a lane of its own

    @property
    def seconds(self) -> float:
        """Seconds of the layer: with several items attention overlaps compute; one item waits for its attention."""
        parallel = self.parallel_s.values()
        return max([self.compute_s, *parallel]) if self.items > 1 else self.compute_s + sum(parallel)


class CostModel:
    """Seconds per layer by token count, per draft step and per head; bytes per second of the weight stream."""

    def __init__(self) -> None:
        self._layer = {bucket: (Average(), Average()) for bucket in BUCKETS}  # average tokens and seconds of a layer
        self._mean = {cost: Average() for cost in Cost}
        self._link = Average()
        self._link_free_s = 0.0  # when the latest load landed
        self._landed, self._landed_s = 0, 0.0  # the number of loads in their slots, and when the latest landed
        self._tokens_per_s = Average()  # over rounds, for all rows together
        self._pieces: dict[str, dict[Op, float]] = {}  # by item: seconds of projections, attention and transfers
        self._split = _SplitLayer()  # the latest split layer
        self._round_start_s: dict[int, float] = {}  # by round that has not ended
        self._round_tokens: dict[int, int] = {}  # by round: new tokens of decoding rows
        self._round_end_s = 0.0  # end of the latest round; rounds of several groups overlap
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
        """Learn the speed of round ``number``, whose rows are all back.

        Its time counts from its start, or from the end of the previous round if that is later.
        """
        start_s = max(self._round_start_s.pop(number, stop_s), self._round_end_s)
        tokens = self._round_tokens.pop(number, 0)
        self._round_end_s = stop_s
        if tokens and stop_s > start_s:
            self._tokens_per_s.add(tokens / (stop_s - start_s))

    @property
    def acceptance(self) -> float:
        """The probability that a proposed token is accepted, given that all tokens before it were accepted."""
        return self._accepted / (self._accepted + self._refused)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of decoding, as a running average; 0 before it is known."""
        return self._tokens_per_s.value or 0.0

    @property
    def draft_step_s(self) -> float:
        """Seconds of one draft step; 0 before it is known."""
        return self._mean[Cost.DRAFT].value or 0.0

    def seconds_until(self, loads: int, load_bytes: int, now_s: float) -> float:
        """Seconds from ``now_s`` until ``loads`` loads have landed, at the present rate; 0 if they have."""
        rate, missing = self._link.value, loads - self._landed
        if rate is None or missing <= 0:
            return 0.0
        return max(0.0, self._landed_s + missing * load_bytes / rate - now_s)

    def round_seconds(self, plan: Plan, drafted_s: float, most: int) -> list[tuple[int, float]]:
        """Estimated (tokens, seconds) of rounds that verify up to ``most`` tokens after ``drafted_s`` of drafting.

        The list is empty before any layer was measured.
        """
        if self._layer_seconds(1) is None:
            return []
        counts = sorted({*(n for n in COUNTS if n < most), most})
        return [(n, self._round_seconds(plan, n, drafted_s)) for n in counts]

    def level_seconds(self, plan: Plan, elapsed_s: float, num_tokens: int) -> float:
        """Seconds that one more draft step adds to a round that has drafted for ``elapsed_s``.

        It adds 0 while the weight stream limits the round and still fills free slots beside the draft.
        """
        step, rate = self._mean[Cost.DRAFT].value or 0.0, self._link.value
        compute = plan.num_layers * (self._layer_seconds(num_tokens) or 0.0)
        streams = rate is not None and compute < plan.streamed_bytes / rate
        return 0.0 if streams and rate and elapsed_s + step <= plan.spare_bytes / rate else step

    def best_draft_tokens(self, plan: Plan, num_rows: int) -> int:
        """The chain length, 0 .. ``plan.max_draft_tokens``, with the highest estimated tokens per second."""
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
        """Seconds of a pass over ``num_tokens``, plus the draft seconds that do not overlap with other work."""
        rate = self._link.value or float("inf")
        compute = plan.num_layers * (self._layer_seconds(num_tokens) or 0.0)
        stream = plan.streamed_bytes / rate
        between = (self._mean[Cost.HEAD].value or 0.0) + (self._mean[Cost.EMBED].value or 0.0)
        if plan.num_groups > 1:  # the busiest lane bounds the round; other groups' passes overlap with the rest
            shared = plan.draft_resource == COMPUTE
            return max(compute + between + (draft_s if shared else 0.0), stream, draft_s) + 1e-6
        between += draft_s
        hidden = min(between, plan.spare_bytes / rate)  # meanwhile the stream fills free slots
        return max(compute + hidden, stream) + between - hidden + 1e-6

    def _layer_seconds(self, num_tokens: int) -> float | None:
        """Seconds of one layer for a token count, interpolated between the nearest measured counts; None without any.

        Below all measured counts, seconds are proportional to tokens: optimistic, so that smaller passes are tried and
        then measured. Above them, the line of the last two continues; with a single count, up to twice as many tokens
        are assumed to cost the same.
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
        """Collect the tasks of a split layer; the layer is learned, over all its items, when the next layer ends."""
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
                self._split.parallel_s[op] = self._split.parallel_s.get(op, 0.0) + piece_s

    def _learn_acceptance(self, num_proposed: int, num_accepted: int) -> None:
        if num_proposed == 0:
            return
        decay = 0.98
        self._accepted = self._accepted * decay + num_accepted
        self._refused = self._refused * decay + (num_accepted < num_proposed)


def _bucket(num_tokens: int) -> int:
    """The largest bucket that is not above ``num_tokens``."""
    return max((b for b in BUCKETS if b <= num_tokens), default=BUCKETS[0])
