"""Products of many rows with weights of 4 bits: a panel of outputs is decoded into a buffer that stays in a cache.

The int4 product of torch takes seconds in proportion to the rows, and decoding takes the same for any number of them.
Measured on a processor with AVX2, [8192, 2048], one thread, ms for 16 / 64 / 256 rows: torch's int4 product 21 / 86 /
233, panels 23 / 53 / 161, torch's bf16 product 56 / 222 / 881. The bits are not those of the int4 product, so exact
steps do not use panels.
"""

import torch

from aspec.models.exact.panels import buffer
from aspec.models.formats.int4.form import ZERO, Int4
from aspec.models.formats.workspace import Workspace, room

PANEL_BYTES = 4 << 20  # of a panel in fp32; measured: 2 MiB take 1.5 times as long to decode
LANE = 16  # bytes of the codes of one input that are moved as one number


def panel_product(
    rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, sizes: Int4, dtype: torch.dtype
) -> torch.Tensor:
    """Rows bf16 [M, K] times the transposed weight: bf16 [M, N]. ``dtype``: of the panels, fp32 or bf16."""
    wide, made = rows.to(dtype), rows.new_empty(len(rows), sizes.rows)
    memory = buffer((1, panel_bytes(sizes, dtype) // 4)).view(torch.uint8)[0]
    step = _outputs(sizes)
    panel = _Panel(sizes, step, dtype, memory)
    for start in range(0, sizes.rows, step):
        stop = min(start + step, sizes.rows)
        if stop - start < step:
            panel = _Panel(sizes, stop - start, dtype, memory)
        made[:, start:stop] = torch.mm(wide, panel.fill(codes[start:stop], scales[:, start:stop]))
    return made


def panel_bytes(sizes: Int4, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the buffer of one thread."""
    outputs = _outputs(sizes)
    elements, pairs = sizes.columns * outputs, 8 * (sizes.columns // sizes.group) * outputs
    narrow = 0 if dtype is torch.float32 else elements * dtype.itemsize
    return room(elements // 2, elements // 2, elements, pairs, 4 * elements, narrow)


def _outputs(sizes: Int4) -> int:
    """Outputs of a whole panel: whole blocks."""
    fit = PANEL_BYTES // (4 * sizes.columns) // sizes.block * sizes.block
    return min(sizes.rows, max(sizes.block, fit))


class _Panel:
    """Decodes [outputs, K] weights as [K, outputs]: in fp32, with the values of ``Int4Decode``."""

    def __init__(self, sizes: Int4, outputs: int, dtype: torch.dtype, memory: torch.Tensor) -> None:
        columns, groups, half = sizes.columns, sizes.columns // sizes.group, sizes.block // 2
        self._blocks, self._columns, space = outputs // sizes.block, columns, Workspace(memory)
        self._sorted = space.take(torch.uint8, columns, self._blocks, half)
        self._halves = space.take(torch.uint8, columns, self._blocks, half)
        self._numbers = space.take(torch.int8, columns, self._blocks, 2, half)
        self._pairs = space.take(torch.float32, 2, groups, 1, outputs)
        self._values = space.take(torch.float32, groups, sizes.group, outputs)
        self._narrow = None if dtype is torch.float32 else space.take(dtype, columns, outputs)

    def fill(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The weights [K, outputs] of codes [outputs, K / 2] and scales [K / group, outputs, 2]."""
        numbers, halves = self._numbers, self._halves
        stored = codes if codes.storage_offset() % LANE == 0 else halves.view(codes.shape).copy_(codes)
        _lanes(self._sorted).copy_(_lanes(stored.view(self._blocks, self._columns, -1)).transpose(0, 1))
        _lanes(numbers[:, :, 0]).copy_(_lanes(torch.bitwise_and(self._sorted, 15, out=halves)))
        _lanes(numbers[:, :, 1]).copy_(_lanes(torch.bitwise_right_shift(self._sorted, 4, out=halves)))
        values, (factors, offsets) = self._values, self._pairs
        values.copy_(numbers.sub_(ZERO).view(values.shape))
        self._pairs.copy_(scales.permute(2, 0, 1)[:, :, None])
        torch.addcmul(offsets, values, factors, out=values)
        weights = values.view(self._columns, -1)
        return weights if self._narrow is None else self._narrow.copy_(weights)


def _lanes(codes: torch.Tensor) -> torch.Tensor:
    """The same bytes as numbers of LANE bytes, which are moved several times as fast; nothing is computed with them."""
    return codes.view(torch.complex128)
