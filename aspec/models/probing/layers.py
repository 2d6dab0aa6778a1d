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
from aspec.models.exact.paths import MaskKind
from aspec.models.families import STATEFUL, family_of
from aspec.models.hf_compat import (
    cache_argument,
    forget_pad_token,
    has_recurrent_state,
    ignore_positions,
    takes_registered_attention,
)
from aspec.models.probing.facts import BIAS, LayerFacts, ModelFacts, layer_result
from aspec.models.probing.masks import MaskRule, causal, mask_kind, probe_mask, rule_of
from aspec.models.probing.noted import ShapeCache, UnfitError
from aspec.models.skeleton import build_on_meta, find_layers, uses_cache
from aspec.models.state.mixers import BoundMixer, RewrittenMixer, bind_mixers
from aspec.models.state.rows import STORES_NOTHING, layer_type
from aspec.models.weights.touched import TensorWatch, same_memory

NAME = "aspec-probe"
NOT_REGISTERED = "its layers attend by code of their own, which aspec does not know"
UNSUPPORTED = ("position_bias", "block_indices", "sinks")
"""Arguments of other attention functions that change the result and that ``attend`` does not support."""


class _UnfitAttentionError(UnfitError):
    """A registered attention is called in a way that aspec does not support."""


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
        raise _UnfitAttentionError(f"its attention takes arguments of its own ({', '.join(given)})")
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.dtype != torch.bool:
        raise _UnfitAttentionError("its attention does not use the mask that its layer receives")
    raise _AttentionReached


AttentionInterface.register(NAME, _probe_attention)
AttentionMaskInterface.register(NAME, probe_mask)


@dataclass(slots=True)
class _Call:
    """The call of one layer."""

    parameters: tuple[str, ...]  # of its forward
    mask: str | None = None  # the argument
    rule: MaskRule | None = None
    taken: str | None = None  # the argument that is the second result of the layer before it
    attends: bool = True  # False: it has run to its end without attention


@dataclass(slots=True)
class _ProbeRun:
    """One run of the model with watched layers; mutable while it runs."""

    num_results: int
    cache: ShapeCache
    is_stateful: bool  # its class says that some layers keep a state
    own_attention: bool  # its layers attend by code of their own
    watched: TensorWatch = field(default_factory=TensorWatch)
    returned: torch.Tensor | None = None
    biased: bool = False  # a layer takes a bias of positions
    layers: list["_Call"] = field(default_factory=list)
    second: list[torch.Tensor] = field(default_factory=list)  # results of the layers

    def watch(self, layer: nn.Module, stores_nothing: bool) -> Callable[..., object]:
        """A forward that checks the call and runs the layer's own forward up to its attention, or to its end."""
        original = type(layer).forward.__get__(layer)
        parameters = tuple(inspect.signature(original).parameters)
        has_mixer = any(isinstance(module.forward, BoundMixer | RewrittenMixer) for module in layer.modules())

        def forward(*args: Any, **kwargs: Any) -> object:
            self.watched.note(args, kwargs)
            self.check_call(parameters, dict(zip(parameters, args, strict=False)) | kwargs)
            self._run_layer(lambda: original(*args, **kwargs), stores_nothing, has_mixer)
            assert self.returned is not None
            self.second.append(torch.zeros(2, 4, 1, dtype=torch.int32, device="meta"))
            return layer_result(self.returned, self.num_results, self.second[-1])

        return forward

    def _run_layer(self, run: Callable[[], object], stores_nothing: bool, has_mixer: bool) -> None:
        """Run a layer up to its attention; behind its mixer it may fail, on meta, where it reads values (experts)."""
        index = len(self.layers) - 1
        try:
            run()
        except _AttentionReached:
            if self.layers[index].mask is None:
                raise UnfitError("a layer takes 0 attention masks, expected one") from None
            if has_mixer and index not in self.cache.states:
                raise UnfitError("a layer attends before its recurrent part") from None
            return
        except (UnfitError, InternalError, Warning):
            raise
        except Exception:
            if self.own_attention or (not stores_nothing and index not in self.cache.states):
                raise
        if self.own_attention:
            if self.layers[index].mask is None or index not in self.cache.shapes:
                raise UnfitError("a layer does not attend to keys and values by a mask")
            return
        self.layers[index].attends = False
        if not stores_nothing and index not in self.cache.states:
            own = "a layer does not attend through the registered attention function"
            raise UnfitError(STATEFUL if self.is_stateful else own)

    def check_call(self, parameters: tuple[str, ...], arguments: dict[str, Any]) -> None:
        """Check that a layer receives the result of the layer before it, and record its mask."""
        hidden = arguments.get(parameters[0])
        if not isinstance(hidden, torch.Tensor):
            raise UnfitError("a layer receives no hidden state")
        if self.returned is not None and not same_memory(hidden, self.returned):
            raise UnfitError("its model computes something between one layer and the next")
        self.returned = torch.empty_like(hidden)
        found = [(name, rule) for name, value in arguments.items() if (rule := rule_of(value)) is not None]
        if self.own_attention and not found and arguments.get("attention_mask") is not None:
            found = [("attention_mask", causal)]  # with a bias of positions in it
        if len(found) > 1:
            raise UnfitError(f"a layer takes {len(found)} attention masks, expected one")
        taken = [name for name, value in arguments.items() if any(value is one for one in self.second)]
        if len(taken) > 1 or any(arguments[name] is not self.second[-1] for name in taken):
            raise UnfitError("a layer receives several results of the layers before it")
        self.biased = arguments.get(BIAS) is not None
        self.layers.append(_Call(parameters, *(found[0] if found else (None, None)), *taken))


@torch.inference_mode(False)  # a view has its base only outside inference mode
def examine(config: PreTrainedConfig, dtype: torch.dtype) -> ModelFacts:
    """Probe a model. Raises UnsupportedModelError if its layers cannot run one by one."""
    try:
        model = build_probe(config, dtype, NAME)
    except UnsupportedModelError as error:
        if NAME not in str(error):
            raise
        raise UnsupportedModelError(f"{config.model_type} is not supported: {NOT_REGISTERED}.") from error
    reasons = []
    for num_results in (0, 1, 2):
        try:
            return _examine(config, model, num_results)
        except UnfitError as error:
            reasons.append(error)
    # a family may take a registered attention without saying so: only now is it a reason
    own = STATEFUL if has_recurrent_state(type(model)) else NOT_REGISTERED
    is_registered = takes_registered_attention(type(model)) or isinstance(reasons[0], _UnfitAttentionError)
    reason = reasons[0] if is_registered else own
    raise UnsupportedModelError(f"{config.model_type} is not supported: {reason}.") from reasons[0]


def build_probe(config: PreTrainedConfig, dtype: torch.dtype, attend: str) -> PreTrainedModel:
    """The model on meta, so that its forward runs with positions and tokens that have no values."""
    model = build_on_meta(config, dtype, attend)
    bind_mixers(model)
    ignore_positions(model)
    forget_pad_token(model.config)
    return model


def _examine(config: PreTrainedConfig, model: PreTrainedModel, num_results: int) -> ModelFacts:
    name, layers = find_layers(model)
    shape_cache, own = ShapeCache(), family_of(config.model_type).own_attention
    probe_run = _ProbeRun(num_results, shape_cache, has_recurrent_state(type(model)), own)
    for index, layer in enumerate(layers):
        layer.forward = probe_run.watch(layer, layer_type(config, index) in STORES_NOTHING)
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    cache = {cache_argument(model): shape_cache}
    try:
        with probe_run.watched:
            output = model(input_ids=tokens, position_ids=tokens, use_cache=uses_cache(config), **cache)
    except (UnfitError, Warning):  # a warning raised as an error is no property of the family
        raise
    except Exception as error:  # any exception of a family means that this driver cannot run it
        if _is_own_fault(error):
            raise InternalError(f"the probe of {config.model_type} has failed: {reason_of(error)}.") from error
        raise UnfitError(f"its own forward fails on text alone, without values ({reason_of(error)})") from error
    if len(probe_run.layers) != len(layers) or output.logits.shape[:2] != tokens.shape:
        raise UnfitError(f"its {len(layers)} layers do not run once each (counted {len(probe_run.layers)} runs)")
    if not shape_cache.shapes and not shape_cache.states:
        raise UnfitError("none of its layers stores keys and values")
    facts = [_facts_of(config, index, call, shape_cache) for index, call in enumerate(probe_run.layers)]
    assert probe_run.returned is not None
    rows_first = probe_run.returned.shape[:2] == tokens.shape
    unused = probe_run.watched.unused(model, name)
    return ModelFacts(tuple(facts), num_results, unused, rows_first, own, probe_run.biased)


def _facts_of(config: PreTrainedConfig, index: int, call: _Call, cache: ShapeCache) -> LayerFacts:
    """The facts of a layer from its call and from what it stored."""
    state = cache.states[index].shape if index in cache.states else None
    if not call.attends:
        return LayerFacts(None, MaskKind(), None, call.parameters, state, taken=call.taken)
    assert call.rule is not None, "a layer that attends has a mask"
    kv, kind, width = cache.shapes.get(index), mask_kind(config, index, call.rule), cache.index_widths.get(index, 0)
    return LayerFacts(kv, kind, call.mask, call.parameters, state, width, call.taken)


def _is_own_fault(error: Exception) -> bool:
    """Whether the error comes from code of aspec that a family's forward called, not from the family's own code."""
    assert error.__traceback__ is not None
    frames = traceback.walk_tb(error.__traceback__.tb_next)  # below the frame that called the family
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    owners = [name.partition(".")[0] for name in modules if name != TensorWatch.__module__]
    return next((owner for owner in reversed(owners) if owner in ("aspec", "transformers")), None) == "aspec"
