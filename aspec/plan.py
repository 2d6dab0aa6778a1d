"""The plan: what is resident, how many slots, how many rows, how long a draft; and the arithmetic behind it.

Standard library only: the scheduler, the simulation and the dashboard read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from aspec.errors import InternalError
from aspec.units import format_bytes

PREFILL_ITEMS = 8  # full prefill items that one stream of the weights serves
SPARE_SLOTS = 5  # slots beyond one layer's parts: they fill while the draft works between two passes


class Tier(StrEnum):
    """Where a part lives between passes."""

    DEVICE = "device"  # resident: never streams
    HOST = "host"  # pinned host memory: one copy per pass
    DISK = "disk"  # the checkpoint's files: one read per pass (and a copy, where the device is not the host)


class Speculation(StrEnum):
    """What a draft proposes."""

    CHAIN = "chain"  # one continuation
    TREE = "tree"  # the likeliest continuations, which share their beginnings


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One unit of weights: ``nbytes`` are read or copied, ``size`` bytes of buffer hold them.

    ``scratch_bytes`` hold what of it must be converted; a resident part keeps its own for good.
    """

    index: int
    layer: int
    nbytes: int
    size: int
    tier: Tier = Tier.DISK
    scratch_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        """What keeping the part resident costs."""
        return self.size + self.scratch_bytes


@dataclass(frozen=True, slots=True)
class Workload:
    """A job: so many prompts of so many tokens, and what is to follow each."""

    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    sampled: bool = False  # whether any of it is drawn with noise


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The shape that a plan is asked to have, and the memory it may take; None means: decide."""

    budget_bytes: int | None = None  # None: unbounded
    num_rows: int = 1
    capacity: int = 2048  # tokens of KV per row
    num_groups: int = 1  # of rows; the draft works for one while another is verified
    prefill_tokens: int = 512  # tokens of one prefill item at most
    speculation: Speculation = Speculation.CHAIN
    max_draft_tokens: int = 0  # proposals of a row in a pass at most; 0: no speculation
    fixed_draft_tokens: int | None = None  # None: chosen by measured cost
    max_draft_depth: int = 32  # tokens of a tree's longest path at most
    fixed_draft_depth: int | None = None  # levels of a tree; None: chosen by measured cost
    draft_ahead: bool = True  # trees grow on while they are verified
    exact: bool = False  # products in blocks of rows: wider moments
    attention_resource: str = "compute"  # "cpu": every layer is split, its attention runs beside other items' work
    micro_batches: int = 1  # work items at most that the decoding rows are divided into
    resident_bytes: int | None = None  # layers resident at most, even where more would fit
    spare_slots: int = field(default=SPARE_SLOTS, compare=False)  # beyond one layer's parts; the plan has the count
    host_bytes: int | None = field(default=None, compare=False)  # behind a device's link; None: the device is the host

    @property
    def kv_on_host(self) -> bool:
        """Whether attention, and the target's KV with it, is on the other side of a device's link."""
        return self.host_bytes is not None and self.attention_resource == "cpu"

    @property
    def prefill_pass_tokens(self) -> int:
        """Prompt tokens that join a pass at most, whose hidden states are all held; a longer prompt joins alone."""
        return max(PREFILL_ITEMS * self.prefill_tokens, self.capacity)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before the first byte is read."""

    parts: tuple[PlannedPart, ...]  # of the layers, in the order of their use
    num_layers: int
    num_slots: int
    slot_bytes: int
    request: PlanRequest = PlanRequest()
    prefill_pass_tokens: int | None = None  # prompt tokens that join a pass at most, but for one longer prompt
    num_staging: int = 0  # 0: reads fill slots directly (the device is the host)
    draft_resource: str = "compute"
    crossing: tuple[tuple[int, int], ...] = ()  # by layer, of split ones: bytes of a token to host KV and back
    arithmetic: Mapping[str, int] = field(default_factory=dict)  # what is held, label -> bytes
    host_arithmetic: Mapping[str, int] = field(default_factory=dict)  # the same behind a device's link

    def __post_init__(self) -> None:
        most = max((len(self.streamed_of(layer)) for layer in range(self.num_layers)), default=0)
        if self.num_slots < most or (self.streamed and self.num_slots < 1):
            raise InternalError(f"a layer streams {most} parts, the plan has {self.num_slots} slots")
        if not 1 <= self.num_groups <= self.num_rows:
            raise InternalError(f"{self.num_rows} rows cannot form {self.num_groups} groups")
        if self.micro_batches < 1:
            raise InternalError(f"a plan divides rows into 1 item or more, found {self.micro_batches}")
        if len(self.crossing) not in (0, self.num_layers):
            raise InternalError(f"what crosses is told for {len(self.crossing)} of {self.num_layers} layers")
        if any(part.size > self.slot_bytes for part in self.streamed):
            raise InternalError(f"a streamed part is larger than a slot of {self.slot_bytes} bytes")

    # -- what was asked for, as the plan has it ------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Sequences that are served at once."""
        return self.request.num_rows

    @property
    def num_groups(self) -> int:
        """Of rows; the draft works for one while another is verified."""
        return self.request.num_groups

    @property
    def capacity(self) -> int:
        """Tokens of KV per row."""
        return self.request.capacity

    @property
    def prefill_tokens(self) -> int:
        """Tokens of one prefill item at most."""
        return self.request.prefill_tokens

    @property
    def speculation(self) -> Speculation:
        """What the draft proposes."""
        return self.request.speculation

    @property
    def max_draft_tokens(self) -> int:
        """Proposals of a row in a pass at most; 0: no speculation."""
        return self.request.max_draft_tokens

    @property
    def fixed_draft_tokens(self) -> int | None:
        """Proposals of a row in every pass; None: chosen by measured cost."""
        return self.request.fixed_draft_tokens

    @property
    def max_draft_depth(self) -> int:
        """Tokens of a tree's longest path at most."""
        return self.request.max_draft_depth

    @property
    def fixed_draft_depth(self) -> int | None:
        """Levels of a tree; None: chosen by measured cost."""
        return self.request.fixed_draft_depth

    @property
    def draft_ahead(self) -> bool:
        """Whether trees grow on while they are verified."""
        return self.request.draft_ahead

    @property
    def attention_resource(self) -> str:
        """The lane of attention; "cpu": every layer is split, its attention runs beside other items' work."""
        return self.request.attention_resource

    @property
    def micro_batches(self) -> int:
        """Work items at most that the decoding rows are divided into."""
        return self.request.micro_batches

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that the plan may hold on the device; None: unbounded."""
        return self.request.budget_bytes

    # -- what follows ----------------------------------------------------------------------------------------------

    @property
    def streamed(self) -> tuple[PlannedPart, ...]:
        """The parts that travel every pass, in the order of their use."""
        return tuple(part for part in self.parts if part.tier is not Tier.DEVICE)

    def streamed_of(self, layer: int) -> tuple[PlannedPart, ...]:
        """The parts of one layer that travel every pass."""
        return tuple(part for part in self.parts if part.layer == layer and part.tier is not Tier.DEVICE)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that travel in one pass."""
        return sum(part.nbytes for part in self.streamed)

    @property
    def spare_bytes(self) -> int:
        """Bytes that can land while no layer frees a slot: what the stream does while the draft works."""
        most = max((len(self.streamed_of(layer)) for layer in range(self.num_layers)), default=0)
        return (self.num_slots - most) * self.slot_bytes

    @property
    def tree_slots(self) -> int:
        """KV slots of a row behind its capacity, for the nodes of a tree that the target verifies."""
        return self.max_draft_tokens if self.speculation is Speculation.TREE else 0

    @property
    def draft_slots(self) -> int:
        """The same for the draft, which also sees nodes that are pruned, and those it grows ahead."""
        return draft_slots(self.speculation, self.max_draft_tokens)

    @property
    def proposes_trees(self) -> bool:
        """Whether what the target verifies are trees."""
        return self.speculation is Speculation.TREE and self.max_draft_tokens > 0

    @property
    def kv_on_host(self) -> bool:
        """Whether the target's KV stays behind a device's link, where the attention goes to it."""
        return self.attention_resource == "cpu" and self.num_staging > 0

    def crossing_of(self, layer: int) -> tuple[int, int] | None:
        """Bytes of a token that go to host KV and back; None where the KV is beside the layer."""
        if not self.kv_on_host:
            return None
        return self.crossing[layer] if self.crossing else (0, 0)

    @property
    def held_bytes(self) -> int:
        """Bytes that the plan holds on the device at its peak."""
        return sum(self.arithmetic.values())

    @property
    def shape(self) -> str:
        """In a few words, such as ``64 rows in 2 groups with chains of up to 24, 9 slots``."""
        words = f"{self.num_rows} rows" + (f" in {self.num_groups} groups" if self.num_groups > 1 else "")
        kind = "trees" if self.speculation is Speculation.TREE else "chains"
        most = self.max_draft_tokens
        words += f" with {kind} of up to {most}" if most else " without speculation"
        words += ", attention on the CPU" if self.attention_resource != "compute" else ""
        return words + (f", {self.num_slots} slots" if self.streamed else "")

    def describe(self) -> str:
        """The arithmetic as one paragraph."""
        return _sum(self.arithmetic)

    def describe_host(self) -> str:
        """The same of the host's memory behind a device's link; empty where there is none."""
        return _sum(self.host_arithmetic) if any(self.host_arithmetic.values()) else ""


def _sum(arithmetic: Mapping[str, int]) -> str:
    terms = " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in arithmetic.items() if nbytes)
    return f"{terms} = {format_bytes(sum(arithmetic.values()))}"


def draft_slots(speculation: Speculation, max_draft_tokens: int) -> int:
    """KV slots of a row of the draft behind its capacity: for the nodes of two rounds, and as many that are pruned."""
    return 4 * (max_draft_tokens + 8) if speculation is Speculation.TREE and max_draft_tokens else 0
