"""From a model folder's config.json to modules without weights; refuses models that aspec cannot run, with a reason.

A skeleton has its parameters on the meta device, and its computed buffers (rotary frequencies, scales) on a real one.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from aspec.errors import CheckpointError, UnsupportedModelError, reason_of, shown
from aspec.io.hub import known_as, read_config
from aspec.models import attention
from aspec.models.configuration.config_sizes import check_numbers, check_tables
from aspec.models.configuration.context import rope_types
from aspec.models.families import ALIASES, HARMLESS, REFUSED_KEYS, family_of
from aspec.models.formats.registry import format_of
from aspec.models.hf_compat import (
    ROPE_INIT_FUNCTIONS,
    auto_class,
    compute_buffers,
    forget_pad_token,
    model_class,
    no_init_weights,
    see_all,
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
    path, raw = known_as(folder / "config.json"), read_config(folder)
    model_type = ALIASES.get(raw["model_type"], raw["model_type"])
    format_of(folder, raw)  # raises for weights that aspec cannot decode
    if model_type not in CONFIG_MAPPING:
        own_code = "brings its own code (auto_map), which aspec does not execute" if "auto_map" in raw else ""
        raise UnsupportedModelError(
            f"{path}: {shown(model_type)} is not supported: it "
            f"{own_code or 'is not known to the installed transformers'}. Update transformers, or choose another model."
        )
    check_numbers(path, raw)
    try:
        if model_type != raw["model_type"]:
            config = CONFIG_MAPPING[model_type].from_dict({**raw, "model_type": model_type})
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Warning:  # raised as an error by the caller's filter; not caused by the file
        raise
    except Exception as error:  # a config class may raise any exception for a value it does not know
        raise UnsupportedModelError(
            f"{path}: transformers cannot read this {model_type} configuration: {reason_of(error)}. Correct the file, "
            f"or update transformers."
        ) from error
    if not isinstance(config.dtype, torch.dtype | str | None):
        raise CheckpointError(
            f"{path}: expected dtype to be the name of a type, such as bfloat16, found {shown(config.dtype)}. Correct "
            f"the file."
        )
    reasons = _refusals(config)
    if reasons:
        raise UnsupportedModelError(f"{path}: {config.model_type} is not supported: {reasons[0]}.")
    return config


def _refusals(config: PreTrainedConfig) -> list[str]:
    """Reasons from the configuration alone why aspec cannot run the model; empty if none."""
    try:
        text = config.get_text_config()
    except ValueError:
        held = " and ".join(config.sub_configs)
        return [f"it holds several models ({held}), of which none is the one that answers in text"]
    rows = [family_of(model_type) for model_type in dict.fromkeys((config.model_type, text.model_type))]
    keys = [key for key in REFUSED_KEYS if not (key == "alibi" and rows[0].biased)]
    reasons = [REFUSED_KEYS[key] for key in keys if _is_set(config, key) or _is_set(text, key)]
    reasons += [row.refused for row in rows if row.refused is not None]
    for kind in sorted(rope_types(text)):
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            reasons.append(f"rotary positions of type {shown(kind)} are not known to the installed transformers")
    if model_class(config, text_class=rows[0].text_class) is None:
        reasons.append("transformers has no decoder-only language model of this type")
    return reasons


def _is_set(config: PreTrainedConfig, key: str) -> bool:
    """Whether a configuration asks for what a key stands for."""
    value = getattr(config, key, None)
    return bool(value) and value != HARMLESS.get(key)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers. Raises UnsupportedModelError if no module list has one per layer.

    A model with towers has several such lists; the one of its language model counts.
    """
    text = model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    if not count:
        raise UnsupportedModelError(
            f"{model.config.model_type} is not supported: its configuration names no decoder layers."
        )
    holders = (own for own in model.modules() if isinstance(own, PreTrainedModel) and type(own.config) is type(text))
    inside = {id(module) for module in next(holders, model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside:
            return name, module
    raise UnsupportedModelError(
        f"{model.config.model_type} is not supported: its {count} decoder layers are not one list of modules."
    )


def uses_cache(config: PreTrainedConfig) -> bool:
    """The argument use_cache of a forward that is given a cache: the cache counts in any case."""
    return not family_of(config.model_type).own_cache


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype, attend: str, *, whole: bool = False) -> PreTrainedModel:
    """The model with all tensors on meta; it attends with the function registered as ``attend``.

    ``whole``: with its towers, also where only its class of text alone can run. Raises UnsupportedModelError if
    transformers cannot build it.
    """
    config = copy.deepcopy(config)
    for own in (config, config.get_text_config()):
        if not _has_pad_token(own):  # a fine-tune may name a token beyond the embedding; no layer uses it
            forget_pad_token(own)
        for key, value in OUTPUTS.items():
            if hasattr(own, key):
                setattr(own, key, value)
    family = family_of(config.model_type)
    set_attention(config, "eager" if family.own_attention else attend)
    if family.experts is not None:
        set_experts(config, family.experts)
    auto = auto_class(config, text_class=family.text_class and not whole)
    assert auto is not None, "load_config refuses a type that transformers cannot build"
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    except Warning:  # raised as an error by the caller's filter; not caused by the configuration
        raise
    except ImportError as error:  # of a tower, such as timm's
        raise UnsupportedModelError(
            f"{config.model_type}: transformers builds this model with a package that is not installed "
            f"({reason_of(error)}). Install it."
        ) from error
    except Exception as error:  # a constructor may raise any exception for a value it does not know
        raise UnsupportedModelError(
            f"{config.model_type}: transformers cannot build a model from this configuration: {reason_of(error)}. "
            f"Correct config.json, or update transformers."
        ) from error
    if family.own_attention:
        set_attention(model.config, attend)  # it makes the masks
    return model.eval()


def _has_pad_token(config: PreTrainedConfig) -> bool:
    """Whether the padding token of a configuration is within its embedding."""
    token, size = getattr(config, "pad_token_id", None), getattr(config.get_text_config(), "vocab_size", None)
    return isinstance(token, int) and isinstance(size, int) and -size <= token < size


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with parameters and stored buffers on meta, and its computed buffers on ``device``."""
    model = build_on_meta(config, dtype, attention.NAME)
    check_tables(model)
    compute_buffers(model, device)
    see_all(model)
    return model
