"""The policy: which sequences sit in which rows, how long the drafts are, and what every pass does.

A round drafts for the rows that decode, verifies them in one pass of the target together with the prompts that
join, and ends when every row's counts are back. The next round is emitted then; the weight stream did not wait.
What may NOT go in: tensors, token values, asyncio, clocks, randomness. Counts, ids, bytes and seconds only.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from aspec.costs import CostModel
from aspec.plan import Plan
from aspec.tasks.passes import DRAFT_AHEAD, VERIFY, Numbering, WeightStream, emit_pass
from aspec.tasks.task import (
    Access,
    Arrived,
    Cancelled,
    Closing,
    Decision,
    Event,
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

GROUP = 0  # one group of rows; rotation over several is a matter of the plan


@dataclass(slots=True)
class Row:
    """A sequence in a row; mutable, because every round moves it on."""

    sequence: int
    length: int  # committed tokens; the last one is not in the target's KV yet
    remaining: int  # tokens that may still be generated; the row retires at 0
    decoding: bool = False  # False until its prompt has gone through a pass
    cancelled: bool = False


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
        self._open_accepts = 0  # ACCEPT tasks of the running pass that are not back
        self._committed = ""  # present content of the sequence buffer
        self._closing = False
        self._quiet_rounds = 0  # decode rounds without a proposal since the last one with

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
                if event.task.op is Op.ACCEPT:
                    self._open_accepts -= 1
                    for outcome in event.outcomes:
                        self._advance(outcome)
        if self._open_accepts == 0:
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
        assert self._open_accepts >= 0

    @property
    def idle(self) -> bool:
        """Whether no pass is running: only an event from outside brings the next one."""
        return self._open_accepts == 0

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
        number = self.passes
        self.passes += 1
        decoding = {n: row for n, row in sorted(self._rows.items()) if row.decoding}
        joining = {n: row for n, row in sorted(self._rows.items()) if not row.decoding}
        lengths = self._draft_lengths(decoding)
        tasks = self._emit_drafts(number, decoding, lengths)
        inputs = self._inputs(f"round {number}" if tasks else None)
        items = [_decode_item(decoding, lengths)] if decoding else []
        items += prefill_items(joining, len(items), self.plan.prefill_tokens)
        tasks += emit_pass(number, items, self._stream, self._next_id, self.plan, inputs, GROUP)
        if self.plan.max_draft_tokens:
            tasks += [self._draft_prefill(number, item) for item in items if item.prefill]
        sampled = [item for item in items if item.samples]
        self._open_accepts = len(sampled)
        self._committed = f"pass {number} item {sampled[-1].index}"
        return tasks

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
