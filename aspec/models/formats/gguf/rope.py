"""Rotary positions of a GGUF file as transformers' ``rope_parameters``.

llama.cpp stores what llama 3 and longrope scale by as tensors of factors, one for each frequency.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.gguf import Gguf, GgufTensor
from aspec.models.formats.gguf.keys import Keys

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all llama 3 models; a file stores only what follows from them."""
CLOSE = 1e-5  # relative: of factors in fp32


def rope_parameters(gguf: Gguf, keys: Keys, context: int, dimensions: int) -> dict[str, Any]:
    """How angles follow from positions. ``dimensions`` of a head are rotated."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0, above=0)}
    keys.expect("rope.scale_linear", 1.0)
    keys.expect("rope.scaling.yarn_ext_factor", 1.0)
    original = keys.whole("rope.scaling.original_context_length", context)
    factor = keys.number("rope.scaling.factor", context / original, above=0)
    kind = keys.text("rope.scaling.type", "linear" if keys.has("rope.scaling.factor") else "none")
    if kind == "linear":
        found |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **_yarn(keys)}
    elif kind not in ("none", "longrope"):
        raise UnsupportedModelError(
            f"{gguf.path}: rotary positions are scaled by {shown(kind)}, which aspec does not know. Choose another "
            f"model."
        )
    if (long := gguf.tensors.get("rope_factors_long.weight")) is not None:
        short = gguf.tensors.get("rope_factors_short.weight", long)
        found |= _longrope(read_factors(long, dimensions), read_factors(short, dimensions), original)
        usual = _usual_attention_factor(context / original, original)
        attention_factor = keys.number("rope.scaling.attn_factor", usual, above=0)
        if abs(attention_factor / usual - 1) > CLOSE:
            found["attention_factor"] = attention_factor
    elif (freqs := gguf.tensors.get("rope_freqs.weight")) is not None:
        found |= _scaled(read_factors(freqs, dimensions), found, dimensions, context)
    if long is None:
        keys.expect("rope.scaling.attn_factor", 1.0)
    return found


def _yarn(keys: Keys) -> dict[str, float]:
    names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
    keys.expect("rope.scaling.yarn_log_multiplier", 0.0)
    return {
        to: keys.number(f"rope.scaling.{name}", above=0)
        for name, to in names.items()
        if keys.has(f"rope.scaling.{name}")
    }


def _longrope(long: list[float], short: list[float], original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
    }


def _usual_attention_factor(scale: float, original: int) -> float:
    """What longrope multiplies sines and cosines by."""
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 < original else 1.0


def _scaled(factors: list[float], found: Mapping[str, Any], dimensions: int, context: int) -> dict[str, Any]:
    """Llama 3's scaling, if the factors are what it gives; otherwise the factors themselves."""
    factor = max(factors)
    if factor == 1.0:
        return {}
    usual = _llama3_factors(factor, found["rope_theta"], dimensions)
    if all(abs(one / other - 1) < CLOSE for one, other in zip(factors, usual, strict=True)):
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    return {**_longrope(factors, factors, context), "attention_factor": 1.0}


def _llama3_factors(factor: float, base: float, dimensions: int) -> list[float]:
    low, high, original = LLAMA3.values()
    made = []
    for index in range(0, dimensions, 2):
        wave = 2 * math.pi * base ** (index / dimensions)
        smooth = min(1.0, max(0.0, (original / wave - low) / (high - low)))
        made.append(1 / ((1 - smooth) / factor + smooth))
    return made


def read_factors(tensor: GgufTensor, dimensions: int) -> list[float]:
    """The numbers of a small tensor; the only weights that a configuration needs."""
    ref = tensor.ref
    if tensor.kind != "F32" or tensor.shape != (dimensions // 2,):
        raise CheckpointError(
            f"{ref.file}: tensor {shown(ref.name)}: expected {dimensions // 2} numbers in F32, found "
            f"{list(tensor.shape)} in {tensor.kind}. Fetch the file again."
        )
    with open(ref.file, "rb") as file:
        file.seek(ref.offset)
        raw = file.read(ref.nbytes)
    values: list[float] = torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist() if raw else []
    if len(raw) != ref.nbytes or not all(0 < value < math.inf for value in values):
        raise CheckpointError(
            f"{ref.file}: tensor {shown(ref.name)}: expected factors above 0, found {shown(values)}. Fetch the file "
            f"again."
        )
    return values
