"""From a design to memory: arenas, caches, buffers of a device, and the parts to read before the engine runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from aspec.backends.cpu import CpuBackend
from aspec.backends.device import Buffers, DeviceLayer
from aspec.backends.registry import ALIGNMENT
from aspec.backends.streams import StreamBackend
from aspec.engine.design import ResolvedEngine, design
from aspec.engine.model_runner import ModelRunner, Weights, use_threads
from aspec.errors import DeviceError
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.disk import DiskLane, FileVersion
from aspec.io.loop.settling import close_all
from aspec.io.memory import SlotMemory, allocate, discard, give_back
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.weights.parts import Part, as_tensor, scratch_bytes
from aspec.plan import Plan, Tier
from aspec.planning.resolve import Resolved
from aspec.speculation.drafter import Drafter
from aspec.speculation.model_drafter import ModelDrafter
from aspec.speculation.ngram_drafter import NgramDrafter
from aspec.tasks.backend import Backend
from aspec.units import format_bytes


@dataclass(frozen=True, slots=True)
class ResidentLoad:
    """A part that is read once, when the engine opens: into host memory, or through it into device memory."""

    part: Part
    view: memoryview | None = None  # host memory that the disk fills
    buffer: torch.Tensor | None = None  # device memory, if the part stays there
    model: Model | None = None  # to bind; None: the part streams from the host


@dataclass(slots=True)
class EngineMemory:
    """The models and memory of an engine; mutable, because closing drops the references that keep memory alive."""

    target: Model
    draft: Model | None
    tokenizer: Tokenizer
    plan: Plan
    parts: dict[int, Part]  # streamed and resident layer parts of the target
    runner: ModelRunner
    slots: list[memoryview]  # in host memory; none behind a device's link
    loads: list[ResidentLoad]
    memory: list[SlotMemory]
    device: DeviceLayer[Any, Any] | None = None
    buffers: Buffers = field(default_factory=lambda: Buffers((), ()))  # behind a device's link

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
            return CpuBackend(self.runner, self.parts, self.slots, disk, num_decoders=number)
        return StreamBackend(self.device, self.runner, self.parts, self.buffers, disk)


def assemble(resolved: Resolved) -> EngineMemory:
    """Design and allocate. Raises UserError if the input cannot be used, DeviceError if memory is refused."""
    made = design(resolved)
    threads = made.plan.request.threads
    use_threads(None if threads is None else threads.decode)  # for all that a model asks of torch while it opens
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
    """Allocate two arenas (resident, slots) and the caches; no weight is read yet."""
    for model in (made.models.target, made.models.draft):
        if model is not None:
            model.prove_products()
    give_back()
    memory: list[SlotMemory] = []
    once = _residents(made)
    views = _carve(memory, [part.size for part, _ in once])
    slots = _carve(memory, [made.plan.slot_bytes] * made.plan.num_slots)
    loads = [ResidentLoad(part, view, None, model) for (part, model), view in zip(once, views, strict=True)]
    return _assembly(made, [as_tensor(slot) for slot in slots], slots, loads, memory)


def _on_device(made: ResolvedEngine, device: DeviceLayer[Any, Any]) -> EngineMemory:
    """The same on a device; in pinned host memory the parts that stay there, and staging."""
    plan = made.plan
    once = _residents(made)
    arena = device.allocate(sum(_aligned(part.size) for part, _ in once))
    places = _offsets([part.size for part, _ in once])
    loads = [
        ResidentLoad(part, buffer=arena[at : at + part.size], model=model)
        for (part, model), at in zip(once, places, strict=True)
    ]
    by_index = {part.index: part for part in made.models.parts}
    hosted = [by_index[planned.index] for planned in plan.parts if planned.tier is Tier.HOST]
    host_parts = {part.index: device.allocate_host(part.size) for part in hosted}
    loads += [ResidentLoad(part, view=host_parts[part.index].view) for part in hosted]
    slot_bytes = _aligned(plan.slot_bytes)
    whole = device.allocate(slot_bytes * plan.num_slots)
    slots = [whole[index * slot_bytes : (index + 1) * slot_bytes] for index in range(plan.num_slots)]
    reads = any(planned.tier is Tier.DISK for planned in plan.parts)
    staging = [device.allocate_host(plan.slot_bytes) for _ in range(plan.num_staging if reads else 0)]
    assembly = _assembly(made, slots, [], loads, [], device)
    assembly.buffers = Buffers(slots, staging, host_parts)
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
    each = scratch_bytes(models.parts)
    scratch = [torch.empty(each, dtype=torch.uint8, device=place) for _ in range(plan.num_scratch)]
    layer_parts = {part.index: part for part in models.parts if part.layer >= 0}
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
    runner = ModelRunner(target, cache, Weights(layer_parts, slots, scratch), drafter, plan.request.threads)
    return EngineMemory(target, draft, made.tokenizer, plan, layer_parts, runner, views, loads, memory, device)


def _residents(made: ResolvedEngine) -> list[tuple[Part, Model]]:
    """The parts that are read once, and their model: the target except its streamed layers, and the whole draft."""
    models = made.models
    resident = {part.index for part in made.plan.parts if part.tier is Tier.DEVICE}
    once = [(part, models.target) for part in models.parts if part.layer < 0 or part.index in resident]
    return once + [(part, models.draft) for part in models.draft_parts if models.draft is not None]


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


def bind_load(load: ResidentLoad) -> None:
    """Bind resident parameters to their buffer until the engine closes; converted ones get memory of their own.

    In host memory, weights are packed where that makes products faster, and their plain bytes are given back.
    """
    if load.model is None:
        return
    buffer = load.buffer
    if buffer is None:
        assert load.view is not None, "a part is read into host memory or into a device's"
        buffer = as_tensor(load.view)
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
    assembly.buffers = Buffers((), ())
    memory, assembly.memory = assembly.memory, []
    device, assembly.device = assembly.device, None
    close_all(
        [
            *(partial(model.forget, own) for model, own in zip(models, parts, strict=True)),
            *(arena.close for arena in memory),
            *([] if device is None else [device.free]),
        ]
    )
