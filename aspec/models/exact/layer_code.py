"""Which decoder layers do what Llama's or Qwen3's do: those whose code is the same, as that of many families is.

Their norms and gates are those for which kernels were proven (``elements.py``); their sizes are multiples of vectors.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aspec.models.exact.elements import RoutedGate, RoutedNorm
from aspec.models.exact.products import RoutedLinear
from aspec.models.hf_compat import known_layer, same_code

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
OF_STEP = ("cos", "sin", "places", "slots", "records", "items", "threads", "scratch")
OF_LAYER = ("in", "out", "keys", "values")
"""What a layer's program is given beside weights: of its step, and of the layer."""

CHILDREN = {"self_attn", "mlp", *NORMS[:2]}
WIDTH = 16  # numbers of which all widths are multiples


@dataclass(frozen=True, slots=True)
class Formula:
    """Of a norm, see ``compiled/products.norm``."""

    eps: float
    rounded: bool
    offset: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """What is equal in layers that share their programs."""

    hidden: int
    heads: int
    groups: int  # heads of keys
    width: int  # of a head
    scale: float  # of scores
    formulas: tuple[Formula, ...]  # of NORMS, as many as there are: two or four


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The parts of such a layer."""

    shape: Shape
    linears: tuple[RoutedLinear, ...]  # of LINEARS
    norms: tuple[Mapping[str, torch.Tensor | None], ...]  # parameters of NORMS, as many as there are


def parts_of(layer: nn.Module) -> LayerParts | None:
    """The parts of a layer with the code of Llama's or Qwen3's; None for others."""
    attention = layer._modules.get("self_attn")
    if attention is None or layer._modules.keys() != CHILDREN:
        return None
    known = known_layer()
    with_norms = same_code(type(attention).forward, known.attention_with_norms)
    names = {f"{name}_proj" for name in LINEARS[:4]} | (set(NORMS[2:]) if with_norms else set())
    if attention._modules.keys() != names or not same_code(type(layer).forward, known.layer):
        return None
    if not with_norms and not any(same_code(type(attention).forward, own) for own in known.attentions):
        return None
    module = inspect.getmodule(type(attention))
    if not all(same_code(getattr(module, name, None), own) for name, own in known.rotary.items()):
        return None
    norms = [layer.get_submodule(name).forward for name in NORMS[:2]]
    norms += [attention.get_submodule(name).forward for name in NORMS[2:] if with_norms]
    mlp = layer.get_submodule("mlp")
    if not isinstance(gate := mlp.forward, RoutedGate) or gate.kernel is None:
        return None
    owners = [attention] * 4 + [mlp] * 3
    linears = [owner.get_submodule(f"{name}_proj").forward for owner, name in zip(owners, LINEARS, strict=True)]
    return _complete(attention, norms, linears)


def _complete(attention: nn.Module, norms: Sequence[Any], linears: Sequence[Any]) -> LayerParts | None:
    """The parts, if kernels of all of them are known."""
    if not all(isinstance(own, RoutedNorm) and own.formula for own in norms):
        return None
    if not all(isinstance(own, RoutedLinear) for own in linears):
        return None
    queries, keys, values, hidden, inner = (len(own.weight) for own in linears[:5])
    width, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(width, int) or not isinstance(scale, float):
        return None
    if keys != values or any(own % WIDTH for own in (width, hidden, inner)) or queries % width or keys % width:
        return None
    formulas = tuple(Formula(**own.formula) for own in norms)
    shape = Shape(hidden, queries // width, keys // width, width, scale, formulas)
    return LayerParts(shape, tuple(linears), tuple(own.parameters for own in norms))
