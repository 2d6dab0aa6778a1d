"""The policy: which sequences sit in which rows, how large the drafts are, and what every pass does.

A round drafts for the rows that decode, verifies them in one pass of the target together with the prompts that
join, and ends when every row's counts are back. The next round is emitted then; the weight stream did not wait.
Chains are emitted with their pass. Trees grow level by level on what the last level found (SpecExec, arXiv
2406.02532), as long as a level is worth its seconds; then the pass takes the nodes that are worth theirs, and the
trees grow on beside its layers, one level at a time: what stands below the target's draws is where the next round
begins. So the end of a pass is emitted late, behind the last level that was drafted ahead.
What may NOT go in: tensors, token values, asyncio, clocks, randomness. Counts, ids, bytes and seconds only.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from aspec.costs import CostModel
from aspec.plan import Plan, Speculation
from aspec.seats import Row, Seats, decode_item, prefill_items
from aspec.sizing import Sizing
from aspec.tasks.passes import DRAFT_AHEAD, VERIFY, Numbering, WeightStream, emit_end, emit_pass
from aspec.tasks.task import (
    COMPUTE,
    Access,
    Arrived,
    Cancelled,
    Closing,
    Decision,
    Event,
    Grown,
    Growth,
    Op,
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
AHEAD_NODES = 256  # of a row's tree beyond those it proposes: among them what the target may draw instead
AHEAD_BEAMS = 32  # nodes that a level expands ahead, on a compute lane of the draft's own
GROUP = 0  # one group of rows; rotation over several is a matter of the plan


@dataclass(slots=True)
class Draft:
    """The trees of a round; mutable, because every level adds to them."""

    rows: dict[int, Row]  # those that decode
    budgets: dict[int, int]  # nodes that a row may propose
    depths: dict[int, int]  # tokens that a path of a row may have
    found: dict[int, Grown]  # by row, the latest; a tree that is not planted promises one token
    levels: int = 0  # that have been emitted
    seconds: float = 0.0  # of drafting before the pass
    growing: bool = False  # a level is under way

    @property
    def promises(self) -> dict[int, float]:
        """Tokens that another level can gain, of the rows where it gains any."""
        return {row: grown.promise for row, grown in sorted(self.found.items()) if grown.promise > 0.0}

    @property
    def probabilities(self) -> dict[int, tuple[float, ...]]:
        """Of the paths to the nodes of every row, descending."""
        return {row: grown.probabilities for row, grown in self.found.items()}


@dataclass(slots=True)
class Pass:
    """The pass that runs; mutable, because it ends in two steps."""

    number: int
    items: list[WorkItem]
    draft: Draft | None  # whose trees may grow on
    next_layer: int = 0  # that has not run for all items
    open: int = 0  # tasks that use its rows and are not back: ACCEPT, DRAFT_PREFILL
    ending: bool = False  # its end is emitted: nothing is drafted ahead any more


class Scheduler:
    """Answers every event with the tasks that follow from it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.costs = CostModel()
        self.sizing = Sizing(plan, self.costs)
        self.passes = 0  # passes emitted
        self.done = False
        self._next_id = Numbering()
        self._stream = WeightStream(plan, self._next_id)
        self._seats = Seats(plan.num_rows)
        self._committed, self._proposed = "", ""  # present content of the sequence and the proposal buffer
        self._closing = False
        self._draft: Draft | None = None  # trees that grow; their pass is not emitted yet
        self._pass: Pass | None = None  # the one that runs
        self._standing: dict[int, Grown] = {}  # by row: what the draft has grown below the last draw

    def handle(self, event: Event) -> Decision:
        """The tasks and row changes that follow from ``event``; nothing while a pass is running."""
        tasks: list[Task] = []
        seatings: list[Seating] = []
        match event:
            case Started():
                tasks = self._stream.fill()
            case Arrived():
                self._seats.arrive(event)
            case Cancelled():
                self._seats.cancel(event.sequence)
            case Closing():
                self._closing = True
                if event.now:
                    self._seats.cancel()
            case Span():
                self.costs.observe(event)
                tasks = self._go_on(event)
        if self.idle:
            seatings = self._seats.reseat()
            if self._seats.rows:
                tasks += self._emit_round()
            else:
                self.done = self._closing
        return Decision(tuple(tasks), tuple(seatings))

    def validate(self) -> None:
        """Check the invariants; tests call it after every event."""
        self._seats.validate(self.plan.capacity)
        assert self._pass is None or self._pass.open > 0
        assert self._pass is None or self._draft is None, "trees that are to be verified grow before their pass"

    @property
    def idle(self) -> bool:
        """Whether no round is running: only an event from outside brings the next one."""
        return self._pass is None and self._draft is None

    @property
    def num_active(self) -> int:
        """Sequences in rows."""
        return len(self._seats.rows)

    # -- a round ---------------------------------------------------------------------------------------------

    def _emit_round(self) -> list[Task]:
        """Drafts for the decoding rows, then one pass that verifies them and prefills those that joined."""
        decoding = self._seats.decoding
        if self.plan.speculation is Speculation.TREE:
            self._draft = self._plant(decoding)
            return self._draft_or_verify(self._draft) if self._draft else self._emit_pass(decoding, {}, [])
        lengths = self.sizing.chains({n: self._most(row) for n, row in decoding.items()})
        return self._emit_pass(decoding, lengths, self._emit_chains(decoding, lengths))

    def _most(self, row: Row) -> int:
        """Tokens that may be proposed on one path of a row: never beyond what it may still generate."""
        return max(0, min(row.remaining - 1, self.plan.capacity - row.length))

    def _emit_pass(
        self, decoding: dict[int, Row], lengths: dict[int, int], tasks: list[Task], draft: Draft | None = None
    ) -> list[Task]:
        """The pass behind ``tasks`` up to its end; ``lengths``: tokens to verify of a row, if any."""
        number = self.passes
        self.passes += 1
        items = [decode_item(decoding, lengths)] if decoding else []
        items += prefill_items(self._seats.joining, len(items), self.plan.prefill_tokens)
        inputs = self._inputs(with_proposal=any(lengths.values()))
        tasks += emit_pass(number, items, self._stream, self._next_id, self.plan, inputs, GROUP)
        prefills = [item for item in items if item.prefill] if self.plan.max_draft_tokens else []
        tasks += [self._draft_prefill(number, item) for item in prefills]
        self._pass = Pass(number, items, draft, open=len(prefills) + sum(item.samples for item in items))
        return tasks if self._may_draft_ahead else tasks + self._emit_end(self._pass)

    def _emit_end(self, running: Pass) -> list[Task]:
        running.ending = True
        tasks = emit_end(running.number, running.items, self._next_id, self.plan, GROUP)
        last = [item.index for item in running.items if item.samples][-1]
        self._committed = self._proposed = f"pass {running.number} item {last}"
        return tasks

    def _go_on(self, span: Span) -> list[Task]:
        """What follows at once from a finished task, in the midst of a round."""
        for outcome in span.outcomes:
            self._seats.advance(outcome)
        running, task = self._pass, span.task
        if task.op is Op.DRAFT and task.growth is not None:
            draft = running.draft if running else self._draft
            assert draft is not None
            draft.growing = False
            promise, before = sum(draft.promises.values()), draft.probabilities
            draft.found |= {grown.row: grown for grown in span.grown}
            if running is None:
                draft.seconds += span.stop_s - span.start_s
                self.sizing.learn(task.step, promise, before, draft.probabilities)
                return self._draft_or_verify(draft)
            return self._draft_ahead(running, span.stop_s)
        if running is None:
            return []
        if task.op in (Op.ACCEPT, Op.DRAFT_PREFILL):
            self._standing |= {grown.row: grown for grown in span.grown}
            running.open -= 1
            self._pass = running if running.open else None
        elif task.op in (Op.EMBED, Op.LAYER) and task.item == running.items[-1]:
            running.next_layer = task.layer + 1
            if running.next_layer >= self.plan.num_layers - 1 and not running.ending:
                return self._emit_end(running)
            return self._draft_ahead(running, span.stop_s)
        return []

    # -- trees -----------------------------------------------------------------------------------------------

    def _plant(self, decoding: dict[int, Row]) -> Draft | None:
        """What the trees of this round may become; None where no row has room or speculation loses."""
        standing, self._standing = self._standing, {}
        rows = {n: row for n, row in decoding.items() if self._most(row) > 0}
        if not rows or self.sizing.rests():
            return None
        depths = {n: min(self.sizing.deepest, self._most(row)) for n, row in rows.items()}
        found = {n: standing.get(n, Grown(n, (), promise=1.0)) for n in rows}
        return Draft(rows, dict.fromkeys(rows, self.sizing.most), depths, found)

    def _draft_or_verify(self, draft: Draft) -> list[Task]:
        """The next level while it pays, otherwise the pass over the nodes that pay."""
        promise = sum(draft.promises.values())
        unplanted = not all(draft.probabilities.values())
        nodes = len(draft.rows) + sum(map(len, draft.probabilities.values()))
        pays = self.sizing.level_pays(draft.levels, promise, draft.seconds, nodes)
        if promise and (pays or (unplanted and not draft.levels)):
            return [self._level(draft, draft.promises)]
        self._draft = None
        decoding = self._seats.decoding
        chosen = self.sizing.nodes(draft.probabilities, draft.seconds)
        draft.found = {n: replace(grown, promise=1.0) for n, grown in draft.found.items()}  # ahead there is more room
        return self._emit_pass(decoding, chosen, [], draft if any(chosen.values()) else None)

    def _draft_ahead(self, running: Pass, now_s: float) -> list[Task]:
        """One more level below what is being verified, where it keeps no layer waiting."""
        draft = running.draft
        if draft is None or draft.growing or running.ending or not self._may_draft_ahead:
            return []
        gains = draft.promises
        loads = self._stream.loads_before(running.next_layer)
        if not self.sizing.ahead_pays(sum(gains.values()), loads, now_s):
            return []
        return [self._level(draft, gains, ahead=True)]

    @property
    def _may_draft_ahead(self) -> bool:
        """Between the layers of a pass, of which the last one hides its end."""
        return self.plan.draft_ahead and self.plan.speculation is Speculation.TREE and self.plan.num_layers > 1

    def _level(self, draft: Draft, rows: Iterable[int], *, ahead: bool = False) -> Task:
        """One more level of some rows' trees."""
        numbers = tuple(rows)
        further = 2 if ahead else 1  # rounds that a path may span
        beams = AHEAD_BEAMS if ahead and self.plan.draft_resource != COMPUTE else BEAMS
        shape = Growth(
            beams,
            WIDTH,
            tuple(draft.budgets[row] for row in numbers),
            tuple(min(further * draft.depths[row], self._most(draft.rows[row])) for row in numbers),
            AHEAD_NODES if ahead else 0,
        )
        number = self._pass.number if self._pass else self.passes
        starts = tuple(draft.rows[row].length - 1 for row in numbers)
        item = WorkItem(-1, numbers, starts, (beams if draft.levels else 1,) * len(numbers))
        reads = self._inputs(with_proposal=draft.levels > 0)
        self._proposed = f"round {number} level {draft.levels}"
        writes = (Access(proposal_buffer(GROUP), self._proposed), Access(draft_kv_buffer(GROUP), self._proposed))
        task = Task(
            self._next_id(),
            Op.DRAFT,
            self.plan.draft_resource,
            DRAFT_AHEAD if ahead else VERIFY,
            reads,
            writes,
            number=number,
            item=item,
            step=draft.levels,
            growth=shape,
        )
        draft.levels, draft.growing = draft.levels + 1, True
        return task

    # -- chains ----------------------------------------------------------------------------------------------

    def _emit_chains(self, rows: dict[int, Row], lengths: dict[int, int]) -> list[Task]:
        """One task per draft step; a row leaves when its own proposal is long enough."""
        tasks = []
        for step in range(max(lengths.values(), default=0)):
            active = [n for n in rows if lengths[n] > step]
            item = WorkItem(-1, tuple(active), tuple(rows[n].length + step - 1 for n in active), (1,) * len(active))
            reads = self._inputs(with_proposal=step > 0)
            self._proposed = f"round {self.passes} step {step}"
            writes = (Access(proposal_buffer(GROUP), self._proposed), Access(draft_kv_buffer(GROUP), self._proposed))
            tasks.append(
                Task(
                    self._next_id(),
                    Op.DRAFT,
                    self.plan.draft_resource,
                    VERIFY,
                    reads,
                    writes,
                    number=self.passes,
                    item=item,
                    step=step,
                )
            )
        return tasks

    def _draft_prefill(self, number: int, item: WorkItem) -> Task:
        """The same chunk of prompts into the draft's KV, in the gaps of the pass."""
        writes = (Access(draft_kv_buffer(GROUP), f"pass {number} item {item.index}"),)
        resource = self.plan.draft_resource
        return Task(self._next_id(), Op.DRAFT_PREFILL, resource, DRAFT_AHEAD, writes=writes, number=number, item=item)

    def _inputs(self, *, with_proposal: bool) -> tuple[Access, ...]:
        """What decoding reads: the committed tokens, and the proposal if there is one."""
        committed = (Access(sequence_buffer(GROUP), self._committed),)
        return (*committed, Access(proposal_buffer(GROUP), self._proposed)) if with_proposal else committed
