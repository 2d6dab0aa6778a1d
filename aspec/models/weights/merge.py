"""The maths of a low-rank update: W + scale * B @ A, in fp32, rounded once to the weight's dtype."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

BLOCK_BYTES = 1 << 20  # of fp32 rows that are computed at once

Matrix = TypeVar("Matrix")
"""A stored tensor, or a place in a buffer."""


@dataclass(frozen=True, slots=True)
class LowRank(Generic[Matrix]):
    """An update of a matrix W [N, M] by A [r, M] and B [N, r]; ``transposed``: by A [r, N] and B [M, r]."""

    a: Matrix
    b: Matrix
    scale: float
    transposed: bool = False  # embeddings, and linear layers that store [in, out]


def merge(target: torch.Tensor, stored: torch.Tensor, update: LowRank[torch.Tensor]) -> None:
    """Write ``stored`` [N, M] with its update to ``target`` [N, M], which may be ``stored`` itself.

    The blocks depend on the shape only, so the bits do not depend on the place of the memory.
    """
    left, right = (update.a.T, update.b.T) if update.transposed else (update.b, update.a)
    right = right.to(torch.float32, copy=True)
    step = max(1, BLOCK_BYTES // (4 * max(1, right.shape[1])))
    for first in range(0, len(target), step):
        rows = slice(first, first + step)
        block = stored[rows].to(torch.float32, copy=True)
        block.addmm_(left[rows].to(torch.float32, copy=True), right, alpha=update.scale)
        target[rows].copy_(block)


def temporary_bytes(shape: tuple[int, ...], rank: int) -> int:
    """Bytes that merging an update of a matrix takes for a moment."""
    rows, columns = shape
    block = min(max(BLOCK_BYTES, 4 * columns), 4 * rows * columns)
    return 4 * rank * (rows + columns) + block
