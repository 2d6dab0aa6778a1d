"""Operations in pieces of a fixed size: products block by block, elementwise functions over whole vectors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

VECTOR_ELEMENTS = 64
"""Elements that one iteration of a CPU's elementwise loop computes: two vectors of 64 bytes in bf16."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""[..., M, K] -> [..., M, N], with the same weights in every call."""


def in_blocks(rows: torch.Tensor, product: Product, sizes: Sequence[int]) -> torch.Tensor:
    """``product`` of rows [..., M, K] in blocks of ``sizes`` rows, the last one padded with zeros; [..., M, N]."""
    count, start, made = rows.shape[-2], 0, []
    for size in sizes:
        block = rows[..., start : start + size, :]
        missing = size - block.shape[-2]
        made.append(product(functional.pad(block, (0, 0, 0, missing)) if missing else block))
        start += size
    whole = made[0] if len(made) == 1 else torch.cat(made, -2)
    return whole if start == count else whole.narrow(-2, 0, count).contiguous()


def pack(weight: torch.Tensor, bias: torch.Tensor | None, hint: int) -> Product:
    """The product with a copy of ``weight`` [N, K] in the order that the library prefers for ``hint`` rows.

    Raises AttributeError or RuntimeError if torch was built without such products.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, hint)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


def in_whole_vectors(func: Callable[..., torch.Tensor], values: torch.Tensor, **options: Any) -> torch.Tensor:
    """An elementwise function of ``values``, computed over whole vectors only."""
    filled = functional.pad(
        values.flatten(), (0, -values.numel() % VECTOR_ELEMENTS)
    )  # torch computes a view with gaps row by row
    return func(filled, **options)[: values.numel()].view(values.shape)
