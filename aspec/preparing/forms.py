"""The forms in which quantised weights are stored: the tensors of a weight, and the settings in config.json.

compressed-tensors stores integers of 8 bits one by one (int-quantized) and of 4 bits eight in a word (pack-quantized):
https://github.com/vllm-project/compressed-tensors. ``ProductForm`` is what this machine's products of 4 bits take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from aspec.models.formats.int4.form import Int4, in_blocks, pack_codes
from aspec.models.formats.int4.kernel import BLOCKS, proved_block
from aspec.models.formats.int4.prepared import CODES, METHOD, SCALES
from aspec.preparing.pieces import NewTensor
from aspec.preparing.rounding import Rounding

PER_WORD = 8  # codes of 4 bits in an int32


class StoredForm(Protocol):
    """How weights of linear layers are stored."""

    @property
    def rounding(self) -> Rounding: ...  # noqa: D102

    @property
    def multiple(self) -> int:
        """The outputs of a weight are a multiple of this."""
        ...

    @property
    def takes_experts(self) -> bool:
        """Whether the matrices of all experts of a layer may be one weight."""
        ...

    def tensors(self, module: str, rows: int, columns: int) -> tuple[NewTensor, ...]:
        """The tensors of the weight [rows, columns] of a module, in the order in which they are read."""
        ...

    def store(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> Sequence[torch.Tensor]:
        """The contents of the tensors, from what ``Rounding`` gives: uint8 [R, C], and two times [R, groups]."""
        ...

    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The quantization_config. ``ignored``: the linear modules whose weights are plain."""
        ...


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The form of compressed-tensors, which transformers and vLLM read, too."""

    bits: int  # 4 or 8
    group: int  # inputs that share a scale
    dtype: torch.dtype  # of scales

    @property
    def rounding(self) -> Rounding:
        """See ``StoredForm``."""
        return Rounding(self.bits, False, self.dtype)

    @property
    def takes_experts(self) -> bool:
        """See ``StoredForm``."""
        return False

    @property
    def packs(self) -> bool:
        """Whether codes are packed into words."""
        return self.bits == 4

    @property
    def multiple(self) -> int:
        """See ``StoredForm``."""
        return PER_WORD

    def tensors(self, module: str, rows: int, columns: int) -> tuple[NewTensor, ...]:
        """See ``StoredForm``."""
        groups = columns // self.group
        scales = NewTensor(f"{module}.weight_scale", self.dtype, (rows, groups))
        if not self.packs:
            return NewTensor(f"{module}.weight", torch.int8, (rows, columns)), scales
        return (
            NewTensor(f"{module}.weight_packed", torch.int32, (rows, columns // PER_WORD)),
            scales,
            NewTensor(f"{module}.weight_shape", torch.int64, (2,)),
        )

    def store(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> Sequence[torch.Tensor]:
        """See ``StoredForm``."""
        if not self.packs:
            return codes.view(torch.int8).bitwise_xor_(-128), scales.to(self.dtype)  # minus 128
        return _words(codes), scales.to(self.dtype), torch.tensor(codes.shape)

    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        """See ``StoredForm``."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
        }
        form = "pack-quantized" if self.packs else "int-quantized"
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": form}},
            "ignore": list(ignored),
        }


@dataclass(frozen=True, slots=True)
class ProductForm:
    """The form in which torch's products on a CPU take weights of 4 bits, so that they need no decoding."""

    group: int  # inputs that share a scale and an offset
    block: int  # rows of a block of codes

    @classmethod
    def of_this_machine(cls, group: int) -> Self:
        """With the blocks of this machine's products; on other machines such weights are decoded."""
        return cls(group, proved_block() or max(BLOCKS.values()))

    @property
    def rounding(self) -> Rounding:
        """See ``StoredForm``."""
        return Rounding(4, True, torch.bfloat16)

    @property
    def multiple(self) -> int:
        """See ``StoredForm``."""
        return self.block

    @property
    def takes_experts(self) -> bool:
        """See ``StoredForm``."""
        return True

    def tensors(self, module: str, rows: int, columns: int) -> tuple[NewTensor, ...]:
        """See ``StoredForm``."""
        sizes = Int4(rows, columns, self.group, self.block)
        return (
            NewTensor(f"{module}.{CODES}", torch.uint8, sizes.codes),
            NewTensor(f"{module}.{SCALES}", torch.bfloat16, sizes.scales),
        )

    def store(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> Sequence[torch.Tensor]:
        """See ``StoredForm``."""
        packed = codes.new_empty(codes.shape[0], codes.shape[1] // 2)
        pack_codes(codes, self.block, in_blocks(packed, self.block))
        return packed, torch.stack((scales.t(), offsets.t()), -1).to(torch.bfloat16)

    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        """See ``StoredForm``."""
        return {"quant_method": METHOD, "bits": 4, "group_size": self.group, "block": self.block}


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, uint8 [R, C], as int32 [R, C / 8], the first in the lowest bits."""
    low, high = codes.view(codes.shape[0], -1, 2).unbind(-1)
    return (low | high << 4).view(torch.int32)
