"""From what a model needs and what a budget allows to a plan: what is resident, how many slots.

Pure policy: byte sizes in, a ``Plan`` out, with the arithmetic that an error or a summary shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from aspec.errors import BudgetError
from aspec.plan import Plan, PlannedPart, Speculation, Tier, format_bytes
from aspec.tasks.task import COMPUTE, CPU, DRAFT_COMPUTE

PREFILL_ITEMS = 8  # full prefill items that one stream of the weights serves
NUM_STAGING = 3  # buffers between files and a device's link
SPARE_SLOTS = 5  # slots beyond one layer's parts: they fill while the draft works between two passes


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be held, bytes, whatever is decided; and the parts among which the plan chooses."""

    parts: tuple[PlannedPart, ...]
    num_layers: int
    fixed: Mapping[str, int]  # label -> bytes that are held in any plan
    kv_bytes_per_token: int  # of the target
    draft_kv_bytes_per_token: int = 0
    host_fixed: Mapping[str, int] = field(default_factory=dict)  # in host memory, where attention runs beside its KV
    crossing: tuple[tuple[int, int], ...] = ()  # see ``Plan``


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for; None means: decide."""

    budget_bytes: int
    num_rows: int
    capacity: int
    num_groups: int = 1
    prefill_tokens: int = 512
    speculation: Speculation = Speculation.CHAIN
    max_draft_tokens: int = 0
    fixed_draft_tokens: int | None = None
    max_draft_depth: int = 32
    fixed_draft_depth: int | None = None
    draft_ahead: bool = True
    exact: bool = False  # products in blocks of rows: wider moments
    attention_resource: str = "compute"  # "cpu": attention beside the rest, in ``micro_batches`` items
    micro_batches: int = 1
    resident_bytes: int | None = None  # layers resident at most, even where more would fit
    spare_slots: int = SPARE_SLOTS  # beyond one layer's parts
    host_bytes: int | None = None  # of host memory behind a device's link; None: the device is the host's own memory

    @property
    def kv_on_host(self) -> bool:
        """Whether attention, and the target's KV with it, is on the other side of a device's link."""
        return self.host_bytes is not None and self.attention_resource == CPU

    @property
    def prefill_pass_tokens(self) -> int:
        """Prompt tokens that join a pass at most, whose hidden states are all held; a longer prompt joins alone."""
        return max(PREFILL_ITEMS * self.prefill_tokens, self.capacity)


def make_plan(needs: Needs, wishes: Wishes) -> Plan:
    """Everything resident if it fits; otherwise the fewest useful slots, and the rest of the budget resident.

    Raises BudgetError, with the arithmetic and the smallest budget that would do.
    """
    slots = wishes.num_rows * (wishes.capacity + 1)
    kv, draft_kv = slots * needs.kv_bytes_per_token, slots * needs.draft_kv_bytes_per_token
    on_host = {"KV cache": kv, **needs.host_fixed} if wishes.kv_on_host else {}
    _check_host(on_host, wishes)
    held = {**needs.fixed, "KV cache": draft_kv + (0 if on_host else kv)}
    room = wishes.budget_bytes - sum(held.values())
    everything = sum(part.resident_bytes for part in needs.parts)
    allowed = room if wishes.resident_bytes is None else min(room, wishes.resident_bytes)
    if everything <= allowed:
        parts = tuple(replace(part, tier=Tier.DEVICE) for part in needs.parts)
        return _plan(needs, wishes, parts, 0, 0, {**held, "resident layers": everything}, on_host)
    per_layer = _most_parts_per_layer(needs)
    slot_bytes = max(part.size for part in needs.parts)
    if per_layer * slot_bytes > room:
        raise BudgetError(_too_small(held, per_layer, slot_bytes, wishes.budget_bytes))
    num_slots = min(per_layer + wishes.spare_slots, room // slot_bytes)
    resident = _spread(needs.parts, min(allowed, room - num_slots * slot_bytes))
    hosted = _hosted(needs.parts, resident, wishes, sum(on_host.values()))
    tiers = dict.fromkeys(hosted, Tier.HOST) | dict.fromkeys(resident, Tier.DEVICE)
    parts = tuple(replace(part, tier=tiers.get(part.index, Tier.DISK)) for part in needs.parts)
    slot_bytes = max(part.size for part in parts if part.tier is not Tier.DEVICE)
    held |= {
        "resident layers": sum(part.resident_bytes for part in parts if part.tier is Tier.DEVICE),
        f"{num_slots} slots": num_slots * slot_bytes,
    }
    return _plan(needs, wishes, parts, num_slots, slot_bytes, held, on_host)


def _check_host(on_host: Mapping[str, int], wishes: Wishes) -> None:
    """Raises BudgetError where host memory does not hold what attention on the CPU takes there."""
    if wishes.host_bytes is not None and sum(on_host.values()) > wishes.host_bytes:
        terms = " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in on_host.items() if nbytes)
        raise BudgetError(
            f"host memory of {format_bytes(wishes.host_bytes)} does not hold what attention on the CPU takes there: "
            f"{terms} = {format_bytes(sum(on_host.values()))}. Give --host-memory more, lower --batch-size or "
            f"--max-context, or run with --attention device."
        )


def _hosted(parts: Sequence[PlannedPart], resident: set[int], wishes: Wishes, taken_bytes: int) -> set[int]:
    """Of the parts that stream, those that host memory keeps, pinned, beside staging buffers and what is taken."""
    streamed = [part for part in parts if part.index not in resident]
    if wishes.host_bytes is None:
        return set()
    room = wishes.host_bytes - taken_bytes
    if sum(part.size for part in streamed) <= room:
        return {part.index for part in streamed}
    return _spread(streamed, room - NUM_STAGING * max(part.size for part in streamed))


def _plan(
    needs: Needs,
    wishes: Wishes,
    parts: tuple[PlannedPart, ...],
    num_slots: int,
    slot_bytes: int,
    held: Mapping[str, int],
    on_host: Mapping[str, int],
) -> Plan:
    hosted = sum(part.size for part in parts if part.tier is Tier.HOST)
    staged = any(part.tier is Tier.DISK for part in parts) and wishes.host_bytes is not None
    staging = NUM_STAGING * slot_bytes if staged else 0
    return Plan(
        parts=parts,
        num_layers=needs.num_layers,
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        num_rows=wishes.num_rows,
        capacity=wishes.capacity,
        num_groups=min(wishes.num_groups, wishes.num_rows),
        prefill_tokens=wishes.prefill_tokens,
        prefill_pass_tokens=wishes.prefill_pass_tokens,
        speculation=wishes.speculation,
        max_draft_tokens=wishes.max_draft_tokens,
        fixed_draft_tokens=wishes.fixed_draft_tokens,
        max_draft_depth=wishes.max_draft_depth,
        fixed_draft_depth=wishes.fixed_draft_depth,
        draft_ahead=wishes.draft_ahead,
        attention_resource=wishes.attention_resource,
        micro_batches=wishes.micro_batches,
        crossing=needs.crossing,
        budget_bytes=wishes.budget_bytes,
        num_staging=0 if wishes.host_bytes is None else NUM_STAGING,
        draft_resource=COMPUTE if wishes.host_bytes is None else DRAFT_COMPUTE,
        arithmetic=held,
        host_arithmetic={"pinned layers": hosted, "staging": staging, **on_host},
    )


def _most_parts_per_layer(needs: Needs) -> int:
    counts = [0] * needs.num_layers
    for part in needs.parts:
        counts[part.layer] += 1
    return max(counts)


def _spread(parts: Sequence[PlannedPart], room: int) -> set[int]:
    """Indices of parts to keep resident: as many as fit, evenly over the order of use.

    Evenly, so that the stream never has to hurry: between two streamed parts there is resident work to hide it.
    """
    chosen: set[int] = set()
    smallest = min(part.resident_bytes for part in parts)
    average = sum(part.resident_bytes for part in parts) / len(parts)
    wanted = int(room // average)
    even = [int((i + 0.5) * len(parts) / wanted) for i in range(wanted)]
    for part in [*(parts[i] for i in even), *parts]:
        if room < smallest:
            break
        if part.resident_bytes <= room and part.index not in chosen:
            chosen.add(part.index)
            room -= part.resident_bytes
    return chosen


def _too_small(held: Mapping[str, int], per_layer: int, slot_bytes: int, budget: int) -> str:
    terms = " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in held.items() if nbytes)
    least = sum(held.values()) + per_layer * slot_bytes
    return (
        f"the memory budget of {format_bytes(budget)} is too small for this model: the smallest plan holds {terms} "
        f"+ {per_layer} slots of {format_bytes(slot_bytes)} = {format_bytes(least)}. Give --device-memory at least "
        f"{-(-least // (1 << 20))}MiB, or shorten --max-context, lower --batch-size or run without --draft."
    )
