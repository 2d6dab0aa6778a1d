"""The words of the dataflow: operations, tasks, what they read and write, and the events around them.

Pure data: no torch, no asyncio, no clock. A task names buffers, never tensors; it carries ids, counts and
byte sizes, never token values. Buffers are named by the helpers below so that policy, executor, simulation
and race detector agree on them.
"""

from dataclasses import dataclass

from aspec.tasks.op import Op

DISK, H2D, D2H, COMPUTE, DRAFT_COMPUTE, CPU = "disk", "h2d", "d2h", "compute", "draft", "cpu"
H2D_RESULTS = "back"  # a second way to the device, for what the host has computed: it does not wait behind weights


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
class TreeLevel:
    """How a DRAFT task grows one level of its rows' trees (SpecExec, arXiv 2406.02532), planting those that are none.

    With ``ahead`` it is for the round to come, while the target verifies what has grown: room for that many more nodes.
    """

    beams: int  # nodes of a row that go through the draft
    width: int  # children that each of them offers
    budgets: tuple[int, ...]  # nodes a row may propose, in the order of the item's rows
    depths: tuple[int, ...]  # tokens a path may have
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class RowAssignment:
    """Sequence ``sequence`` occupies row ``row`` from now on (None: the row is free again, its KV stands)."""

    row: int
    sequence: int | None
    num_cached_tokens: int = 0  # leading tokens whose KV stands in the row


@dataclass(frozen=True, slots=True)
class Load:
    """What READ and COPY bring: one part on its way to a slot."""

    part: int
    layer: int
    nbytes: int
    slot: int | None = None  # that is filled; None: the part lands in staging
    staging: int | None = None  # the host buffer it passes; None: it does not come from the disk, or needs none


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What a task of a layer needs besides its item."""

    layer: int
    slots: tuple[tuple[int, int], ...] = ()  # (part, slot) pairs that it computes with
    nbytes: int = 0  # that cross a link (SEND, RETURN)


@dataclass(frozen=True, slots=True)
class DraftStep:
    """One step of the draft: the next token of chains, or with ``growth`` one level of trees."""

    step: int
    growth: TreeLevel | None = None


@dataclass(frozen=True, slots=True)
class RowChanges:
    """What ASSIGN_ROWS does."""

    rows: tuple[RowAssignment, ...]


Payload = Load | LayerWork | DraftStep | RowChanges


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
    payload: Payload | None = None  # None: the item says it all

    @property
    def num_tokens(self) -> int:
        """Tokens the task works on; 0 for loads."""
        return self.item.num_tokens if self.item else 0

    @property
    def load(self) -> Load:
        """What a load brings."""
        assert isinstance(self.payload, Load), f"{self.op} loads nothing"
        return self.payload

    @property
    def draft(self) -> DraftStep:
        """The step of a DRAFT task."""
        assert isinstance(self.payload, DraftStep), f"{self.op} drafts nothing"
        return self.payload

    @property
    def growth(self) -> TreeLevel | None:
        """Of a DRAFT task that grows trees."""
        return self.payload.growth if isinstance(self.payload, DraftStep) else None

    @property
    def layer(self) -> int | None:
        """The layer it loads or computes."""
        return self.payload.layer if isinstance(self.payload, LayerWork | Load) else None

    @property
    def detail(self) -> int | None:
        """The part of a load, the step of a draft."""
        match self.payload:
            case Load(part=part):
                return part
            case DraftStep(step=step):
                return step
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.payload.nbytes if isinstance(self.payload, LayerWork | Load) else 0

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """The (part, slot) pairs that it computes with."""
        return self.payload.slots if isinstance(self.payload, LayerWork) else ()

    @property
    def filled_slot(self) -> int | None:
        """The slot that a load fills."""
        return self.payload.slot if isinstance(self.payload, Load) else None

    @property
    def label(self) -> str:
        """A short stable name: its colour in a trace, its name in an error."""
        return self.op.label(self.layer, self.detail)


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """The counts of one row after ACCEPT: all the policy ever learns of tokens."""

    row: int
    num_proposed: int
    num_accepted: int
    num_new: int
    stopped: bool  # an end-of-sequence token or a stop string ended the row


@dataclass(frozen=True, slots=True)
class TreeStatus:
    """A row's tree after a level: what its nodes are worth, and what another level could bring."""

    row: int
    probabilities: tuple[float, ...]  # calibrated, of the paths to its nodes, descending
    gain_bound: float  # expected tokens that one more level can gain at most; 0: it is grown


@dataclass(frozen=True, slots=True)
class Report:
    """The counts that a task leaves: of its rows after ACCEPT, of their trees after a level or below what was drawn."""

    outcomes: tuple[RowOutcome, ...] = ()
    grown: tuple[TreeStatus, ...] = ()


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
    grown: tuple[TreeStatus, ...] = ()
    cause: int = -1  # the task whose end let this one start; -1: something outside


# Events: all the scheduler ever hears.


@dataclass(frozen=True, slots=True)
class Started:
    """The executor is up; the slots are empty."""


@dataclass(frozen=True, slots=True)
class RequestAdded:
    """A sequence waits to be served; of its prompt ``kept`` leading tokens are those of a sequence that has ended."""

    sequence: int
    prompt_tokens: int
    max_new_tokens: int
    reuse_from: int | None = None  # the one that has ended
    num_cached_tokens: int = 0  # below both lengths: all of them are in its KV, and one token is left to draw from


@dataclass(frozen=True, slots=True)
class RequestAborted:
    """Nobody listens to a sequence any more."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """No further sequence will arrive; stop when those present are done, or at once if ``now``."""

    now: bool = False


Event = Started | RequestAdded | RequestAborted | Shutdown | Span


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


def weights_buffer(layer: int) -> str:
    """The modules of a streamed layer: its first task in a pass binds their parameters to the slots."""
    return f"weights:{layer}"


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
