"""Finds the arguments of a family's layers by running its own forward once on meta tensors.

Every layer of a probe skeleton runs with the arguments from its model and stops where its attention begins. This
shows, without a table: whether a layer gives the next one a hidden state and nothing else, the shapes that each layer
stores, the mask of its attention and the name of that argument, and that its attention is the registered one.
"""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from aspec.errors import InternalError, UnsupportedModelError, reason_of
from aspec.models.attention import attend
from aspec.models.exact.paths import MaskKind
from aspec.models.hf_compat import (
    Cache,
    cache_argument,
    forget_pad_token,
    ignore_positions,
    takes_registered_attention,
)
from aspec.models.kv_cache import KVCache, KVShape, StepCache
from aspec.models.kv_offload import HostAttention
from aspec.models.skeleton import build_on_meta, find_layers
from aspec.models.split_layer import finish, project, to_host

NAME, SPLIT = "aspec-probe", "aspec-probe-split"
NOT_REGISTERED = "its attention does not take a registered attention function"
SAMPLES = 4096  # pairs of positions for the comparison of a family's mask with aspec's
UNSUPPORTED = ("position_bias", "indices", "block_indices", "sinks")
"""Arguments of other attention functions that change the result and that ``attend`` does not support."""

MaskRule = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' form of a mask: (row, head, query positions, key positions) -> bool, True where visible."""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer: the shape it stores, and how its model calls it."""

    kv: KVShape | None  # None: it attends to keys and values of another layer
    mask: MaskKind
    mask_argument: str
    parameters: tuple[str, ...]  # of its forward, in order, the hidden state first


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """All layers of a model, and how it calls them."""

    layers: tuple[LayerFacts, ...]
    in_tuples: bool  # its forward expects a tuple from a layer


class _UnfitError(Exception):
    """The reason why the driver cannot run the model, or not with this type of layer result."""


class _AttentionReached(Exception):
    """Not an error: stops a layer at its attention."""


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> NoReturn:
    """The attention function of the probe: checks the call, computes nothing, stops the layer."""
    given = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if given:
        raise _UnfitError(f"its attention uses {', '.join(given)}")
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.dtype != torch.bool:
        raise _UnfitError("its attention does not use the mask that its layer receives")
    raise _AttentionReached


def _probe_mask(
    *args: object, batch_size: int, q_length: int, kv_length: int, mask_function: MaskRule, **_: object
) -> torch.Tensor:
    """A bool mask [B, 1, T, S] on meta with its rule as an attribute."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.aspec_rule = mask_function  # type: ignore[attr-defined]  # read by _rule_of
    return mask


def _rule_of(value: object) -> MaskRule | None:
    """The rule of a mask from ``_probe_mask``, also of a slice that covers all of it; None for other values."""
    if not isinstance(value, torch.Tensor):
        return None
    base = value if value._base is None or value.shape != value._base.shape else value._base
    rule: MaskRule | None = getattr(base, "aspec_rule", None)
    return rule


AttentionInterface.register(NAME, _probe_attention)
AttentionMaskInterface.register(NAME, _probe_mask)


class _ShapeCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """An empty cache that records the shapes that layers store."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, KVShape] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the shapes and return the arguments."""
        if not key_states.dim() == value_states.dim() == 4:
            raise _UnfitError("its layers store something other than keys and values per head")
        self.shapes[layer_idx] = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return key_states, value_states


@dataclass(slots=True)
class _ProbeRun:
    """One run of the model with watched layers; mutable while it runs."""

    in_tuples: bool
    returned: torch.Tensor | None = None
    layers: list[tuple[str, MaskRule, tuple[str, ...]]] = field(default_factory=list)  # by call: mask and parameters

    def watch(self, layer: nn.Module) -> Callable[..., object]:
        """A forward that checks the call and runs the layer's own forward up to its attention."""
        original = type(layer).forward.__get__(layer)
        parameters = tuple(inspect.signature(original).parameters)

        def forward(*args: Any, **kwargs: Any) -> object:
            self.check_call(parameters, dict(zip(parameters, args, strict=False)) | kwargs)
            try:
                original(*args, **kwargs)
            except _AttentionReached:
                assert self.returned is not None
                return (self.returned,) if self.in_tuples else self.returned
            raise _UnfitError("a layer does not attend through the registered attention function")

        return forward

    def check_call(self, parameters: tuple[str, ...], arguments: dict[str, Any]) -> None:
        """Check that a layer receives the result of the layer before it, and record its mask."""
        hidden = arguments.get(parameters[0])
        if not isinstance(hidden, torch.Tensor):
            raise _UnfitError("a layer receives no hidden state")
        if self.returned is not None and not same_memory(hidden, self.returned):
            raise _UnfitError("a layer does not receive the result of the layer before it")
        self.returned = torch.empty_like(hidden)
        found = [(name, rule) for name, value in arguments.items() if (rule := _rule_of(value)) is not None]
        if len(found) != 1:
            raise _UnfitError(f"a layer takes {len(found)} attention masks, expected one")
        self.layers.append((*found[0], parameters))


@torch.inference_mode(False)  # a view has its base only outside inference mode
def examine(config: PreTrainedConfig, dtype: torch.dtype) -> ModelFacts:
    """Probe a model. Raises UnsupportedModelError if its layers cannot run one by one."""
    try:
        model = _build(config, dtype, NAME)
    except UnsupportedModelError as error:
        if NAME not in str(error):
            raise
        raise UnsupportedModelError(f"{config.model_type} is not supported: {NOT_REGISTERED}.") from error
    try:
        return _examine(config, model, in_tuples=False)
    except _UnfitError as error:
        try:
            return _examine(config, model, in_tuples=True)
        except _UnfitError:  # a family may take a registered attention without saying so: only now is it a reason
            reason = error if takes_registered_attention(type(model)) else NOT_REGISTERED
            raise UnsupportedModelError(f"{config.model_type} is not supported: {reason}.") from error


def _build(config: PreTrainedConfig, dtype: torch.dtype, attend: str) -> PreTrainedModel:
    """The model on meta, so that its forward runs with positions and tokens that have no values."""
    model = build_on_meta(config, dtype, attend)
    ignore_positions(model)
    forget_pad_token(model.config)
    return model


def _examine(config: PreTrainedConfig, model: PreTrainedModel, in_tuples: bool) -> ModelFacts:
    layers = find_layers(model)[1]
    shape_cache = _ShapeCache()
    probe_run = _ProbeRun(in_tuples)
    for layer in layers:
        layer.forward = probe_run.watch(layer)
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    cache = {cache_argument(model): shape_cache}
    try:
        output = model(input_ids=tokens, position_ids=tokens, use_cache=True, **cache)
    except (_UnfitError, Warning):  # a warning raised as an error is no property of the family
        raise
    except Exception as error:  # any exception of a family means that this driver cannot run it
        if _is_own_fault(error):
            raise InternalError(f"the probe of {config.model_type} has failed: {reason_of(error)}.") from error
        raise _UnfitError(f"its layers exchange more than a hidden state ({reason_of(error)})") from error
    if len(probe_run.layers) != len(layers) or tuple(output.logits.shape[:2]) != (2, 4):
        raise _UnfitError(f"its {len(layers)} layers do not run once each (counted {len(probe_run.layers)} runs)")
    if not shape_cache.shapes:
        raise _UnfitError("none of its layers stores keys and values")
    facts = [
        LayerFacts(shape_cache.shapes.get(index), _mask_kind(config, index, rule), argument, parameters)
        for index, (argument, rule, parameters) in enumerate(probe_run.layers)
    ]
    return ModelFacts(tuple(facts), in_tuples)


def _is_own_fault(error: Exception) -> bool:
    """Whether the error comes from code of aspec that a family's forward called, not from the family's own code."""
    assert error.__traceback__ is not None
    frames = traceback.walk_tb(error.__traceback__.tb_next)  # below the frame that called the family
    owners = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    return next((owner for owner in reversed(owners) if owner in ("aspec", "transformers")), None) == "aspec"


AttentionInterface.register(SPLIT, attend)
AttentionMaskInterface.register(SPLIT, _probe_mask)


def examine_split(config: PreTrainedConfig, dtype: torch.dtype, facts: ModelFacts) -> tuple[int, int]:
    """Largest number of bytes that a split layer holds, per token of an item and per slot of its rows.

    Raises UnsupportedModelError if a layer cannot be split at its attention, for example if it attends twice.
    """
    run = _run_split(config, dtype, facts, offloaded=False)

    def measure(num_tokens: int, num_slots: int) -> int:
        return max(nbytes for nbytes, _ in run(num_tokens, num_slots))

    least = measure(64, 128)
    return -(-(measure(128, 128) - least) // 128), -(-(measure(64, 192) - least) // 128)


@dataclass(frozen=True, slots=True)
class OffloadFacts:
    """Sizes of a model's split layers with KV in host memory."""

    per_token: int  # device bytes that an item holds from the projections to the end of a layer
    kept: tuple[KVShape | None, ...]  # by layer: shape on the host; None: it uses another layer's KV
    crossing: tuple[tuple[int, int], ...]  # by layer: bytes per token to the host, and back


def examine_offload(config: PreTrainedConfig, dtype: torch.dtype, facts: ModelFacts) -> OffloadFacts:
    """Probe a model whose layers attend with KV in host memory.

    Raises UnsupportedModelError if a layer cannot be split, or attends to tensors that the host cannot store.
    """
    run = _run_split(config, dtype, facts, offloaded=True)
    few, many = (run(num_tokens, 128) for num_tokens in (64, 128))
    more = max(nbytes for nbytes, _ in many) - max(nbytes for nbytes, _ in few)
    attentions = [attention for _, attention in few if attention is not None]
    return OffloadFacts(
        -(-more // 128),
        tuple(attention.kv_shape for attention in attentions),
        tuple(attention.token_bytes for attention in attentions),
    )


_SplitState = tuple[int, HostAttention | None]
"""Bytes that a split layer holds before its second half, and its attention on the host, if any."""


def _run_split(
    config: PreTrainedConfig, dtype: torch.dtype, facts: ModelFacts, *, offloaded: bool
) -> Callable[[int, int], list[_SplitState]]:
    """A function of tokens and slots per row; it runs two rows through split layers on meta, returns their states."""
    model = _build(config, dtype, SPLIT)
    held: list[_SplitState] = []
    finished: set[object] = set()
    argument = cache_argument(model)
    for index, layer in enumerate(find_layers(model)[1]):
        layer.forward = _watch_split(layer, index, facts, held, finished)

    def run(num_tokens: int, num_slots: int) -> list[_SplitState]:
        """Rows 0 and 2 are not consecutive, so that their slots are gathered (the larger copy)."""
        held.clear()
        cache = KVCache([layer.kv for layer in facts.layers], 3, num_slots, dtype, "meta", offloaded=offloaded)
        step = cache.step([0, 2], [num_slots - num_tokens] * 2, [num_tokens] * 2)
        tokens = torch.zeros(2, num_tokens, dtype=torch.long, device="meta")
        try:
            model(input_ids=tokens, position_ids=tokens, use_cache=True, **{argument: step})
        except InternalError as error:
            raise UnsupportedModelError(
                f"{config.model_type}: its attention cannot run apart from the rest of its layers: {error}. "
                f"Run it with --attention device."
            ) from error
        return list(held)

    return run


def _watch_split(
    layer: nn.Module, index: int, facts: ModelFacts, held: list[_SplitState], finished: set[object]
) -> Callable[..., object]:
    """A forward that runs the layer in two halves and appends its state between them to ``held``.

    The second half only shows whether a layer can be split, so of equal layers (``finished``) one runs it. After its
    attention a layer may fail on meta if it reads values (experts); at that time it holds no bytes.
    """
    original, own = layer.forward, facts.layers[index]
    modules = tuple((type(each), tuple(p.shape for p in each.parameters(recurse=False))) for each in layer.modules())

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> object:
        split = project(lambda: original(hidden, *args, **kwargs), hidden)
        assert split.call is not None
        _, query, _, value, *_ = split.call[0]
        step = next(given for given in (*args, *kwargs.values()) if isinstance(given, StepCache))
        if step.offloaded:
            to_host(split, step, index, own.mask, stores=own.kv is not None)
        back = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        split.output = split.host_attention.device_result if split.host_attention is not None else back
        held.append((split.nbytes, split.host_attention))
        try:
            if (own, modules) not in finished:
                finish(lambda: original(hidden, *args, **kwargs), split)
        except (InternalError, Warning):
            raise
        except Exception:
            assert split.output is None
        finished.add((own, modules))
        return (hidden,) if facts.in_tuples else hidden

    return forward


def _mask_kind(config: PreTrainedConfig, index: int, rule: MaskRule) -> MaskKind:
    """The kind of mask that equals a family's rule, compared at many pairs of positions, near edges and random."""
    text = config.get_text_config()
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    kinds = [
        MaskKind(),
        *([MaskKind(window=window)] if window else []),
        *([MaskKind(chunk=chunk)] if chunk else []),
    ]
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(4 * max(window or 0, chunk or 0, 64), (SAMPLES,), generator=generator)
    near = query + torch.randint(-2, 3, (SAMPLES,), generator=generator)  # near every edge; random pairs follow
    edges = [near - shift for shift in (0, window or 0, chunk or 0)]
    key = torch.cat([*edges, torch.randint(int(query.max()) + 1, (SAMPLES,), generator=generator)]).clamp(min=0)
    query = query.repeat(len(edges) + 1)
    try:
        visible = rule(0, 0, query, key)
    except (RuntimeError, NotImplementedError):  # the rule of chunks reads a tensor on meta: use the configuration
        types = getattr(text, "layer_types", None) or []
        if chunk and types[index : index + 1] == ["chunked_attention"]:
            return MaskKind(chunk=chunk)
        raise _UnfitError("its attention mask depends on more than positions") from None
    for kind in kinds:
        if torch.equal(kind.visible(query, key), visible.expand_as(query)):
            return kind
    raise _UnfitError(
        f"layer {index} attends by a rule that is neither causal, nor a sliding window of {window}, "
        f"nor chunks of {chunk}"
    )


def same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are the same view of the same memory; works on meta too."""
    return (
        first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() == second.storage_offset()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )
