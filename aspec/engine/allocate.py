"""From a design to memory: arenas, caches, buffers of a device, and the parts to read before the engine runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from aspec.backends.cpu import CpuBackend
from aspec.backends.device import Buffers, DeviceLayer
from aspec.backends.registry import ALIGNMENT
from aspec.backends.streams import StreamBackend
from aspec.engine.decode_check import DecodeCheck
from aspec.engine.design import ResolvedEngine, design
from aspec.engine.model_runner import ModelRunner, Weights, use_threads
from aspec.errors import DeviceError
from aspec.generation.grammar.compiler import Grammars
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.disk import DiskLane, FileVersion
from aspec.io.loop.settling import close_all
from aspec.io.memory import SlotMemory, allocate, discard, give_back
from aspec.models.experts.running import ExpertRunner
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.weights.parts import Part, as_tensor
from aspec.options import MEASURE
from aspec.plan import Plan, Tier
from aspec.planning.resolve import Resolved
from aspec.speculation.drafter import Drafter
from aspec.speculation.model_drafter import ModelDrafter
from aspec.speculation.ngram_drafter import NgramDrafter
from aspec.tasks.backend import Backend
from aspec.units import format_bytes


@dataclass(frozen=True, slots=True)
class ResidentLoad:
    """A part that is read once, when the engine opens: into host memory, or through it into device memory.

    ``passing``: its memory is that of other parts, too, once it is bound.
    """

    part: Part
    view: memoryview | None = None  # host memory that the disk fills
    buffer: torch.Tensor | None = None  # device memory, if the part stays there
    model: Model | None = None  # to bind; None: the part streams from the host, or every pass decodes it
    passing: bool = False


@dataclass(slots=True)
class EngineMemory:
    """The models and memory of an engine; mutable, because closing drops the references that keep memory alive."""

    target: Model
    draft: Model | None
    tokenizer: Tokenizer
    grammars: Grammars
    plan: Plan
    parts: dict[int, Part]  # streamed and resident layer parts of the target
    runner: ModelRunner
    slots: list[memoryview]  # in host memory; none behind a device's link
    loads: list[ResidentLoad]
    memory: list[SlotMemory]
    device: DeviceLayer[Any, Any] | None = None
    buffers: Buffers = field(default_factory=lambda: Buffers((), ()))  # behind a device's link
    experts: ExpertRunner | None = None  # that are read on demand
    expert_slots: list[memoryview] = field(default_factory=list)
    checks: list[DecodeCheck] = field(default_factory=list)  # of kept prices; they see all spans

    @property
    def models(self) -> list[Model]:
        """The target and, if it proposes anything, the draft."""
        return [model for model in (self.target, self.draft) if model is not None]

    @property
    def files(self) -> dict[str, FileVersion]:
        """The files of all weights, as they were when their headers were read."""
        return {path: version for model in self.models for path, version in model.files.items()}

    def open_backend(self, disk: DiskLane) -> Backend:
        """Open the backend that runs the tasks; on the loop's thread."""
        if self.device is None:
            threads = self.plan.request.threads
            number = 1 if threads is None or not self.plan.num_scratch else threads.weights
            self.checks += [DecodeCheck(self.target, number)] if self.plan.num_scratch else []
            return CpuBackend(
                self.runner,
                self.parts,
                self.slots,
                disk,
                num_decoders=number,
                experts=self.experts,
                expert_slots=self.expert_slots,
            )
        return StreamBackend(self.device, self.runner, self.parts, self.buffers, disk, self.experts)


def assemble(resolved: Resolved) -> EngineMemory:
    """Design and allocate. Raises UserError if the input cannot be used, DeviceError if memory is refused."""
    made = design(resolved)
    threads = made.plan.request.threads
    use_threads(None if threads is None else threads.decode)  # for all that a model asks of torch while it opens
    if made.models.resolved.options.progress is not None:
        made.models.resolved.options.progress(MEASURE, 0, 0)
    captured = resolved.kind is not None  # a device's recording of a draft step knows nothing of kernels
    for model in (made.models.target, None if captured else made.models.draft):
        if model is not None and model.device.type == "cpu":
            model.prove_products()
    if resolved.kind is None:
        return _on_host(made)
    device = resolved.kind.open()
    try:
        return _on_device(made, device)
    except torch.OutOfMemoryError as error:
        device.free()
        raise DeviceError(out_of_memory(made.plan)) from error
    except BaseException:
        device.free()
        raise


def out_of_memory(plan: Plan) -> str:
    """The message for a device that refuses memory of the plan."""
    smaller = max(plan.num_rows // 2, 1) if plan.num_rows > 1 else None
    fewer = f"--batch-size {smaller}" if smaller else f"--max-context {plan.capacity // 2}"
    budget = plan.budget_bytes or plan.held_bytes
    return (
        f"the device ran out of memory: the plan holds {plan.describe()} of a budget of {format_bytes(budget)}, and "
        f"other processes or the device itself hold the rest. Choose a smaller plan: --device-memory "
        f"{int(plan.held_bytes * 0.9) >> 20}MiB, or {fewer}."
    )


def _on_host(made: ResolvedEngine) -> EngineMemory:
    """Allocate two arenas (resident, slots) and the caches; no weight is read yet.

    Resident parts whose stored bytes are not kept are read into the memory of the slots.
    """
    give_back()
    memory: list[SlotMemory] = []
    once = _residents(made)
    kept, passing = ([one for one in once if one.passing is through] for through in (False, True))
    views = _carve(memory, [one.part.size for one in kept])
    loads = [replace(one, view=view) for one, view in zip(kept, views, strict=True)]
    slots, whole = _carve_slots(memory, made.plan, max((one.part.size for one in passing), default=0))
    loads += [replace(one, view=whole[: one.part.size]) for one in passing]
    assembly = _assembly(made, [as_tensor(slot) for slot in slots], slots, loads, memory)
    _add_experts(made, assembly)
    return assembly


def _add_experts(made: ResolvedEngine, assembly: EngineMemory) -> None:
    """Allocate the slots of experts that are read on demand, in an arena of their own."""
    plan, routed = made.plan.experts, made.models.on_demand
    if plan is None or routed is None:
        return
    assembly.experts = made.models.target.read_on_demand(routed)
    assembly.expert_slots = _carve(assembly.memory, [plan.shape.slot_bytes] * plan.num_slots)
    scratch = torch.empty(plan.shape.scratch_bytes, dtype=torch.uint8)
    assembly.experts.use([as_tensor(slot) for slot in assembly.expert_slots], scratch)


def _add_experts_on_device(made: ResolvedEngine, assembly: EngineMemory, device: DeviceLayer[Any, Any]) -> None:
    """The same on a device, and their slots in pinned host memory."""
    plan, routed = made.plan.experts, made.models.on_demand
    if plan is None or plan.host is None or routed is None:
        return
    assembly.experts = made.models.target.read_on_demand(routed)
    nbytes = plan.shape.slot_bytes
    arena = device.allocate(nbytes * plan.num_slots)
    slots = [arena[at * nbytes : (at + 1) * nbytes] for at in range(plan.num_slots)]
    host = [device.allocate_host(nbytes) for _ in range(plan.host.num_slots)]
    assembly.buffers = replace(assembly.buffers, expert_slots=slots, host_experts=host)
    assembly.experts.use(slots, device.allocate(plan.shape.scratch_bytes))


def _on_device(made: ResolvedEngine, device: DeviceLayer[Any, Any]) -> EngineMemory:
    """The same on a device; in pinned host memory the parts that stay there, and staging."""
    plan = made.plan
    once = _residents(made)
    kept, passing = ([one for one in once if one.passing is through] for through in (False, True))
    arena = device.allocate(sum(_aligned(one.part.size) for one in kept))
    places = _offsets([one.part.size for one in kept])
    loads = [replace(one, buffer=arena[at : at + one.part.size]) for one, at in zip(kept, places, strict=True)]
    by_index = {part.index: part for part in made.models.parts}
    hosted = [by_index[planned.index] for planned in plan.parts if planned.tier is Tier.HOST]
    host_parts = {part.index: device.allocate_host(part.size) for part in hosted}
    loads += [ResidentLoad(part, view=host_parts[part.index].view) for part in hosted]
    slot_bytes = _aligned(plan.slot_bytes)
    whole = device.allocate(max(slot_bytes * plan.num_slots, *(_aligned(one.part.size) for one in passing), 0))
    loads += [replace(one, buffer=whole[: one.part.size]) for one in passing]
    slots = [whole[index * slot_bytes : (index + 1) * slot_bytes] for index in range(plan.num_slots)]
    reads = any(planned.tier is Tier.DISK for planned in plan.parts)
    staging = [device.allocate_host(plan.slot_bytes) for _ in range(plan.num_staging if reads else 0)]
    assembly = _assembly(made, slots, [], loads, [], device)
    assembly.buffers = Buffers(slots, staging, host_parts)
    _add_experts_on_device(made, assembly, device)
    device.synchronize()
    return assembly


def _assembly(
    made: ResolvedEngine,
    slots: Sequence[torch.Tensor],
    views: list[memoryview],
    loads: list[ResidentLoad],
    memory: list[SlotMemory],
    device: DeviceLayer[Any, Any] | None = None,
) -> EngineMemory:
    """Add the caches, the drafter and the runner to the memory for weights."""
    models, plan = made.models, made.plan
    resolved, target, draft = models.resolved, models.target, models.draft
    place = torch.device("cpu") if device is None else device.torch_device
    scratch = [torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=place) for _ in range(plan.num_scratch)]
    layer_parts = _placed_parts(made)
    one = (
        1 if resolved.options.speculation == "chain" else None
    )  # continuations of a lookup; None: as many as a tree takes
    drafter: Drafter | None = NgramDrafter(one) if plan.request.from_text and plan.max_draft_tokens else None
    if draft is not None:
        cache = _cache(draft, plan, plan.draft_capacity + plan.draft_slots, place, plan.request.draft_log_slots)
        capture = None if device is None else device.create_capture()
        shared = resolved.options.shared_noise
        drafter = ModelDrafter(draft, cache, target.vocab_size, shared_noise=shared, capture=capture)
    capacity = plan.capacity + plan.tree_slots
    log_slots = plan.request.log_slots
    cache = _cache(
        target, plan, capacity, place, log_slots, saves=True, exact=plan.request.exact, offloaded=plan.kv_on_host
    )
    kept = {part.index for part in plan.decoding if part.packed}
    packed = {load.part.index: _stored(load) for load in loads if load.model is None and load.part.index in kept}
    weights = Weights(layer_parts, slots, scratch, packed)
    runner = ModelRunner(target, cache, weights, drafter, plan.request.threads)
    grammars = Grammars(made.tokenizer, target.vocab_size, target.end_ids)
    return EngineMemory(
        target, draft, made.tokenizer, grammars, plan, layer_parts, runner, views, loads, memory, device
    )


def _residents(made: ResolvedEngine) -> list[ResidentLoad]:
    """The parts that are read once, without memory yet: of the target all but streamed ones, and the whole draft."""
    models = made.models
    kept = {part.index: part for part in made.plan.parts if part.tier is Tier.DEVICE}
    once: list[ResidentLoad] = []
    for part in models.parts:
        if part.layer < 0 or (part.index in kept and not kept[part.index].packed):
            once.append(ResidentLoad(part, model=models.target, passing=part.passes_through))
        elif part.index in kept:
            once.append(ResidentLoad(part))
    return once + [
        ResidentLoad(part, model=models.draft, passing=part.passes_through)
        for part in models.draft_parts
        if models.draft is not None
    ]


def _placed_parts(made: ResolvedEngine) -> dict[int, Part]:
    """The parts of all layers by index; those that passes decode lie side by side in their layer's scratch."""
    placed = {part.index: part for part in made.models.parts if part.layer >= 0}
    ends: Counter[int] = Counter()
    for planned in made.plan.decoding:
        placed[planned.index] = replace(placed[planned.index], scratch_at=ends[planned.layer])
        ends[planned.layer] += planned.scratch_bytes
    return placed


def _stored(load: ResidentLoad) -> torch.Tensor:
    """The memory into which a part is read."""
    if load.buffer is not None:
        return load.buffer
    assert load.view is not None, "a part is read into host memory or into a device's"
    return as_tensor(load.view)


def _cache(
    model: Model,
    plan: Plan,
    capacity: int,
    place: torch.device,
    log_slots: int,
    *,
    saves: bool = False,
    exact: bool = False,
    offloaded: bool = False,
) -> KVCache:
    shapes, where = model.kv_shapes(offloaded=offloaded), "cpu" if offloaded else place
    return KVCache(
        shapes,
        plan.num_rows,
        capacity,
        model.dtype,
        where,
        exact=exact,
        offloaded=offloaded,
        states=model.state_shapes,
        log_slots=log_slots,
        saves=saves,
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _offsets(sizes: Sequence[int]) -> list[int]:
    """The byte offset of each of several aligned buffers."""
    return [sum(map(_aligned, sizes[:index])) for index in range(len(sizes))]


def _carve(memory: list[SlotMemory], sizes: Sequence[int]) -> list[memoryview]:
    """Page-aligned views of one new arena."""
    if not sizes:
        return []
    arena = allocate(sum(sizes))
    memory.append(arena)
    views, at = [], 0
    for size in sizes:
        views.append(arena.view[at : at + size])
        at += size
    return views


def _carve_slots(memory: list[SlotMemory], plan: Plan, least: int) -> tuple[list[memoryview], memoryview]:
    """The slots, and all their memory, which has ``least`` bytes even where slots are smaller."""
    nbytes = max(plan.slot_bytes * plan.num_slots, least)
    if not nbytes:
        return [], memoryview(b"")
    memory.append(allocate(nbytes))
    whole = memory[-1].view
    return [whole[at * plan.slot_bytes : (at + 1) * plan.slot_bytes] for at in range(plan.num_slots)], whole


def bind_load(load: ResidentLoad) -> None:
    """Bind resident parameters to their buffer until the engine closes; converted ones get memory of their own.

    In host memory, weights are packed where that makes products faster, and their plain bytes are given back.
    """
    if load.model is None:
        return
    buffer = _stored(load)
    scratch = torch.empty(load.part.scratch_bytes, dtype=torch.uint8, device=buffer.device)
    load.model.bind(replace(load.part, scratch_at=0), buffer, scratch)
    if load.view is None:
        return
    for packed in load.model.pack(load.part):
        start = load.part.shift + packed.at
        discard(load.view[start : start + packed.nbytes])


def free_memory(assembly: EngineMemory) -> None:
    """Drop every view of the weights and free their memory; no task may run after this."""
    models = assembly.models
    parts = [tuple(load.part for load in assembly.loads if load.model is model) for model in models]
    assembly.loads.clear()
    assembly.slots.clear()
    assembly.expert_slots.clear()
    assembly.buffers = Buffers((), ())
    memory, assembly.memory = assembly.memory, []
    device, assembly.device = assembly.device, None
    close_all(
        [
            *(check.conclude for check in assembly.checks),
            *(partial(model.forget, own) for model, own in zip(models, parts, strict=True)),
            *(arena.close for arena in memory),
            *([] if device is None else [device.free]),
        ]
    )
