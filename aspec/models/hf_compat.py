"""All names of transformers that are private or differ between versions: no other module of aspec uses one.

Where two versions differ, the code inspects the installed one, such as the signature of a forward, and never a version
number. ``tests/test_warnings.py`` and the tests marked ``compat`` were run with these versions:

| transformers | torch | Python | name of the cache in a forward  |
|--------------|-------|--------|---------------------------------|
| 5.17.0       | 2.11  | 3.11   | ``past_key_values``             |
| 5.17.0       | 2.13  | 3.11   | ``past_key_values``             |
| 5.24.0       | 2.13  | 3.11   | ``cache``                       |

The bounds in ``pyproject.toml`` are the first and the last row. From 5.24 on, the name ``past_key_values`` causes a
FutureWarning; 5.40 removes it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.pytorch_utils import Conv1D

from aspec.errors import UnsupportedModelError
from aspec.models.configuration.context import CHANGING

__all__ = [
    "RECURRENT_FORWARDS",
    "RECURRENT_FUNCTIONS",
    "ROPE_INIT_FUNCTIONS",
    "Cache",
    "Experts",
    "LlamaDecoderLayer",
    "WeightConverter",
    "WeightRenaming",
    "activation_function",
    "as_published",
    "auto_class",
    "build_glob_alternation",
    "cache_argument",
    "compute_buffers",
    "conversion_rules",
    "dot_natural_key",
    "experts_of",
    "forget_pad_token",
    "has_recurrent_state",
    "ignore_positions",
    "ignored_keys",
    "is_transposed_linear",
    "kept_dtypes",
    "model_class",
    "no_init_weights",
    "rename_source_key",
    "sdpa_mask",
    "see_all",
    "set_attention",
    "set_experts",
    "takes_registered_attention",
    "text_splits_of_gguf",
    "tied_weights",
    "tokenizer_from_gguf",
]

RECURRENT_FUNCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "causal_conv1d_fn": "convolution",
        "torch_chunk_gated_delta_rule": "delta rule",
        "chunk_kimi_delta_attention": "delta rule",
        "mamba2_chunk_scan": "state space",
        "mamba_selective_scan": "selective scan",
    }
)
"""The functions of several tokens that the mixers of recurrent layers name: name -> kind of aspec's own function."""

RECURRENT_FORWARDS: Mapping[str, str] = MappingProxyType({"get_linear_cache": "lightning attention"})
"""A name in the forward of a mixer that holds its recurrence in its lines -> kind of aspec's own forward."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # newest first; the last one of families without attention


def cache_argument(module: nn.Module) -> str:
    """The name of the cache argument of ``module``'s forward. Raises UnsupportedModelError if it has none."""
    parameters = inspect.signature(type(module).forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    name = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    raise UnsupportedModelError(f"{name} is not supported: its forward takes no cache, by which earlier tokens stay.")


def activation_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation function that a configuration names."""
    found: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return found


def auto_class(config: PreTrainedConfig, *, text_class: bool = False) -> Any | None:
    """The class of transformers that builds a language model from a configuration; None where it has none.

    A model with towers for images or sounds is built whole, because that is how its weights are named; ``text_class``:
    as its class of text alone, where it has one.
    """
    whole = config.get_text_config() is not config and not text_class
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in (reversed(autos) if whole else autos) if type(config) in auto._model_mapping), None)


def model_class(config: PreTrainedConfig, *, text_class: bool = False) -> type[PreTrainedModel] | None:
    """The class that ``auto_class`` would build; None where transformers has none."""
    auto = auto_class(config, text_class=text_class)
    found: type[PreTrainedModel] | None = None if auto is None else auto._model_mapping[type(config)]
    return found


def has_recurrent_state(family: type[PreTrainedModel]) -> bool:
    """Whether the family's layers keep state other than a cache of keys and values."""
    return bool(getattr(family, "_is_stateful", False))


def takes_registered_attention(family: type[PreTrainedModel]) -> bool:
    """Whether the family's layers attend with the function that ``set_attention`` sets."""
    return bool(getattr(family, "_supports_attention_backend", False))


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Make models of ``config`` attend with the function that is registered as ``name``."""
    config._attn_implementation = name


def see_all(model: nn.Module) -> None:
    """Take the masks out of modules that hold one of their own beside the mask that they receive (GPT-Neo)."""
    for module in model.modules():
        own = module._buffers.get("bias")
        if own is not None and hasattr(module, "attention_type"):
            module._buffers["bias"] = own.new_ones(1, 1, 1, 1).expand(1, 1, 1 << 30, 1 << 30)  # one byte in all


def set_experts(config: PreTrainedConfig, name: str) -> None:
    """Make models of ``config`` run their experts with the implementation ``name``."""
    config._experts_implementation = name


@dataclass(frozen=True, slots=True)
class Experts:
    """How a module of routed experts computes: up, gate or activation, down; all experts' weights in two tensors.

    As transformers' ``grouped_mm``, which takes ``hidden`` [N, H], the experts of each token [N, k], their weights.
    """

    up: str  # the name of its weights [E, outputs, inputs], or [E, inputs, outputs] if ``transposed``
    down: str
    number: int  # of experts; larger numbers in a route mean none
    transposed: bool
    gated: bool  # the first product has two halves, a gate and what it multiplies
    biased: bool  # with ``<up>_bias`` and ``<down>_bias`` [E, outputs]
    act: Callable[[torch.Tensor], torch.Tensor]  # between the two products
    norm: Callable[[torch.Tensor], torch.Tensor] | None  # behind the second one


def experts_of(module: nn.Module) -> Experts | None:
    """How a module computes its routed experts; None where it is no such module, or computes them in another way."""
    kinds = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
    if not all(hasattr(module, name) for name in kinds) or not hasattr(module, "down_proj"):
        return None
    chosen = getattr(module.config, "_experts_implementation", None)
    if chosen != "grouped_mm":
        return None
    gated, normed = module.has_gate, getattr(module, "has_post_expert_norm", False)
    return Experts(
        "gate_up_proj" if gated else "up_proj",
        "down_proj",
        int(module.num_experts),  # type: ignore[arg-type]
        bool(module.is_transposed),
        bool(gated),
        bool(module.has_bias),
        module._apply_gate if gated else module.act_fn,  # type: ignore[arg-type]
        module.post_expert_norm if normed else None,  # type: ignore[arg-type]
    )


def set_gate(module: nn.Module, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make a module of routed experts compute its gate with ``act``."""
    vars(module)["_apply_gate"] = act


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute on ``device`` the buffers of ``model`` that no checkpoint stores; all other tensors stay on meta."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers does not change marked tensors
    for name, buffer in list(model.named_buffers()):
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if last in module._non_persistent_buffers_set:
            module._buffers[last] = torch.empty_like(buffer, device=device)
        else:
            buffer._is_hf_initialized = True
    model.initialize_weights()


def forget_pad_token(config: PreTrainedConfig) -> None:
    """Make ``config`` name no padding token, also where its class wants one.

    Rows are padded by masks here; with a padding token, some forwards look for it among the tokens.
    """
    vars(config)["pad_token_id"] = None


def ignore_positions(model: PreTrainedModel) -> None:
    """Make the rotary angles of ``model`` independent of the values of positions, which meta tensors do not have.

    Angles of type dynamic depend on the largest position, in 5.17 those of longrope too. Shapes stay the same.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = {layer: "default" if kind in CHANGING else kind for layer, kind in kinds.items()}
        elif kinds in CHANGING:
            module.rope_type = "default"


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is [in, out], as in GPT-2."""
    return isinstance(module, Conv1D)


def kept_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Fixed dtypes that do not follow the model's dtype: pattern of parameter names -> dtype."""
    return dict(model._get_dtype_plan(model.dtype))


def conversion_rules(model: PreTrainedModel) -> list[Any]:
    """The rules from stored names to parameters: ``WeightRenaming`` and ``WeightConverter``."""
    return list(get_model_conversion_mapping(model, None, None))


def as_published(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters under the names and in the shapes in which checkpoints have them; the rules are run backwards."""
    return dict(revert_weight_conversion(model, dict(tensors)))


def ignored_keys(model: PreTrainedModel) -> Iterable[str]:
    """Patterns of stored names that the model does not use."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share the memory of another parameter: name -> name of the other."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tokenizer_from_gguf(architecture: str, parts: Mapping[str, Any]) -> Any | None:
    """The tokenizer that the metadata of a GGUF file describe; None where transformers is too old to build it.

    ``parts``: names as transformers' own reader gives them (``tokens``, ``merges``, ``pre_tokenizer_type``).
    """
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    except ImportError:
        return None
    return convert_gguf_tokenizer(architecture, dict(parts))[0]


def text_splits_of_gguf() -> frozenset[str]:
    """The rules of splitting text for a byte-level vocabulary, by ``tokenizer.ggml.pre``, that transformers knows."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


@dataclass(frozen=True)
class KnownLayer:
    """The functions of Llama's layer, and of its relatives whose attention is the same, or has norms in addition."""

    layer: Callable[..., Any]
    attentions: tuple[Callable[..., Any], ...]
    attention_with_norms: Callable[..., Any]
    rotary: Mapping[str, Callable[..., Any]]  # functions of the same names are in the module of every family


@cache
def known_layer() -> KnownLayer:
    """What families' code is compared with."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.mistral.modeling_mistral import MistralAttention
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    attentions = llama.LlamaAttention.forward, MistralAttention.forward, Qwen2Attention.forward
    rotary = {"apply_rotary_pos_emb": llama.apply_rotary_pos_emb, "rotate_half": llama.rotate_half}
    return KnownLayer(llama.LlamaDecoderLayer.forward, attentions, Qwen3Attention.forward, rotary)


@dataclass(frozen=True)
class KnownModel:
    """The functions of Llama's model with its head, and of the models below it that make no more than masks of it."""

    forward: Callable[..., Any]
    bases: tuple[Callable[..., Any], ...]


@cache
def known_model() -> KnownModel:
    """What families' code is compared with."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
    from transformers.models.mistral.modeling_mistral import MistralModel
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    bases = LlamaModel.forward, MistralModel.forward, Qwen2Model.forward, Qwen3Model.forward
    return KnownModel(LlamaForCausalLM.forward, bases)


def same_code(one: Callable[..., Any] | None, other: Callable[..., Any]) -> bool:
    """Whether two functions do the same with what they are given: their code is equal, apart from the docstring."""
    if one is None:
        return False
    codes = [inspect.unwrap(own).__code__ for own in (one, other)]
    first, second = ((own.co_code, own.co_names, own.co_varnames, _constants(own.co_consts)) for own in codes)
    return first == second


def _constants(values: tuple[object, ...]) -> list[object]:
    return [own for own in values if not (isinstance(own, str) and "\n" in own)]
