"""The data types of the dataflow: tasks, the buffers that they read and write, and the scheduler's events.

Pure data: no torch, no asyncio, no clock. A task names buffers, never tensors; it carries ids, counts and byte sizes,
never token values. ``layers/buffers.py`` names the buffers.
"""

from dataclasses import dataclass

from aspec.tasks.op import Op

DISK, H2D, D2H, COMPUTE, DRAFT_COMPUTE, CPU = "disk", "h2d", "d2h", "compute", "draft", "cpu"
DECODE = "decode"  # stored weights to those that products take, beside compute
EXPERT_DISK = "experts"  # reads of the experts that a router has chosen: they do not wait behind other weights
H2D_RESULTS = "back"  # a second way to the device, for results of the host: they do not wait behind weights


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of worker.

    At most ``depth`` tasks are in flight. ``in_order``: they complete in the order of issue. Resources with the same
    non-empty ``domain`` order their work among themselves (one stream, or streams that wait for each other's events),
    so a dependency inside a domain is met when the producer is *issued*.
    """

    name: str
    depth: int
    in_order: bool = True
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Access:
    """A buffer, and the content that a reader expects or a writer leaves in it."""

    buffer: str
    content: str


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Rows that go through a pass together, and the positions of their tokens.

    Row ``rows[i]`` runs the tokens at positions ``starts[i] .. starts[i] + counts[i] - 1``. A decode item runs the last
    committed token and the row's proposals; a prefill item runs a chunk of prompts. ``samples``: the item ends in a
    draw (all items do, except the inner chunks of a long prompt). ``scored``: the prompt's own logprobs are wanted.
    Items of several groups are in flight at once.
    Raises ValueError if a row lacks a start or has no token.
    """

    index: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    prefill: bool = False
    samples: bool = True
    group: int = 0
    scored: bool = False

    def __post_init__(self) -> None:
        if not len(self.rows) == len(self.starts) == len(self.counts) or min(self.counts, default=0) < 1:
            raise ValueError(f"a work item needs a start and at least one token per row, found {self}")

    @property
    def name(self) -> str:
        """A name that is unique among the items in flight."""
        return f"{self.group}.{self.index}"

    @property
    def num_tokens(self) -> int:
        """Tokens that go through every layer for this item, without padding."""
        return sum(self.counts)

    @property
    def padded_tokens(self) -> int:
        """Tokens that are computed or transferred, with padding: every row has the width of the widest."""
        return len(self.rows) * max(self.counts)


@dataclass(frozen=True, slots=True)
class TreeLevel:
    """The limits by which a DRAFT task grows one level of its rows' trees, and starts missing trees.

    Source: SpecExec, arXiv 2406.02532. With ``ahead`` > 0 the level is for the next round, while the target verifies
    the present nodes.
    """

    beams: int  # nodes of a row that go through the draft
    width: int  # candidate children of each such node
    budgets: tuple[int, ...]  # most nodes that a row may propose, in the order of the item's rows
    depths: tuple[int, ...]  # most tokens of a path, in the order of the item's rows
    ahead: int = 0  # further nodes that a row's tree may hold


@dataclass(frozen=True, slots=True)
class RowAssignment:
    """From now on sequence ``sequence`` occupies row ``row`` (None: the row is free and retains its KV)."""

    row: int
    sequence: int | None
    num_cached_tokens: int = 0  # leading tokens whose KV is in the row


@dataclass(frozen=True, slots=True)
class Load:
    """The payload of READ and COPY: one part on its way to a slot."""

    part: int
    layer: int
    nbytes: int
    slot: int | None = None  # the slot to fill; None: the part lands in staging
    staging: int | None = None  # the staging buffer; None: the part is not from the disk, or needs no staging


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """The payload of LOAD_EXPERT and COPY_EXPERT: one expert on its way to an expert slot."""

    expert: int
    layer: int
    nbytes: int
    slot: int | None = None  # the slot to fill; None: the expert lands in host memory
    host_slot: int | None = None  # there; None: the device is the host
    guessed: bool = False  # no router has chosen it yet


@dataclass(frozen=True, slots=True)
class Decoding:
    """The payload of DECODE: one part on its way to a scratch buffer, from a slot or from where it is resident."""

    part: int
    layer: int
    nbytes: int  # that it makes
    slot: int | None  # None: the part is resident
    scratch: int
    frees_slot: bool = True  # no layer's task reads the slot


@dataclass(frozen=True, slots=True)
class LayerWork:
    """The payload of a layer's task, besides its item."""

    layer: int
    slots: tuple[tuple[int, int], ...] = ()  # (part, slot) pairs of the streamed weights that the layer itself binds
    nbytes: int = 0  # bytes transferred across a link (SEND, RETURN)
    experts: tuple[tuple[int, int], ...] = ()  # (expert, slot) pairs to compute (EXPERTS, COMBINE)


@dataclass(frozen=True, slots=True)
class DraftStep:
    """The payload of DRAFT: the next token of chains, or with ``growth`` one level of trees."""

    step: int
    growth: TreeLevel | None = None


@dataclass(frozen=True, slots=True)
class RowChanges:
    """The payload of ASSIGN_ROWS."""

    rows: tuple[RowAssignment, ...]


Payload = Load | ExpertLoad | Decoding | LayerWork | DraftStep | RowChanges


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work for one resource, in program order by ``id``; smaller ``priority`` runs first."""

    id: int
    op: Op
    resource: str
    priority: int
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    number: int = 0  # number of the task's pass or round; for a load the number of the load
    item: WorkItem | None = None
    payload: Payload | None = None  # None: the item is sufficient

    @property
    def num_tokens(self) -> int:
        """Tokens that the task processes; 0 for loads."""
        return self.item.num_tokens if self.item else 0

    @property
    def load(self) -> Load:
        """The payload of a READ or COPY task."""
        assert isinstance(self.payload, Load), f"{self.op} is not a load"
        return self.payload

    @property
    def draft(self) -> DraftStep:
        """The payload of a DRAFT task."""
        assert isinstance(self.payload, DraftStep), f"{self.op} is not a draft step"
        return self.payload

    @property
    def growth(self) -> TreeLevel | None:
        """The tree level of a DRAFT task; None for all other tasks, and for chains."""
        return self.payload.growth if isinstance(self.payload, DraftStep) else None

    @property
    def layer(self) -> int | None:
        """The layer that the task loads, decodes or computes; None if there is none."""
        return self.payload.layer if isinstance(self.payload, LayerWork | Load | ExpertLoad | Decoding) else None

    @property
    def detail(self) -> int | None:
        """The part of a load or of a decoding, the expert of its load, or the step of a draft; None for other tasks."""
        match self.payload:
            case Load(part=part) | Decoding(part=part):
                return part
            case ExpertLoad(expert=expert):
                return expert
            case DraftStep(step=step):
                return step
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that the task transfers or decodes to."""
        return self.payload.nbytes if isinstance(self.payload, LayerWork | Load | ExpertLoad | Decoding) else 0

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """The (part, slot) pairs that the task binds."""
        match self.payload:
            case LayerWork(slots=slots):
                return slots
            case Decoding(part=part, slot=slot):
                return () if slot is None else ((part, slot),)
        return ()

    @property
    def filled_slot(self) -> int | None:
        """The slot that a load fills; None for other tasks and reads into staging."""
        return self.payload.slot if isinstance(self.payload, Load) else None

    @property
    def label(self) -> str:
        """A short stable name: it sets the colour in a trace and names the task in an error."""
        return self.op.label(self.layer, self.detail)


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """The counts of one row after ACCEPT; the policy learns nothing else about tokens."""

    row: int
    num_proposed: int
    num_accepted: int
    num_new: int
    stopped: bool  # an end-of-sequence token or a stop string ended the sequence


@dataclass(frozen=True, slots=True)
class TreeStatus:
    """A row's tree after a level: the probabilities of its nodes, and the gain bound of another level."""

    row: int
    probabilities: tuple[float, ...]  # calibrated probabilities of the paths to its nodes, descending
    gain_bound: float  # upper bound of the expected tokens that one more level gains; 0: the tree is complete


@dataclass(frozen=True, slots=True)
class Report:
    """The counts that a task returns."""

    outcomes: tuple[RowOutcome, ...] = ()  # after ACCEPT, by row
    grown: tuple[TreeStatus, ...] = ()  # by row: its tree after a level, or after ACCEPT the tree below the last draw
    routed: tuple[tuple[int, int], ...] = ()  # after ROUTE: (expert, tokens that it is given) pairs, by expert
    states_s: float = 0.0  # of the task: what it took to run nodes of recurrent layers, or in ACCEPT to commit them


NOTHING = Report()


@dataclass(frozen=True, slots=True)
class Completion:
    """A backend's result of a finished task: seconds on the backend's clock, and counts."""

    start_s: float
    stop_s: float
    report: Report = NOTHING


@dataclass(frozen=True, slots=True)
class Span:
    """A finished task with its start and end, in seconds on the backend's clock; observers read spans."""

    task: Task
    start_s: float
    stop_s: float
    outcomes: tuple[RowOutcome, ...] = ()
    grown: tuple[TreeStatus, ...] = ()
    cause: int = -1  # id of the task whose end allowed this one to start; -1: an event from outside
    routed: tuple[tuple[int, int], ...] = ()  # see ``Report``
    states_s: float = 0.0  # see ``Report``


# Events: the only input of the scheduler.


@dataclass(frozen=True, slots=True)
class Started:
    """The executor has started; the slots are empty."""


@dataclass(frozen=True, slots=True)
class RequestAdded:
    """A new sequence waits for a row; its prompt may share its leading tokens with an ended sequence."""

    sequence: int
    prompt_tokens: int
    max_new_tokens: int
    reuse_from: int | None = None  # the ended sequence
    num_cached_tokens: int = 0  # shared tokens, all in its KV; fewer than both lengths: one token is left to run
    scored: bool = False  # the logprobs of the prompt's own tokens are wanted


@dataclass(frozen=True, slots=True)
class RequestAborted:
    """The caller has abandoned a sequence."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """No further sequence will be added; stop when all present ones are done, or at once if ``now``."""

    now: bool = False


Event = Started | RequestAdded | RequestAborted | Shutdown | Span
