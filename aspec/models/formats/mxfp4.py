"""MXFP4: four-bit floats in groups of 32 that share a power of two (OCP Microscaling Formats 1.0).

gpt-oss stores fused experts with the input last, and computes with the transpose: ``gate_up_proj_blocks``
[E, 2 I, H / 32, 16] and ``gate_up_proj_scales`` [E, 2 I, H / 32] make ``gate_up_proj`` [E, H, 2 I]. Products are exact.
"""

from collections.abc import Mapping

import torch

from aspec.io.checkpoint import TensorRef
from aspec.models.formats import grouped
from aspec.models.formats.grouped import Grouped
from aspec.models.formats.packed import Format, Kind, Outline, PackedWeight, PlainWeight, outlined
from aspec.models.formats.settings import Settings, missing

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"
KNOWN = ("quant_method", "modules_to_not_convert", "dequantize")


class Mxfp4(Format):
    """The method of gpt-oss: the stored names say which weights are packed."""

    def __init__(self, settings: Settings) -> None:
        settings.check_known(KNOWN)
        settings.names("modules_to_not_convert")  # their weights are stored plainly
        settings.flag("dequantize")
        self._settings = settings

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        found = []
        for name, ref in tensors.items():
            if name.endswith(BLOCKS):
                weight = name.removesuffix(BLOCKS)
                if (scales := tensors.get(weight + SCALES)) is None:
                    raise missing(ref, weight + SCALES)
                decode = Grouped(GROUP, transposed=True)
                found.append(grouped.packed(weight, ref, scales, None, decode, "MXFP4"))
            elif name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS not in tensors:
                raise missing(ref, name.removesuffix(SCALES) + BLOCKS)
        self._settings.check_found(len(found), f"tensors named *{BLOCKS} and *{SCALES}")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        if weight.kind is not Kind.EXPERTS or self._settings.excludes(weight.module, "modules_to_not_convert"):
            return {}
        experts, width, height = weight.shape
        return {
            f"{weight.name}{BLOCKS}": outlined(torch.uint8, experts, height, width // GROUP, GROUP // 2),
            f"{weight.name}{SCALES}": outlined(torch.uint8, experts, height, width // GROUP),
        }


def packed(name: str, codes: TensorRef, scales: TensorRef, rounded: torch.dtype | None = None) -> PackedWeight:
    """A weight [N, K] of codes [N, K / 2] and scales [N, K / 32], as compressed-tensors stores them."""
    return grouped.packed(name, codes, scales, None, Grouped(GROUP, rounded=rounded), "MXFP4")


def read(values: Mapping[str, object], where: str) -> Format:
    """The method with the settings of a checkpoint."""
    return Mxfp4(Settings(values, where, "MXFP4"))
