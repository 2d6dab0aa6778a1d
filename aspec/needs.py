"""What a plan is made from: the models a user names, what was asked of them, and the bytes that any plan must hold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aspec.attention import DEVICE_SCORE_BYTES, MAX_SCORE_BYTES, temporary_bytes, temporary_bytes_exact
from aspec.devices import ALIGNMENT, Kind, kind_of
from aspec.errors import UserError
from aspec.exact import BLOCK_ROWS
from aspec.graphs import graph_bytes
from aspec.hub import resolve
from aspec.io.host_memory import available_bytes
from aspec.io.layout import Part, scratch_bytes
from aspec.io.memory import PAGE
from aspec.kv import KVCache
from aspec.model import Model
from aspec.offload import pinned_bytes
from aspec.options import EngineOptions
from aspec.plan import PlannedPart, Speculation, draft_slots
from aspec.planner import Needs, Wishes
from aspec.tasks.ngram import index_bytes
from aspec.tasks.task import COMPUTE, CPU

MIB = 1 << 20
NGRAM = "ngram"  # the name of the draft that needs no model
DEMO = Path(__file__).parent / "demo"
DEMO_BUDGET_BYTES = 14 * MIB  # below the demo target's 16 MB, so that streaming really happens
DEMO_RESIDENT_BYTES = 4 * MIB  # of its layers on a device, for the same reason
MAX_CHAIN, MAX_TREE, MAX_DEPTH = 24, 128, 32  # proposals of a row in a pass, and tokens of a path, at most
MOST_TREES = 8  # rows for which trees are grown where nobody has said what is to be done: beyond, compute binds
DEFAULT_CONTEXT = 4096
DEFAULT_ROWS = 4
PREFILL_TOKENS = 512  # tokens of one prefill item
MICRO_BATCHES = 2  # where attention has a lane of its own: one attends while the other computes
HOST_SHARE, DEVICE_SHARE = 0.7, 0.9  # of the memory that is free: what is taken where nobody has said
DRAW_BYTES = 64  # per token id of the vocabulary, while one row is drawn: scores, noise and their sum


@dataclass(frozen=True, slots=True)
class Models:
    """A target and its draft as their headers tell, or their configurations; nothing is read."""

    target: Model
    draft: Model | None
    parts: tuple[Part, ...]
    draft_parts: tuple[Part, ...]
    budget_bytes: int
    kind: Kind | None = None  # of device; None: the host's own memory

    def needs(self, wishes: Wishes) -> Needs:
        """What any plan for these wishes holds, and the parts among which it chooses.

        A draft that proposes nothing is not loaded.
        """
        draft, draft_parts = (self.draft, self.draft_parts) if wishes.max_draft_tokens else (None, ())
        made = _needs(self.target, self.parts, draft, draft_parts, wishes)
        return made if self.kind is None else replace(made, fixed={**made.fixed, **_beside(self.kind, draft, wishes)})


def _beside(kind: Kind, draft: Model | None, wishes: Wishes) -> dict[str, int]:
    """What a device holds for itself."""
    held = {"workspaces": kind.workspace_bytes}
    if kind.captures and draft is not None:
        spare = draft_slots(wishes.speculation, wishes.max_draft_tokens)
        held["draft graphs"] = graph_bytes(draft, wishes.num_rows, wishes.capacity + spare, spare)
    return held


def read_models(options: EngineOptions, *, budget_bytes: int | None = None, outlined: bool = False) -> Models:
    """Index both checkpoints, from headers alone. Raises UserError.

    ``budget_bytes`` goes before the options'; ``outlined``: folders with nothing but a configuration will do.
    """
    target_folder, draft_folder = folders(options)
    kind = kind_of(options.device)
    place, alignment = (torch.device("cpu"), 1) if kind is None else (kind.place, ALIGNMENT)
    how: dict[str, Any] = {"dtype": compute_dtype(options.dtype), "device": place, "outlined": outlined}
    target = Model(target_folder, **how)
    draft = None if draft_folder is None else Model(draft_folder, **how)
    budget = budget_bytes or options.device_memory or _default_budget(options)
    parts = target.plan(_part_bytes(budget), alignment)
    draft_parts = draft.plan(1 << 40, alignment) if draft else ()
    return Models(target, draft, parts, draft_parts, budget, kind)


def wishes_of(options: EngineOptions, models: Models) -> Wishes:
    """What was asked for, and defaults for the rest."""
    return Wishes(
        budget_bytes=models.budget_bytes,
        num_rows=options.max_batch or max(DEFAULT_ROWS, options.num_groups or 1),
        num_groups=options.num_groups or 1,
        capacity=_capacity(options, models.target, models.draft),
        prefill_tokens=options.prefill_tokens or PREFILL_TOKENS,
        **_speculation(options, models.draft),
        **_attention(options),
        resident_bytes=_resident_bytes(options),
        exact=is_exact(options),
        host_bytes=host_bytes(options),
    )


def folders(options: EngineOptions) -> tuple[Path, Path | None]:
    """Where target and draft are; hub ids are fetched. Raises UserError where they cannot be found."""
    off = is_off(options) or options.draft == NGRAM
    if options.target is None:
        if options.draft not in (None, NGRAM):
            raise UserError("--draft was given without --target: a draft serves one target; name both or neither.")
        return DEMO / "target", None if off else DEMO / "draft"
    target = resolve(str(options.target), what="target")
    if options.draft is None or off:
        return target, None
    return target, resolve(str(options.draft), what="draft")


def compute_dtype(name: str) -> torch.dtype | None:
    """The compute dtype; None: the checkpoint's own."""
    known = {"auto": None, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32}
    known |= {"fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16}
    if name not in known:
        raise UserError(f"--dtype {name!r} is not known: expected one of {', '.join(known)}.")
    return known[name]


def _default_budget(options: EngineOptions) -> int:
    """Most of the memory that is free now; for the embedded demo less than its target, to show the streaming."""
    kind = kind_of(options.device)
    if kind is not None:
        return int(kind.free_bytes() * DEVICE_SHARE)
    return DEMO_BUDGET_BYTES if options.target is None else int(available_bytes() * HOST_SHARE)


def _resident_bytes(options: EngineOptions) -> int | None:
    """Of layers at most; a device has room for all of the embedded demo, which is to show the streaming."""
    shows = options.target is None and options.device_memory is None and kind_of(options.device) is not None
    return DEMO_RESIDENT_BYTES if options.resident_memory is None and shows else options.resident_memory


def host_bytes(options: EngineOptions) -> int | None:
    """Host memory for pinned layers and KV behind a device's link; None where the device is the host's own memory."""
    if kind_of(options.device) is None:
        return None
    return options.host_memory or int(available_bytes() * HOST_SHARE)


def _capacity(options: EngineOptions, target: Model, draft: Model | None) -> int:
    """Tokens per row: what was asked for, never beyond what both models were built for."""
    limits = [model.max_context for model in (target, draft) if model is not None and model.max_context]
    most = min(limits, default=DEFAULT_CONTEXT)
    return min(options.max_context or DEFAULT_CONTEXT, most)


def is_exact(options: EngineOptions) -> bool:
    """Whether steps are exact: on a CPU, where it was proved, unless refused; elsewhere if asked for."""
    return options.exact if options.exact is not None else kind_of(options.device) is None


def is_off(options: EngineOptions) -> bool:
    """Whether nothing is to be proposed."""
    return options.num_draft_tokens == 0 or options.speculation == "off"


def _speculation(options: EngineOptions, draft: Model | None) -> dict[str, Any]:
    """What of the wishes speaks of drafts."""
    ngram = options.draft == NGRAM
    if is_off(options) or (draft is None and not ngram):
        return {}
    many = options.speculation == "auto" and (options.max_batch or 1) > MOST_TREES
    tree = ngram or not (many or options.speculation == "chain")  # a lookup's chain is a tree of one branch
    most = MAX_TREE if tree else MAX_CHAIN
    return {
        "speculation": Speculation.TREE if tree else Speculation.CHAIN,
        "max_draft_tokens": most if options.num_draft_tokens is None else options.num_draft_tokens,
        "fixed_draft_tokens": options.num_draft_tokens,
        "max_draft_depth": options.draft_depth or MAX_DEPTH,
        "fixed_draft_depth": options.draft_depth,
        "draft_ahead": options.draft_ahead and not ngram,
    }


def _attention(options: EngineOptions) -> dict[str, Any]:
    """What of the wishes speaks of where attention runs."""
    return {"attention_resource": CPU, "micro_batches": MICRO_BATCHES} if options.attention == "cpu" else {}


def _part_bytes(budget: int) -> int:
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
    kv = KVCache.bytes_per_token(target.kv_shapes(offloaded=wishes.kv_on_host), target.dtype)
    draft_kv = 0 if draft is None else KVCache.bytes_per_token(draft.kv_shapes(), draft.dtype)
    spare = draft_slots(wishes.speculation, wishes.max_draft_tokens)
    nodes = wishes.num_rows * wishes.max_draft_tokens * kv if spare else 0  # that the target verifies
    fixed = {
        "embeddings, norms and head": sum(part.size + part.scratch_bytes for part in parts if part.layer < 0),
        "draft weights": sum(part.size + part.scratch_bytes for part in draft_parts),
        "scratch": scratch_bytes(parts),
        "activations": _activation_bytes(target, wishes),
        "draft trees": wishes.num_rows * spare * draft_kv + (0 if wishes.kv_on_host else nodes),
    }
    if wishes.host_bytes is None and wishes.speculation is Speculation.TREE and wishes.max_draft_tokens:
        fixed["n-gram index"] = wishes.num_rows * index_bytes(wishes.capacity)
    if draft is not None and wishes.host_bytes is not None:
        beside = replace(wishes, attention_resource=COMPUTE)  # whatever the target's layers do
        fixed["draft activations"] = _activation_bytes(draft, beside)  # it has a stream of its own there
    if not wishes.kv_on_host:
        return Needs(layer_parts, target.num_layers, fixed, kv, draft_kv)
    on_host = {"draft trees": nodes, **_host_bytes(target, wishes)}
    return Needs(layer_parts, target.num_layers, fixed, kv, draft_kv, on_host, target.offload.crossing)


def _activation_bytes(target: Model, wishes: Wishes) -> int:
    """Hidden states, and the widest of what comes by turns: attention, the rest of a layer, the head."""
    verified = wishes.num_rows * (1 + wishes.max_draft_tokens)
    tokens = max(wishes.prefill_tokens, verified)
    text = target.config.get_text_config()
    hidden = int(text.hidden_size)
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    wide = max(wide) if isinstance(wide, list | tuple) else int(wide)
    item = target.dtype.itemsize
    projected = tokens * 4 * hidden * item
    attention = projected + _attention_bytes(target, wishes, tokens)
    logits = -(-verified // BLOCK_ROWS) * BLOCK_ROWS if wishes.exact else verified
    head = logits * target.vocab_size * item * 2 + target.vocab_size * DRAW_BYTES
    joining = min(wishes.prefill_pass_tokens, wishes.num_rows * wishes.capacity)
    others = max(0, joining - wishes.prefill_tokens)  # that wait while one item is in a layer
    waiting = others * (hidden * item + wishes.capacity)  # their hidden states, and what each may see
    layer = tokens * 3 * wide * item
    if wishes.kv_on_host:
        held = (verified + 2 * wishes.prefill_tokens) * target.offload.per_token
        return waiting + tokens * 2 * hidden * item + held + max(projected, layer, head)
    if wishes.attention_resource == CPU:
        return (
            waiting + tokens * 2 * hidden * item + _split_bytes(target, wishes, verified) + attention + max(layer, head)
        )
    return waiting + tokens * 2 * hidden * item + max(attention, layer, head)


def _attention_bytes(target: Model, wishes: Wishes, tokens: int) -> int:
    """Scores and weights of one item of so many tokens."""
    heads = int(target.config.get_text_config().num_attention_heads)
    if not wishes.exact:
        on_device = wishes.host_bytes is not None and not wishes.kv_on_host
        most = DEVICE_SCORE_BYTES if on_device else MAX_SCORE_BYTES
        return temporary_bytes(1, heads, tokens, wishes.capacity, most)
    slot = _slot_bytes(target, wishes)
    return temporary_bytes_exact(wishes.num_rows, heads, tokens, wishes.capacity, slot)


def _slot_bytes(target: Model, wishes: Wishes) -> int:
    """Keys and values of one token in the layer that keeps most of it."""
    shapes = target.kv_shapes(offloaded=wishes.kv_on_host)
    return max(shape[0] * (shape[1] + shape[2]) * target.dtype.itemsize for shape in shapes if shape)


def _host_bytes(target: Model, wishes: Wishes) -> dict[str, int]:
    """What attention beside KV in host memory takes there: buffers for what crosses, and one item's attention."""
    verified = wishes.num_rows * (1 + wishes.max_draft_tokens)
    joining = min(wishes.prefill_pass_tokens, wishes.num_rows * wishes.capacity)
    rows = wishes.num_rows * wishes.capacity * _slot_bytes(target, wishes)  # gathered, where they are apart
    masks = (verified + joining) * wishes.capacity
    largest = max(map(sum, target.offload.crossing))
    return {
        "crossing": pinned_bytes(verified + 2 * wishes.prefill_tokens, largest),
        "attention": _attention_bytes(target, wishes, max(wishes.prefill_tokens, verified)) + rows + masks,
    }


def _split_bytes(target: Model, wishes: Wishes, verified: int) -> int:
    """What items hold between the projections and the end of a layer: all decoding rows, and two prompts or chunks."""
    per_token, per_slot = target.split_bytes
    slots = (wishes.num_rows + 1) * wishes.capacity  # two chunks of a prompt see the same row
    return (verified + 2 * wishes.prefill_tokens) * per_token + slots * per_slot
