"""The shape of a model, for pricing: bytes and widths, from the headers and the configuration, or written by hand.

Bytes are the bytes that the products read: in the compute dtype, which may differ from the dtype of the files.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig

from aspec.models.configuration.config_sizes import experts_per_token
from aspec.models.formats.packed import PackedWeight
from aspec.models.model import Model
from aspec.models.state.shapes import StateShape
from aspec.models.weights.parts import REST

_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\.")
_OUTPUT = re.compile(r"\.(o_proj|out_proj|c_proj|dense|wo)$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer. A pass reads only those routed experts to which its tokens are sent."""

    project_bytes: int  # weights of the projections to queries, keys and values
    rest_bytes: int  # the output projection and all dense weights after it
    wide: int = 0  # outputs of the products per token: the elements of elementwise work
    products: int = 7  # number of products with dense weights
    expert_bytes: int = 0  # weights of one routed expert
    experts: int = 0  # number of routed experts
    active: int = 0  # routed experts of one token
    packed: tuple[tuple[str, int], ...] = ()  # method and number of the weights that are decoded before their use
    state: int = 0  # elements of a row's recurrent state
    written_bytes: int = 0  # of the decoded weights where they are not in the compute dtype; 0: they are
    project_int4: int = 0  # of the projections' weights, those that are multiplied in 4 bits
    rest_int4: int = 0  # of the rest

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights that every token uses."""
        return self.project_bytes + self.rest_bytes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model; ``layers`` are in the order of their use."""

    layers: tuple[LayerShape, ...]
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    width: int  # elements of a head's key
    value_width: int  # elements of a head's value
    head_bytes: int
    dtype: str = "bfloat16"
    head_int4: int = 0  # weights of the head that are multiplied in 4 bits

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return torch.finfo(getattr(torch, self.dtype)).bits // 8

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return self.kv_heads * (self.width + self.value_width) * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all weights without the embeddings."""
        layers = sum(layer.dense_bytes + layer.experts * layer.expert_bytes for layer in self.layers)
        return layers + self.head_bytes


def shape_of(model: Model) -> ModelShape:
    """The shape of a model; no weights are read."""
    text = model.config.get_text_config()
    kv = next((shape for shape in model.kv_shapes() if shape is not None), (0, 0, 0))
    layers = tuple(
        _with_packed(layer_shape(layer, text), model.packed.get(index, ()), model.dtype.itemsize, _state(state))
        for index, (layer, state) in enumerate(zip(model.layer_modules, model.state_shapes, strict=True))
    )
    hidden = int(text.hidden_size)
    return ModelShape(
        layers,
        hidden=hidden,
        vocab=model.vocab_size,
        heads=int(text.num_attention_heads) if kv[0] else 0,
        kv_heads=kv[0],
        width=kv[1],
        value_width=kv[2],
        head_bytes=model.vocab_size * hidden * model.dtype.itemsize,
        dtype=str(model.dtype).removeprefix("torch."),
        head_int4=sum(math.prod(own.shape) for own in model.packed.get(REST, ()) if own.sizes is not None),
    )


def _state(shape: StateShape | None) -> int:
    """Elements of the recurrent state of a layer."""
    return 0 if shape is None or shape.recurrence is None else shape.recurrence.state_bytes // 4


def _with_packed(layer: LayerShape, weights: Iterable[PackedWeight], itemsize: int, state: int) -> LayerShape:
    """The layer with what is decoded of it, and what is multiplied packed; ``itemsize``: bytes of a decoded weight."""
    counts: Counter[str] = Counter()
    multiplied: Counter[bool] = Counter()
    nbytes = 0
    for weight in weights:
        count = math.prod(weight.shape)
        if weight.is_written:
            counts[weight.method] += count
            nbytes += itemsize * count if weight.sizes is None else weight.sizes.nbytes
        if weight.sizes is not None:
            multiplied[_is_projection(weight.name)] += count
    return replace(
        layer,
        packed=tuple(counts.items()),
        written_bytes=nbytes,
        project_int4=multiplied[True],
        rest_int4=multiplied[False],
        state=state,
    )


def layer_shape(layer: nn.Module, config: PreTrainedConfig) -> LayerShape:
    """The shape of a decoder layer, which may be on the meta device."""
    matrices = {name: p for name, p in layer.named_parameters() if p.dim() >= 2}
    routed = {name: p for name, p in matrices.items() if p.dim() == 3 or _EXPERT.search(name)}
    dense = {name: p for name, p in matrices.items() if name not in routed}
    projections = {name: p for name, p in dense.items() if _is_projection(name)}
    experts = _num_experts(routed)
    return LayerShape(
        project_bytes=_nbytes(projections.values()),
        rest_bytes=_nbytes(dense.values()) - _nbytes(projections.values()),
        wide=sum(p.shape[0] for p in dense.values()) + _routed_width(routed, experts, experts_per_token(config)),
        products=len(dense),
        expert_bytes=_nbytes(routed.values()) // experts if experts else 0,
        experts=experts,
        active=min(experts_per_token(config), experts) if experts else 0,
    )


def _is_projection(name: str) -> bool:
    """Whether a matrix projects to queries, keys or values."""
    return bool(_ATTENTION.search(name)) and not _OUTPUT.search(name.rpartition(".")[0])


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _num_experts(routed: Mapping[str, torch.Tensor]) -> int:
    """The routed experts of a layer: the first dimension of a fused tensor, or the number of numbered modules."""
    fused = [p.shape[0] for name, p in routed.items() if p.dim() == 3]
    numbered = {match[1] for name in routed if (match := _EXPERT.search(name))}
    return max(fused, default=len(numbered))


def _routed_width(routed: Mapping[str, torch.Tensor], experts: int, active: int) -> int:
    """Outputs of the routed products for one token."""
    total = sum(p.numel() // max(1, p.shape[-1]) for p in routed.values())
    return total * active // experts if experts else 0


def touched_experts(experts: int, active: int, tokens: float) -> float:
    """Expected number of distinct experts for n tokens, if each token uses k = ``active`` of E ``experts`` at random.

    E (1 - (1 - k / E)^n): one token does not use a given expert with probability 1 - k / E.
    """
    return experts * (1.0 - (1.0 - active / experts) ** tokens) if experts else 0.0
