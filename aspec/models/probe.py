"""What a family's layers are called with, found by running its own forward once on meta tensors.

Every layer of a probe skeleton is entered with the arguments its model gives it and left where its attention
begins. That tells, without a table: whether layers hand each other a hidden state and nothing else, what each one
stores, which mask reaches its attention and under which name, and that its attention is the registered one.
"""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from aspec.errors import InternalError, UnsupportedModelError
from aspec.models.attention import attend
from aspec.models.hf_compat import Cache, cache_argument, ignore_positions
from aspec.models.kv_cache import KVCache, KVShape, MaskKind, StepCache
from aspec.models.kv_offload import HostAttention
from aspec.models.skeleton import build_on_meta, find_layers, first_line
from aspec.models.split_layer import finish, project, to_host

NAME, SPLIT = "aspec-probe", "aspec-probe-split"
SAMPLES = 4096  # pairs of positions at which a family's mask is compared with ours
UNSUPPORTED = ("position_bias", "indices", "block_indices", "sinks")
"""Arguments of other attention functions that change the result, and that ours does not know."""

MaskRule = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' own form of a mask: (row, head, query positions, key positions) -> bool, True where visible."""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer: what it stores, and how its model calls it."""

    kv: KVShape | None  # None: it attends to what another layer stored
    mask: MaskKind
    mask_argument: str
    parameters: tuple[str, ...]  # of its forward, in order, the hidden state first


@dataclass(frozen=True, slots=True)
class Facts:
    """A whole model."""

    layers: tuple[LayerFacts, ...]
    in_tuples: bool  # its forward unpacks what a layer returns


class _UnfitError(Exception):
    """Why the driver cannot run the model, or not with what it returns from layers."""


class _Reached(Exception):
    """Not an error: a layer has come to its attention."""


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> NoReturn:
    """What the probe attends with: checks the call, computes nothing, leaves the layer."""
    given = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if given:
        raise _UnfitError(f"its attention uses {', '.join(given)}")
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.dtype != torch.bool:
        raise _UnfitError("its attention does not use the mask its layer is given")
    raise _Reached


def _probe_mask(
    *args: object, batch_size: int, q_length: int, kv_length: int, mask_function: MaskRule, **_: object
) -> torch.Tensor:
    """A mask on meta that carries the rule it stands for."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.aspec_rule = mask_function  # type: ignore[attr-defined]  # read by _rule_of
    return mask


def _rule_of(value: object) -> MaskRule | None:
    """The rule of a mask that ``_probe_mask`` made, also through a slice that takes all of it."""
    if not isinstance(value, torch.Tensor):
        return None
    base = value if value._base is None or value.shape != value._base.shape else value._base
    rule: MaskRule | None = getattr(base, "aspec_rule", None)
    return rule


AttentionInterface.register(NAME, _probe_attention)
AttentionMaskInterface.register(NAME, _probe_mask)


class _Store(Cache):  # type: ignore[misc]  # transformers is untyped
    """An empty cache that notes the shapes a layer wants to store."""

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
        """Note and hand back."""
        if not key_states.dim() == value_states.dim() == 4:
            raise _UnfitError("its layers store other things than keys and values per head")
        self.shapes[layer_idx] = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return key_states, value_states


@dataclass(slots=True)
class _Visit:
    """One run of the model through watched layers; mutable while it runs."""

    in_tuples: bool
    returned: torch.Tensor | None = None
    layers: list[tuple[str, MaskRule, tuple[str, ...]]] = field(default_factory=list)  # mask and parameters, as entered

    def watch(self, layer: nn.Module) -> Callable[..., object]:
        """A forward that runs the layer's own up to its attention."""
        original = type(layer).forward.__get__(layer)
        parameters = tuple(inspect.signature(original).parameters)

        def forward(*args: Any, **kwargs: Any) -> object:
            self.see(parameters, dict(zip(parameters, args, strict=False)) | kwargs)
            try:
                original(*args, **kwargs)
            except _Reached:
                assert self.returned is not None
                return (self.returned,) if self.in_tuples else self.returned
            raise _UnfitError("a layer does not attend through the registered attention function")

        return forward

    def see(self, parameters: tuple[str, ...], arguments: dict[str, Any]) -> None:
        """Check that a layer receives what the one before returned, and find its mask."""
        hidden = arguments.get(parameters[0])
        if not isinstance(hidden, torch.Tensor):
            raise _UnfitError("a layer receives no hidden state")
        if self.returned is not None and not same_memory(hidden, self.returned):
            raise _UnfitError("a layer does not receive what the layer before it returned")
        self.returned = torch.empty_like(hidden)
        found = [(name, rule) for name, value in arguments.items() if (rule := _rule_of(value)) is not None]
        if len(found) != 1:
            raise _UnfitError(f"a layer takes {len(found)} attention masks, expected one")
        self.layers.append((*found[0], parameters))


@torch.inference_mode(False)  # where views know their base
def examine(config: PreTrainedConfig, dtype: torch.dtype) -> Facts:
    """Probe a model. Raises UnsupportedModelError where its layers cannot be run one by one."""
    model = _build(config, dtype, NAME)
    try:
        return _examine(config, model, in_tuples=False)
    except _UnfitError as error:
        try:
            return _examine(config, model, in_tuples=True)
        except _UnfitError:
            raise UnsupportedModelError(f"{config.model_type} is not supported: {error}.") from error


def _build(config: PreTrainedConfig, dtype: torch.dtype, attend: str) -> PreTrainedModel:
    """The model on meta, where its forward runs on positions that have no values."""
    model = build_on_meta(config, dtype, attend)
    ignore_positions(model)
    return model


def _examine(config: PreTrainedConfig, model: PreTrainedModel, in_tuples: bool) -> Facts:
    layers = find_layers(model)[1]
    store = _Store()
    visit = _Visit(in_tuples)
    for layer in layers:
        layer.forward = visit.watch(layer)
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    cache = {cache_argument(model): store}
    try:
        output = model(input_ids=tokens, position_ids=tokens, use_cache=True, **cache)
    except (_UnfitError, Warning):  # a warning that was turned into an error says nothing of the family
        raise
    except Exception as error:  # whatever a family raises means: not with this driver
        if _is_own_fault(error):
            raise InternalError(f"the probe of {config.model_type} has failed: {first_line(error)}.") from error
        raise _UnfitError(f"its layers exchange more than a hidden state ({first_line(error)})") from error
    if len(visit.layers) != len(layers) or tuple(output.logits.shape[:2]) != (2, 4):
        raise _UnfitError(f"its {len(layers)} layers do not run once each (counted {len(visit.layers)} runs)")
    if not store.shapes:
        raise _UnfitError("none of its layers stores keys and values")
    facts = [
        LayerFacts(store.shapes.get(index), _mask_kind(config, index, rule), argument, parameters)
        for index, (argument, rule, parameters) in enumerate(visit.layers)
    ]
    return Facts(tuple(facts), in_tuples)


def _is_own_fault(error: Exception) -> bool:
    """Whether code of aspec raised it that a family's forward has called back, rather than the family's own."""
    assert error.__traceback__ is not None
    frames = traceback.walk_tb(error.__traceback__.tb_next)  # below the one that called the family
    owners = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    return next((owner for owner in reversed(owners) if owner in ("aspec", "transformers")), None) == "aspec"


AttentionInterface.register(SPLIT, attend)
AttentionMaskInterface.register(SPLIT, _probe_mask)


def examine_split(config: PreTrainedConfig, dtype: torch.dtype, facts: Facts) -> tuple[int, int]:
    """Bytes that a split layer holds at most, per token of an item and per slot of its rows.

    Raises UnsupportedModelError where a layer cannot be taken apart at its attention, such as one that attends twice.
    """
    run = _run_split(config, dtype, facts, offloaded=False)

    def measure(num_tokens: int, num_slots: int) -> int:
        return max(nbytes for nbytes, _ in run(num_tokens, num_slots))

    least = measure(64, 128)
    return -(-(measure(128, 128) - least) // 128), -(-(measure(64, 192) - least) // 128)


@dataclass(frozen=True, slots=True)
class OffloadFacts:
    """What a model's split layers are beside KV in host memory."""

    per_token: int  # bytes that an item holds on the device between its projections and the end of a layer
    kept: tuple[KVShape | None, ...]  # by layer: what the host keeps; None where it is another layer's
    crossing: tuple[tuple[int, int], ...]  # by layer: bytes of a token that go to the host, and that come back


def examine_offload(config: PreTrainedConfig, dtype: torch.dtype, facts: Facts) -> OffloadFacts:
    """Probe a model whose layers attend beside KV in host memory.

    Raises UnsupportedModelError where one cannot be taken apart, or attends to what the host cannot keep.
    """
    run = _run_split(config, dtype, facts, offloaded=True)
    few, many = (run(num_tokens, 128) for num_tokens in (64, 128))
    more = max(nbytes for nbytes, _ in many) - max(nbytes for nbytes, _ in few)
    crossings = [crossing for _, crossing in few if crossing is not None]
    return OffloadFacts(
        -(-more // 128),
        tuple(crossing.kept for crossing in crossings),
        tuple(crossing.token_bytes for crossing in crossings),
    )


_Held = tuple[int, HostAttention | None]
"""Bytes behind a split layer before its second half, and its attention on the way to the host."""


def _run_split(
    config: PreTrainedConfig, dtype: torch.dtype, facts: Facts, *, offloaded: bool
) -> Callable[[int, int], list[_Held]]:
    """A model on meta, its layers in halves: what each holds, for two rows of so many tokens and slots."""
    model = _build(config, dtype, SPLIT)
    held: list[_Held] = []
    argument = cache_argument(model)
    for index, layer in enumerate(find_layers(model)[1]):
        layer.forward = _watch_split(layer, index, facts, held)

    def run(num_tokens: int, num_slots: int) -> list[_Held]:
        """The rows are apart, so that their slots are gathered."""
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


def _watch_split(layer: nn.Module, index: int, facts: Facts, held: list[_Held]) -> Callable[..., object]:
    """A forward that takes the layer's own apart, and tells what is held between the halves.

    Behind its attention a layer may fail on meta, where it looks at numbers (experts); by then nothing is held.
    """
    original, own = layer.forward, facts.layers[index]

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> object:
        split = project(lambda: original(hidden, *args, **kwargs), hidden)
        assert split.call is not None
        _, query, _, value, *_ = split.call[0]
        step = next(given for given in (*args, *kwargs.values()) if isinstance(given, StepCache))
        if step.offloaded:
            to_host(split, step, index, own.mask, stores=own.kv is not None)
        back = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        split.output = split.crossing.back if split.crossing is not None else back
        held.append((split.nbytes, split.crossing))
        try:
            finish(lambda: original(hidden, *args, **kwargs), split)
        except (InternalError, Warning):
            raise
        except Exception:
            assert split.output is None
        return (hidden,) if facts.in_tuples else hidden

    return forward


def _mask_kind(config: PreTrainedConfig, index: int, rule: MaskRule) -> MaskKind:
    """Which of our masks a family's rule is, by comparing the two at many pairs of positions."""
    text = config.get_text_config()
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    kinds = [
        MaskKind(),
        *([MaskKind(window=window)] if window else []),
        *([MaskKind(chunk=chunk)] if chunk else []),
    ]
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(4 * max(window or 0, chunk or 0, 64), (SAMPLES,), generator=generator)
    near = query + torch.randint(-2, 3, (SAMPLES,), generator=generator)  # around every edge, and anywhere
    edges = [near - shift for shift in (0, window or 0, chunk or 0)]
    key = torch.cat([*edges, torch.randint(int(query.max()) + 1, (SAMPLES,), generator=generator)]).clamp(min=0)
    query = query.repeat(len(edges) + 1)
    try:
        visible = rule(0, 0, query, key)
    except (RuntimeError, NotImplementedError):  # chunks look at a tensor on meta: the configuration must do
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
    """Whether two tensors show the same memory in the same way; holds on meta too."""
    return (
        first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() == second.storage_offset()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )
