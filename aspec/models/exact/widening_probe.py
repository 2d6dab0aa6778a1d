"""Finds out on this machine whether products in bf16 are faster in panels of fp32, and proves their numbers of rows.

See ``panels.py``. All panels of a weight have the same shape, except the last one, so two of them are the whole proof.
"""

import torch

from aspec.models.exact.panels import Panel, in_panels, panel_outputs, widened
from aspec.models.exact.recipe import Widening
from aspec.models.exact.row_probe import (
    OPERATIONS,
    SMALLEST_WEIGHT,
    Operands,
    ProductKind,
    kind_operands,
    kind_rows,
    least_seconds,
    prove,
)

OPS = ("linear", "mm")  # what may be widened: weights [N, K], and [K, N] of one expert
TYPICAL_ROWS, FASTER = 16, 0.7  # widened products are used if so many rows take at most this share of the seconds
FEW_ROWS = (1, 2, 4, 8)  # may be faster without widening
TIMED_OUTPUTS, TIMED_BYTES = 2048, 16 << 20  # of a weight that is timed
DENSE, LARGER = 64, (128, 256)  # every number of rows up to the first is tried, and single larger ones


@torch.inference_mode()
def probe_widening(kind: ProductKind) -> Widening | None:
    """How to widen products of this kind; None if it does not pay. Call it with ``kind.threads`` threads set."""
    if kind.op not in OPS or kind.dtype != torch.bfloat16 or kind.out * kind.inner < SMALLEST_WEIGHT:
        return None
    step = panel_outputs(kind.inner)
    generator = torch.Generator().manual_seed(5)
    rows = kind_rows(LARGER[-1], kind, generator)
    most = max(TIMED_OUTPUTS, TIMED_BYTES // (2 * kind.inner))
    timed = kind_operands(kind.resized(min(kind.out, most)), generator)
    from_rows = _pays_from(kind, rows, timed)
    if from_rows is None:
        return None
    whole, rest = min(kind.out, step), kind.out % step if kind.out > step else 0
    weight, bias = kind_operands(kind.resized(whole + rest), generator)
    panel = _panel(kind, weight)
    recipe = prove(lambda own: in_panels(own, whole + rest, panel, (len(own),), bias), rows, DENSE, list(LARGER))
    return Widening(recipe, from_rows)


def _pays_from(kind: ProductKind, rows: torch.Tensor, operands: Operands) -> int | None:
    """The least number of rows that are faster widened; None if a typical number is not."""
    weight, bias = operands
    panel, out = _panel(kind, weight), weight.shape[0] if kind.op == "linear" else weight.shape[1]

    def share(count: int) -> float:
        own = rows[:count]
        plain = least_seconds(lambda: OPERATIONS[kind.op](own, weight, bias))
        return least_seconds(lambda: in_panels(own, out, panel, (count,), bias)) / plain

    if share(TYPICAL_ROWS) > FASTER:
        return None
    return next((count for count in FEW_ROWS if share(count) < 1), TYPICAL_ROWS)


def _panel(kind: ProductKind, weight: torch.Tensor) -> Panel:
    return widened(weight.t() if kind.op == "linear" else weight)
