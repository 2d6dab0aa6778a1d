"""Measures weights that are packed: seconds of decoding or repacking each method's, and of products with 4 bits.

Threads that decode at the same time slow one another: they share memory bandwidth, and the interpreter's lock between
the operations of a decoder. So the seconds of one thread are measured with as many at work as a run has. On 2 cores,
GPTQ 4 bits, one thread made 0.36 billion weights a second and two made 0.53, which is 1.5 times as many, not 2.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from aspec.io.checkpoint import TensorRef
from aspec.io.loop.side_by_side import Work, side_by_side
from aspec.models.exact.products import exact_int4, fastest_int4
from aspec.models.formats.int4.form import Int4
from aspec.models.formats.packed import PackedWeight
from aspec.models.model import Model
from aspec.profiling.hardware import Table
from aspec.profiling.stopwatch import seconds_of

MOST_WEIGHTS = 1 << 24  # of the weight that is decoded: it takes some tens of milliseconds, and 64 MiB at most
REPEATS = 3
INT4_ROWS = (1, 4, 16, 64, 256)  # beyond them seconds grow with the rows
INT4_BYTES = 64 << 20  # of weights that are multiplied in turn: too many for most caches
ROUNDS = 6  # of several threads at once: wall time, which other work on the machine lengthens


def measured_weights(model: Model) -> dict[str, PackedWeight]:
    """The weight to measure by method: the largest one of up to MOST_WEIGHTS; none where all are larger."""
    found: dict[str, PackedWeight] = {}
    for weight in _packed(model):
        known = found.get(weight.method)
        if (
            weight.is_written
            and (0 if known is None else math.prod(known.shape)) < math.prod(weight.shape) <= MOST_WEIGHTS
        ):
            found[weight.method] = weight
    return found


def int4_sizes(model: Model) -> Int4 | None:
    """Of the largest weight of up to MOST_WEIGHTS that products take packed."""
    found = (weight.sizes for weight in _packed(model) if weight.sizes is not None)
    small = (own for own in found if own.rows * own.columns <= MOST_WEIGHTS)
    return max(small, key=lambda own: own.rows * own.columns, default=None)


@torch.inference_mode()
def measure_int4(sizes: Int4, threads: int, *, exact: bool) -> Table:
    """Seconds per weight of products with weights of 4 bits, by rows, on so many threads."""
    turn = itertools.cycle(torch.randint(256, (INT4_BYTES // sizes.nbytes + 2, *sizes.codes), dtype=torch.uint8))
    scales = torch.full(sizes.scales, 2.0**-6, dtype=torch.bfloat16)

    def seconds(rows: int) -> float:
        hidden = torch.randn(rows, sizes.columns).bfloat16()
        product = exact_int4 if exact else fastest_int4
        return seconds_of(lambda: product(hidden, next(turn), scales, sizes), REPEATS)

    with _threads(threads):
        return tuple((rows, seconds(rows) / (sizes.rows * sizes.columns)) for rows in INT4_ROWS)


def measure_decoding(weight: PackedWeight, dtype: torch.dtype, threads: int = 1) -> float:
    """Seconds of one thread per weight of a matrix decoded into ``dtype``, while so many threads do the same."""
    works = [_decoding(weight, dtype) for _ in range(threads)]
    with _threads(1):
        seconds = seconds_of(works[0], REPEATS) if threads == 1 else _seconds_together(works)
    return seconds / math.prod(weight.shape)


def _decoding(weight: PackedWeight, dtype: torch.dtype) -> Work:
    """Decodes the weight, from and to memory of its own; on any thread."""
    stored = [_random(ref) if place == 0 else _read(ref) for place, ref in enumerate(weight.refs)]
    sizes, factor = weight.sizes, weight.factor
    if sizes is not None and factor is not None and factor.write is not None:
        codes, scales = torch.zeros(sizes.codes, dtype=torch.uint8), torch.zeros(sizes.scales, dtype=torch.bfloat16)
        workspace = torch.zeros(factor.workspace_bytes, dtype=torch.uint8)
        write = partial(factor.write, stored, sizes.block, codes, scales, workspace)
    else:
        out, workspace = torch.zeros(weight.shape, dtype=dtype), torch.zeros(weight.workspace_bytes, dtype=torch.uint8)
        write = partial(weight.decode, stored, out, workspace)

    def decode() -> None:
        torch.set_num_threads(1)  # a thread that never asked would use every core
        write()

    return decode


def _seconds_together(works: Sequence[Work]) -> float:
    """Seconds until all works are done, each on a thread of its own: the best of a few rounds after the first."""
    best = math.inf
    for turn in range(1 + ROUNDS):
        start = time.perf_counter()
        side_by_side(works)
        best = min(best, time.perf_counter() - start) if turn else best
    return best


def _random(ref: TensorRef) -> torch.Tensor:
    """Codes: any bytes are some."""
    return torch.randint(256, (ref.nbytes,), dtype=torch.uint8).view(ref.dtype).view(ref.shape)


def _read(ref: TensorRef) -> torch.Tensor:
    """Scales and indices, whose values may decide how a weight is decoded; zeros where only headers are at hand."""
    found = torch.zeros(ref.nbytes, dtype=torch.uint8)
    try:
        with open(ref.file, "rb") as file:
            file.seek(ref.offset)
            data = file.read(ref.nbytes)
    except OSError:
        data = b""
    if len(data) == ref.nbytes:
        found.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return found.view(ref.dtype).view(ref.shape)


def _packed(model: Model) -> Iterator[PackedWeight]:
    return itertools.chain.from_iterable(model.packed.values())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
