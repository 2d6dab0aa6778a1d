"""The policy: which sequences sit in which rows, how large the drafts are, and what every pass does.

A round drafts for the rows that decode, verifies them in one pass of the target together with the prompts that
join, and ends when every row's counts are back. The next round is emitted then; the weight stream did not wait.
Chains are emitted with their pass. Trees grow level by level on what the last level found (SpecExec, arXiv
2406.02532), as long as a level is worth its seconds; then the pass takes the nodes that are worth theirs.
What may NOT go in: tensors, token values, asyncio, clocks, randomness. Counts, ids, bytes and seconds only.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from aspec.calibration import another_level, marginal_seconds, worthwhile
from aspec.costs import CostModel
from aspec.plan import Plan, Speculation
from aspec.tasks.passes import DRAFT_AHEAD, VERIFY, Numbering, WeightStream, emit_pass
from aspec.tasks.task import (
    Access,
    Arrived,
    Cancelled,
    Closing,
    Decision,
    Event,
    Grown,
    Growth,
    Op,
    RowOutcome,
    Seating,
    Span,
    Started,
    Task,
    WorkItem,
    draft_kv_buffer,
    proposal_buffer,
    sequence_buffer,
)

BEAMS, WIDTH = 8, 8  # nodes of a row that a level expands, and children that each of them offers
LEAST_GAIN = 0.02  # tokens; a level that promises less is not worth the loop's time
TRY_AGAIN_EVERY = 32  # rounds without a draft, once proposals do not pay
GROUP = 0  # one group of rows; rotation over several is a matter of the plan


@dataclass(slots=True)
class Row:
    """A sequence in a row; mutable, because every round moves it on."""

    sequence: int
    length: int  # committed tokens; the last one is not in the target's KV yet
    remaining: int  # tokens that may still be generated; the row retires at 0
    decoding: bool = False  # False until its prompt has gone through a pass
    cancelled: bool = False


@dataclass(slots=True)
class Draft:
    """The trees of the round that is being drafted; mutable, because every level adds to them."""

    rows: dict[int, Row]  # those that decode
    budgets: dict[int, int]  # nodes that a row may propose
    depths: dict[int, int]  # tokens that a path of a row may have
    level: int = 0  # the one that is being grown
    found: dict[int, Grown] = field(default_factory=dict)  # by row, the latest
    seconds: float = 0.0  # of drafting so far


class Scheduler:
    """Answers every event with the tasks that follow from it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.costs = CostModel()
        self.passes = 0  # passes emitted
        self.done = False
        self._next_id = Numbering()
        self._stream = WeightStream(plan, self._next_id)
        self._waiting: deque[Arrived] = deque()
        self._rows: dict[int, Row] = {}  # by row number; only occupied rows
        self._open = 0  # ACCEPT and DRAFT_PREFILL tasks of the running pass that are not back: they use its rows
        self._committed = ""  # present content of the sequence buffer
        self._closing = False
        self._quiet_rounds = 0  # decode rounds without a proposal since the last one with
        self._draft: Draft | None = None  # trees that grow; their pass is not emitted yet

    def handle(self, event: Event) -> Decision:
        """The tasks and row changes that follow from ``event``; nothing while a pass is running."""
        tasks: list[Task] = []
        seatings: list[Seating] = []
        match event:
            case Started():
                tasks = self._stream.fill()
            case Arrived():
                self._waiting.append(event)
            case Cancelled():
                self._cancel(event.sequence)
            case Closing():
                self._close(event.now)
            case Span():
                self.costs.observe(event)
                self._open -= event.task.op in (Op.ACCEPT, Op.DRAFT_PREFILL)
                for outcome in event.outcomes:
                    self._advance(outcome)
                if event.grown:
                    tasks = self._grow_on(event)
        if self.idle:
            seatings = self._reseat()
            if self._rows:
                tasks += self._emit_round()
            else:
                self.done = self._closing
        return Decision(tuple(tasks), tuple(seatings))

    def validate(self) -> None:
        """Check the invariants; tests call it after every event."""
        assert all(0 <= row < self.plan.num_rows for row in self._rows)
        assert all(row.length <= self.plan.capacity for row in self._rows.values())
        assert self._open >= 0

    @property
    def idle(self) -> bool:
        """Whether no round is running: only an event from outside brings the next one."""
        return self._open == 0 and self._draft is None

    @property
    def num_active(self) -> int:
        """Sequences in rows."""
        return len(self._rows)

    # -- rows ------------------------------------------------------------------------------------------------

    def _advance(self, outcome: RowOutcome) -> None:
        row = self._rows[outcome.row]
        row.decoding = True
        row.length += outcome.num_new
        row.remaining = 0 if outcome.stopped else row.remaining - outcome.num_new

    def _cancel(self, sequence: int) -> None:
        self._waiting = deque(arrived for arrived in self._waiting if arrived.sequence != sequence)
        for row in self._rows.values():
            row.cancelled |= row.sequence == sequence

    def _close(self, now: bool) -> None:
        self._closing = True
        if now:
            self._waiting.clear()
            for row in self._rows.values():
                row.cancelled = True

    def _reseat(self) -> list[Seating]:
        """Between passes: retire the rows that are done, seat those that wait in the lowest free rows."""
        gone = [number for number, row in self._rows.items() if row.remaining <= 0 or row.cancelled]
        for number in gone:
            del self._rows[number]
        seatings = [Seating(number, None) for number in gone]
        for number in range(self.plan.num_rows):
            if self._waiting and number not in self._rows:
                arrived = self._waiting.popleft()
                self._rows[number] = Row(arrived.sequence, arrived.prompt_tokens, arrived.max_new_tokens)
                seatings.append(Seating(number, arrived.sequence))
        return seatings

    # -- a round ---------------------------------------------------------------------------------------------

    def _emit_round(self) -> list[Task]:
        """Drafts for the decoding rows, then one pass that verifies them and prefills those that joined."""
        decoding = {n: row for n, row in sorted(self._rows.items()) if row.decoding}
        if self.plan.speculation is Speculation.TREE:
            if (draft := self._plant(decoding)) is not None:
                self._draft = draft
                return [self._level(draft, tuple(draft.rows))]
            return self._emit_pass(decoding, dict.fromkeys(decoding, 0), [], None)
        lengths = self._draft_lengths(decoding)
        tasks = self._emit_drafts(self.passes, decoding, lengths)
        return self._emit_pass(decoding, lengths, tasks, f"round {self.passes}" if tasks else None)

    def _emit_pass(
        self, decoding: dict[int, Row], lengths: dict[int, int], tasks: list[Task], proposal: str | None
    ) -> list[Task]:
        """The pass behind ``tasks``; ``proposal``: the content of the proposal buffer, if there is one to verify."""
        number = self.passes
        self.passes += 1
        joining = {n: row for n, row in sorted(self._rows.items()) if not row.decoding}
        items = [_decode_item(decoding, lengths)] if decoding else []
        items += prefill_items(joining, len(items), self.plan.prefill_tokens)
        tasks += emit_pass(number, items, self._stream, self._next_id, self.plan, self._inputs(proposal), GROUP)
        prefills = [item for item in items if item.prefill] if self.plan.max_draft_tokens else []
        tasks += [self._draft_prefill(number, item) for item in prefills]
        sampled = [item for item in items if item.samples]
        self._open = len(sampled) + len(prefills)
        self._committed = f"pass {number} item {sampled[-1].index}"
        return tasks

    # -- trees -----------------------------------------------------------------------------------------------

    def _plant(self, decoding: dict[int, Row]) -> Draft | None:
        """What the trees of this round may become; None where no row has room or speculation loses."""
        plan = self.plan
        most = plan.max_draft_tokens if plan.fixed_draft_tokens is None else plan.fixed_draft_tokens
        deepest = plan.max_draft_depth if plan.fixed_draft_depth is None else plan.fixed_draft_depth
        rows = {n: row for n, row in decoding.items() if row.remaining > 1}
        if not rows or not most or self._rests():
            return None
        depths = {n: min(deepest, row.remaining - 1, plan.capacity - row.length) for n, row in rows.items()}
        return Draft(rows, dict.fromkeys(rows, most), depths)

    def _rests(self) -> bool:
        """Whether this round goes without a draft: the longer proposals have not paid, the rarer one is tried."""
        quiet = self._quiet_rounds
        self._quiet_rounds += quiet > 0
        return quiet > 0 and quiet % TRY_AGAIN_EVERY != 0

    def _level(self, draft: Draft, rows: tuple[int, ...]) -> Task:
        """One more level of some rows' trees."""
        shape = Growth(
            draft.level,
            BEAMS,
            WIDTH,
            tuple(draft.budgets[row] for row in rows),
            tuple(draft.depths[row] for row in rows),
        )
        starts = tuple(draft.rows[row].length + draft.level - 1 for row in rows)
        counts = (1,) * len(rows) if draft.level == 0 else (BEAMS,) * len(rows)
        item = WorkItem(-1, rows, starts, counts)
        content = _level_content(self.passes, draft.level)
        reads = (Access(proposal_buffer(GROUP), _level_content(self.passes, draft.level - 1)),)
        return Task(
            self._next_id(),
            Op.DRAFT,
            self.plan.draft_resource,
            VERIFY,
            reads if draft.level else self._inputs(None),
            (Access(proposal_buffer(GROUP), content), Access(draft_kv_buffer(GROUP), content)),
            number=self.passes,
            item=item,
            step=draft.level,
            growth=shape,
        )

    def _grow_on(self, span: Span) -> list[Task]:
        """After a level: the next one while it pays, otherwise the pass over the nodes that pay."""
        draft = self._draft
        assert draft is not None
        draft.found |= {grown.row: grown for grown in span.grown}
        draft.seconds += span.stop_s - span.start_s
        gains = {row: grown.promise for row, grown in draft.found.items() if grown.promise > 0.0}
        if gains and self._level_pays(draft, sum(gains.values())):
            draft.level += 1
            return [self._level(draft, tuple(sorted(gains)))]
        self._draft = None
        decoding = {n: row for n, row in sorted(self._rows.items()) if row.decoding}
        lengths = dict.fromkeys(decoding, 0) | self._choose_nodes(draft)
        if self.plan.fixed_draft_tokens is None:
            self._quiet_rounds = 0 if any(lengths.values()) else self._quiet_rounds + 1
        proposal = _level_content(self.passes, draft.level) if any(lengths.values()) else None
        return self._emit_pass(decoding, lengths, [], proposal)

    def _level_pays(self, draft: Draft, gain: float) -> bool:
        if self.plan.fixed_draft_tokens is not None or self.plan.fixed_draft_depth is not None:
            return True
        plan_bytes = (self.plan.streamed_bytes, self.plan.spare_bytes)
        nodes = len(draft.rows) + sum(len(grown.probabilities) for grown in draft.found.values())
        level_s = self.costs.level_seconds(draft.seconds, self.plan.num_layers, nodes, plan_bytes)
        return gain > LEAST_GAIN and another_level(gain, self.costs.tokens_per_s, level_s)

    def _choose_nodes(self, draft: Draft) -> dict[int, int]:
        """How many nodes of every row to verify: the likeliest of all rows, while a node is worth its seconds."""
        if self.plan.fixed_draft_tokens is not None:
            return {row: len(grown.probabilities) for row, grown in draft.found.items()}
        ranked = sorted(((p, row) for row, grown in draft.found.items() for p in grown.probabilities), reverse=True)
        points = self.costs.pass_seconds(self.plan.num_layers, self.plan.streamed_bytes, len(draft.rows) + len(ranked))
        chosen = len(ranked)
        if points:
            cost = marginal_seconds(points, len(draft.rows))
            chosen = worthwhile([p for p, _ in ranked], self.costs.tokens_per_s, cost)
        return {row: sum(owner == row for _, owner in ranked[:chosen]) for row in draft.found}

    # -- chains ----------------------------------------------------------------------------------------------

    def _draft_lengths(self, rows: dict[int, Row]) -> dict[int, int]:
        """How many tokens to propose for every row: never beyond what it may still generate."""
        chosen = self.plan.fixed_draft_tokens
        if chosen is None:
            chosen = self._choose_draft_tokens(len(rows))
        most = min(chosen, self.plan.max_draft_tokens)
        return {n: max(0, min(most, row.remaining - 1, self.plan.capacity - row.length)) for n, row in rows.items()}

    def _choose_draft_tokens(self, num_rows: int) -> int:
        """By measured cost; where speculation loses, one proposal now and then keeps the estimate alive."""
        if not num_rows or not self.plan.max_draft_tokens:
            return 0
        plan = self.plan
        best = self.costs.best_draft_tokens(
            plan.num_layers, num_rows, plan.streamed_bytes, plan.spare_bytes, plan.max_draft_tokens
        )
        self._quiet_rounds = 0 if best else self._quiet_rounds + 1
        return best or int(self._quiet_rounds % 32 == 0)

    def _emit_drafts(self, number: int, rows: dict[int, Row], lengths: dict[int, int]) -> list[Task]:
        """One task per draft step; a row leaves when its own proposal is long enough."""
        tasks = []
        reads: tuple[Access, ...] = self._inputs(None)
        for step in range(max(lengths.values(), default=0)):
            active = [n for n in rows if lengths[n] > step]
            item = WorkItem(-1, tuple(active), tuple(rows[n].length + step - 1 for n in active), (1,) * len(active))
            content = f"round {number}" if step == max(lengths.values()) - 1 else f"round {number} step {step}"
            written = Access(proposal_buffer(GROUP), content)
            tasks.append(
                Task(
                    self._next_id(),
                    Op.DRAFT,
                    self.plan.draft_resource,
                    VERIFY,
                    reads,
                    (written, Access(draft_kv_buffer(GROUP), content)),
                    number=number,
                    item=item,
                    step=step,
                )
            )
            reads = (written,)
        return tasks

    def _draft_prefill(self, number: int, item: WorkItem) -> Task:
        """The same chunk of prompts into the draft's KV, in the gaps of the pass."""
        writes = (Access(draft_kv_buffer(GROUP), f"pass {number} item {item.index}"),)
        resource = self.plan.draft_resource
        return Task(self._next_id(), Op.DRAFT_PREFILL, resource, DRAFT_AHEAD, writes=writes, number=number, item=item)

    def _inputs(self, proposal: str | None) -> tuple[Access, ...]:
        """What decoding reads: the committed tokens, and the proposal if there is one."""
        committed = (Access(sequence_buffer(GROUP), self._committed),)
        return committed if proposal is None else (*committed, Access(proposal_buffer(GROUP), proposal))


def _decode_item(rows: dict[int, Row], lengths: dict[int, int]) -> WorkItem:
    """The last committed token of every row and its proposals."""
    numbers = tuple(rows)
    starts = tuple(rows[n].length - 1 for n in numbers)
    return WorkItem(0, numbers, starts, tuple(1 + lengths[n] for n in numbers))


def prefill_items(rows: dict[int, Row], first_index: int, most_tokens: int) -> list[WorkItem]:
    """Prompts as work items of at most ``most_tokens`` padded tokens.

    A longer prompt is cut into chunks, of which only the last one draws; shorter ones of like length share an item.
    """
    items: list[WorkItem] = []
    short: list[int] = []
    for number, row in sorted(rows.items(), key=lambda pair: pair[1].length):
        if row.length <= most_tokens and (len(short) + 1) * row.length <= most_tokens:
            short.append(number)  # lengths grow, so this row's length is the item's width
            continue
        items += _shared_item(rows, short, first_index + len(items))
        short = [number] if row.length <= most_tokens else []
        if row.length > most_tokens:
            items += _chunks(number, row.length, first_index + len(items), most_tokens)
    return items + _shared_item(rows, short, first_index + len(items))


def _shared_item(rows: dict[int, Row], numbers: Sequence[int], index: int) -> list[WorkItem]:
    if not numbers:
        return []
    ordered = tuple(sorted(numbers))
    counts = tuple(rows[n].length for n in ordered)
    return [WorkItem(index, ordered, (0,) * len(ordered), counts, prefill=True)]


def _chunks(number: int, length: int, index: int, most_tokens: int) -> list[WorkItem]:
    starts = range(0, length, most_tokens)
    return [
        WorkItem(
            index + i,
            (number,),
            (start,),
            (min(most_tokens, length - start),),
            prefill=True,
            samples=start == starts[-1],
        )
        for i, start in enumerate(starts)
    ]


def _level_content(number: int, level: int) -> str:
    return f"round {number} level {level}"
