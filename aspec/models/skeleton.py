"""From a model folder's config.json to modules without weights; refuses models that aspec cannot run, with a reason.

A skeleton has its parameters on the meta device, and its computed buffers (rotary frequencies, scales) on a real one.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from aspec.errors import CheckpointError, UnsupportedModelError
from aspec.io.json_file import read_json
from aspec.io.weight_format import REMEDY, quantisation
from aspec.models import attention
from aspec.models.families import ATTENTION_LAYERS, CAPPED_ROPE, HARMLESS, REFUSED_KEYS, REFUSED_ROPE, family_of
from aspec.models.hf_compat import (
    ROPE_INIT_FUNCTIONS,
    compute_buffers,
    forget_pad_token,
    has_recurrent_state,
    model_class,
    no_init_weights,
    set_attention,
    set_experts,
)

OUTPUTS = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
"""Keys that choose what a forward returns beside logits: a training run may have left them in config.json."""


def load_config(folder: Path) -> PreTrainedConfig:
    """The model's configuration. Raises CheckpointError or UnsupportedModelError, each with one paragraph."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json: expected a model folder in transformers' format. Check the path."
        )
    raw = read_json(path, "a model's configuration", error=CheckpointError, constants=True)  # some write Infinity
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{path}: expected a JSON object with the name of a model_type, found none. Fetch the checkpoint again."
        )
    if (kind := quantisation(raw)) is not None:
        raise UnsupportedModelError(
            f"{path}: its weights are quantised ({kind}), and quantised checkpoints are not supported yet. {REMEDY}"
        )
    if model_type not in CONFIG_MAPPING:
        own_code = "brings its own code (auto_map), which aspec does not execute" if "auto_map" in raw else ""
        raise UnsupportedModelError(
            f"{path}: {model_type} is not supported: it {own_code or 'is not known to the installed transformers'}. "
            f"Update transformers, or choose another model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Warning:  # raised as an error by the caller's filter; not caused by the file
        raise
    except Exception as error:  # a config class may raise any exception for a value it does not know
        raise UnsupportedModelError(
            f"{path}: transformers cannot read this {model_type} configuration: {first_line(error)}. Correct the file, "
            f"or update transformers."
        ) from error
    reasons = _refusals(config)
    if reasons:
        raise UnsupportedModelError(f"{path}: {config.model_type} is not supported: {'; '.join(reasons)}.")
    return config


def _refusals(config: PreTrainedConfig) -> list[str]:
    """Reasons from the configuration alone why aspec cannot run the model; empty if none."""
    try:
        text = config.get_text_config()
    except ValueError as error:
        return [f"it holds several models of text ({first_line(error)})"]
    reasons = [why for key, why in REFUSED_KEYS.items() if _is_set(config, key) or _is_set(text, key)]
    if (refused := family_of(config.model_type).refused) is not None:
        reasons.append(refused)
    if text is not config:
        reasons.append("it is multimodal; only text-only checkpoints are supported")
    for kind in sorted(rope_types(text)):
        if kind in REFUSED_ROPE:
            reasons.append(f"rotary positions of type {kind}: {REFUSED_ROPE[kind]}")
        elif kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            reasons.append(f"rotary positions of type {kind} are not known to the installed transformers")
    if (family := model_class(config)) is None:
        return [*reasons, "transformers has no decoder-only language model of this type"]
    if has_recurrent_state(family) and not _attends_only(text):
        reasons.append("it keeps recurrent state, which cannot be rolled back when a proposal is refused")
    return reasons


def _is_set(config: PreTrainedConfig, key: str) -> bool:
    """Whether a configuration asks for what a key stands for."""
    value = getattr(config, key, None)
    return bool(value) and value != HARMLESS.get(key)


def _attends_only(text: PreTrainedConfig) -> bool:
    """Whether the configuration names every layer's type, and each of them is some form of attention."""
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    return bool(types) and all(kind in ATTENTION_LAYERS for kind in types)


def rope_types(text: PreTrainedConfig) -> set[str]:
    """The types of rotary positions in a configuration, over all its layer types."""
    rope = getattr(text, "rope_parameters", None) or {}
    entries = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {str(entry.get("rope_type", entry.get("type"))) for entry in entries} - {"None"}


def max_context(text: PreTrainedConfig) -> int | None:
    """Largest number of tokens in a row: the model's limit, or the original one of CAPPED_ROPE; None: no limit."""
    limit = getattr(text, "max_position_embeddings", None)
    if rope_types(text) & CAPPED_ROPE:
        key = "original_max_position_embeddings"
        original = (getattr(text, "rope_parameters", None) or {}).get(key) or getattr(text, key, None)
        limit = min(filter(None, (original, limit)), default=None)
    return None if limit is None else int(limit)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers. Raises UnsupportedModelError if no module list has one per layer."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0:
            return name, module
    raise UnsupportedModelError(
        f"{model.config.model_type} is not supported: expected a list of {count} decoder layers, found none."
    )


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype, attend: str) -> PreTrainedModel:
    """The model with all tensors on meta; it attends with the function registered as ``attend``.

    Raises UnsupportedModelError if transformers cannot build it.
    """
    config = copy.deepcopy(config)
    if not _has_pad_token(config):  # a fine-tune may name a token beyond the embedding; no layer uses it
        forget_pad_token(config)
    for key, value in OUTPUTS.items():
        if hasattr(config, key):
            setattr(config, key, value)
    set_attention(config, attend)
    if (experts := family_of(config.model_type).experts) is not None:
        set_experts(config, experts)
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Warning:  # raised as an error by the caller's filter; not caused by the configuration
        raise
    except Exception as error:  # a constructor may raise any exception for a value it does not know
        raise UnsupportedModelError(
            f"{config.model_type}: transformers cannot build a model from this configuration: {first_line(error)}. "
            f"Correct config.json, or update transformers."
        ) from error
    return model.eval()


def _has_pad_token(config: PreTrainedConfig) -> bool:
    """Whether the padding token of a configuration is within its embedding."""
    token, size = getattr(config, "pad_token_id", None), getattr(config.get_text_config(), "vocab_size", None)
    return isinstance(token, int) and isinstance(size, int) and -size <= token < size


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with parameters and stored buffers on meta, and its computed buffers on ``device``."""
    model = build_on_meta(config, dtype, attention.NAME)
    compute_buffers(model, device)
    return model


def first_line(error: BaseException) -> str:
    """The type and first line of an error, for use in another message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}" if text else type(error).__name__
