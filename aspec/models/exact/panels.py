"""Products in fp32 with weights that become fp32 a panel at a time, in a small buffer that stays in a cache.

A processor without instructions for bf16 multiplies bf16 many times slower than fp32, and a copy of all weights in fp32
would take twice their memory and their time to read. Measured on a processor with AVX2, [5632, 2048], one thread, ms
for 1 / 16 / 64 / 256 rows: torch's bf16 product 3.3 / 37 / 149 / 585, panels 6 / 11 / 36 / 100.
"""

import threading
from collections.abc import Callable, Sequence

import torch

PANEL_BYTES = 2 << 20  # of a panel in fp32; measured: 0.5 and 8 MiB are slower
FEWEST_OUTPUTS = 16  # of a panel, however long a row of weights is

Panel = Callable[[int, int], torch.Tensor]
"""Weights fp32 [K, n] of the outputs from a first to before a last one; they are used before the next call."""

_thread = threading.local()  # .buffer: fp32, for panels


def panel_outputs(inner: int) -> int:
    """Outputs of a whole panel, for weights of ``inner`` inputs."""
    return max(FEWEST_OUTPUTS, PANEL_BYTES // (4 * inner))


def buffer_bytes(out: int, inner: int) -> int:
    """Bytes of the buffer of one thread for a weight of so many outputs and inputs."""
    return 4 * inner * min(out, panel_outputs(inner))


def in_panels(
    rows: torch.Tensor, out: int, panel: Panel, blocks: Sequence[int], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows [M, K] times the weights of all panels, in blocks of so many rows; [M, out] in the dtype of ``rows``.

    The blocks hold at least M rows; what is missing of the last one is zeros. Sums and bias are rounded once.
    """
    (count, inner), step = rows.shape, panel_outputs(rows.shape[1])
    wide = rows.new_zeros((sum(blocks), inner), dtype=torch.float32)
    wide[:count] = rows
    made = rows.new_empty((count, out))
    added = None if bias is None else bias.float()
    for start in range(0, out, step):
        stop, first = min(start + step, out), 0
        weights = panel(start, stop)
        for size in blocks:
            result = torch.mm(wide[first : first + size], weights)
            if added is not None:
                result += added[start:stop]
            made[first : first + size, start:stop] = result[: count - first]
            first += size
    return made


def widened(weight: torch.Tensor) -> Panel:
    """Panels of a weight [K, N] in a smaller dtype, in the order of its memory. Each thread has one buffer."""

    def panel(start: int, stop: int) -> torch.Tensor:
        part = weight[:, start:stop]
        if weight.stride(0) == 1:
            return buffer((stop - start, len(weight))).copy_(part.t()).t()
        return buffer((len(weight), stop - start)).copy_(part)

    return panel


def buffer(shape: tuple[int, int]) -> torch.Tensor:
    """Memory of a panel, fp32, of this thread; every call returns the same."""
    found: torch.Tensor | None = getattr(_thread, "buffer", None)
    size = shape[0] * shape[1]
    if found is None or found.numel() < size:
        with torch.inference_mode(False):  # or it could be filled in inference mode only
            found = _thread.buffer = torch.empty(size)
    return found[:size].view(shape)
