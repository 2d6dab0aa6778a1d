"""Finds out on this machine whether products by compiled kernels are faster, and proves them, see ``row_probe.py``.

A kernel computes every row by itself, in an order that its text fixes. So what is proven is that the machine does what
the text says: close to the product in fp32, and with the same bits in every number of rows that is tried.
"""

from functools import partial

import torch

from aspec.io.host_info import compiler
from aspec.models.compiled.products import INNER, dense_product
from aspec.models.exact.row_probe import (
    OPERATIONS,
    Operands,
    ProductKind,
    kind_operands,
    kind_rows,
    proves_all,
    share_of_seconds,
)

SMALLEST_WEIGHT = 64 * 128  # elements; smaller ones are of no model that anybody waits for
TIMED = (1, 16, 64)  # rows of products that are timed
FASTER = 0.95  # compiled products are used if they take at most this share of the seconds, in the geometric mean
TIMED_WEIGHTS = 1 << 20  # of a weight that is timed
PROVEN_OUTPUTS = 61  # more than a tile has, in no multiple of it: every output is a sum of its own
DENSE, LARGER = 32, (64, 256)  # every number of rows up to the first is tried, and single larger ones
TOLERANCE = 2**-7  # of the sum of a row's absolute terms: one rounding to bf16, and those of the sum


@torch.inference_mode()
def compiled_pays(kind: ProductKind) -> bool:
    """Whether products of this kind are compiled here. Call it with ``kind.threads`` threads set."""
    by_output = kind.op == "linear" or (kind.op == "mm" and kind.transposed)
    plain = kind.dtype == torch.bfloat16 and kind.out * kind.inner >= SMALLEST_WEIGHT and kind.inner % INNER == 0
    if not (by_output and plain and compiler()):
        return False
    generator = torch.Generator().manual_seed(5)
    rows = kind_rows(max(LARGER), kind, generator)
    timed = kind_operands(kind.resized(min(kind.out, max(PROVEN_OUTPUTS, TIMED_WEIGHTS // kind.inner))), generator)
    try:
        return _share(kind, rows, timed) <= FASTER and _holds(kind, rows, generator)
    except (ImportError, OSError, RuntimeError):  # a build of the package that this machine can not use
        return False


def _share(kind: ProductKind, rows: torch.Tensor, operands: Operands) -> float:
    """The seconds of compiled products, as a share of those of plain ones."""
    weight, bias = operands

    pairs = [
        (partial(_product, kind, own, weight, bias), partial(OPERATIONS[kind.op], own, weight, bias))
        for own in (rows[:count] for count in TIMED)
    ]
    return share_of_seconds(pairs)


def _holds(kind: ProductKind, rows: torch.Tensor, generator: torch.Generator) -> bool:
    """Whether products are close to those in fp32, and have the same bits in every number of rows."""
    weight, bias = kind_operands(kind.resized(min(kind.out, PROVEN_OUTPUTS)), generator)
    stored = (weight if kind.op == "linear" else weight.t()).float()
    exact = rows.float() @ stored.t() + (0.0 if bias is None else bias.float())
    close = (_product(kind, rows, weight, bias).float() - exact).abs() <= TOLERANCE * (
        rows.float().abs() @ stored.abs().t() + 1.0
    )
    same = proves_all(lambda own: _product(kind, own, weight, bias), rows, DENSE, list(LARGER))
    return bool(close.all()) and same


def _product(kind: ProductKind, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return dense_product(rows, weight if kind.op == "linear" else weight.t(), bias)
