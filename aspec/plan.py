"""The plan: resident parts, the number of slots and rows, the draft's length, and the memory arithmetic behind them.

Standard library only: the scheduler, the simulation and the dashboard read it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from aspec.errors import InternalError, UserError
from aspec.expert_plan import ExpertPlan
from aspec.threads import Threads
from aspec.units import format_bytes

PREFILL_ITEMS = 8  # full prefill items that share one pass over the weights
MOST_WORK = 10**12  # prompts, or tokens of one prompt, in an expected workload
SCRATCH_BUFFERS = 2  # of one layer each: a layer is decoded beside the products of the one before; 1: behind them
SPARE_SLOTS = 5  # slots beyond one layer's parts: they fill while the draft works between two passes


class Tier(StrEnum):
    """The place of a part between passes."""

    DEVICE = "device"  # resident: never streams
    HOST = "host"  # pinned host memory: one copy per pass
    DISK = "disk"  # the checkpoint's files: one read per pass (and one copy, if the device is not the host)


class Speculation(StrEnum):
    """The form of a proposal."""

    CHAIN = "chain"  # one continuation
    TREE = "tree"  # the likeliest continuations, which share their first tokens


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One unit of weights: ``nbytes`` are read or copied, a buffer of ``size`` bytes holds them.

    ``scratch_bytes`` hold its decoded weights. A resident part keeps a scratch of its own, and its stored bytes only if
    weights are used there; or it stays ``packed``, and is decoded in every pass as streamed parts are.
    """

    index: int
    layer: int
    nbytes: int
    size: int
    tier: Tier = Tier.DISK
    scratch_bytes: int = 0
    decoded_bytes: int = 0  # that decoding writes, in scratch or where they were read; 0: nothing is decoded
    in_place: bool = True  # some weights are used where they were read: the layer itself needs the slot
    repeatable: bool = True  # the bytes once read can be decoded in every pass
    packed: bool = False  # of a resident part: it is kept as it is stored

    @property
    def resident_bytes(self) -> int:
        """Bytes that the part takes when it is resident."""
        return self.size if self.packed else self.size * self.in_place + self.scratch_bytes

    @property
    def is_decoded_in_passes(self) -> bool:
        """Whether every pass decodes it."""
        return self.decoded_bytes > 0 and (self.packed or self.tier is not Tier.DEVICE)


@dataclass(frozen=True, slots=True)
class Workload:
    """The expected work: the number of prompts, the tokens of each, and the new tokens after each."""

    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    sampled: bool = False  # whether any token is drawn with noise

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 1), ("prompt_tokens", 1), ("new_tokens", 2)):
            if not least <= (value := getattr(self, name)) <= MOST_WORK:
                raise UserError(f"{name} of a workload must be between {least} and {MOST_WORK}, found {value}.")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The requested shape of a plan, and the memory it may take; None means: decide."""

    budget_bytes: int | None = None  # None: unbounded
    num_rows: int = 1
    capacity: int = 2048  # tokens of KV per row
    draft_context: int | None = None  # most tokens of a row that the draft can read; None: no limit
    num_groups: int = 1  # groups of rows; the draft works for one while the target verifies another
    prefill_tokens: int = 512  # most tokens of one prefill item
    speculation: Speculation = Speculation.CHAIN
    max_draft_tokens: int = 0  # most proposed tokens per row and pass; 0: no speculation
    fixed_draft_tokens: int | None = None  # None: chosen by measured cost
    max_draft_depth: int = 32  # most tokens of a tree's longest path
    fixed_draft_depth: int | None = None  # levels of a tree; None: chosen by measured cost
    draft_ahead: bool = True  # trees grow while the target verifies them
    from_text: bool = False  # proposals come from what a row's own text has said before, not from a draft model
    exact: bool = False  # a token's bits do not depend on the other tokens of its pass
    attention_resource: str = "compute"  # "cpu": every layer is split, attention runs in parallel with other items
    micro_batches: int = 1  # most work items that the decoding rows are divided into
    resident_bytes: int | None = None  # most bytes of resident layers, even where more would fit
    threads: Threads | None = None  # None: unknown, as for a machine that is not at hand
    spare_slots: int = field(default=SPARE_SLOTS, compare=False)  # beyond one layer's parts; the plan has the count
    scratch_buffers: int = SCRATCH_BUFFERS  # most of them; fewer where they do not fit
    keep_packed: bool = False  # resident parts stay as they are stored, where that is possible
    on_demand: bool = False  # experts are read when a router has chosen them; otherwise with their layer
    prefetch_experts: bool = True  # those of a layer's previous pass are read before its route, while the disk rests
    host_bytes: int | None = field(default=None, compare=False)  # host budget; None: the device is the host

    @property
    def draft_capacity(self) -> int:
        """Tokens of the draft's KV per row; a longer row goes on without proposals."""
        return self.capacity if self.draft_context is None else min(self.capacity, self.draft_context)

    @property
    def log_slots(self) -> int:
        """Most nodes of a row that the target's recurrent layers may have to take back: proposals, or a prompt's last
        token, which runs again where the prompt is repeated."""
        return max(1, self.max_draft_tokens)

    @property
    def draft_log_slots(self) -> int:
        """Most nodes of a row that the draft's recurrent layers may have to take back."""
        if not self.max_draft_tokens or self.from_text:
            return 0
        return draft_slots(self.speculation, self.max_draft_tokens) or self.max_draft_tokens + 1

    @property
    def kv_on_host(self) -> bool:
        """Whether attention and the target's KV are in host memory, across a device's link."""
        return self.host_bytes is not None and self.attention_resource == "cpu"

    @property
    def prefill_pass_tokens(self) -> int:
        """Most prompt tokens that join a pass (all their hidden states are held); a longer prompt joins alone."""
        return max(PREFILL_ITEMS * self.prefill_tokens, self.capacity)


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions that precede the first read."""

    parts: tuple[PlannedPart, ...]  # of all layers, in the order of their use
    num_layers: int
    num_slots: int
    slot_bytes: int
    request: PlanRequest = PlanRequest()
    prefill_pass_tokens: int | None = None  # most prompt tokens that join a pass, except for one longer prompt
    num_staging: int = 0  # staging buffers; 0: reads fill slots directly (the device is the host)
    draft_resource: str = "compute"
    crossing: tuple[tuple[int, int], ...] = ()  # by split layer: bytes per token to host attention and back
    arithmetic: Mapping[str, int] = field(default_factory=dict)  # bytes held on the device, by label
    host_arithmetic: Mapping[str, int] = field(default_factory=dict)  # bytes held in host memory, by label
    exact_price: float | None = None  # share by which exact passes take longer; None: nobody compared
    experts: ExpertPlan | None = None  # read on demand; None: every layer's experts are in its parts
    expected_layer_s: tuple[tuple[int, float], ...] = field(default=(), compare=False)  # by padded tokens, of one layer
    expected_step_s: float = field(default=0.0, compare=False)  # of a draft step; 0: not known

    def __post_init__(self) -> None:
        most = max((len(self.streamed_of(layer)) for layer in range(self.num_layers)), default=0)
        if self.num_slots < most or (self.streamed and self.num_slots < 1):
            raise InternalError(f"a layer streams {most} parts, the plan has {self.num_slots} slots")
        if not 1 <= self.num_groups <= self.num_rows:
            raise InternalError(f"{self.num_rows} rows cannot form {self.num_groups} groups")
        if self.micro_batches < 1:
            raise InternalError(f"micro_batches must be at least 1, found {self.micro_batches}")
        if self.experts is not None and self.attention_resource != "compute":
            raise InternalError("a layer with experts on demand cannot attend apart from its other work")
        if len(self.crossing) not in (0, self.num_layers):
            raise InternalError(f"crossing bytes are given for {len(self.crossing)} of {self.num_layers} layers")
        if any(part.size > self.slot_bytes for part in self.streamed):
            raise InternalError(f"a streamed part is larger than a slot of {self.slot_bytes} bytes")

    # -- the fields of the request -------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Sequences served at once."""
        return self.request.num_rows

    @property
    def num_groups(self) -> int:
        """Groups of rows; the draft works for one while the target verifies another."""
        return self.request.num_groups

    @property
    def capacity(self) -> int:
        """Tokens of KV per row."""
        return self.request.capacity

    @property
    def draft_capacity(self) -> int:
        """Tokens of the draft's KV per row; a longer row goes on without proposals."""
        return self.request.draft_capacity

    @property
    def prefill_tokens(self) -> int:
        """Most tokens of one prefill item."""
        return self.request.prefill_tokens

    @property
    def speculation(self) -> Speculation:
        """The form of the proposals."""
        return self.request.speculation

    @property
    def max_draft_tokens(self) -> int:
        """Most proposed tokens per row and pass; 0: no speculation."""
        return self.request.max_draft_tokens

    @property
    def fixed_draft_tokens(self) -> int | None:
        """Proposed tokens per row in every pass; None: chosen by measured cost."""
        return self.request.fixed_draft_tokens

    @property
    def max_draft_depth(self) -> int:
        """Most tokens of a tree's longest path."""
        return self.request.max_draft_depth

    @property
    def fixed_draft_depth(self) -> int | None:
        """Levels of a tree; None: chosen by measured cost."""
        return self.request.fixed_draft_depth

    @property
    def draft_ahead(self) -> bool:
        """Whether trees grow while the target verifies them."""
        return self.request.draft_ahead

    @property
    def attention_resource(self) -> str:
        """The resource of attention; "cpu": every layer is split, attention runs in parallel with other items."""
        return self.request.attention_resource

    @property
    def micro_batches(self) -> int:
        """Most work items that the decoding rows are divided into."""
        return self.request.micro_batches

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that the plan may hold on the device; None: unbounded."""
        return self.request.budget_bytes

    # -- derived values ----------------------------------------------------------------------------------------------

    @property
    def streamed(self) -> tuple[PlannedPart, ...]:
        """The parts that stream in every pass, in the order of their use."""
        return tuple(part for part in self.parts if part.tier is not Tier.DEVICE)

    def streamed_of(self, layer: int) -> tuple[PlannedPart, ...]:
        """The parts of one layer that stream in every pass."""
        return tuple(part for part in self.parts if part.layer == layer and part.tier is not Tier.DEVICE)

    @property
    def decoding(self) -> tuple[PlannedPart, ...]:
        """The parts that are decoded in every pass, in the order of their use."""
        return tuple(part for part in self.parts if part.is_decoded_in_passes)

    @property
    def decoded(self) -> tuple[int, ...]:
        """The layers of which weights are decoded in every pass."""
        return tuple(sorted({part.layer for part in self.decoding}))

    @property
    def num_scratch(self) -> int:
        """Scratch buffers, each for the decoded weights of one layer."""
        return min(self.request.scratch_buffers, len(self.decoded))

    @property
    def scratch_bytes(self) -> int:
        """Bytes of a scratch buffer."""
        return scratch_bytes(self.parts)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that stream in one pass."""
        return sum(part.nbytes for part in self.streamed)

    @property
    def spare_bytes(self) -> int:
        """Bytes that the stream can load while no layer frees a slot, as when only the draft works."""
        most = max((len(self.streamed_of(layer)) for layer in range(self.num_layers)), default=0)
        return (self.num_slots - most) * self.slot_bytes

    @property
    def tree_slots(self) -> int:
        """The target's KV positions per row beyond its capacity, for the nodes of a tree that it verifies."""
        return self.max_draft_tokens if self.speculation is Speculation.TREE else 0

    @property
    def draft_slots(self) -> int:
        """The draft's KV positions per row beyond its capacity, for verified, pruned and drafted-ahead nodes."""
        return draft_slots(self.speculation, self.max_draft_tokens)

    @property
    def proposes_trees(self) -> bool:
        """Whether the target verifies trees."""
        return self.speculation is Speculation.TREE and self.max_draft_tokens > 0

    @property
    def kv_on_host(self) -> bool:
        """Whether the target's KV stays in host memory, across a device's link, and attention runs there."""
        return self.attention_resource == "cpu" and self.num_staging > 0

    def crossing_of(self, layer: int) -> tuple[int, int] | None:
        """Bytes per token to host attention and back; None where the KV is in the layer's own memory."""
        if not self.kv_on_host:
            return None
        return self.crossing[layer] if self.crossing else (0, 0)

    @property
    def held_bytes(self) -> int:
        """Bytes that the plan holds on the device at its peak."""
        return sum(self.arithmetic.values())

    @property
    def shape(self) -> str:
        """The shape in a few words, such as ``64 rows in 2 groups with chains of up to 24, 9 slots``."""
        words = (
            f"{self.num_rows} row"
            + "s" * (self.num_rows > 1)
            + (f" in {self.num_groups} groups" if self.num_groups > 1 else "")
        )
        kind = "trees" if self.speculation is Speculation.TREE else "chains"
        most = self.max_draft_tokens
        source = " from the text" if self.request.from_text else ""
        words += f" with {kind} of up to {most}{source}" if most else " without speculation"
        words += ", attention on the CPU" if self.attention_resource != "compute" else ""
        words += f", {self.num_slots} slots" if self.streamed else ""
        words += ", decoding behind products" if self.num_scratch == 1 < len(self.decoded) else ""
        return words + (", resident layers packed" if any(part.packed for part in self.parts) else "")

    @property
    def exactness(self) -> str:
        """Whether passes are exact, and what that costs, if it was compared; empty if there is nothing to tell."""
        if self.exact_price is None:
            return ""
        share = f"{max(0.0, self.exact_price):.0%}"
        if self.request.exact:
            return f"exact passes, which take {share} longer"
        return f"passes that are not exact: exact ones would take {share} longer (--exact)"

    def as_dict(self) -> dict[str, Any]:
        """The plan as a JSON object, in tokens and bytes."""
        return {
            "rows": self.num_rows,
            "groups": self.num_groups,
            "context": self.capacity,
            "prefill_tokens": self.prefill_tokens,
            "speculation": str(self.speculation) if self.max_draft_tokens else "off",
            "most_draft_tokens": self.max_draft_tokens,
            "from_text": self.request.from_text,
            "exact": self.request.exact,
            "exact_price": self.exact_price,
            "threads": None if self.request.threads is None else asdict(self.request.threads),
            "attention": self.attention_resource,
            "micro_batches": self.micro_batches,
            "scratch_buffers": self.num_scratch,
            "slots": self.num_slots,
            "slot_bytes": self.slot_bytes,
            "streamed_bytes": self.streamed_bytes,
            "experts": None if self.experts is None else self.experts.as_dict(),
            "bytes_by_tier": {str(tier): sum(part.nbytes for part in self.parts if part.tier is tier) for tier in Tier},
            "budget_bytes": self.budget_bytes,
            "device_bytes": dict(self.arithmetic),
            "host_bytes": dict(self.host_arithmetic),
        }

    def describe(self) -> str:
        """The device memory as one sum."""
        return _sum(self.arithmetic)

    def describe_host(self) -> str:
        """The host memory as one sum; empty where the device is the host."""
        return _sum(self.host_arithmetic) if any(self.host_arithmetic.values()) else ""


def _sum(arithmetic: Mapping[str, int]) -> str:
    terms = " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in arithmetic.items() if nbytes)
    return f"{terms} = {format_bytes(sum(arithmetic.values()))}"


def scratch_bytes(parts: Iterable[PlannedPart]) -> int:
    """Bytes of a scratch buffer, which holds the decoded weights of one layer."""
    layers: dict[int, int] = defaultdict(int)
    for part in parts:
        layers[part.layer] += part.scratch_bytes * part.is_decoded_in_passes
    return max(layers.values(), default=0)


def draft_slots(speculation: Speculation, max_draft_tokens: int) -> int:
    """The draft's KV positions per row beyond its capacity: nodes of two rounds, and as many pruned nodes."""
    return 4 * (max_draft_tokens + 8) if speculation is Speculation.TREE and max_draft_tokens else 0
