"""Running estimates of the seconds of each kind of work, learned from spans; the policy sizes drafts with them.

Pure policy: it receives seconds and never reads a clock. In virtual time the same estimates come from simulated
spans, so the code that runs a plan also judges it.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from statistics import fmean, median

from aspec.plan import Plan, Tier
from aspec.tasks.experts.prices import ExpertPrices
from aspec.tasks.op import Cost, Op
from aspec.tasks.price_curve import NEW_NOISE, NOISE, PriceCurve
from aspec.tasks.task import COMPUTE, LayerWork, Span, Task, WorkItem

SMOOTHING = 0.2  # weight of a new sample; about the last ten samples count
RATE_DECAY = 0.9  # factor on the earlier rounds' tokens and seconds, at each round: about the last ten count
FEW_TOKENS = 2  # of a row in a pass: expected before any round has ended
LAST_STEPS = 9  # draft steps whose median is the price of one
DEPTHS = 32  # tokens of a chain with an acceptance of their own
DEPTH_DECAY = 0.98  # factor on a depth's counts, at each observation there: about the last 50 count
PRIOR = 5.0  # weight of the acceptance expected of a depth, in observations: that of the depth before
FIRST_ACCEPTANCE = 0.8  # expected of the first token
OVERLAP = 5.0  # how well compute hides the stream: the longer of the two is a pass's seconds if this is infinite


def expected_tokens(acceptance: float, num_draft: int) -> float:
    """Expected tokens of a round for a chain of ``num_draft`` independent proposals, including the bonus token.

    (1 - p^(n+1)) / (1 - p), and n + 1 at p = 1: monotone in p and in n (Leviathan et al., 2023, eq. 1).
    """
    if acceptance >= 1.0:
        return float(num_draft + 1)
    return (1.0 - acceptance ** (num_draft + 1)) / (1.0 - acceptance)


def _beside(compute_s: float, stream_s: float) -> float:
    """Seconds of a pass whose layers compute while weights stream.

    Neither is steady from layer to layer, and few slots are between them. Where both take as long, each waits for the
    other: 0.73 and 0.77 s took 0.95, measured; 0.52 and 0.76 took 0.79, 1.25 and 0.75 took 1.32.
    """
    longer, shorter = max(compute_s, stream_s), min(compute_s, stream_s)
    return longer * (1.0 + (shorter / longer) ** OVERLAP) ** (1.0 / OVERLAP) if longer else 0.0


class Average:
    """An exponentially weighted mean, which starts at its first sample."""

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self.value: float | None = None  # None until the first sample
        self._smoothing = smoothing

    def add(self, sample: float) -> None:
        """Add one sample."""
        self.value = sample if self.value is None else self.value + self._smoothing * (sample - self.value)


class ChainAcceptance:
    """The chance that a chain's proposal is accepted, by its depth, given that all before it were.

    It is learned for every depth: a chain that has come far is in a predictable text, so chances often grow with depth.
    """

    def __init__(self) -> None:
        self._accepted = [0.0] * DEPTHS  # by depth: decayed counts
        self._seen = [0.0] * DEPTHS

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Learn from one verified chain."""
        for depth in range(min(num_proposed, num_accepted + 1, DEPTHS)):
            self._seen[depth] = self._seen[depth] * DEPTH_DECAY + 1.0
            self._accepted[depth] = self._accepted[depth] * DEPTH_DECAY + (depth < num_accepted)

    def tokens(self, most: int) -> list[float]:
        """Expected tokens of a round, including the bonus token, by the number of proposals, 0 .. ``most``."""
        chance, chances = FIRST_ACCEPTANCE, []
        for depth in range(most):
            if depth < DEPTHS:
                chance = (self._accepted[depth] + PRIOR * chance) / (self._seen[depth] + PRIOR)
            chances.append(chance)
        return list(accumulate(accumulate(chances, mul), initial=1.0))


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


class _Link:
    """Bytes per second of one link, while it works."""

    def __init__(self) -> None:
        self.rate = Average()
        self._free_s = 0.0  # when the latest load has crossed it

    def add(self, span: Span) -> None:
        """Learn from one load."""
        busy = span.stop_s - max(span.start_s, self._free_s)  # loads in flight overlap
        if busy > 0:
            self.rate.add(span.task.nbytes / busy)
        self._free_s = max(self._free_s, span.stop_s)


@dataclass(slots=True)
class _Round:
    """A round that has not ended; mutable, because every task adds to it."""

    start_s: float | None = None
    num_rows: int = 0  # decoding rows
    num_new: int = 0  # their new tokens
    layers_s: dict[WorkItem, list[float]] = field(default_factory=dict)  # of whole layers, by item
    split_s: list[float] = field(default_factory=list)  # of split layers, all items together
    split_tokens: int = 0
    ends_s: dict[WorkItem, float] = field(default_factory=dict)  # embedding, head and acceptance, by decoding item
    tokens: int = 0  # padded ones that decode; 0: the round has prompts, too
    busy_s: float = 0.0  # of all its tasks


@dataclass(frozen=True, slots=True)
class _Stream:
    """What a plan's stream moves in one pass: bytes in all, those of them from the disk, and those ahead of a pass."""

    nbytes: int
    read_bytes: int
    spare_bytes: int

    @staticmethod
    def of(plan: Plan) -> "_Stream":
        """The sums over the plan's parts, which may be thousands."""
        read_bytes = sum(part.nbytes for part in plan.streamed if part.tier is Tier.DISK)
        return _Stream(plan.streamed_bytes, read_bytes, plan.spare_bytes)


class CostModel:
    """Seconds per layer by token count, per draft step and per head; bytes per second of the weight stream."""

    def __init__(self, plan: Plan | None = None, experts: ExpertPrices | None = None) -> None:
        """``plan``: what it expects is believed until it is measured."""
        self.experts = experts  # None: all experts come with their layers
        self._layer = PriceCurve()  # by padded tokens
        for tokens, seconds in () if plan is None else plan.expected_layer_s:
            self._layer.expect(tokens, seconds)
        self._ends = PriceCurve()  # embedding, head and acceptance of decoding rows, by padded tokens
        steps = [plan.expected_step_s] if plan is not None and plan.expected_step_s else []
        self._steps = deque[float](steps, maxlen=LAST_STEPS)  # seconds of draft steps
        self._links = {Cost.DISK: _Link(), Cost.H2D: _Link()}
        self._known: tuple[Plan, _Stream] | None = None  # the latest plan that was asked for, and its sums
        self._landed, self._landed_s = 0, 0.0  # the number of loads in their slots, and when the latest landed
        self._pieces: dict[str, dict[Op, float]] = {}  # by item: seconds of projections, attention and transfers
        self._split = _SplitLayer()  # the latest split layer
        self._rounds: dict[int, _Round] = {}  # by number
        self._round_end_s = 0.0  # end of the latest round; rounds of several groups overlap
        self._new, self._new_s = 0.0, 0.0  # decayed sums over rounds: new tokens of all rows, and their seconds
        self._chains = ChainAcceptance()

    def observe(self, span: Span) -> None:
        """Learn from one finished task."""
        seconds, task = span.stop_s - span.start_s, span.task
        if task.filled_slot is not None:
            self._landed, self._landed_s = self._landed + 1, span.stop_s
        if self.experts is not None:
            self.experts.observe(span)
        if task.op in (Op.READ, Op.COPY):
            self._links[task.op.cost].add(span)
        if task.op is Op.DRAFT:
            self._steps.append(seconds)
        if task.item is not None:
            self._learn_item(task, task.item, span)
        for outcome in span.outcomes:
            self._chains.observe(outcome.num_proposed, outcome.num_accepted)

    def _learn_item(self, task: Task, item: WorkItem, span: Span) -> None:
        """Add an item's task to its round."""
        own, seconds = self._rounds.setdefault(task.number, _Round()), span.stop_s - span.start_s
        if own.start_s is None and task.op in (Op.DRAFT, Op.EMBED):
            own.start_s = span.start_s
        own.busy_s += seconds
        if task.op is Op.EMBED:
            own.tokens = 0 if item.prefill else item.padded_tokens
        if task.op is Op.LAYER:
            own.layers_s.setdefault(item, []).append(seconds)
        elif isinstance(task.payload, LayerWork):
            self._learn_split(task, item, task.payload.layer, seconds)
        elif task.op.cost in (Cost.EMBED, Cost.HEAD, Cost.ACCEPT) and not item.prefill:
            own.ends_s[item] = own.ends_s.get(item, 0.0) + seconds
        if not item.prefill:
            own.num_rows += len(span.outcomes)
            own.num_new += sum(outcome.num_new for outcome in span.outcomes)

    def end_round(self, number: int, stop_s: float) -> None:
        """Learn the costs and the speed of round ``number``, whose rows are all back.

        Its time counts from its start, or from the end of the previous round if that is later.
        """
        own = self._rounds.pop(number, _Round())
        start_s = max(stop_s if own.start_s is None else own.start_s, self._round_end_s)
        if self.experts is not None:
            self.experts.begin_round(own.tokens, stop_s - start_s - own.busy_s)
        if self._split.key[0] == number:
            self._end_split(own)
        for item, layers_s in own.layers_s.items():
            self._layer.add(item.padded_tokens, fmean(layers_s), NEW_NOISE if item.prefill else NOISE)
        if own.split_s:
            self._layer.add(own.split_tokens, fmean(own.split_s))
        for item, ends_s in own.ends_s.items():
            self._ends.add(item.padded_tokens, ends_s)
        self._round_end_s = stop_s
        if own.num_new and stop_s > start_s:
            if not self._new_s:  # one round tells little: it counts beside one of few tokens
                self._new, self._new_s = FEW_TOKENS * max(1, own.num_rows), stop_s - start_s
            self._new = RATE_DECAY * self._new + own.num_new
            self._new_s = RATE_DECAY * self._new_s + stop_s - start_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of decoding, as a running average; 0 before it is known."""
        return self._new / self._new_s if self._new_s else 0.0

    @property
    def draft_step_s(self) -> float:
        """Seconds of one draft step; 0 before it is known."""
        return median(self._steps) if self._steps else 0.0

    def _stream_rate(self, plan: Plan) -> float | None:
        """Streamed bytes per second, by the slowest link that they cross; None before one is known.

        Parts on disk may cross a device's link, too; those in host memory cross nothing else.
        """
        disk, copy = (self._links[cost].rate.value for cost in (Cost.DISK, Cost.H2D))
        if copy is None:
            return disk
        stream = self._stream_of(plan)
        read = stream.read_bytes
        return copy if disk is None or not read else min(copy, disk * stream.nbytes / read)

    def _stream_of(self, plan: Plan) -> _Stream:
        """The sums of a plan; prices are asked for dozens of times in a round, and always for the same plan."""
        if self._known is None or self._known[0] is not plan:
            self._known = plan, _Stream.of(plan)
        return self._known[1]

    def seconds_until(self, plan: Plan, loads: int, now_s: float) -> float:
        """Seconds from ``now_s`` until ``loads`` loads have landed, at the present rate; 0 if they have."""
        rate, missing = self._stream_rate(plan), loads - self._landed
        if rate is None or missing <= 0:
            return 0.0
        return max(0.0, self._landed_s + missing * plan.slot_bytes / rate - now_s)

    def level_seconds(self, plan: Plan, elapsed_s: float, num_tokens: int) -> float:
        """Seconds that one more draft step adds to a round that has drafted for ``elapsed_s``.

        It adds 0 while the weight stream limits the round and still fills free slots beside the draft.
        """
        step, rate = self.draft_step_s, self._stream_rate(plan)
        compute = plan.num_layers * (self._layer.seconds(num_tokens) or 0.0)
        streams = rate is not None and compute < self._stream_of(plan).nbytes / rate
        return 0.0 if streams and rate and elapsed_s + step <= self._stream_of(plan).spare_bytes / rate else step

    def best_draft_tokens(self, plan: Plan, num_rows: int) -> int:
        """The chain length, 0 .. ``plan.max_draft_tokens``, with the highest estimated tokens per second."""
        most = plan.max_draft_tokens
        if self._layer.seconds(num_rows) is None:
            return min(4, most)
        tokens, step = self._chains.tokens(most), self.draft_step_s
        return max(
            range(most + 1), key=lambda n: tokens[n] / (self.round_seconds(plan, num_rows * (n + 1), n * step) or 1.0)
        )

    def compute_seconds(self, plan: Plan, num_tokens: int) -> float | None:
        """Seconds of all layers for one item of ``num_tokens`` padded tokens; None before any layer was measured."""
        layer_s = self._layer.seconds(num_tokens)
        return None if layer_s is None else plan.num_layers * layer_s

    def round_seconds(self, plan: Plan, num_tokens: int, draft_s: float) -> float | None:
        """Seconds of a pass over ``num_tokens`` padded tokens, plus the draft seconds that do not overlap with it.

        None before any layer was measured.
        """
        layer_s, rate = self._layer.seconds(num_tokens), self._stream_rate(plan) or float("inf")
        if layer_s is None:
            return None
        compute, stream = plan.num_layers * layer_s, self._stream_of(plan).nbytes / rate
        waits = 1e-6 + (0.0 if self.experts is None else self.experts.seconds(num_tokens))  # for experts to be read
        between = self._ends.seconds(num_tokens) or 0.0
        if plan.num_groups > 1:  # the busiest lane bounds the round; other groups' passes overlap with the rest
            shared = plan.draft_resource == COMPUTE
            return max(compute + between + (draft_s if shared else 0.0), stream, draft_s) + waits
        between += draft_s
        hidden = min(between, self._stream_of(plan).spare_bytes / rate)  # meanwhile the stream fills free slots
        return _beside(compute + hidden, stream) + between - hidden + waits

    def _learn_split(self, task: Task, item: WorkItem, layer: int, seconds: float) -> None:
        """Collect the tasks of a split layer; the layer is learned, over all its items, when the next layer ends."""
        if not task.op.ends_layer:
            pieces = self._pieces.setdefault(item.name, {})
            pieces[task.op] = pieces.get(task.op, 0.0) + seconds
            return
        if self._split.key != (task.number, layer):
            self._end_split(self._rounds.get(self._split.key[0]))
            self._split = _SplitLayer((task.number, layer))
        self._split.items += 1
        self._split.tokens += item.padded_tokens
        self._split.compute_s += seconds
        for op, piece_s in self._pieces.pop(item.name, {}).items():
            if op.lane is task.op.lane:
                self._split.compute_s += piece_s
            else:
                self._split.parallel_s[op] = self._split.parallel_s.get(op, 0.0) + piece_s

    def _end_split(self, own: _Round | None) -> None:
        """Add the latest split layer to its round."""
        if own is not None and self._split.items:
            own.split_s.append(self._split.seconds)
            own.split_tokens = self._split.tokens
        self._split = _SplitLayer()
