"""Formats of weights by the signs they are known by, for messages that name them."""

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

FILES: Mapping[str, str] = MappingProxyType(
    {
        ".ggml": "GGML (of llama.cpp)",
        ".bin": "PyTorch's .bin",
        ".pt": "PyTorch's .pt",
        ".pth": "PyTorch's .pth",
        ".ckpt": "PyTorch's .ckpt",
        ".h5": "Keras' .h5",
        ".msgpack": "Flax's .msgpack",
        ".onnx": "ONNX",
        ".npz": "MLX's .npz",
    }
)
"""The end of a file's name -> its format."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "aqlm": "AQLM",
        "auto-round": "AutoRound",
        "autoround": "AutoRound",
        "awq": "AWQ",
        "bitnet": "BitNet",
        "bitsandbytes": "bitsandbytes",
        "compressed-tensors": "compressed-tensors",
        "exl2": "EXL2",
        "exl3": "EXL3",
        "fbgemm_fp8": "FP8",
        "fp8": "FP8",
        "gptq": "GPTQ",
        "hqq": "HQQ",
        "modelopt": "ModelOpt",
        "mxfp4": "MXFP4",
        "nvfp4": "NVFP4",
        "quanto": "Quanto",
        "quark": "Quark",
        "torchao": "torchao",
    }
)
"""``quant_method`` of a quantization_config -> the name of the format."""

TENSORS: Mapping[str, str] = MappingProxyType(
    {
        ".qweight": "GPTQ or AWQ",
        ".weight_packed": "compressed-tensors",
        ".weight_scale_inv": "FP8",
        ".weight_scale": "FP8 or compressed-tensors",
        ".absmax": "bitsandbytes",
        ".SCB": "bitsandbytes",
        "_blocks": "MXFP4",
        ".scales": "MLX",
    }
)
"""The end of a stored tensor's name -> the format that has such tensors."""

REMEDY = (
    "Give the original model instead: the same model in bfloat16, float16 or float32 safetensors, from which this "
    "one was made (its model card names it)."
)


def file_format(path: Path) -> str | None:
    """The name of the format of a file of weights; None for safetensors and for other files."""
    return FILES.get(path.suffix.lower())


def folder_format(folder: Path) -> tuple[str, str] | None:
    """The format of a folder's weights and one of its files; None if it has safetensors, or no weights at all."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return None
    found = ((FILES[end], name) for end in FILES for name in names if name.lower().endswith(end))
    return next(((kind, name) for kind, name in found if name != "training_args.bin"), None)


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The format of quantised weights in a config.json, such as ``GPTQ, 4 bits``; None if they are not quantised."""
    keys = ("quantization_config", "compression_config", "quantization")
    found = next((value for key in keys if (value := config.get(key))), None)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        return f"an unknown format ({reprlib.repr(found)})"
    method = found.get("quant_method", found.get("quant_algo"))
    if method is None:
        name = "MLX" if "group_size" in found else "an unknown format"
    else:
        name = METHODS.get(str(method).lower().replace("_", "-"), METHODS.get(str(method).lower(), f"{method!r:.40}"))
    bits = found.get("bits", found.get("w_bit"))
    bits = 4 if bits is None and found.get("load_in_4bit") is True else bits
    bits = 8 if bits is None and found.get("load_in_8bit") is True else bits
    return f"{name}, {bits} bits" if type(bits) is int and 0 < bits < 64 else name


def quantised_tensors(names: Iterable[str]) -> str | None:
    """The format of which stored tensors have the names; None if they have the names of no format."""
    ends = {end for name in names for end in TENSORS if name.endswith(end)}
    return next((TENSORS[end] for end in TENSORS if end in ends), None)
