"""torch's own attention kernel, and the proof for which numbers of queries a query's bits are equal on this machine.

The kernel computes blocks of 32 or more queries and 512 keys, and a library multiplies these. As in ``row_probe.py``,
the operands cancel: weights are nearly equal, and the values of the second half of the keys are those of the first with
another sign, so another order of summation changes almost every output.
"""

import torch

from aspec.models.exact.blocks import Product
from aspec.models.exact.paths import KEY_TILE
from aspec.models.exact.recipe import BLOCKS, Recipe
from aspec.models.exact.row_probe import ProductKind, prove, side_by_side, uneven

FLASH = "flash"  # the operation's name in a ProductKind; ``batch`` is the number of key heads

DENSE, LARGER = 32, (64, 128, 256, 384, 512)
"""The kernel's smallest block of queries, within which every number is proven, and single larger numbers."""

LENGTHS = (64, 192, 512, 832)
"""Numbers of keys: parts of a block, a block, a block and a part, and several. Shorter ones with hidden keys too."""

BLOCK_KEYS = 512
"""Keys of a block."""

PACKED_HEADS, PACKED_WIDTH = 4, 64  # fewer key heads are never packed, nor other widths than multiples
PACKED_ELEMENTS = 2688 << 10
"""Elements of the keys of all heads from which on the kernel packs keys for other numbers of queries than below: both
ways must give the same bits."""

MOST_WIDTH = 256
"""Of a head; the probe of wider ones would take more seconds than it is worth."""

Joinable = tuple[torch.Tensor, torch.Tensor]
"""Attention [B, G, M, D] to some keys, and in fp32 the logarithms of the sums of exponentials [B, G, M]."""


def flash(
    rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> Joinable:
    """Attention of rows [B, G, M, D] to key and value [B, G, S, D]; ``bias``, added to scores: [B, 1, M, S]."""
    made: Joinable = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, key, value, attn_mask=bias, scale=scale
    )
    return made


@torch.inference_mode()
def probe_flash(kind: ProductKind) -> Recipe:
    """The proven numbers of queries; BLOCKS if nothing is proven. Call it with ``kind.threads`` threads set."""
    if kind.inner > MOST_WIDTH or kind.dtype not in (torch.bfloat16, torch.float32):
        return BLOCKS
    generator = torch.Generator().manual_seed(5)
    products = []
    for length in (*LENGTHS, *_packed_length(kind)):
        key = uneven((1, kind.batch, length, kind.inner), generator) * kind.inner**-0.5
        value = uneven((1, kind.batch, length, kind.inner), generator)
        value[:, :, length // 2 :] = -value[:, :, : length // 2].roll(7, 2)
        key, value = key.to(kind.dtype), value.to(kind.dtype)
        products.append(_product(key, value, 0))
        if length <= BLOCK_KEYS:
            products.append(_product(key, value, length // 4))
    rows = 0.1 * torch.randn(kind.batch, max(LARGER), kind.inner, generator=generator)
    return prove(side_by_side(products), rows.to(kind.dtype), DENSE, list(LARGER))


def _packed_length(kind: ProductKind) -> list[int]:
    """The number of keys from which on they are packed for other numbers of queries; empty if they never are."""
    if kind.batch < PACKED_HEADS or kind.inner % PACKED_WIDTH or kind.dtype == torch.float32:
        return []
    return [PACKED_ELEMENTS // (kind.batch * kind.inner * KEY_TILE) * KEY_TILE + KEY_TILE]


def _product(key: torch.Tensor, value: torch.Tensor, num_hidden: int) -> Product:
    """Rows [G, M, D] -> [G, M, D + 1]: the attention to all but the last keys, and the logarithms."""
    bias = torch.zeros(key.shape[2], dtype=key.dtype)
    bias[key.shape[2] - num_hidden :] = float("-inf")

    def product(rows: torch.Tensor) -> torch.Tensor:
        own = bias.expand(1, 1, rows.shape[1], -1) if num_hidden else None
        mixed, exponents = flash(rows[None], key, value, 1.0, own)
        return torch.cat([mixed[0], exponents[0, ..., None]], -1)

    return product
