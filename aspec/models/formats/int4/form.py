"""The form in which a product takes weights of 4 bits: codes in blocks of rows, a scale and an offset for each group.

A weight is w = (code - 8) * scale + offset, codes from 0 to 15. ``codes`` uint8 [N, K / 2] are N / block matrices
[K, block / 2], one after another: byte (k, j) of a block has the code of its row j in the low bits and that of row
j + block / 2 in the high ones. ``scales`` bf16 [K / group, N, 2] are pairs (scale, offset). It is the order of torch's
int4 product: blocks of 64 rows on processors with AVX-512, of 32 with AVX2 (ATen/native/cpu/int4mm_kernel.cpp).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from aspec.models.formats.workspace import Workspace, room

GROUPS = (32, 64, 128, 256)
"""Inputs that may share a scale."""

ZERO = 8  # the code of a weight that is its group's offset
TILE_ROWS = 256  # that are decoded or packed at once; a multiple of every block


@dataclass(frozen=True, slots=True)
class Int4:
    """The sizes of a weight [rows, columns] in this form."""

    rows: int  # outputs, a multiple of block
    columns: int  # inputs, a multiple of group
    group: int  # inputs that share a scale
    block: int  # rows of a block

    @property
    def codes(self) -> tuple[int, int]:
        """The shape of the codes, uint8."""
        return self.rows, self.columns // 2

    @property
    def scales(self) -> tuple[int, int, int]:
        """The shape of scales and offsets, bfloat16."""
        return self.columns // self.group, self.rows, 2

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self.rows * self.columns // 2 + 4 * self.rows * (self.columns // self.group)


class WriteInt4(Protocol):
    """Writes stored tensors in this form; it allocates nothing, and may run on any thread."""

    def __call__(
        self,
        stored: Sequence[torch.Tensor],
        block: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """``stored``, ``workspace``: as ``Decode`` takes them. ``codes``, ``scales``: of the shapes of ``Int4``."""
        ...


@dataclass(frozen=True, slots=True)
class Int4Factor:
    """How a stored weight becomes the factor of a product without being decoded."""

    group: int  # inputs that share a scale
    write: WriteInt4 | None = None  # None: the stored tensors are the codes and the scales
    workspace_bytes: int = 0
    block: int | None = None  # rows of a block of stored codes; None: ``write`` makes any
    rounds: bool = True  # scales or offsets are rounded to bfloat16, so that the weight isn't the decoded one

    def sizes(self, shape: Sequence[int], block: int) -> Int4 | None:
        """The sizes of a weight for products with such blocks; None if it does not fit them."""
        rows, columns = shape if len(shape) == 2 else (0, 0)
        fits = self.group in GROUPS and rows % block == 0 and columns % self.group == 0 and rows * columns > 0
        return Int4(rows, columns, self.group, block) if fits and self.block in (None, block) else None


def pack_codes(codes: torch.Tensor, block: int, out: torch.Tensor) -> None:
    """Pack codes [rows, columns] (uint8, which is overwritten) of whole blocks into ``out``, see ``in_blocks``."""
    rows, columns = codes.shape
    low, high = codes.view(rows // block, 2, block // 2, columns).unbind(1)
    low.bitwise_or_(high.bitwise_left_shift_(4))
    out.copy_(low.transpose(1, 2))


def in_blocks(packed: torch.Tensor, block: int) -> torch.Tensor:
    """Codes [rows, columns / 2] as [rows / block, columns, block / 2]."""
    rows, pairs = packed.shape
    return packed.view(rows // block, 2 * pairs, block // 2)


def unpack_codes(packed: torch.Tensor, block: int, out: torch.Tensor) -> None:
    """The inverse: from [rows, columns / 2] to ``out`` [rows, columns], uint8."""
    rows, columns = out.shape
    low, high = out.view(rows // block, 2, block // 2, columns).unbind(1)
    low.copy_(in_blocks(packed, block).transpose(1, 2))
    torch.bitwise_right_shift(low, 4, out=high)
    low.bitwise_and_(15)


@dataclass(frozen=True, slots=True)
class Int4Decode:
    """Decodes codes and scales that are stored in this form: in fp32, rounded once. See ``Decode``."""

    sizes: Int4

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """See ``Decode``."""
        own, (packed, scales) = self.sizes, stored
        height, groups = min(TILE_ROWS, own.rows), own.columns // own.group
        space = Workspace(workspace)
        codes = space.take(torch.uint8, height, own.columns)
        values = space.take(torch.float32, height, own.columns)
        pairs = space.take(torch.float32, 2, own.rows, groups).copy_(scales.permute(2, 1, 0))
        for first in range(0, own.rows, height):
            rows = slice(first, min(first + height, own.rows))
            count = rows.stop - first
            unpack_codes(packed[rows], own.block, codes[:count])
            grouped = values[:count].view(count, groups, own.group)
            values[:count].copy_(codes[:count].view(torch.int8).sub_(ZERO))
            grouped.mul_(pairs[0, rows, :, None]).add_(pairs[1, rows, :, None])
            out[rows].copy_(values[:count])

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace for one weight."""
        own = self.sizes
        tile = min(TILE_ROWS, own.rows) * own.columns
        return room(tile, 4 * tile, 8 * own.rows * (own.columns // own.group))


@dataclass(frozen=True, slots=True)
class MatricesDecode:
    """Decodes matrices [E, rows, columns], of codes and scales that have one slice for each. See ``Decode``."""

    matrix: Int4Decode

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """See ``Decode``."""
        for codes, scales, own in zip(*stored, out, strict=True):
            self.matrix((codes, scales), own, workspace)
