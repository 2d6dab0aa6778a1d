"""Forecasts the speed of a plan on a machine: runs the real scheduler and executor in virtual time on measured costs.

A forecast runs a few rounds of a long job and extrapolates from their rate. The parts of a large model are merged, so
that a round has at most a few hundred tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, sqrt

from aspec.observe.timeline import DRAFT, TARGET, bottleneck, lane_use
from aspec.plan import Plan, Tier, Workload
from aspec.planning.coarsening import coarse, tasks_per_pass
from aspec.planning.search import Forecast
from aspec.planning.simulation import simulate
from aspec.profiling.cost_tables import CostTable, SimCosts
from aspec.tasks.cost_model import expected_tokens
from aspec.tasks.task import COMPUTE, CPU, Span, WorkItem

MOST_TASKS = 20_000  # in one run with drafts
MOST_PLAIN_TASKS = 5_000  # in one run without drafts, where all passes are alike
FEW_PROMPTS, MOST_TASKS_OF_FEW = 8, 1_200  # one run for up to 8 prompts: they do not wait long for their plan
LEAST_PASSES = 8  # of decoding, even if they have more tasks
COUNTED = 0.9  # share of the tokens that count: the last ones come from passes with free rows
LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)  # numbers of proposals for which the bound is computed


class ThroughputMeter:
    """Observes a run, simulated or real, and measures how fast it decodes while all rows are in use.

    It measures from the first token of the last row until a row has ``new_tokens``; if None, until the share COUNTED of
    all tokens is there.
    """

    def __init__(self, num_rows: int, new_tokens: int | None = None) -> None:
        self._num_rows, self._new_tokens = num_rows, new_tokens
        self._num_new: dict[int, int] = {}  # new tokens by row
        self._last_pass: int | None = None  # number of the first pass in which a row got its last token
        self._first_token_s: list[float] = []  # times at which rows got their first token
        self._new: list[tuple[float, int, int]] = []  # decoding up to that pass: (time in seconds, tokens, rows)
        self._work: dict[str, list[tuple[float, float, int]]] = {}  # by lane: (start, stop, bytes)
        self._start_s: float | None = None
        self._stop_s = 0.0  # time of the last tokens

    def __call__(self, span: Span) -> None:
        """Record one finished task."""
        task = span.task
        if self._start_s is None:
            self._start_s = span.start_s
        self._work.setdefault(task.op.lane, []).append((span.start_s, span.stop_s, task.nbytes))
        if task.item is None or not span.outcomes:
            return
        self._stop_s = span.stop_s
        tokens = sum(outcome.num_new for outcome in span.outcomes)
        if task.item.prefill:
            self._first_token_s += [span.stop_s] * len(span.outcomes)
        elif self._last_pass in (None, task.number):
            self._new.append((span.stop_s, tokens, len(span.outcomes)))
        for outcome in span.outcomes:
            self._num_new[outcome.row] = self._num_new.get(outcome.row, 0) + outcome.num_new
            if self._new_tokens is not None and self._num_new[outcome.row] >= self._new_tokens:
                self._last_pass = task.number if self._last_pass is None else self._last_pass

    @property
    def prefill_s(self) -> float:
        """Seconds from the first task until every row has its first token."""
        return self._full_s - (self._start_s or 0.0)

    @property
    def tail_s(self) -> float:
        """Seconds that decoding takes longer than at the rate of full rows, because some rows end late."""
        if not self.tokens_per_s:
            return 0.0
        decoded = sum(self._num_new.values()) - len(self._first_token_s)
        return max(0.0, self._stop_s - self._full_s - decoded / self.tokens_per_s)

    @property
    def tokens_per_s(self) -> float:
        """Rate of decoding, all rows together; 0 if no row decodes."""
        new, stop_s = self._counted
        return sum(tokens for _, tokens, _ in new) / (stop_s - self._full_s) if stop_s > self._full_s else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of one row in one pass, on average."""
        new, _ = self._counted
        return sum(tokens for _, tokens, _ in new) / max(1, sum(rows for *_, rows in new))

    @property
    def bottleneck(self) -> str:
        """The lane or resource that limits the rate, in words."""
        stop_s = self._counted[1]
        return bottleneck([lane_use(lane, work, self._full_s, stop_s) for lane, work in self._work.items()])

    def share(self, *lanes: str) -> float:
        """Share of the measured time in which at least one of these lanes was busy, 0 to 1."""
        work = [one for lane in lanes for one in self._work.get(lane, ())]
        return lane_use(lanes[0], work, self._full_s, self._counted[1]).share

    @property
    def _full_s(self) -> float:
        """The time at which every row had its first token."""
        first_s = sorted(self._first_token_s)[: self._num_rows]
        return first_s[-1] if first_s else 0.0

    @property
    def _counted(self) -> tuple[list[tuple[float, int, int]], float]:
        """The entries of ``_new`` that count, and the time of the last one."""
        new = [one for one in self._new if one[0] > self._full_s]
        if self._last_pass is not None and new:
            return new, new[-1][0]
        wanted, got = COUNTED * sum(tokens for _, tokens, _ in new), 0
        for place, (stop_s, tokens, _) in enumerate(new):
            got += tokens
            if got >= wanted:
                return new[: place + 1], stop_s
        return [], self._full_s


def decode_seconds(plan: Plan, costs: SimCosts) -> float:
    """Seconds of the lane that decodes weights in one pass of a plan; 0 if nothing is decoded."""
    table = costs.cost_table
    parts = plan.decoding
    if table is None:
        return costs.decode_s * len(parts)
    each = (part.decoded_bytes * table.target.layers[part.layer].decode_byte_s / table.decoders for part in parts)
    return sum(each) + table.task_s * len(parts)


def with_expectations(plan: Plan, costs: SimCosts, work: Workload) -> Plan:
    """The plan with the seconds of a layer by the size of its pass, and of a draft step; as it is where layers split.

    Sizes are powers of two up to the most proposals, in the middle of the rows' texts.
    """
    table = costs.cost_table
    if table is None or plan.attention_resource != COMPUTE or not plan.max_draft_tokens:
        return plan
    rows = min(-(-plan.num_rows // plan.num_groups), work.num_prompts)
    start, widest = work.prompt_tokens + work.new_tokens // 2, 1 + plan.max_draft_tokens
    widths = sorted({*(1 << power for power in range(widest.bit_length())), widest})
    items = [_item(rows, start, width) for width in widths]
    layer_s = [table.target.layer_seconds(item, tree=table.tree) / plan.num_layers + table.task_s for item in items]
    sizes = [item.padded_tokens for item in items]
    step_s = _step_s(table, _item(rows, start, 1))
    return replace(plan, expected_layer_s=tuple(zip(sizes, layer_s, strict=True)), expected_step_s=step_s)


def _item(rows: int, start: int, width: int) -> WorkItem:
    return WorkItem(0, tuple(range(rows)), (start,) * rows, (width,) * rows)


def _step_s(table: CostTable, item: WorkItem) -> float:
    """Seconds of a draft step; 0 without a model that drafts."""
    draft = table.draft
    if draft is None:
        return 0.0
    rows = len(item.rows)
    return table.task_s + draft.embed_seconds(item) + draft.layer_seconds(item) + draft.head_seconds(rows, rows)


@dataclass(frozen=True, slots=True)
class Forecaster:
    """Forecasts plans for one workload on one machine."""

    profile_of: Callable[[Plan], SimCosts]  # the costs of a plan's tasks; called often
    workload: Workload

    def __call__(self, plan: Plan) -> Forecast:
        """Run a sample of the workload under a plan, and extrapolate to all of it."""
        plan, profile = coarse(plan, self.profile_of(plan))
        plan = with_expectations(plan, profile, self.workload)
        prompt, new = self._sample(plan)
        rows = min(plan.num_rows, self.workload.num_prompts)
        meter = ThroughputMeter(rows, new)
        simulate(plan, profile, [(prompt, new)] * rows, [meter])
        rate, prefill_s = meter.tokens_per_s, self._prefill_s(plan, meter.prefill_s, prompt)
        decode_s = self._decode_s(plan, rows, rate, meter.tokens_per_pass)
        computing = meter.share(TARGET, DRAFT) if plan.draft_resource == COMPUTE else meter.share(TARGET)
        tail_s = meter.tail_s * sqrt(self.workload.new_tokens / new) if self.workload.num_prompts % rows == 0 else 0.0
        return Forecast(
            tokens_per_s=rate,
            prefill_s=prefill_s,
            job_s=prefill_s + decode_s + self._refill_s(plan, rows, (1.0 - computing) * decode_s) + tail_s,
            tokens_per_pass=meter.tokens_per_pass,
            bottleneck=meter.bottleneck,
        )

    def least_s(self, plan: Plan) -> float:
        """A lower bound on the job's seconds: no schedule is faster than its stream, its decoding or its compute."""
        work, rows = self.workload, min(plan.num_rows, self.workload.num_prompts)
        per_group = ceil(rows / plan.num_groups)
        stream_s = max(self._stream_s(plan), decode_seconds(plan, self.profile_of(plan)))
        best = 0.0  # highest tokens per second
        for proposed in LENGTHS:
            if proposed and proposed > plan.max_draft_tokens:
                break
            tokens = per_group * min(float(work.new_tokens), self._most_tokens(plan, proposed))
            compute_s = self._compute_s(per_group, proposed, plan)
            best = max(best, tokens / max(stream_s, compute_s, 1e-9))
        return work.num_prompts * (work.new_tokens - 1) / best

    def _sample(self, plan: Plan) -> tuple[int, int]:
        """Prompt tokens and new tokens of a row in the run; a shorter run decodes in the middle of the context."""
        work = self.workload
        most = MOST_TASKS if plan.max_draft_tokens else MOST_PLAIN_TASKS
        most = MOST_TASKS_OF_FEW if work.num_prompts <= FEW_PROMPTS else most
        passes = max(LEAST_PASSES, most // (tasks_per_pass(plan) * plan.num_groups))
        each = self._most_tokens(plan, min(8, plan.max_draft_tokens))
        joining = ceil(plan.num_rows * work.prompt_tokens / (plan.prefill_pass_tokens or work.prompt_tokens))
        new = min(work.new_tokens, 1 + int((passes + joining) * each))  # rows that join first also end first
        return work.prompt_tokens + (work.new_tokens - new) // 2, new

    def _most_tokens(self, plan: Plan, proposed: int) -> float:
        """Upper bound on the expected tokens of a row in a pass; in a tree a second choice may be accepted."""
        profile = self.profile_of(plan)
        chance = profile.acceptance
        if plan.proposes_trees:
            chance += (1.0 - chance) * profile.spread
        return expected_tokens(chance, proposed)

    def _compute_s(self, rows: int, proposed: int, plan: Plan, prompt: int = 0) -> float:
        """Seconds of computing all layers in one pass over so many rows.

        ``prompt``: every row prefills so many tokens instead of decoding. If attention has its own lane, the seconds of
        the slower lane.
        """
        work, profile = self.workload, self.profile_of(plan)
        cost_table = profile.cost_table
        start, count = (0, prompt) if prompt else (work.prompt_tokens + work.new_tokens // 2, 1 + proposed)
        item = WorkItem(0, tuple(range(rows)), (start,) * rows, (count,) * rows, prefill=bool(prompt))
        if cost_table is None:
            excess = max(0, item.num_tokens - profile.knee_tokens)
            return plan.num_layers * (profile.layer_s + profile.layer_token_s * excess)
        if plan.attention_resource == CPU:
            return max(
                cost_table.target.product_seconds(item), cost_table.target.attention_seconds(item, tree=cost_table.tree)
            )
        return cost_table.target.layer_seconds(item, tree=cost_table.tree)

    def _decode_s(self, plan: Plan, rows: int, rate: float, tokens_per_pass: float) -> float:
        """Seconds of decoding all prompts: waves that fill the rows, and a last wave with fewer rows."""
        if not rate:
            return 0.0
        new = self.workload.new_tokens - 1
        waves, last = divmod(self.workload.num_prompts, rows)
        full_s = rows * tokens_per_pass / rate  # one pass of every group
        full_waves_s = waves * rows * new / rate
        if not last:
            return full_waves_s
        proposed = min(8, plan.max_draft_tokens)
        share = self._compute_s(last, proposed, plan) / max(1e-12, self._compute_s(rows, proposed, plan))
        last_s = min(full_s, max(plan.num_groups * self._stream_s(plan), share * full_s))
        return full_waves_s + last_s * new / tokens_per_pass

    def _refill_s(self, plan: Plan, rows: int, idle_s: float) -> float:
        """Seconds of prefilling the later prompts, minus the seconds in which nothing computes.

        Later prompts join one by one when rows become free: each one is its own item.
        """
        later = max(0, self.workload.num_prompts - rows)
        return max(0.0, later * self._compute_s(1, 0, plan, self.workload.prompt_tokens) - idle_s)

    def _prefill_s(self, plan: Plan, measured_s: float, prompt: int) -> float:
        """Seconds of the workload's prefill, from a run with prompts of another length.

        They are equal if the stream is the bottleneck, and proportional to the length otherwise.
        """
        together = min(plan.num_rows, (plan.prefill_pass_tokens or prompt * plan.num_rows) // prompt)
        if together * self._compute_s(1, 0, plan, prompt) < self._stream_s(plan):
            return measured_s
        return measured_s * self.workload.prompt_tokens / prompt

    def _stream_s(self, plan: Plan) -> float:
        """Seconds of one pass's loads on the slower link; bytes from the disk cross a device's link too."""
        profile = self.profile_of(plan)
        copy = profile.copy_bytes_per_s
        disk_s = sum(part.nbytes for part in plan.streamed if part.tier is Tier.DISK) / profile.disk_bytes_per_s
        return disk_s if copy is None else max(disk_s, plan.streamed_bytes / copy)
