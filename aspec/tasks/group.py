"""One group of rows and its round: the draft that grows, the pass that verifies it, and what the group's buffers hold.

Makes the draft's tasks and the end of a pass; when they are due is the scheduler's business. Pure policy: counts, ids
and seconds only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aspec.plan import Plan
from aspec.tasks.op import Op
from aspec.tasks.passes import DRAFT_AHEAD, VERIFY, Numbering, emit_end
from aspec.tasks.rows import Row
from aspec.tasks.task import (
    COMPUTE,
    CPU,
    Access,
    DraftStep,
    RowAssignment,
    RowChanges,
    Task,
    TreeLevel,
    TreeStatus,
    WorkItem,
    draft_kv_buffer,
    proposal_buffer,
    sequence_buffer,
)

BEAMS, WIDTH = 8, 8  # nodes of a row that a level expands, and children that each of them offers
AHEAD_NODES = 256  # of a row's tree beyond those it proposes: among them what the target may draw instead
AHEAD_BEAMS = 32  # nodes that a level expands ahead, on a compute lane of the draft's own


@dataclass(slots=True)
class Draft:
    """The trees of a round; mutable, because every level adds to them."""

    rows: dict[int, Row]  # those that decode
    budgets: dict[int, int]  # nodes that a row may propose
    depths: dict[int, int]  # tokens that a path of a row may have
    found: dict[int, TreeStatus]  # by row, the latest; a tree that is not planted promises one token
    levels: int = 0  # that have been emitted
    seconds: float = 0.0  # of drafting while no pass was running
    growing: bool = False  # a level is under way

    @property
    def gain_bounds(self) -> dict[int, float]:
        """Tokens that another level can gain, of the rows where it gains any."""
        return {row: grown.gain_bound for row, grown in sorted(self.found.items()) if grown.gain_bound > 0.0}

    @property
    def probabilities(self) -> dict[int, tuple[float, ...]]:
        """Of the paths to the nodes of every row, descending."""
        return {row: grown.probabilities for row, grown in self.found.items()}


@dataclass(slots=True)
class Pass:
    """A pass that runs; mutable, because it ends in two steps."""

    number: int
    items: list[WorkItem]
    draft: Draft | None  # whose trees may grow on
    next_layer: int = 0  # that has not run for all items
    open: int = 0  # tasks that use its rows and are not back: ACCEPT, DRAFT_PREFILL
    ending: bool = False  # its end is emitted: nothing is drafted ahead any more


class Group:
    """Rows that draft and are verified together."""

    def __init__(self, number: int, plan: Plan, next_id: Numbering) -> None:
        self.number = number
        self.draft: Draft | None = None  # trees that grow; their pass is not emitted yet
        self.running: Pass | None = None
        self.carried_over: dict[int, TreeStatus] = {}  # by row: what the draft has grown below the last draw
        self.last_pass = -1  # who waits longest is verified next
        self._plan, self._next_id = plan, next_id
        self._committed, self._proposed = "", ""  # present content of the sequence and the proposal buffer

    @property
    def idle(self) -> bool:
        """Whether its rows may change."""
        return self.draft is None and self.running is None

    def most(self, row: Row) -> int:
        """Tokens that may be proposed on one path of a row: never beyond what it may still generate."""
        return max(0, min(row.remaining - 1, self._plan.capacity - row.length))

    def assign(self, rows: Sequence[RowAssignment], number: int) -> Task:
        """Rows change hands before pass ``number``: the group's sequences, and what the draft knows of them."""
        task_id = self._next_id()
        self._committed = content = f"rows of task {task_id}"
        buffers = [sequence_buffer(self.number)]
        if self._plan.max_draft_tokens:
            buffers += [proposal_buffer(self.number), draft_kv_buffer(self.number)]
            self._proposed = content
        writes = tuple(Access(buffer, content) for buffer in buffers)
        payload = RowChanges(tuple(rows))
        return Task(task_id, Op.ASSIGN_ROWS, CPU, VERIFY, (), writes, number, payload=payload)

    def inputs(self, *, with_proposal: bool) -> tuple[Access, ...]:
        """What tokens come from: the committed ones, and the proposal if there is one."""
        committed = (Access(sequence_buffer(self.number), self._committed),)
        return (*committed, Access(proposal_buffer(self.number), self._proposed)) if with_proposal else committed

    def emit_chains(self, number: int, rows: dict[int, Row], lengths: dict[int, int]) -> list[Task]:
        """One task per draft step; a row leaves when its own proposal is long enough."""
        tasks = []
        for step in range(max(lengths.values(), default=0)):
            active = tuple(n for n in rows if lengths[n] > step)
            starts = tuple(rows[n].length + step - 1 for n in active)
            item = WorkItem(-1, active, starts, (1,) * len(active), group=self.number)
            tasks.append(self._draft_step(number, item, step, f"round {number} step {step}"))
        return tasks

    def emit_level(self, number: int, draft: Draft, rows: Iterable[int], *, ahead: bool = False) -> Task:
        """One more level of some rows' trees; ``ahead``: below what is being verified."""
        numbers = tuple(rows)
        further = 2 if ahead else 1  # rounds that a path may span
        beams = AHEAD_BEAMS if ahead and self._plan.draft_resource != COMPUTE else BEAMS
        shape = TreeLevel(
            beams,
            WIDTH,
            tuple(draft.budgets[row] for row in numbers),
            tuple(min(further * draft.depths[row], self.most(draft.rows[row])) for row in numbers),
            AHEAD_NODES if ahead else 0,
        )
        starts = tuple(draft.rows[row].length - 1 for row in numbers)
        counts = (beams if draft.levels else 1,) * len(numbers)
        item = WorkItem(-1, numbers, starts, counts, group=self.number)
        task = self._draft_step(number, item, draft.levels, f"round {number} level {draft.levels}", shape)
        draft.levels, draft.growing = draft.levels + 1, True
        return task

    def emit_prefill(self, item: WorkItem, number: int) -> Task:
        """The same chunk of prompts into the draft's KV, in the gaps of the pass."""
        writes = (Access(draft_kv_buffer(self.number), f"pass {number} item {item.index}"),)
        resource, reads = self._plan.draft_resource, self.inputs(with_proposal=False)
        return Task(self._next_id(), Op.DRAFT_PREFILL, resource, DRAFT_AHEAD, reads, writes, number, item)

    def emit_end(self, running: Pass) -> list[Task]:
        """The end of the pass; what is drafted from now on is for the next one."""
        running.ending = True
        tasks = emit_end(running.number, running.items, self._next_id, self._plan)
        last = [item.index for item in running.items if item.samples][-1]
        self._committed = self._proposed = f"pass {running.number} item {last}"
        return tasks

    def _draft_step(
        self, number: int, item: WorkItem, step: int, content: str, growth: TreeLevel | None = None
    ) -> Task:
        """A step of the draft, which leaves ``content`` in its buffers."""
        ahead = self.running is not None or self._plan.num_groups > 1  # a pass is to go first
        reads = self.inputs(with_proposal=step > 0)
        self._proposed = content
        writes = (Access(proposal_buffer(self.number), content), Access(draft_kv_buffer(self.number), content))
        priority = DRAFT_AHEAD if ahead else VERIFY
        resource, payload = self._plan.draft_resource, DraftStep(step, growth)
        return Task(self._next_id(), Op.DRAFT, resource, priority, reads, writes, number, item, payload)
