"""What the generic driver takes and what it refuses, as rows: a new family is a row here at most."""

from collections.abc import Mapping
from dataclasses import dataclass

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""Attention kinds whose masks the slot cache can build; any other kind of layer keeps recurrent state."""

REFUSED_KEYS: Mapping[str, str] = {
    "quantization_config": "quantised checkpoints are not supported yet; use the bf16 or fp32 checkpoint",
    "alibi": "positions by attention bias (alibi) are not supported",
    "is_encoder_decoder": "encoder-decoder models are not supported; aspec runs decoder-only models",
}
"""Config keys that, when true, change the maths in a way the driver does not follow: key -> reason and remedy."""

REFUSED_ROPE: Mapping[str, str] = {
    "dynamic": "its angles change with the length, so cached keys would go stale",
    "longrope": "its angles switch with the length, so cached keys would go stale",
}
"""Rotary types that depend on the running length."""


@dataclass(frozen=True, slots=True)
class Family:
    """What differs from the generic driver for one ``model_type``."""

    refused: str | None = None  # why, and what to do instead
    shares_kv: bool = False  # some layers own no keys and values, by design


FAMILIES: Mapping[str, Family] = {
    "bloom": Family(refused="its positions are an attention bias (alibi) built from a 2-d mask"),
    "mpt": Family(refused="its positions are an attention bias (alibi) built from a 2-d mask"),
    "falcon": Family(refused="its attention does not take a registered attention function"),
    "qwen3_next": Family(refused="its linear-attention layers keep recurrent state"),
    "qwen3_5_text": Family(refused="its linear-attention layers keep recurrent state"),
    "xlm": Family(refused="its layers are parallel lists"),
    "zamba": Family(refused="its layers share weights"),
    "zamba2": Family(refused="its layers share weights"),
    "gemma3n_text": Family(shares_kv=True),
    "gemma4_text": Family(shares_kv=True),
}


def family_of(model_type: str) -> Family:
    """The row of a family; most need none."""
    return FAMILIES.get(model_type, Family())
