"""Measures decoding: seconds per weight of each method of a checkpoint, with its own decoders, on one thread."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from aspec.io.checkpoint import TensorRef
from aspec.models.formats.packed import PackedWeight
from aspec.models.model import Model
from aspec.profiling.stopwatch import seconds_of

MOST_WEIGHTS = 1 << 24  # of the weight that is decoded: it takes some tens of milliseconds, and 64 MiB at most
REPEATS = 3


def measured_weights(model: Model) -> dict[str, PackedWeight]:
    """The weight to measure by method: the largest one of up to MOST_WEIGHTS; none where all are larger."""
    found: dict[str, PackedWeight] = {}
    for weight in itertools.chain.from_iterable(model.packed.values()):
        known = found.get(weight.method)
        if (0 if known is None else math.prod(known.shape)) < math.prod(weight.shape) <= MOST_WEIGHTS:
            found[weight.method] = weight
    return found


def measure_decoding(weight: PackedWeight, dtype: torch.dtype) -> float:
    """Seconds of decoding one weight of a matrix into ``dtype``, on one thread."""
    stored = [_random(ref) if place == 0 else _read(ref) for place, ref in enumerate(weight.refs)]
    out = torch.zeros(weight.shape, dtype=dtype)
    workspace = torch.zeros(weight.workspace_bytes, dtype=torch.uint8)
    with _one_thread():
        return _seconds(weight, stored, out, workspace) / out.numel()


def _seconds(weight: PackedWeight, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> float:
    return seconds_of(lambda: weight.decode(stored, out, workspace), REPEATS)


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


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
