"""Products by kernels that are compiled on this machine; ``exact/compiled_probe.py`` says where they pay."""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import torch

from aspec.models.compiled import kernels
from aspec.models.compiled.build import multiplies_pairs
from aspec.models.compiled.shapes import QUANTISED, ROWS
from aspec.models.formats.int4.form import Int4
from aspec.models.formats.int4.kernel import int4_product

PAIRS = 32  # numbers that are multiplied in pairs at once
INNER = 16  # the inputs of a weight are a multiple: of every number of lanes
BLOCK_BYTES = 512 << 10  # of weights that stay in a cache while all rows pass
PER_NUMBER = 8  # multiplications that take as long as a number of a norm or a gate
LEAST_WORK = 1 << 18  # multiplications that pay for a second thread, which may have to be woken

Int4Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Int4], torch.Tensor]
"""Rows bf16 [M, K], codes and scales of a weight of 4 bits and its sizes, to bf16 [M, N]."""

zero = torch.zeros(1)
"""The bias of products that have none."""


def dense_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Rows bf16 [..., K] times the transposed weight bf16 [N, K], which is contiguous: bf16 [..., N], summed in fp32.

    Sums and bias [N] are rounded once. A row's bits depend on the row alone. Raises ImportError without the compiler.
    """
    outputs, inner = weight.shape
    count = rows.numel() // inner
    pairs = inner % PAIRS == 0 and multiplies_pairs()
    given = (rows if pairs else rows.float()).contiguous()
    made = weight.new_empty((*rows.shape[:-1], outputs))
    added, step = (zero, 0) if bias is None else (bias.float(), 1)
    addresses = weight.data_ptr(), given.data_ptr(), added.data_ptr(), made.data_ptr()
    block = max(1, BLOCK_BYTES // (2 * inner))
    threads = threads_for(count * outputs * inner)
    kernels.dense(pairs)(*addresses, outputs, inner, count, block, step, threads)
    return made


def several_products(rows: torch.Tensor, counts: Sequence[int], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows bf16 [M, K] in groups of ``counts``, each times a transposed weight bf16 [N, K] of its own: bf16 [M, N].

    The weights are contiguous. The bits are those of ``dense_product``. Raises ImportError without the compiler.
    """
    outputs, inner = weights[0].shape
    pairs = inner % PAIRS == 0 and multiplies_pairs()
    given = (rows if pairs else rows.float()).contiguous()
    made = rows.new_empty(len(rows), outputs)
    number = len(weights)
    places = (ctypes.c_int64 * number)(*(weight.data_ptr() for weight in weights))
    starts = (ctypes.c_int64 * (number + 1))(0, *accumulate(counts))
    addresses = ctypes.addressof(places), ctypes.addressof(starts), given.data_ptr(), made.data_ptr()
    block, threads = max(1, BLOCK_BYTES // (2 * inner)), threads_for(len(rows) * outputs * inner)
    kernels.several(pairs)(*addresses, number * outputs, outputs, inner, block, threads)
    return made


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    sinks: torch.Tensor,
    records: torch.Tensor,
    scale: float,
    made: torch.Tensor,
) -> None:
    """Attention to keys [B, G, S, D] and values [B, G, S, Dv] in bf16, as ``records`` tell: see ``shapes.py``.

    ``query`` bf16; the last dimension of all lies together. Raises ImportError without the compiler.
    """
    kernel = kernels.attention(key.shape[-1], value.shape[-1])
    addresses = [own.data_ptr() for own in (query, key, value, slots, sinks, records, made)]
    threads = threads_for(len(records) * ROWS * key.shape[2] * (key.shape[3] + value.shape[3]))
    kernel(*addresses, len(records), key.stride(2), value.stride(2), float_bits(scale), threads)


def norm(rows: torch.Tensor, weight: torch.Tensor, eps: float, *, rounded: bool, offset: bool) -> torch.Tensor:
    """Rows bf16 [..., W] by the root of their mean square, times the weight bf16 [W]; W in vectors of INNER numbers.

    ``rounded``: to bf16 before the weight, too; ``offset``: weights are stored less 1. A row's bits depend on the row
    alone. Raises ImportError without the compiler.
    """
    given = rows.contiguous()
    made, width = torch.empty_like(given), rows.shape[-1]
    count = given.numel() // width
    addresses = given.data_ptr(), weight.data_ptr(), made.data_ptr()
    threads = threads_for(count * width * PER_NUMBER)
    kernels.norm()(*addresses, count, width, float_bits(eps), rounded, offset, threads)
    return made


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of bf16 [..., I], both rounded; I in vectors of INNER numbers.

    Raises ImportError without the compiler.
    """
    made, width = gate.new_empty(gate.shape), gate.shape[-1]
    flat = [own.reshape(-1, width) for own in (gate, up)]  # views of the halves of one tensor, too
    gate, up = (own if own.stride(1) == 1 else own.contiguous() for own in flat)
    addresses = gate.data_ptr(), up.data_ptr(), made.data_ptr()
    kernels.gate()(*addresses, len(gate), width, gate.stride(0), up.stride(0), threads_for(made.numel() * PER_NUMBER))
    return made


@cache
def float_bits(value: float) -> int:
    """The bits of a number in fp32."""
    return int.from_bytes(struct.pack("<f", value), "little")


def threads_for(work: int) -> int:
    """The threads for so many multiplications: one or all, as teams of many sizes would start threads anew."""
    return torch.get_num_threads() if work >= LEAST_WORK else 1


def compile_now(sizes: Int4 | None = None, *, integers: bool = False, experts: bool = False) -> None:
    """Compile the kernel of weights in bf16, of ``experts`` or of such ``sizes``, before a pass waits for it."""
    if sizes is None:
        (kernels.several if experts else kernels.dense)(multiplies_pairs())
    elif integers:
        kernels.quantise()
        kernels.integers(sizes.block)
    else:
        kernels.int4(sizes.block)


def compiled_int4_product(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, sizes: Int4) -> torch.Tensor:
    """Rows bf16 [M, K] times the transposed weight of 4 bits: bf16 [M, N], summed in fp32 and rounded once.

    A row's bits depend on the row alone. Raises ImportError without the compiler.
    """
    (count, inner), outputs = rows.shape, sizes.rows
    wide, made = rows.float().contiguous(), rows.new_empty(count, outputs)
    addresses = codes.data_ptr(), scales.data_ptr(), wide.data_ptr(), made.data_ptr()
    threads = threads_for(count * outputs * inner)
    kernels.int4(sizes.block)(*addresses, outputs // sizes.block, inner, count, sizes.group, threads)
    return made


def integer_int4_product(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, sizes: Int4) -> torch.Tensor:
    """The same in whole numbers, see ``compiled/int4_integers.py``, on processors of ``multiplies_integers``."""
    (count, inner), outputs = rows.shape, sizes.rows
    given, made, blocks = rows.contiguous(), rows.new_empty(count, outputs), count * inner // QUANTISED
    scratch = torch.empty(2 * count * inner + 8 * blocks, dtype=torch.int8)  # planes, scales, sums
    planes = scratch.data_ptr()
    scales_at = planes + 2 * count * inner
    quantised = planes, scales_at, scales_at + 4 * blocks
    kernels.quantise()(given.data_ptr(), *quantised, blocks, threads_for(count * inner))
    addresses = codes.data_ptr(), scales.data_ptr(), *quantised, made.data_ptr()
    threads = threads_for(count * outputs * inner)
    kernels.integers(sizes.block)(*addresses, outputs // sizes.block, inner, count, sizes.group, threads)
    return made


def torch_int4_product(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, sizes: Int4) -> torch.Tensor:
    """The same by torch's own kernel."""
    return int4_product(rows.contiguous(), codes, scales, sizes.group)
