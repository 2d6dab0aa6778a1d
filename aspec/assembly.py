"""From a design to memory: two arenas, the caches, and what is to be read into them before the engine runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from aspec.design import Design, design
from aspec.drafting import Drafter, ModelDrafter
from aspec.io.layout import Part, as_tensor, scratch_bytes
from aspec.io.memory import SlotMemory, allocate, give_back
from aspec.kv import KVCache
from aspec.lookup import NgramDrafter
from aspec.model import Model
from aspec.options import EngineOptions
from aspec.plan import Plan, Tier
from aspec.runner import ModelRunner, Weights
from aspec.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Load:
    """A part that is read once, when the engine opens."""

    part: Part
    buffer: memoryview
    model: Model


@dataclass(slots=True)
class Assembly:
    """What an engine owns; mutable, because closing drops the references that keep memory alive."""

    target: Model
    draft: Model | None
    tokenizer: Tokenizer
    plan: Plan
    parts: dict[int, Part]  # streamed and resident layer parts of the target
    runner: ModelRunner
    slots: list[memoryview]
    loads: list[Load]
    memory: list[SlotMemory]


def assemble(options: EngineOptions) -> Assembly:
    """Design and allocate. Raises UserError where the input cannot be used."""
    made = design(options)
    give_back()  # what the search for a plan has left
    return _allocate(made)


def _allocate(made: Design) -> Assembly:
    """Two arenas (resident, slots) and the caches; no weight is read yet."""
    target, draft, plan = made.target, made.draft, made.plan
    resident = {part.index for part in plan.parts if part.tier is Tier.DEVICE}
    once = [(part, target) for part in made.parts if part.layer < 0 or part.index in resident]
    once += [(part, draft) for part in made.draft_parts if draft is not None]
    memory: list[SlotMemory] = []
    buffers = _carve(memory, [part.size for part, _ in once])
    slots = _carve(memory, [plan.slot_bytes] * plan.num_slots)
    scratch = torch.empty(scratch_bytes(made.parts), dtype=torch.uint8)
    layer_parts = {part.index: part for part in made.parts if part.layer >= 0}
    weights = Weights(layer_parts, [as_tensor(slot) for slot in slots], scratch)
    drafter: Drafter | None = NgramDrafter(made.continuations) if made.ngram else None
    if draft is not None:
        drafter = ModelDrafter(
            draft, _cache(draft, plan, plan.draft_slots), target.vocab_size, shared_noise=made.shared_noise
        )
    runner = ModelRunner(target, _cache(target, plan, plan.tree_slots, exact=made.exact), weights, drafter)
    loads = [Load(part, buffer, model) for (part, model), buffer in zip(once, buffers, strict=True)]
    return Assembly(target, draft, made.tokenizer, plan, layer_parts, runner, slots, loads, memory)


def _cache(model: Model, plan: Plan, slots: int, *, exact: bool = False) -> KVCache:
    return KVCache(model.kv_shapes(), plan.num_rows, plan.capacity + slots, model.dtype, "cpu", exact=exact)


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


def bind_load(load: Load) -> None:
    """Point resident parameters at their buffer, for good; what must be converted gets memory of its own."""
    scratch = torch.empty(load.part.scratch_bytes, dtype=torch.uint8)
    load.model.bind(replace(load.part, scratch_at=0), as_tensor(load.buffer), scratch)


def release(assembly: Assembly) -> None:
    """Drop every view of the weights and give their memory back; nothing may run any more."""
    for model in (assembly.target, assembly.draft):
        if model is not None:
            model.forget(tuple(load.part for load in assembly.loads if load.model is model))
    assembly.loads.clear()
    assembly.slots.clear()
    memory, assembly.memory = assembly.memory, []
    for arena in memory:
        arena.close()
