"""The words of the dataflow: operations, tasks, what they read and write, and the events around them.

Pure data: no torch, no asyncio, no clock. A task names buffers, never tensors; it carries ids, counts and
byte sizes, never token values. Buffers are named by the helpers below so that policy, executor, simulation
and race detector agree on them.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Op(StrEnum):
    """What a task does."""

    READ = "read"  # disk -> slot (CPU) or staging (CUDA)
    COPY = "copy"  # staging or pinned host part -> slot
    EMBED = "embed"  # token ids -> hidden, positions and masks
    LAYER = "layer"  # one target layer for one work item
    PROJECT = "project"  # of a layer that is split: up to the queries, keys and values
    SEND = "send"  # these to the host, where its KV is behind a device's link
    ATTEND = "attend"  # its attention
    RETURN = "return"  # what that makes of them, back to the device
    FFN = "ffn"  # and what follows
    HEAD = "head"  # hidden -> logits -> the target's draws
    ACCEPT = "accept"  # compare draws with the proposal, commit, detokenise
    DRAFT = "draft"  # one step of the draft for all rows of a group
    DRAFT_PREFILL = "draft_prefill"  # a chunk of prompts into the draft's KV


ENDS_LAYER = frozenset({Op.LAYER, Op.FFN})
"""What an item's layer ends with."""

DISK, H2D, D2H, COMPUTE, DRAFT_COMPUTE, CPU = "disk", "h2d", "d2h", "compute", "draft", "cpu"
BACK = "back"  # a second way to the device, for what the host has computed: it does not wait behind weights


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of worker.

    ``depth`` tasks are in flight at most. ``in_order``: they complete in the order of issue. Resources that
    share a non-empty ``domain`` order their work among themselves (one stream, or streams that wait for each
    other's events), so a dependency inside a domain is met when the producer is *issued*.
    """

    name: str
    depth: int
    in_order: bool = True
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Access:
    """A buffer and the content a reader expects in it, or a writer leaves in it."""

    buffer: str
    content: str


@dataclass(frozen=True, slots=True)
class WorkItem:
    """The rows that go through a pass together, and which of their positions.

    Row ``rows[i]`` runs the tokens at positions ``starts[i] .. starts[i] + counts[i] - 1``. A decode item
    runs the last committed token and the row's proposals; a prefill item runs a chunk of prompts.
    ``samples`` tells whether the item ends in a draw (all but the inner chunks of a long prompt do). Items of several
    groups are in flight at once.
    """

    index: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    prefill: bool = False
    samples: bool = True
    group: int = 0

    def __post_init__(self) -> None:
        if not len(self.rows) == len(self.starts) == len(self.counts) or min(self.counts, default=0) < 1:
            raise ValueError(f"a work item needs a start and at least one token per row, found {self}")

    @property
    def name(self) -> str:
        """What tells it from all others in flight."""
        return f"{self.group}.{self.index}"

    @property
    def num_tokens(self) -> int:
        """Tokens that go through every layer for this item, padding excluded."""
        return sum(self.counts)

    @property
    def padded_tokens(self) -> int:
        """Tokens that are really worked on, or travel: every row as wide as the widest."""
        return len(self.rows) * max(self.counts)


@dataclass(frozen=True, slots=True)
class Growth:
    """How a DRAFT task grows one level of its rows' trees (SpecExec, arXiv 2406.02532), planting those that are none.

    With ``ahead`` it is for the round to come, while the target verifies what has grown: room for that many more nodes.
    """

    beams: int  # nodes of a row that go through the draft
    width: int  # children that each of them offers
    budgets: tuple[int, ...]  # nodes a row may propose, in the order of the item's rows
    depths: tuple[int, ...]  # tokens a path may have
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work for one resource, in program order by ``id``; smaller ``priority`` runs first."""

    id: int
    op: Op
    resource: str
    priority: int
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    number: int = 0  # pass or round the task belongs to; for loads the running number of the load
    item: WorkItem | None = None
    layer: int = -1
    part: int = -1
    slot: int = -1  # slot (COPY, READ without staging) that is filled
    staging: int = -1
    step: int = -1  # draft step
    nbytes: int = 0
    slots: tuple[tuple[int, int], ...] = ()  # (part, slot) pairs that a task of a layer computes with
    growth: Growth | None = None  # of a DRAFT task that grows trees

    @property
    def num_tokens(self) -> int:
        """Tokens the task works on; 0 for loads."""
        return self.item.num_tokens if self.item else 0

    @property
    def label(self) -> str:
        """A short stable name: its colour in a trace, its name in an error."""
        return label(self.op, self.layer, self.part, self.step)


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """The counts of one row after ACCEPT: all the policy ever learns of tokens."""

    row: int
    num_proposed: int
    num_accepted: int
    num_new: int
    stopped: bool  # an end-of-sequence token or a stop string ended the row


@dataclass(frozen=True, slots=True)
class Grown:
    """A row's tree after a level: what its nodes are worth, and what another level could bring."""

    row: int
    probabilities: tuple[float, ...]  # calibrated, of the paths to its nodes, descending
    promise: float  # expected tokens that one more level can gain at most; 0: it is grown


@dataclass(frozen=True, slots=True)
class Report:
    """The counts that a task leaves: of its rows after ACCEPT, of their trees after a level or below what was drawn."""

    outcomes: tuple[RowOutcome, ...] = ()
    grown: tuple[Grown, ...] = ()


NOTHING = Report()


@dataclass(frozen=True, slots=True)
class Completion:
    """What a backend tells of a finished task: seconds on the backend's clock, and counts."""

    start_s: float
    stop_s: float
    report: Report = NOTHING


@dataclass(frozen=True, slots=True)
class Span:
    """A finished task with its start and end, seconds on the backend's clock: what observers read."""

    task: Task
    start_s: float
    stop_s: float
    outcomes: tuple[RowOutcome, ...] = ()
    grown: tuple[Grown, ...] = ()
    cause: int = -1  # the task whose end let this one start; -1: something outside


# Events: all the scheduler ever hears.


@dataclass(frozen=True, slots=True)
class Started:
    """The executor is up; the slots are empty."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A sequence waits to be served; of its prompt ``kept`` leading tokens are those of a sequence that has ended."""

    sequence: int
    prompt_tokens: int
    max_new_tokens: int
    follows: int | None = None  # the one that has ended
    kept: int = 0  # below both lengths: all of them are in its KV, and one token is left to draw from


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody listens to a sequence any more."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Closing:
    """No further sequence will arrive; stop when those present are done, or at once if ``now``."""

    now: bool = False


Event = Started | Arrived | Cancelled | Closing | Span


# Decisions the maths must hear of: which sequence sits in which row.


@dataclass(frozen=True, slots=True)
class Seating:
    """Sequence ``sequence`` occupies row ``row`` from now on (None: the row is free again, its KV stands)."""

    row: int
    sequence: int | None
    kept: int = 0  # leading tokens whose KV stands in the row


@dataclass(frozen=True, slots=True)
class Decision:
    """What the scheduler answers to an event: tasks in program order, and row changes that precede them."""

    tasks: tuple[Task, ...] = ()
    seatings: tuple[Seating, ...] = field(default=())


_OF_LAYER = {
    Op.LAYER: "",
    Op.PROJECT: " projections",
    Op.SEND: " queries out",
    Op.ATTEND: " attention",
    Op.RETURN: " result back",
    Op.FFN: " rest",
}


def label(op: Op, layer: int, part: int, step: int) -> str:
    """The name of a task, from what tells it from others of its kind."""
    if op in (Op.READ, Op.COPY):
        return f"{op} {part}"
    if op in _OF_LAYER:
        return f"L{layer}{_OF_LAYER[op]}"
    return f"draft {step}" if op is Op.DRAFT else str(op)


SCRATCH = "scratch"
"""Where the weights of the layer that runs are, as far as they had to be converted."""


def slot_buffer(slot: int) -> str:
    """A device buffer that holds one part."""
    return f"slot:{slot}"


def staging_buffer(index: int) -> str:
    """A pinned host buffer between disk and device."""
    return f"staging:{index}"


def hidden_buffer(item: WorkItem) -> str:
    """The hidden state of a work item between layers."""
    return f"hidden:{item.name}"


def attention_buffer(item: WorkItem) -> str:
    """What a split layer of a work item leaves for its attention, and what that makes of it.

    Prompts take turns in two of them, so that what a pass holds does not grow with their number.
    """
    return f"attention:{_turn(item)}"


def crossing_buffer(item: WorkItem) -> str:
    """The same in host memory, where a split layer attends beside its KV there."""
    return f"crossing:{_turn(item)}"


def _turn(item: WorkItem) -> str:
    return f"{item.group}.prefill {item.index % 2}" if item.prefill else item.name


def draws_buffer(item: WorkItem) -> str:
    """The target's draws for a work item."""
    return f"draws:{item.name}"


def kv_buffer(group: int, layer: int) -> str:
    """The target's keys and values of one layer for one group of rows."""
    return f"kv:{group}:{layer}"


def rows_kv_buffer(item: WorkItem, layer: int) -> str:
    """The same, for the rows of one item: items of a pass share all their rows (chunks of a prompt) or none."""
    return f"kv:{item.group}:{layer}:{item.rows[0]}"


def draft_kv_buffer(group: int) -> str:
    """The draft's keys and values of one group."""
    return f"draft_kv:{group}"


def proposal_buffer(group: int) -> str:
    """The proposed tokens of one group."""
    return f"proposal:{group}"


def sequence_buffer(group: int) -> str:
    """The committed tokens of one group."""
    return f"sequence:{group}"
