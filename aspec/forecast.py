"""What a plan would come to on a machine: the real scheduler and executor, in virtual time, on measured costs.

Of a long job a few rounds are run and the rest follows from their rate. Large models run with their parts merged, so
that a round stays a few hundred tasks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil

from aspec.costs import expected_tokens
from aspec.io.sim import Profile
from aspec.plan import Plan, PlannedPart, Speculation, Workload
from aspec.search import Forecast
from aspec.simulation import simulate
from aspec.tariff import LayerCost
from aspec.tasks.task import Span, WorkItem
from aspec.timeline import LANE_OF, bottleneck, lane_use

MOST_TASKS = 20_000  # of one run
LEAST_PASSES = 8  # of decoding, however many tasks they take
MOST_TASKS_PER_PASS = 400  # beyond this, parts and layers are merged
COUNTED = 0.9  # of the tokens: those behind come from passes that are no longer full
LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)  # proposals at which a bound is taken


class Tally:
    """An observer of a run, simulated or real: how fast it decodes while its rows are full."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._begun_s: list[float] = []  # when rows got their first token
        self._new: list[tuple[float, int, int]] = []  # of rows that decode: when, tokens, rows
        self._work: dict[str, list[tuple[float, float, int]]] = {}  # by lane
        self._start_s: float | None = None

    def __call__(self, span: Span) -> None:
        """Take one finished task."""
        task = span.task
        if self._start_s is None:
            self._start_s = span.start_s
        self._work.setdefault(LANE_OF[task.op], []).append((span.start_s, span.stop_s, task.nbytes))
        if task.item is None or not span.outcomes:
            return
        tokens = sum(outcome.num_new for outcome in span.outcomes)
        if task.item.prefill:
            self._begun_s += [span.stop_s] * len(span.outcomes)
        else:
            self._new.append((span.stop_s, tokens, len(span.outcomes)))

    @property
    def prefill_s(self) -> float:
        """From the first task until every row has its first token."""
        return self._full_s - (self._start_s or 0.0)

    @property
    def tokens_per_s(self) -> float:
        """Of decoding, all rows together, until COUNTED of the tokens are there; 0 where nothing decodes."""
        new, stop_s = self._counted
        return sum(tokens for _, tokens, _ in new) / (stop_s - self._full_s) if stop_s > self._full_s else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Of a row."""
        new, _ = self._counted
        return sum(tokens for _, tokens, _ in new) / max(1, sum(rows for *_, rows in new))

    @property
    def bottleneck(self) -> str:
        """In words."""
        stop_s = self._counted[1]
        return bottleneck([lane_use(lane, work, self._full_s, stop_s) for lane, work in self._work.items()])

    @property
    def _full_s(self) -> float:
        """When every row had begun."""
        begun = sorted(self._begun_s)[: self._num_rows]
        return begun[-1] if begun else 0.0

    @property
    def _counted(self) -> tuple[list[tuple[float, int, int]], float]:
        """What decoding brought from then on, up to COUNTED of all, and when that was reached."""
        new = [one for one in self._new if one[0] > self._full_s]
        wanted, got = COUNTED * sum(tokens for _, tokens, _ in new), 0
        for place, (stop_s, tokens, _) in enumerate(new):
            got += tokens
            if got >= wanted:
                return new[: place + 1], stop_s
        return [], self._full_s


@dataclass(frozen=True, slots=True)
class Forecaster:
    """Runs plans for one workload on one machine."""

    profile: Profile
    workload: Workload

    def __call__(self, plan: Plan) -> Forecast:
        """Serve the workload, or the beginning of it."""
        plan, profile = coarse(plan, self.profile)
        prompt, new = self._sample(plan)
        rows = min(plan.num_rows, self.workload.num_prompts)
        tally = Tally(rows)
        simulate(plan, profile, [(prompt, new)] * rows, [tally])
        rate, prefill_s = tally.tokens_per_s, tally.prefill_s * self.workload.prompt_tokens / prompt
        decode_s = self.workload.num_prompts * (self.workload.new_tokens - 1) / rate if rate else 0.0
        return Forecast(
            tokens_per_s=rate,
            prefill_s=prefill_s,
            job_s=prefill_s + decode_s + self._refill_s(plan, rows, decode_s),
            tokens_per_pass=tally.tokens_per_pass,
            bottleneck=tally.bottleneck,
        )

    def least_s(self, plan: Plan) -> float:
        """Seconds that the job takes at least: no schedule beats its stream, nor its compute."""
        work, rows = self.workload, min(plan.num_rows, self.workload.num_prompts)
        per_group = ceil(rows / plan.num_groups)
        stream_s = plan.streamed_bytes / self._link_rate
        best = 0.0  # tokens per second
        for proposed in LENGTHS:
            if proposed and proposed > plan.max_draft_tokens:
                break
            tokens = per_group * min(float(work.new_tokens), self._most_tokens(plan, proposed))
            compute_s = self._compute_s(per_group, proposed, plan)
            best = max(best, tokens / max(stream_s, compute_s, 1e-9))
        return work.num_prompts * (work.new_tokens - 1) / best

    def _sample(self, plan: Plan) -> tuple[int, int]:
        """Prompt and new tokens of the run; with fewer new tokens it decodes in the middle of the context."""
        work = self.workload
        passes = max(LEAST_PASSES, MOST_TASKS // (tasks_per_pass(plan) * plan.num_groups))
        each = self._most_tokens(plan, min(8, plan.max_draft_tokens))
        new = min(work.new_tokens, 1 + int(passes * each))
        return work.prompt_tokens + (work.new_tokens - new) // 2, new

    def _most_tokens(self, plan: Plan, proposed: int) -> float:
        """Tokens of a row in a pass at most; a tree has second choices."""
        chance = self.profile.acceptance
        if plan.speculation is Speculation.TREE:
            chance += (1.0 - chance) * self.profile.spread
        return expected_tokens(chance, proposed)

    def _compute_s(self, rows: int, proposed: int, plan: Plan, prompt: int = 0) -> float:
        """Of one pass over so many rows, all layers; ``prompt``: of so many prompts at once instead."""
        work, tariff = self.workload, self.profile.tariff
        start, count = (0, prompt) if prompt else (work.prompt_tokens + work.new_tokens // 2, 1 + proposed)
        item = WorkItem(0, tuple(range(rows)), (start,) * rows, (count,) * rows, prefill=bool(prompt))
        if tariff is None:
            excess = max(0, item.num_tokens - self.profile.knee_tokens)
            return plan.num_layers * (self.profile.layer_s + self.profile.layer_token_s * excess)
        return tariff.target.layer_seconds(item)

    def _refill_s(self, plan: Plan, rows: int, decode_s: float) -> float:
        """What the prompts behind the first ones cost: as far as the stream does not hide it."""
        later = self.workload.num_prompts - rows
        if later <= 0 or not decode_s:
            return 0.0
        each_s = self._compute_s(1, 0, plan, self.workload.prompt_tokens)
        stream_s = plan.streamed_bytes / self._link_rate
        slack = max(0.0, 1.0 - self._compute_s(rows, 0, plan) / stream_s) if stream_s else 0.0
        return max(0.0, later * each_s - slack * decode_s)

    @property
    def _link_rate(self) -> float:
        """Bytes per second of the slowest link that a plan may use."""
        copy = self.profile.copy_bytes_per_s
        return self.profile.disk_bytes_per_s if copy is None else copy


def tasks_per_pass(plan: Plan) -> int:
    """About how many tasks a pass of a group is."""
    per_layer = 1 if plan.attention_resource == "compute" else 3 * plan.micro_batches
    return plan.num_layers * per_layer + len(plan.streamed) * (1 + bool(plan.num_staging)) + 8


def coarse(plan: Plan, profile: Profile) -> tuple[Plan, Profile]:
    """A plan of about as many bytes and seconds in fewer tasks, where a pass has too many; otherwise itself."""
    if tasks_per_pass(plan) <= MOST_TASKS_PER_PASS:
        return plan, profile
    merged = _merge_parts(plan, 1)
    layers = ceil(tasks_per_pass(merged) / MOST_TASKS_PER_PASS)
    if layers == 1:
        return merged, profile
    merged = _merge_parts(plan, layers)
    tariff = profile.tariff
    if tariff is None:
        return merged, replace(profile, layer_s=profile.layer_s * layers, layer_token_s=profile.layer_token_s * layers)
    target = replace(tariff.target, layers=tuple(_together(tariff.target.layers, layers)))
    return merged, replace(profile, tariff=replace(tariff, target=target))


def _merge_parts(plan: Plan, layers: int) -> Plan:
    """One part for what streams of every ``layers`` layers, from each tier."""
    sizes: dict[tuple[int, str], tuple[int, int, PlannedPart]] = {}
    for part in plan.parts:
        key = part.layer // layers, part.tier
        nbytes, size, _ = sizes.get(key, (0, 0, part))
        sizes[key] = nbytes + part.nbytes, size + part.size, part
    parts = tuple(
        replace(part, index=index, layer=layer, nbytes=nbytes, size=size)
        for index, ((layer, _), (nbytes, size, part)) in enumerate(sorted(sizes.items(), key=lambda one: one[0]))
    )
    streamed = [part for part in parts if part.tier != "device"]
    if not streamed:
        return replace(plan, parts=parts, num_layers=ceil(plan.num_layers / layers))
    slot = max(part.size for part in streamed)
    least = max(sum(part.layer == layer for part in streamed) for layer in {part.layer for part in streamed})
    slots = max(least, round(plan.num_slots * plan.slot_bytes / slot))
    return replace(plan, parts=parts, num_layers=ceil(plan.num_layers / layers), num_slots=slots, slot_bytes=slot)


def _together(layers: tuple[LayerCost, ...], count: int) -> Iterable[LayerCost]:
    """Every ``count`` layers as one that costs as much."""
    for start in range(0, len(layers), count):
        own = layers[start : start + count]
        yield own[0].times(len(own))
