"""NVFP4: four-bit floats in groups of 16 with an e4m3 scale, and one float32 scale for the whole weight.

compressed-tensors divides by the whole weight's scale and rounds the result to bfloat16; ModelOpt multiplies by it.
This file has the arithmetic of both, and ModelOpt's checkpoints: ``weight``, ``weight_scale`` and ``weight_scale_2``.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch

from aspec.errors import UnsupportedModelError, shown
from aspec.io.checkpoint import TensorRef
from aspec.io.weight_format import REMEDY
from aspec.models.formats import fp8, grouped
from aspec.models.formats.grouped import Grouped
from aspec.models.formats.packed import Format, Kind, Outline, PackedWeight, PlainWeight, outlined
from aspec.models.formats.settings import Settings, misfit, missing

GROUP = 16
KNOWN = (
    "quant_method",
    "quant_algo",
    "config_groups",
    "ignore",
    "exclude_modules",
    "group_size",
    "input_activations",
    "kv_cache_quant_algo",
    "kv_cache_scheme",
    "producer",
    "quantized_layers",
    "weights",
)
ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "MIXED_PRECISION")
CHANGED = (".pre_quant_scale", ".svdquant_lora_a", ".svdquant_lora_b")  # tensors of other ModelOpt algorithms
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class ModelOpt(Format):
    """ModelOpt's floating-point checkpoints: the stored tensors of a weight say which algorithm it has."""

    def __init__(self, settings: Settings) -> None:
        settings.check_known(KNOWN)
        settings.choice("quant_algo", ALGORITHMS, None)
        settings.choice("group_size", (None, GROUP, 32), None)
        settings.names("ignore")
        settings.names("exclude_modules")
        self._settings = settings

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        found = []
        for name, ref in tensors.items():
            if name.endswith(CHANGED):
                raise UnsupportedModelError(
                    f"{ref.file}: tensor {shown(name)} changes the inputs or outputs of a layer: expected an "
                    f"algorithm that only quantises weights, one of {', '.join(ALGORITHMS)}, found this tensor of "
                    f"another. {REMEDY}"
                )
            scale, factor = tensors.get(name + "_scale"), tensors.get(name + "_scale_2")
            if scale is not None and ref.dtype == torch.uint8:
                if factor is None:
                    raise missing(ref, name + "_scale_2")
                decode = Grouped(GROUP, divided=False)
                found.append(grouped.packed(name, ref, scale, factor, decode, "NVFP4"))
            elif scale is not None and ref.dtype in FP8:
                found.append(fp8.packed(name, ref, scale, _block(ref, scale), "FP8 of ModelOpt"))
            elif scale is not None:
                raise misfit(ref, f"uint8 or float8_e4m3fn, as {shown(scale.name)} scales it")
            elif ref.dtype in FP8 and not name.endswith("_scale"):
                raise missing(ref, name + "_scale")
        self._settings.check_found(len(found), "tensors named *.weight_scale beside their weights")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        algorithm = self._algorithm(weight.module) if weight.kind in (Kind.LINEAR, Kind.HEAD) else None
        if algorithm is None:
            return {}
        height, width = weight.shape
        scale = f"{weight.name}_scale"
        if algorithm in ("NVFP4", "W4A16_NVFP4"):
            return {
                weight.name: outlined(torch.uint8, height, width // 2),
                scale: outlined(FP8[0], height, width // GROUP),
                f"{scale}_2": outlined(torch.float32),
            }
        scales = {
            "FP8": outlined(torch.float32),
            "FP8_PER_CHANNEL_PER_TOKEN": outlined(torch.float32, height),
            "MXFP8": outlined(torch.uint8, height, width // 32),
        }
        return {weight.name: outlined(FP8[0], height, width), scale: scales[algorithm]}

    def _algorithm(self, module: str) -> str | None:
        """The algorithm of a module's weight; None if it is stored plainly. Patterns are those of file names."""
        values = self._settings.values
        excluded = self._settings.names("exclude_modules") + self._settings.names("ignore")
        if any(fnmatchcase(module, pattern) for pattern in excluded):
            return None
        algorithm = values.get("quant_algo")
        if algorithm == "MIXED_PRECISION":
            layers = values.get("quantized_layers")
            own = layers.get(module) if isinstance(layers, Mapping) else None
            algorithm = own.get("quant_algo") if isinstance(own, Mapping) else None
        return algorithm if algorithm in ALGORITHMS[:-1] else None


def _block(weight: TensorRef, scale: TensorRef) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale: groups of 32 with powers of two, else as the scales are."""
    return (1, 32) if scale.dtype in grouped.POWERS else None


def packed(
    name: str, codes: TensorRef, scales: TensorRef, factor: TensorRef, rounded: torch.dtype | None = torch.bfloat16
) -> PackedWeight:
    """A weight [N, K] of codes [N, K / 2], scales [N, K / 16] and a divisor [1], as compressed-tensors stores them."""
    return grouped.packed(name, codes, scales, factor, Grouped(GROUP, divided=True, rounded=rounded), "NVFP4")


def read(values: Mapping[str, object], where: str) -> Format:
    """ModelOpt with the settings of a checkpoint."""
    inner = values.get("quantization")  # of hf_quant_config.json; config.json has its fields without this level
    return ModelOpt(Settings(inner if isinstance(inner, Mapping) else values, where, "ModelOpt"))
