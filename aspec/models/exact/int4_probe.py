"""Proves which numbers of rows give equal bits in int4 products, see ``row_probe.py``; times panels beside them.

Every output is a sum of its own, over the inputs one after another, so a few blocks of outputs stand for all.
"""

from bisect import bisect_left
from dataclasses import replace
from functools import partial

import torch

from aspec.io.host_info import compiler
from aspec.models.compiled.build import multiplies_integers
from aspec.models.compiled.products import (
    Int4Product,
    compiled_int4_product,
    integer_int4_product,
    torch_int4_product,
)
from aspec.models.exact.int4_panels import panel_product
from aspec.models.exact.recipe import BLOCKS, COMPILED, IN_INTEGERS, Recipe, Widening
from aspec.models.exact.row_probe import LARGER, ProductKind, least_seconds, prove, proves_all, share_of_seconds, uneven
from aspec.models.formats.int4.form import ZERO, Int4, Int4Decode, in_blocks, pack_codes

INT4 = "int4"  # the operation; ``batch`` of its kinds is the number of inputs that share a scale
DENSE = 64  # every number of rows up to it is tried

INT4_PANELS = "int4-panels"  # the operation; ``dtype`` of its kinds is that of the panels
FROM_ROWS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96)  # panels may be faster from one of these on
NEVER = 1 << 20  # rows: panels are not faster
FEWEST_WEIGHTS = 1 << 20  # of a matrix for which panels are worth a probe
TIMED_WEIGHTS = 2 << 20  # of a weight that is timed: two panels
TIMED_COMPILED = 8 << 20  # of a weight that is timed in compiled products: enough work for threads
TIMED_ROWS, FASTER = (1, 16), 0.85  # compiled products are used if they take at most this share, in the geometric mean
TOLERANCE = 2**-7  # of the sum of a row's absolute terms: compiled products beside torch's, both rounded once


def int4_kind(sizes: Int4, threads: int) -> ProductKind:
    """The kind of products with weights of these sizes."""
    return ProductKind(INT4, torch.bfloat16, sizes.group, 2 * sizes.block, sizes.columns, True, False, threads)


@torch.inference_mode()
def probe_int4(kind: ProductKind) -> Recipe:
    """The cheapest proven recipe; takes a few tenths of a second. Call it with ``kind.threads`` threads set."""
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
    for recipe in _compiled_that_pay(sizes):
        if _holds(int4_product_of(recipe), rows, codes, scales, sizes, larger):
            return recipe
    return prove(lambda block: torch_int4_product(block, codes, scales, sizes), rows, DENSE, larger)


def int4_product_of(recipe: Recipe) -> Int4Product:
    """The product that a recipe of weights of 4 bits is for."""
    if recipe.compiled:
        return integer_int4_product if recipe.integers else compiled_int4_product
    return torch_int4_product


def _compiled_that_pay(sizes: Int4) -> list[Recipe]:
    """Recipes of kernels that take less than torch's product with such weights, the fastest first."""
    own = replace(sizes, rows=max(1, TIMED_COMPILED // sizes.columns // sizes.block) * sizes.block)
    if not compiler():
        return []
    codes, scales = torch.zeros(own.codes, dtype=torch.uint8), torch.ones(own.scales, dtype=torch.bfloat16)
    several = [torch.ones(count, own.columns, dtype=torch.bfloat16) for count in TIMED_ROWS]
    shares: list[tuple[float, Recipe]] = []
    try:
        for recipe in (IN_INTEGERS, COMPILED) if multiplies_integers() else (COMPILED,):
            product = int4_product_of(recipe)
            pairs = [
                (partial(product, rows, codes, scales, own), partial(torch_int4_product, rows, codes, scales, own))
                for rows in several
            ]
            shares.append((share_of_seconds(pairs), recipe))
    except (ImportError, OSError, RuntimeError):  # a build of the package that this machine can not use
        return []
    shares.sort(key=lambda found: found[0])
    return [recipe for share, recipe in shares if share <= FASTER]


def _holds(
    product: Int4Product,
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    sizes: Int4,
    larger: list[int],
) -> bool:
    """Whether products are close to torch's, and have the same bits in every number of rows."""
    few = rows[:DENSE].clone()
    few[:, sizes.columns // 2 :] = 0.0  # sums that do not cancel
    weight, decode = torch.empty(sizes.rows, sizes.columns), Int4Decode(sizes)
    decode((codes, scales), weight, torch.empty(decode.workspace_bytes, dtype=torch.uint8))
    terms = few.float().abs() @ weight.abs().t()
    apart = (product(few, codes, scales, sizes) - torch_int4_product(few, codes, scales, sizes)).abs()
    same = proves_all(lambda block: product(block, codes, scales, sizes), rows, DENSE, larger)
    return same and bool((apart <= TOLERANCE * terms).all())


def panels_kind(sizes: Int4, dtype: torch.dtype, threads: int) -> ProductKind:
    """The kind of products in panels of ``dtype`` with weights of these sizes."""
    return ProductKind(INT4_PANELS, dtype, sizes.group, 2 * sizes.block, sizes.columns, True, False, threads)


@torch.inference_mode()
def probe_panels(kind: ProductKind) -> Recipe:
    """From how many rows on panels are faster than int4 products; takes about a second, see ``probe_int4``."""
    block = kind.out // 2
    sizes = Int4(max(1, TIMED_WEIGHTS // kind.inner // block) * block, kind.inner, kind.batch, block)
    codes, scales = torch.zeros(sizes.codes, dtype=torch.uint8), torch.ones(sizes.scales, dtype=torch.bfloat16)
    rows = torch.ones(FROM_ROWS[-1], kind.inner, dtype=torch.bfloat16)
    product = int4_product_of(next(iter(_compiled_that_pay(sizes)), BLOCKS))

    def pays(count: int) -> bool:
        own = rows[:count]
        panels_s = least_seconds(lambda: panel_product(own, codes, scales, sizes, kind.dtype))
        return panels_s < least_seconds(lambda: product(own, codes, scales, sizes))

    index = bisect_left(FROM_ROWS, True, key=pays)
    return Recipe(BLOCKS.lowest, BLOCKS.highest, widening=Widening(BLOCKS, (*FROM_ROWS, NEVER)[index]))
