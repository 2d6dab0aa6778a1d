"""The input of a plan: target and draft from their headers, the user's request, the bytes that every plan holds."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from aspec.backends.registry import ALIGNMENT, Kind
from aspec.errors import UserError
from aspec.expert_plan import ExpertShape
from aspec.io.memory import PAGE
from aspec.models.attention import DEVICE_SCORE_BYTES, temporary_bytes, temporary_bytes_exact
from aspec.models.exact.int4_panels import panel_bytes
from aspec.models.exact.panels import buffer_bytes
from aspec.models.exact.recipe import BLOCK_ROWS, MOST_PACKED_BYTES, PACK_BLOCKS
from aspec.models.exact.tiles import MAX_SCORE_BYTES
from aspec.models.experts.layout import RoutedLayers
from aspec.models.kv_cache import KVCache
from aspec.models.kv_offload import pinned_bytes
from aspec.models.model import Model
from aspec.models.state.shapes import node_bytes, row_bytes
from aspec.models.weights.parts import Part, merge_bytes
from aspec.plan import PlannedPart, PlanRequest, Speculation, draft_slots
from aspec.planning.placement import Footprint
from aspec.planning.resolve import Resolved
from aspec.speculation.draft_graphs import graph_bytes
from aspec.speculation.ngram_index import index_bytes
from aspec.tasks.task import COMPUTE, CPU

MIB = 1 << 20
MAX_CHAIN, MAX_TREE, MAX_DEPTH = 24, 128, 64  # most proposals of a row in a pass (chain, tree); tokens of a path
MOST_TREES = 8  # most rows for which trees are the default; with more rows, compute is the bottleneck
FEW_EXPERTS = 4  # for each that a token chooses
DEFAULT_CONTEXT = 4096
DEFAULT_ROWS = 4
PREFILL_TOKENS = 512  # tokens of one prefill item
MICRO_BATCHES = 2  # if attention has its own lane: one micro batch attends while the other one computes
LEAST_BLOCK = 16  # rows; where proven blocks are as small, weights are packed for a few of them
MIXES = 3  # fp32 copies of a hidden state of several streams, while a layer mixes them
DRAW_BYTES = 64  # per vocabulary entry while one row is drawn: scores, noise and their sum


@dataclass(frozen=True, slots=True)
class Models:
    """A target and its draft, known from their headers or configurations; no weights are read."""

    resolved: Resolved
    target: Model
    draft: Model | None
    parts: tuple[Part, ...]
    draft_parts: tuple[Part, ...]
    on_demand: RoutedLayers | None = None  # the layers whose experts are in no part: they are read when chosen

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the models, a text each."""
        return self.target.remarks + (() if self.draft is None else self.draft.remarks)

    @property
    def nbytes(self) -> int:
        """Bytes of the target's stored weights."""
        shape = None if self.on_demand is None else self.on_demand.shape
        return sum(part.nbytes for part in self.parts) + (0 if shape is None else shape.total_bytes)

    def footprint(self, request: PlanRequest) -> Footprint:
        """The bytes that every plan for this request holds, and the parts that a plan places.

        The draft is left out if it may propose no tokens.
        """
        models = self if request.max_draft_tokens else self.without_draft()
        found = _footprint(models.target, models.parts, models.draft, models.draft_parts, request)
        if self.on_demand is not None and (shape := self.on_demand.shape) is not None:
            held = {"expert scratch": shape.scratch_bytes, "routed tokens": _routed_bytes(self.target, shape, request)}
            found = replace(found, experts=shape, fixed={**found.fixed, **held})
        kind = self.resolved.kind
        if kind is None:
            return found
        return replace(found, fixed={**found.fixed, **_device_overheads(kind, models.draft, request)})

    def reading_experts(self, *, on_demand: bool) -> "Models":
        """The same models, whose experts are read on demand or with their layers.

        Raises UserError if they cannot be read on demand.
        """
        alignment = 1 if self.resolved.kind is None else ALIGNMENT
        routed = _routed(self.resolved, self.target, alignment) if on_demand else None
        parts = self.target.parts(_part_bytes(self.resolved.budget_bytes), alignment, routed)
        return replace(self, parts=parts, on_demand=routed)

    def without_draft(self) -> "Models":
        """The target alone."""
        return replace(self, draft=None, draft_parts=())


def _routed(resolved: Resolved, target: Model, alignment: int) -> RoutedLayers:
    """The layers whose experts are read on demand. Raises UserError if there are none, or if they cannot run so."""
    routed = target.routed(alignment)
    if not routed.layers:
        raise UserError(f"{target.name} has no experts that can be read one by one. Leave out --experts on-demand.")
    if resolved.options.attention == "cpu":
        raise UserError("experts are read on demand in layers that attend themselves. Leave out --attention cpu.")
    return routed


def _routed_bytes(target: Model, shape: ExpertShape, request: PlanRequest) -> int:
    """Bytes that all items of a pass hold between a layer's router and its end, per token about six hidden states.

    In addition the results of its experts, and scores of all experts in fp32 with their order.
    """
    text = target.config.get_text_config()
    joining = min(request.prefill_pass_tokens, request.num_rows * request.capacity)
    tokens = joining + request.num_rows * (1 + request.max_draft_tokens)
    token_bytes = (6 + shape.top_k) * int(text.hidden_size) * target.dtype.itemsize + 8 * max(shape.num_experts)
    return tokens * token_bytes


def _device_overheads(kind: Kind, draft: Model | None, request: PlanRequest) -> dict[str, int]:
    """Label -> bytes that a device needs for its own libraries and captured graphs."""
    held = {"workspaces": kind.workspace_bytes}
    if kind.captures and draft is not None:
        spare = draft_slots(request.speculation, request.max_draft_tokens)
        held["draft graphs"] = graph_bytes(draft, request.num_rows, request.draft_capacity + spare, spare)
    return held


def read_models(resolved: Resolved, *, outlined: bool = False) -> Models:
    """Index both checkpoints from their headers. Raises UserError.

    ``outlined``: a folder may hold nothing but a configuration.
    """
    kind = resolved.kind
    place, alignment = (torch.device("cpu"), 1) if kind is None else (kind.place, ALIGNMENT)
    how: dict[str, Any] = {"dtype": resolved.dtype, "device": place, "outlined": outlined}
    asked = {"packed": True, "decoded": False}.get(resolved.options.products)
    target = Model(resolved.target, adapter=resolved.adapter, packed_products=asked, **how)
    resolved = _with_possible_exactness(resolved, target)
    draft = None if resolved.draft is None else Model(resolved.draft, adapter=resolved.draft_adapter, **how)
    draft_parts = draft.parts(1 << 40, alignment) if draft else ()
    models = Models(resolved, target, draft, (), draft_parts)
    models = models.reading_experts(on_demand=resolved.options.experts == "on-demand")
    for text in _context_warnings(models):
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return models


def _with_possible_exactness(resolved: Resolved, target: Model) -> Resolved:
    """Passes that are not exact where exact ones are not possible. Raises UserError if they were asked for."""
    if not resolved.exact or target.facts.why_not_exact is None:
        return resolved
    if resolved.options.exact:
        raise UserError(f"{target.name} has no exact passes: {target.facts.why_not_exact}. Leave out --exact.")
    return replace(resolved, exact=False)


def _context_warnings(models: Models) -> Iterator[str]:
    """Sentences on rows that may be longer than a model was made for, or shorter than the user has asked for."""
    target, draft, asked = models.target, models.draft, models.resolved.asked_context
    capacity = _capacity(models)
    if asked is not None and target.max_context is not None and capacity > target.max_context:
        yield (
            f"--max-context {asked} exceeds the {target.max_context} tokens that {target.name} was made for: the "
            f"text beyond them may be poor"
        )
    if asked is not None and (possible := target.context.possible) is not None and asked > possible:
        yield f"--max-context {asked} exceeds the {possible} positions of {target.name}: rows end there"
    if draft is not None and draft.max_context is not None and capacity > draft.max_context:
        yield (
            f"the draft {draft.name} reads {draft.max_context} tokens, a row may have {capacity}: longer rows go on "
            f"without proposals"
        )


def request_for(models: Models) -> PlanRequest:
    """The user's settings, and defaults for the others."""
    resolved, options = models.resolved, models.resolved.options
    return PlanRequest(
        budget_bytes=resolved.budget_bytes,
        num_rows=options.max_batch or max(DEFAULT_ROWS, options.num_groups or 1),
        num_groups=options.num_groups or 1,
        capacity=_capacity(models),
        draft_context=None if models.draft is None else models.draft.max_context,
        prefill_tokens=options.prefill_tokens or PREFILL_TOKENS,
        **_speculation(resolved),
        **_attention(resolved),
        resident_bytes=resolved.resident_bytes,
        exact=resolved.exact,
        host_bytes=resolved.host_bytes,
        on_demand=models.on_demand is not None,
        prefetch_experts=_prefetches(models),
    )


def _prefetches(models: Models) -> bool:
    """Whether experts are read ahead: as asked, or where passes touch most of a layer's, so that guesses are right."""
    asked = models.resolved.options.prefetch_experts
    shape = None if models.on_demand is None else models.on_demand.shape
    return asked if asked is not None else shape is not None and max(shape.num_experts) <= FEW_EXPERTS * shape.top_k


def _capacity(models: Models) -> int:
    """Tokens per row: the user's number or the default, limited by the target's context."""
    wanted = models.resolved.options.max_context or DEFAULT_CONTEXT
    return min(wanted, models.target.context.most(models.resolved.asked_context) or wanted)


def _speculation(resolved: Resolved) -> dict[str, Any]:
    """The fields of a request for speculation; none if there is no draft."""
    options, method = resolved.options, resolved.method
    if not method.shapes or method.if_free:
        return {}
    few_branches = method.agrees or (options.max_batch or 1) > MOST_TREES
    asked = Speculation.CHAIN if options.speculation == "auto" and few_branches else options.speculation
    chain = asked == Speculation.CHAIN and Speculation.CHAIN in method.shapes
    most = MAX_CHAIN if chain else MAX_TREE
    return {
        "speculation": Speculation.CHAIN if chain else Speculation.TREE,
        "max_draft_tokens": most if options.num_draft_tokens is None else options.num_draft_tokens,
        "fixed_draft_tokens": options.num_draft_tokens,
        "max_draft_depth": options.draft_depth or MAX_DEPTH,
        "fixed_draft_depth": options.draft_depth,
        "draft_ahead": options.draft_ahead and method.grows_ahead,
        "from_text": not method.has_model,
    }


def _attention(resolved: Resolved) -> dict[str, Any]:
    """The fields of a request for the place of attention."""
    on_cpu = resolved.options.attention == "cpu"
    return {"attention_resource": CPU, "micro_batches": MICRO_BATCHES} if on_cpu else {}


def _part_bytes(budget: int) -> int:
    """The most bytes of a part: slots take little of the budget, and the disk reaches its full rate."""
    return max(PAGE, min(32 * MIB, budget // 24))


def _footprint(
    target: Model,
    parts: Sequence[Part],
    draft: Model | None,
    draft_parts: Sequence[Part],
    request: PlanRequest,
) -> Footprint:
    layer_parts = tuple(
        PlannedPart(
            part.index,
            part.layer,
            part.nbytes,
            part.size,
            scratch_bytes=part.scratch_bytes,
            decoded_bytes=part.decoded_bytes,
            in_place=not part.passes_through,
            repeatable=not part.updates,
        )
        for part in parts
        if part.layer >= 0
    )
    outside = [part for part in parts if part.layer < 0]
    kv = KVCache.bytes_per_token(target.kv_shapes(offloaded=request.kv_on_host), target.dtype)
    draft_kv = 0 if draft is None else KVCache.bytes_per_token(draft.kv_shapes(), draft.dtype)
    spare = draft_slots(request.speculation, request.max_draft_tokens)
    nodes = request.num_rows * request.max_draft_tokens * kv if spare else 0  # for the tokens that the target verifies
    fixed = {
        "embeddings, norms and head": sum(part.resident_bytes for part in outside),
        "draft weights": sum(part.resident_bytes for part in draft_parts),
        "adapter merge": merge_bytes((*parts, *draft_parts)),
        "activations": _activation_bytes(target, request),
        "recurrent states": _state_bytes(target, request.num_rows, request.log_slots, num_states=2)
        + (0 if draft is None else _state_bytes(draft, request.num_rows, request.draft_log_slots)),
        "draft trees": request.num_rows * spare * draft_kv + (0 if request.kv_on_host else nodes),
    }
    if request.host_bytes is None and request.speculation is Speculation.TREE and request.max_draft_tokens:
        fixed["n-gram index"] = request.num_rows * index_bytes(request.capacity)
    if draft is not None and request.host_bytes is not None:
        # the draft's layers are never split, and its rows end at its own context
        on_device = replace(request, attention_resource=COMPUTE, capacity=request.draft_capacity)
        fixed["draft activations"] = _activation_bytes(draft, on_device)  # the draft has its own stream
    loading = max((part.size for part in (*outside, *draft_parts) if part.passes_through), default=0)
    found = Footprint(layer_parts, target.num_layers, fixed, kv, draft_kv, loading_bytes=loading)
    if not request.kv_on_host:
        return found
    on_host = {"draft trees": nodes, **_host_bytes(target, request)}
    return replace(found, host_fixed=on_host, crossing=target.offload.crossing)


def _state_bytes(model: Model, num_rows: int, log_slots: int, num_states: int = 1) -> int:
    """Bytes of the recurrent layers: the states of every row, and a log of the nodes that may be taken back."""
    shapes = model.state_shapes
    return num_rows * (num_states * row_bytes(shapes, model.dtype) + log_slots * node_bytes(shapes, model.dtype))


def _activation_bytes(target: Model, request: PlanRequest) -> int:
    """Bytes of hidden states, plus the largest of three steps: attention, the rest of a layer, the head."""
    verified = request.num_rows * (1 + request.max_draft_tokens)
    tokens = max(request.prefill_tokens, verified)
    text = target.config.get_text_config()
    hidden = int(text.hidden_size)
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    wide = max(wide) if isinstance(wide, list | tuple) else int(wide)
    item = target.dtype.itemsize
    state = target.facts.width * item  # of one token between layers
    streams = tokens * MIXES * (target.facts.width - hidden) * 4
    projected = tokens * 4 * hidden * item + streams
    attention = projected + _attention_bytes(target, request, tokens)
    logits = -(-verified // BLOCK_ROWS) * BLOCK_ROWS if request.exact else verified
    head = logits * target.vocab_size * item * 2 + target.vocab_size * DRAW_BYTES
    joining = min(request.prefill_pass_tokens, request.num_rows * request.capacity)
    others = max(0, joining - request.prefill_tokens)  # tokens that wait while one item is in a layer
    waiting = others * (state + request.capacity)  # their hidden states and their masks
    packs = request.exact and request.host_bytes is None and tokens >= PACK_BLOCKS * LEAST_BLOCK
    packed = min(MOST_PACKED_BYTES, wide * hidden * item) if packs else 0
    layer = tokens * 3 * wide * item + max(packed, _panel_bytes(target, request, hidden, wide)) + streams
    own = [
        shape.step_bytes(1 + request.max_draft_tokens, request.num_rows, tokens, target.dtype)
        for shape in target.state_shapes
        if shape
    ]
    layer = max(layer, projected + max(own)) if own else layer
    if request.kv_on_host:
        held = (verified + 2 * request.prefill_tokens) * target.offload.per_token
        return waiting + tokens * 2 * state + held + max(projected, layer, head)
    if request.attention_resource == CPU:
        return waiting + tokens * 2 * state + _split_bytes(target, request, verified) + attention + max(layer, head)
    return waiting + tokens * 2 * state + max(attention, layer, head)


def _panel_bytes(target: Model, request: PlanRequest, hidden: int, wide: int) -> int:
    """Bytes of one thread in which weights become fp32 for a while: of 4 bits, for many rows, and of bf16."""
    if request.host_bytes is not None:
        return 0
    found = [] if target.dtype is torch.float32 else [buffer_bytes(wide, hidden), buffer_bytes(hidden, wide)]
    if not request.exact:
        own = (weight.sizes for weight in itertools.chain.from_iterable(target.packed.values()))
        found += [panel_bytes(sizes) for sizes in own if sizes is not None]
    return max(found, default=0)


def _attention_bytes(target: Model, request: PlanRequest, tokens: int) -> int:
    """Bytes of the scores and weights of one item of so many tokens."""
    if not any(target.kv_shapes()):
        return 0
    heads = int(target.config.get_text_config().num_attention_heads)
    if target.facts.own_attention:
        return own_attention_bytes(target, tokens, request.capacity)
    if not request.exact:
        on_device = request.host_bytes is not None and not request.kv_on_host
        most = DEVICE_SCORE_BYTES if on_device else MAX_SCORE_BYTES
        mask = 0 if on_device else tokens * request.capacity * target.dtype.itemsize  # torch's kernel adds it to scores
        return temporary_bytes(1, heads, tokens, request.capacity, most) + mask + _index_bytes(target, request, tokens)
    slot, shapes = _slot_bytes(target, request), target.kv_shapes(offloaded=request.kv_on_host)
    head = max(shape[2] for shape in shapes if shape) * target.dtype.itemsize
    tree = 1 + request.max_draft_tokens if request.speculation is Speculation.TREE and request.max_draft_tokens else 0
    return temporary_bytes_exact(request.num_rows, heads, tokens, request.capacity, slot, head, tree)


def own_attention_bytes(target: Model, tokens: int, length: int) -> int:
    """Bytes that layers hold which attend by code of their own: fp32 scores, with the mask, weights, and a cast.

    All queries of a step at once; two masks, bool and added, are held beside them.
    """
    heads = int(target.config.get_text_config().num_attention_heads)
    return tokens * length * (heads * 4 * 4 + 1 + target.dtype.itemsize)


def _index_bytes(target: Model, request: PlanRequest, tokens: int) -> int:
    """Bytes of an indexer's fp32 scores of one item, in two copies; 0 where no layer selects slots."""
    heads = getattr(target.config.get_text_config(), "index_n_heads", 0) if target.facts.selects else 0
    return 2 * tokens * request.capacity * heads * 4


def _slot_bytes(target: Model, request: PlanRequest) -> int:
    """Bytes of one token's keys and values in the layer where they are largest."""
    shapes = target.kv_shapes(offloaded=request.kv_on_host)
    return max(shape[0] * (shape[1] + shape[2]) * target.dtype.itemsize for shape in shapes if shape)


def _host_bytes(target: Model, request: PlanRequest) -> dict[str, int]:
    """Bytes in host memory for attention on the CPU: buffers for what crosses the link, and one item's attention."""
    verified = request.num_rows * (1 + request.max_draft_tokens)
    joining = min(request.prefill_pass_tokens, request.num_rows * request.capacity)
    rows = request.num_rows * request.capacity * _slot_bytes(target, request)  # copies of rows that are not contiguous
    masks = (verified + joining) * request.capacity
    largest = max(map(sum, target.offload.crossing))
    return {
        "crossing": pinned_bytes(verified + 2 * request.prefill_tokens, largest),
        "attention": _attention_bytes(target, request, max(request.prefill_tokens, verified)) + rows + masks,
    }


def _split_bytes(target: Model, request: PlanRequest, verified: int) -> int:
    """Bytes between the projections and the end of a layer, for all decoding rows and two prompts or chunks."""
    per_token, per_slot = target.split_bytes
    slots = (request.num_rows + 1) * request.capacity  # two chunks of a prompt attend to the same row
    return (verified + 2 * request.prefill_tokens) * per_token + slots * per_slot
