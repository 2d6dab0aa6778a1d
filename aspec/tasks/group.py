"""One group of rows and its round: the draft, the pass that verifies it, and the contents of the group's buffers.

A group creates the draft's tasks and the end of a pass; the scheduler decides when. Pure policy: counts, ids and
seconds only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from aspec.plan import Plan
from aspec.tasks.layers.buffers import draft_kv_buffer, proposal_buffer, sequence_buffer
from aspec.tasks.layers.weights import DRAFT_AHEAD, VERIFY, Numbering
from aspec.tasks.op import Op
from aspec.tasks.passes import Emission, emit_end
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
)

BEAMS, WIDTH = 8, 8  # nodes of a row that a level expands, and candidate children of each such node
AHEAD_NODES = 256  # nodes of a row's tree beyond the proposed ones: the target may draw tokens outside the proposal
AHEAD_BEAMS = 32  # nodes of a row that a level expands ahead, if the draft has a compute lane of its own


@dataclass(slots=True)
class Draft:
    """The trees of a round; mutable, because every level adds to them."""

    rows: dict[int, Row]  # decoding rows, by number
    budgets: dict[int, int]  # by row: most nodes to propose
    depths: dict[int, int]  # by row: most tokens of a path
    trees: dict[int, TreeStatus]  # by row: the latest status; the gain bound of a tree not started yet is 1 token
    levels: int = 0  # levels emitted
    seconds: float = 0.0  # seconds of drafting while no pass was running
    growing: bool = False  # a level is in flight

    @property
    def gain_bounds(self) -> dict[int, float]:
        """By row: most tokens that another level can gain, without the rows where it is 0."""
        return {row: tree.gain_bound for row, tree in sorted(self.trees.items()) if tree.gain_bound > 0.0}

    @property
    def probabilities(self) -> dict[int, tuple[float, ...]]:
        """By row: the probabilities of the paths to its nodes, descending."""
        return {row: tree.probabilities for row, tree in self.trees.items()}


@dataclass(slots=True)
class Pass:
    """A running pass; mutable, because it ends in two steps."""

    number: int
    items: list[WorkItem]
    draft: Draft | None  # its trees may grow during the pass
    emission: Emission  # its tasks, as far as they could be emitted
    next_layer: int = 0  # the first layer that has not run for all items
    num_open: int = 0  # ACCEPT and DRAFT_PREFILL tasks that have not completed
    ending: bool = False  # the end of the pass was emitted: no further level is drafted ahead


class Group:
    """Rows whose sequences are drafted for and verified together."""

    def __init__(self, number: int, plan: Plan, next_id: Numbering) -> None:
        self.number = number
        self.draft: Draft | None = None  # trees that grow before their pass is emitted
        self.running: Pass | None = None
        self.carried_over: dict[int, TreeStatus] = {}  # by row: the tree that was drafted ahead below the last draw
        self.last_pass = -1  # number of the latest pass; the group with the smallest is verified next
        self._plan, self._next_id = plan, next_id
        self._committed, self._proposed = "", ""  # present contents of the sequence buffer and the proposal buffer

    @property
    def idle(self) -> bool:
        """Whether no round runs, so that the assignment of rows may change."""
        return self.draft is None and self.running is None

    def max_proposal(self, row: Row) -> int:
        """Most proposed tokens on one path of a row, limited by its remaining tokens and the draft's context."""
        return max(0, min(row.remaining - 1, self._plan.draft_capacity - row.length))

    def assign(self, rows: Sequence[RowAssignment], number: int) -> Task:
        """The task that assigns rows before pass ``number``: it writes the group's sequences and the draft's state."""
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
        """The reads of an item's tokens: the committed tokens, and the proposal if the item has one."""
        committed = (Access(sequence_buffer(self.number), self._committed),)
        return (*committed, Access(proposal_buffer(self.number), self._proposed)) if with_proposal else committed

    def emit_chains(self, number: int, rows: dict[int, Row], lengths: dict[int, int]) -> list[Task]:
        """One task per draft step, over the rows whose proposal is still too short."""
        tasks = []
        for step in range(max(lengths.values(), default=0)):
            active = tuple(n for n in rows if lengths[n] > step)
            starts = tuple(rows[n].length + step - 1 for n in active)
            item = WorkItem(-1, active, starts, (1,) * len(active), group=self.number)
            tasks.append(self._draft_step(number, item, step, f"round {number} step {step}"))
        return tasks

    def emit_level(self, number: int, draft: Draft, rows: Iterable[int], *, ahead: bool = False) -> Task:
        """One more level of the trees of ``rows``; ``ahead``: below the nodes that the target is verifying."""
        numbers = tuple(rows)
        num_rounds = 2 if ahead else 1  # rounds that a path may span
        beams = AHEAD_BEAMS if ahead and self._plan.draft_resource != COMPUTE else BEAMS
        shape = TreeLevel(
            beams,
            WIDTH,
            tuple(draft.budgets[row] for row in numbers),
            tuple(min(num_rounds * draft.depths[row], self.max_proposal(draft.rows[row])) for row in numbers),
            AHEAD_NODES if ahead else 0,
        )
        starts = tuple(draft.rows[row].length - 1 for row in numbers)
        counts = (beams if draft.levels else 1,) * len(numbers)
        item = WorkItem(-1, numbers, starts, counts, group=self.number)
        task = self._draft_step(number, item, draft.levels, f"round {number} level {draft.levels}", shape)
        draft.levels, draft.growing = draft.levels + 1, True
        return task

    def emit_prefill(self, item: WorkItem, joining: dict[int, Row], number: int) -> list[Task]:
        """The task that prefills the draft's KV with the prompts of ``item``, in idle times of the pass.

        None for prompts beyond the draft's context: these rows get no proposals.
        """
        short = [place for place, n in enumerate(item.rows) if joining[n].length < self._plan.draft_capacity]
        if not short or not self._plan.max_draft_tokens:
            return []
        rows, starts, counts = (tuple(own[at] for at in short) for own in (item.rows, item.starts, item.counts))
        item = replace(item, rows=rows, starts=starts, counts=counts)
        writes = (Access(draft_kv_buffer(self.number), f"pass {number} item {item.index}"),)
        resource, reads = self._plan.draft_resource, self.inputs(with_proposal=False)
        return [Task(self._next_id(), Op.DRAFT_PREFILL, resource, DRAFT_AHEAD, reads, writes, number, item)]

    def emit_end(self, running: Pass) -> list[Task]:
        """The tasks at the end of the pass; later draft tasks belong to the next pass."""
        running.ending = True
        tasks = emit_end(running.number, running.items, self._next_id, self._plan)
        last = [item.index for item in running.items if item.samples][-1]
        self._committed = self._proposed = f"pass {running.number} item {last}"
        return tasks

    def _draft_step(
        self, number: int, item: WorkItem, step: int, content: str, growth: TreeLevel | None = None
    ) -> Task:
        """A step of the draft, which leaves ``content`` in the group's proposal and draft KV buffers."""
        ahead = self.running is not None or self._plan.num_groups > 1  # a pass has priority
        reads = self.inputs(with_proposal=step > 0)
        self._proposed = content
        writes = (Access(proposal_buffer(self.number), content), Access(draft_kv_buffer(self.number), content))
        priority = DRAFT_AHEAD if ahead else VERIFY
        resource, payload = self._plan.draft_resource, DraftStep(step, growth)
        return Task(self._next_id(), Op.DRAFT, resource, priority, reads, writes, number, item, payload)
