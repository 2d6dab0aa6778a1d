"""What a model is to a machine: bytes and widths, from headers and the configuration alone. Constructible by hand.

Bytes are those that the products read: in the compute dtype, whatever the files hold.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from aspec.models.model import Model

ACTIVE_KEYS = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts")
"""What families call the number of experts that a token goes through."""

_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\.")
_OUTPUT = re.compile(r"\.(o_proj|out_proj|c_proj|dense|wo)$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer; of routed experts a pass reads those that its tokens are sent to."""

    project_bytes: int  # weights of the projections to queries, keys and values
    rest_bytes: int  # the output projection and what every token goes through behind it
    wide: int = 0  # outputs of the products, per token: what elementwise work passes over
    products: int = 7  # with weights that every token meets
    expert_bytes: int = 0  # one routed expert
    experts: int = 0
    active: int = 0  # experts of a token
    convert_bytes: int = 0  # of weights that are stored in another dtype

    @property
    def dense_bytes(self) -> int:
        """Weights that every token meets."""
        return self.project_bytes + self.rest_bytes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model; ``layers`` in order of their use."""

    layers: tuple[LayerShape, ...]
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    width: int  # of a head's keys
    value_width: int
    head_bytes: int
    dtype: str = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return torch.finfo(getattr(torch, self.dtype)).bits // 8

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return self.kv_heads * (self.width + self.value_width) * self.itemsize

    @property
    def nbytes(self) -> int:
        """All weights but the embeddings."""
        layers = sum(layer.dense_bytes + layer.experts * layer.expert_bytes for layer in self.layers)
        return layers + self.head_bytes


def shape_of(model: Model) -> ModelShape:
    """The facts of a model that is built; nothing is read."""
    text = model.config.get_text_config()
    kv = next(shape for shape in model.kv_shapes() if shape is not None)
    converted: dict[int, int] = {}
    for part in model.parts(1 << 62):
        converted[part.layer] = converted.get(part.layer, 0) + part.scratch_bytes
    layers = tuple(layer_shape(layer, text, converted.get(index, 0)) for index, layer in enumerate(model.layer_modules))
    hidden = int(text.hidden_size)
    return ModelShape(
        layers,
        hidden=hidden,
        vocab=model.vocab_size,
        heads=int(text.num_attention_heads),
        kv_heads=kv[0],
        width=kv[1],
        value_width=kv[2],
        head_bytes=model.vocab_size * hidden * model.dtype.itemsize,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def layer_shape(layer: nn.Module, config: PreTrainedConfig, convert_bytes: int = 0) -> LayerShape:
    """The facts of a decoder layer, which may be on meta."""
    matrices = {name: p for name, p in layer.named_parameters() if p.dim() >= 2}
    routed = {name: p for name, p in matrices.items() if p.dim() == 3 or _EXPERT.search(name)}
    dense = {name: p for name, p in matrices.items() if name not in routed}
    projections = {name: p for name, p in dense.items() if _is_projection(name)}
    experts = _num_experts(routed)
    return LayerShape(
        project_bytes=_nbytes(projections.values()),
        rest_bytes=_nbytes(dense.values()) - _nbytes(projections.values()),
        wide=sum(p.shape[0] for p in dense.values()) + _routed_width(routed, experts, _active(config)),
        products=len(dense),
        expert_bytes=_nbytes(routed.values()) // experts if experts else 0,
        experts=experts,
        active=min(_active(config), experts) if experts else 0,
        convert_bytes=convert_bytes,
    )


def _is_projection(name: str) -> bool:
    """Whether a matrix is one of those that attention waits for."""
    return bool(_ATTENTION.search(name)) and not _OUTPUT.search(name.rpartition(".")[0])


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _num_experts(routed: Mapping[str, torch.Tensor]) -> int:
    """How many a layer routes to: the leading size of a fused tensor, or the modules that are numbered."""
    fused = [p.shape[0] for name, p in routed.items() if p.dim() == 3]
    numbered = {match[1] for name in routed if (match := _EXPERT.search(name))}
    return max(fused, default=len(numbered))


def _routed_width(routed: Mapping[str, torch.Tensor], experts: int, active: int) -> int:
    total = sum(p.numel() // max(1, p.shape[-1]) for p in routed.values())
    return total * active // experts if experts else 0


def _active(config: PreTrainedConfig) -> int:
    return next((int(value) for key in ACTIVE_KEYS if (value := getattr(config, key, None))), 1)


def touched_experts(experts: int, active: int, tokens: float) -> float:
    """Distinct experts that so many tokens are expected to meet, each of them ``active`` of ``experts`` at random.

    E (1 - (1 - k / E)^n): an expert is missed by a token with probability 1 - k / E.
    """
    return experts * (1.0 - (1.0 - active / experts) ** tokens) if experts else 0.0
