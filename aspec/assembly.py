"""From folders and options to everything an engine needs, before the first weight is read.

Order matters: headers and configs first, then the plan, then memory; a budget that cannot hold the plan, or two
models that do not share a vocabulary, are refused before anything is allocated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from aspec.attention import temporary_bytes, temporary_bytes_exact
from aspec.drafting import Drafter, ModelDrafter
from aspec.errors import BudgetError, UserError
from aspec.exact import BLOCK_ROWS
from aspec.hub import resolve
from aspec.io.layout import Part, scratch_bytes
from aspec.io.memory import PAGE, SlotMemory, allocate
from aspec.kv import KVCache
from aspec.lookup import NgramDrafter
from aspec.model import Model
from aspec.options import EngineOptions
from aspec.plan import Plan, PlannedPart, Speculation, Tier, draft_slots
from aspec.planner import Needs, Wishes, make_plan
from aspec.runner import ModelRunner, Weights
from aspec.text import Tokenizer, check_tokenizer, check_vocabulary

MIB = 1 << 20
NGRAM = "ngram"  # the name of the draft that needs no model
DEMO = Path(__file__).parent / "demo"
DEMO_BUDGET_BYTES = 14 * MIB  # below the demo target's 16 MB, so that streaming really happens
MAX_CHAIN, MAX_TREE, MAX_DEPTH = 24, 128, 32  # proposals of a row in a pass, and tokens of a path, at most
DEFAULT_CONTEXT = 4096
DEFAULT_ROWS = 4
SMALLEST_CONTEXT = 256
PREFILL_TOKENS = 512  # tokens of one prefill item
SMALLEST_PREFILL = 64
SMALLEST_TREE = 16
DRAW_BYTES = 64  # per token id of the vocabulary, while one row is drawn: scores, noise and their sum


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


@dataclass(frozen=True, slots=True)
class Design:
    """What an engine will be: headers and configs are read, the plan is decided, nothing is allocated."""

    target: Model
    draft: Model | None
    tokenizer: Tokenizer
    plan: Plan
    parts: tuple[Part, ...]
    draft_parts: tuple[Part, ...]
    exact: bool = False
    shared_noise: bool = True
    ngram: bool = False  # the draft needs no model: it looks up what the text has said before
    continuations: int | None = None  # of a lookup; None: as many as a tree is wide


def assemble(options: EngineOptions) -> Assembly:
    """Design and allocate. Raises UserError where the input cannot be used."""
    return _allocate(design(options))


def design(options: EngineOptions) -> Design:
    """Index both checkpoints and decide the plan, from headers alone. Raises UserError."""
    tell = options.progress or (lambda *_: None)
    tell("index", 0, 0)
    target_folder, draft_folder = folders(options)
    target = Model(target_folder, dtype=_dtype(options.dtype, target_folder))
    draft = Model(draft_folder, dtype=_dtype(options.dtype, draft_folder)) if draft_folder else None
    tokenizer = Tokenizer.load(target_folder)
    check_tokenizer(tokenizer, target.vocab_size)
    if draft is not None and draft_folder is not None:
        check_vocabulary(tokenizer, Tokenizer.load(draft_folder), target.vocab_size, draft.vocab_size)
    tell("plan", 0, 0)
    budget = options.device_memory or _default_budget(options)
    capacity = _capacity(options, target, draft)
    parts = target.plan(_part_bytes(target, budget))
    draft_parts = draft.plan(1 << 40) if draft else ()
    wishes = Wishes(
        budget_bytes=budget,
        num_rows=options.max_batch or max(DEFAULT_ROWS, options.num_groups or 1),
        num_groups=options.num_groups or 1,
        capacity=capacity,
        **_speculation(options, draft),
        resident_bytes=options.resident_memory,
        exact=is_exact(options),
    )
    plan = _plan(options, wishes, lambda wished: _needs(target, parts, draft, draft_parts, wished))
    return Design(target, draft, tokenizer, plan, tuple(parts), tuple(draft_parts), **_method(options))


def folders(options: EngineOptions) -> tuple[Path, Path | None]:
    """Where target and draft are; hub ids are fetched. Raises UserError where they cannot be found."""
    off = _is_off(options) or options.draft == NGRAM
    if options.target is None:
        if options.draft not in (None, NGRAM):
            raise UserError("--draft was given without --target: a draft serves one target; name both or neither.")
        return DEMO / "target", None if off else DEMO / "draft"
    target = resolve(str(options.target), what="target")
    if options.draft is None or off:
        return target, None
    return target, resolve(str(options.draft), what="draft")


def _dtype(name: str, folder: Path) -> torch.dtype | None:
    """The compute dtype; half precision runs as bfloat16 on a CPU, where fp16 products are very slow."""
    known = {"auto": None, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32}
    known |= {"fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16}
    if name not in known:
        raise UserError(f"--dtype {name!r} is not known: expected one of {', '.join(known)}.")
    return known[name]


def _plan(options: EngineOptions, wishes: Wishes, needs: Callable[[Wishes], Needs]) -> Plan:
    """What was left open shrinks until the budget holds it: rows first, then context, prefill items and drafts.

    Raises BudgetError if even the smallest does not fit.
    """
    for rows in _halved(wishes.num_rows, options.max_batch, wishes.num_groups):
        for capacity in _halved(wishes.capacity, options.max_context, SMALLEST_CONTEXT):
            longest = min(options.prefill_tokens or PREFILL_TOKENS, rows * capacity)
            for prefill in _halved(longest, options.prefill_tokens, SMALLEST_PREFILL):
                for most in _halved(wishes.max_draft_tokens, options.num_draft_tokens, SMALLEST_TREE):
                    wished = replace(
                        wishes, num_rows=rows, capacity=capacity, prefill_tokens=prefill, max_draft_tokens=most
                    )
                    try:
                        return make_plan(needs(wished), wished)
                    except BudgetError as error:
                        refusal = error
    raise refusal


def _halved(start: int, fixed: int | None, least: int) -> list[int]:
    """``start`` and its halves down to ``least``; only itself where the user has fixed it."""
    choices = [start]
    while fixed is None and choices[-1] // 2 >= least:
        choices.append(choices[-1] // 2)
    return choices


def _default_budget(options: EngineOptions) -> int:
    """Most of the memory that is free now; for the embedded demo less than its target, to show the streaming."""
    if options.target is None:
        return DEMO_BUDGET_BYTES
    return int(psutil.virtual_memory().available * 0.7)


def _capacity(options: EngineOptions, target: Model, draft: Model | None) -> int:
    """Tokens per row: what was asked for, never beyond what both models were built for."""
    limits = [model.max_context for model in (target, draft) if model is not None and model.max_context]
    most = min(limits, default=DEFAULT_CONTEXT)
    return min(options.max_context or DEFAULT_CONTEXT, most)


def _method(options: EngineOptions) -> dict[str, Any]:
    """How the draft proposes."""
    ngram = options.draft == NGRAM and not _is_off(options)
    one = 1 if options.speculation == "chain" else None
    return {"exact": is_exact(options), "shared_noise": options.shared_noise, "ngram": ngram, "continuations": one}


def is_exact(options: EngineOptions) -> bool:
    """Whether steps are exact: on a CPU unless refused, never by the machine at hand."""
    return options.exact if options.exact is not None else options.device != "cuda"


def _is_off(options: EngineOptions) -> bool:
    return options.num_draft_tokens == 0 or options.speculation == "off"


def _speculation(options: EngineOptions, draft: Model | None) -> dict[str, Any]:
    """What of the wishes speaks of drafts."""
    ngram = options.draft == NGRAM
    if _is_off(options) or (draft is None and not ngram):
        return {}
    tree = ngram or options.speculation != "chain"  # a lookup's chain is a tree of one branch
    most = MAX_TREE if tree else MAX_CHAIN
    return {
        "speculation": Speculation.TREE if tree else Speculation.CHAIN,
        "max_draft_tokens": most if options.num_draft_tokens is None else options.num_draft_tokens,
        "fixed_draft_tokens": options.num_draft_tokens,
        "max_draft_depth": options.draft_depth or MAX_DEPTH,
        "fixed_draft_depth": options.draft_depth,
        "draft_ahead": options.draft_ahead and not ngram,
    }


def _part_bytes(target: Model, budget: int) -> int:
    """Parts small enough that slots take little of the budget, large enough for the disk's full rate."""
    return max(PAGE, min(32 * MIB, budget // 24))


def _needs(
    target: Model,
    parts: Sequence[Part],
    draft: Model | None,
    draft_parts: Sequence[Part],
    wishes: Wishes,
) -> Needs:
    layer_parts = tuple(
        PlannedPart(part.index, part.layer, part.nbytes, part.size, scratch_bytes=part.scratch_bytes)
        for part in parts
        if part.layer >= 0
    )
    kv = KVCache.bytes_per_token(target.kv_shapes(), target.dtype)
    draft_kv = 0 if draft is None else KVCache.bytes_per_token(draft.kv_shapes(), draft.dtype)
    spare = draft_slots(wishes.speculation, wishes.max_draft_tokens)
    nodes = wishes.max_draft_tokens if spare else 0
    fixed = {
        "embeddings, norms and head": sum(part.size + part.scratch_bytes for part in parts if part.layer < 0),
        "draft weights": sum(part.size + part.scratch_bytes for part in draft_parts),
        "scratch": scratch_bytes(parts),
        "activations": _activation_bytes(target, wishes),
        "draft trees": wishes.num_rows * (nodes * kv + spare * draft_kv),
    }
    return Needs(layer_parts, target.num_layers, fixed, kv + draft_kv)


def _activation_bytes(target: Model, wishes: Wishes) -> int:
    """Hidden states, and the widest of what comes by turns: attention, the rest of a layer, the head."""
    verified = wishes.num_rows * (1 + wishes.max_draft_tokens)
    tokens = max(wishes.prefill_tokens, verified)
    text = target.config.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    wide = max(wide) if isinstance(wide, list | tuple) else int(wide)
    item = target.dtype.itemsize
    attention = tokens * 4 * hidden * item
    if wishes.exact:
        slot = max(shape[0] * (shape[1] + shape[2]) * item for shape in target.kv_shapes() if shape)
        attention += temporary_bytes_exact(wishes.num_rows, heads, tokens, wishes.capacity, slot)
    else:
        attention += temporary_bytes(1, heads, tokens, wishes.capacity)
    logits = -(-verified // BLOCK_ROWS) * BLOCK_ROWS if wishes.exact else verified
    head = logits * target.vocab_size * item * 2 + target.vocab_size * DRAW_BYTES
    joining = min(wishes.prefill_pass_tokens, wishes.num_rows * wishes.capacity)
    waiting = joining * (hidden * item + wishes.capacity)  # their hidden states, and what each may see
    return waiting + tokens * 2 * hidden * item + max(attention, tokens * 3 * wide * item, head)


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


def as_tensor(buffer: memoryview) -> torch.Tensor:
    """A uint8 tensor over the same bytes."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


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
