"""The dtype in which a model computes: requested, named by its configuration, or that of most stored weights."""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedConfig

from aspec.models.formats.packed import StoredWeight

COMPUTABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HALF_IS_SLOW = (
    "float16 is computed as bfloat16, because a CPU computes float16 about a hundred times slower. bfloat16 keeps 8 of "
    "its 11 significant bits; --dtype float32 keeps all, in twice the memory"
)


def named_dtype(requested: torch.dtype | None, config: PreTrainedConfig) -> torch.dtype | None:
    """The requested dtype, or that of the configuration; None if neither names one that can be computed in."""
    return next((dtype for dtype in (requested, config.dtype) if dtype in COMPUTABLE), None)


def stored_dtype(weights: Mapping[str, StoredWeight]) -> torch.dtype | None:
    """The float dtype of most stored bytes; None without weights. Some families store a few tensors in fp32."""
    nbytes = bytes_by_dtype(weights.values())
    return max(nbytes, key=lambda dtype: nbytes[dtype], default=None)


def bytes_by_dtype(weights: Iterable[StoredWeight]) -> Counter[torch.dtype]:
    """Stored bytes by float dtype; of packed weights it is the one that they decode to."""
    found: Counter[torch.dtype] = Counter()
    for weight in weights:
        if weight.dtype in COMPUTABLE:
            found[weight.dtype] += weight.nbytes
    return found


def computed_on(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a device computes ``dtype`` in: a CPU has fast products for bf16, and none for fp16."""
    return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def both_dtypes(computed: torch.dtype, weights: Iterable[StoredWeight]) -> str:
    """The dtype that a model computes in, and those in which its weights are stored, if they differ."""
    stored = [dtype_name(dtype) for dtype, _ in bytes_by_dtype(weights).most_common()]
    name = dtype_name(computed)
    return name if stored in ([], [name]) else f"{name} (stored in {' and '.join(stored)})"
