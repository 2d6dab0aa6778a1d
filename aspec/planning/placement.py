"""Where the parts of a model are placed: from a footprint and a budget to resident parts, slots and host memory.

Pure policy: byte sizes in, a ``Plan`` out. The plan holds the sums that an error or a summary shows.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from aspec.errors import BudgetError
from aspec.expert_plan import ExpertPlan, ExpertShape, share_slots
from aspec.plan import Plan, PlannedPart, PlanRequest, Tier, scratch_bytes
from aspec.tasks.task import COMPUTE, DRAFT_COMPUTE
from aspec.units import format_bytes

UNBOUNDED = 1 << 62  # bytes
NUM_STAGING = 3  # buffers between files and a device's link
PASSING_SLOTS = 8  # for experts beyond their layers' caches: four are read while four are computed
EXPERT_SLOTS = "expert slots"


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes that every plan holds, and the parts that a plan places."""

    parts: tuple[PlannedPart, ...]
    num_layers: int
    fixed: Mapping[str, int]  # label -> bytes that every plan holds on the device
    kv_bytes_per_token: int  # of the target
    draft_kv_bytes_per_token: int = 0
    host_fixed: Mapping[str, int] = field(default_factory=dict)  # label -> bytes, if KV is in host memory
    crossing: tuple[tuple[int, int], ...] = ()  # see ``Plan``
    loading_bytes: int = 0  # of the largest part outside the layers whose stored bytes are not kept
    experts: ExpertShape | None = None  # that are in no part, because they are read on demand


def make_plan(footprint: Footprint, request: PlanRequest) -> Plan:
    """Make all parts resident if they fit; otherwise take the fewest useful slots and fill the rest of the budget.

    Where two scratch buffers do not fit, the plan has one, and decoding waits for products.
    Raises BudgetError; its message shows the sum of bytes and the smallest budget that suffices.
    """
    kv = request.num_rows * (request.capacity + 1) * footprint.kv_bytes_per_token
    draft_kv = request.num_rows * (request.draft_capacity + 1) * footprint.draft_kv_bytes_per_token
    on_host = {"KV cache": kv, **footprint.host_fixed} if request.kv_on_host else {}
    _check_host(on_host, request)
    held = {**footprint.fixed, "KV cache": draft_kv + (0 if on_host else kv)}
    for buffers in range(request.scratch_buffers, 1, -1):
        with suppress(BudgetError):
            return _with_experts(footprint, replace(request, scratch_buffers=buffers), held, on_host)
    return _with_experts(footprint, replace(request, scratch_buffers=1), held, on_host)


def _with_experts(footprint: Footprint, request: PlanRequest, held: dict[str, int], on_host: Mapping[str, int]) -> Plan:
    """The plan, and slots for experts that are read on demand.

    Weights outside the experts are used in every pass, so they are placed first. What is left is for the caches.
    """
    shape = footprint.experts
    if shape is None:
        return _placed(footprint, request, held, on_host)
    plan, passing = None, PASSING_SLOTS
    while plan is None:
        try:
            plan = _placed(footprint, request, {**held, EXPERT_SLOTS: passing * shape.slot_bytes}, on_host)
        except BudgetError:
            if passing == 1:
                raise
            passing //= 2
    room = (UNBOUNDED if request.budget_bytes is None else request.budget_bytes) - plan.held_bytes
    if request.resident_bytes is not None:
        resident = sum(part.resident_bytes for part in plan.parts if part.tier is Tier.DEVICE)
        room = min(room, request.resident_bytes - resident)
    experts = ExpertPlan(shape, share_slots(shape, max(0, room) // shape.slot_bytes), passing)
    return replace(plan, experts=experts, arithmetic={**plan.arithmetic, EXPERT_SLOTS: experts.nbytes})


def _placed(footprint: Footprint, request: PlanRequest, held: dict[str, int], on_host: Mapping[str, int]) -> Plan:
    """The plan with as many scratch buffers as the request names, beside the bytes ``held``."""
    budget = UNBOUNDED if request.budget_bytes is None else request.budget_bytes
    room = budget - sum(held.values())
    allowed = room if request.resident_bytes is None else min(room, request.resident_bytes)
    for packed in (False, True) if request.keep_packed else (False,):
        parts = tuple(_kept(part, packed=packed) for part in footprint.parts)
        scratch = _scratch(parts, request)
        everything = sum(part.resident_bytes for part in parts)
        loading = _loading_bytes(footprint, parts)
        if everything <= allowed and everything + scratch + loading <= room:
            held = {**held, "scratch": scratch, "resident layers": everything, "loading": loading}
            return _plan(footprint, request, parts, 0, 0, held, on_host)
    scratch = _scratch(footprint.parts, request)
    room -= scratch
    per_layer = _most_parts_per_layer(footprint)
    slot_bytes = max(part.size for part in footprint.parts)
    loading = max(0, footprint.loading_bytes - per_layer * slot_bytes)
    if per_layer * slot_bytes + loading > room:
        raise BudgetError(_too_small({**held, "scratch": scratch, "loading": loading}, per_layer, slot_bytes, budget))
    num_slots = min(per_layer + request.spare_slots, (room - loading) // slot_bytes)
    candidates = [_kept(part, packed=request.keep_packed) for part in footprint.parts]
    resident = _spread_evenly(candidates, min(allowed, room - num_slots * slot_bytes - loading))
    pinned = _pinned_parts(footprint.parts, resident, request, sum(on_host.values()))
    parts = tuple(
        kept if kept.index in resident else replace(part, tier=Tier.HOST if part.index in pinned else Tier.DISK)
        for part, kept in zip(footprint.parts, candidates, strict=True)
    )
    slot_bytes = max(part.size for part in parts if part.tier is not Tier.DEVICE)
    held = {
        **held,
        "scratch": _scratch(parts, request),
        "resident layers": sum(part.resident_bytes for part in parts if part.tier is Tier.DEVICE),
        f"{num_slots} slots": num_slots * slot_bytes,
        "loading": max(0, _loading_bytes(footprint, parts) - num_slots * slot_bytes),
    }
    return _plan(footprint, request, parts, num_slots, slot_bytes, held, on_host)


def _kept(part: PlannedPart, *, packed: bool) -> PlannedPart:
    """The part as a resident one; ``packed``: as it is stored, where that is possible."""
    return replace(part, tier=Tier.DEVICE, packed=packed and part.decoded_bytes > 0 and part.repeatable)


def _scratch(parts: Sequence[PlannedPart], request: PlanRequest) -> int:
    """Bytes of the scratch buffers, if these parts are placed so."""
    layers = {part.layer for part in parts if part.is_decoded_in_passes}
    return min(request.scratch_buffers, len(layers)) * scratch_bytes(parts)


def _loading_bytes(footprint: Footprint, parts: Sequence[PlannedPart]) -> int:
    """Bytes through which resident parts are loaded whose stored bytes are not kept; slots serve for it, too."""
    passing = (part.size for part in parts if part.tier is Tier.DEVICE and not (part.packed or part.in_place))
    return max((footprint.loading_bytes, *passing))


def _check_host(on_host: Mapping[str, int], request: PlanRequest) -> None:
    """Raises BudgetError if the bytes of attention on the CPU do not fit into host memory."""
    if request.host_bytes is not None and sum(on_host.values()) > request.host_bytes:
        terms = " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in on_host.items() if nbytes)
        raise BudgetError(
            f"the host memory of {format_bytes(request.host_bytes)} is too small for attention on the CPU, which needs "
            f"{terms} = {format_bytes(sum(on_host.values()))}. Raise --host-memory, lower --batch-size or "
            f"--max-context, or run with --attention device."
        )


def _pinned_parts(parts: Sequence[PlannedPart], resident: set[int], request: PlanRequest, taken_bytes: int) -> set[int]:
    """Indices of streamed parts to keep pinned in host memory, beside ``taken_bytes`` and the staging buffers."""
    streamed = [part for part in parts if part.index not in resident]
    if request.host_bytes is None:
        return set()
    room = request.host_bytes - taken_bytes
    if sum(part.size for part in streamed) <= room:
        return {part.index for part in streamed}
    return _spread_evenly(streamed, room - NUM_STAGING * max(part.size for part in streamed))


def _plan(
    footprint: Footprint,
    request: PlanRequest,
    parts: tuple[PlannedPart, ...],
    num_slots: int,
    slot_bytes: int,
    held: Mapping[str, int],
    on_host: Mapping[str, int],
) -> Plan:
    pinned_bytes = sum(part.size for part in parts if part.tier is Tier.HOST)
    staged = any(part.tier is Tier.DISK for part in parts) and request.host_bytes is not None
    staging = NUM_STAGING * slot_bytes if staged else 0
    return Plan(
        parts=parts,
        num_layers=footprint.num_layers,
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        request=replace(request, num_groups=min(request.num_groups, request.num_rows)),
        prefill_pass_tokens=request.prefill_pass_tokens,
        crossing=footprint.crossing,
        num_staging=0 if request.host_bytes is None else NUM_STAGING,
        draft_resource=COMPUTE if request.host_bytes is None else DRAFT_COMPUTE,
        arithmetic=held,
        host_arithmetic={"pinned layers": pinned_bytes, "staging": staging, **on_host},
    )


def _most_parts_per_layer(footprint: Footprint) -> int:
    counts = [0] * footprint.num_layers
    for part in footprint.parts:
        counts[part.layer] += 1
    return max(counts)


def _spread_evenly(parts: Sequence[PlannedPart], room: int) -> set[int]:
    """Indices of the parts to keep: as many as fit into ``room`` bytes, evenly over the order of use.

    They are even so that resident work between two streamed parts hides the next load.
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
