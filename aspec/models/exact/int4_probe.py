"""Proves which numbers of rows give equal bits in int4 products; see ``row_probe.py``.

Every output is a sum of its own, over the inputs one after another, so a few blocks of outputs stand for all.
"""

import torch

from aspec.models.exact.recipe import Recipe
from aspec.models.exact.row_probe import LARGER, ProductKind, prove, uneven
from aspec.models.formats.int4.form import ZERO, Int4, in_blocks, pack_codes
from aspec.models.formats.int4.kernel import int4_product

INT4 = "int4"  # the operation; ``batch`` of its kinds is the number of inputs that share a scale
DENSE = 64  # every number of rows up to it is tried


def int4_kind(sizes: Int4, threads: int) -> ProductKind:
    """The kind of products with weights of these sizes."""
    return ProductKind(INT4, torch.bfloat16, sizes.group, 2 * sizes.block, sizes.columns, True, False, threads)


@torch.inference_mode()
def probe_int4(kind: ProductKind) -> Recipe:
    """The cheapest proven recipe; takes a tenth of a second. Call it with ``kind.threads`` threads set."""
    generator, half = torch.Generator().manual_seed(5), kind.inner // 2
    sizes = Int4(kind.out, kind.inner, kind.batch, kind.out // 2)
    numbers = torch.randint(1, 16, (sizes.rows, sizes.columns), dtype=torch.uint8, generator=generator)
    numbers[:, half : 2 * half] = 2 * ZERO - numbers[:, :half]  # the weights cancel
    codes = torch.empty(sizes.codes, dtype=torch.uint8)
    pack_codes(numbers, sizes.block, in_blocks(codes, sizes.block))
    scales = torch.zeros(sizes.scales, dtype=torch.bfloat16)
    scales[..., 0] = uneven((sizes.rows,), generator)
    rows = uneven((LARGER[-1], kind.inner), generator)
    rows[:, half : 2 * half] = rows[:, :half]
    rows = rows.bfloat16()
    larger = [size for size in LARGER if size > DENSE]
    return prove(lambda block: int4_product(block.contiguous(), codes, scales, sizes.group), rows, DENSE, larger)
