"""Measures this machine's CPU and disk for ``roofline.py``, with the code that an engine runs.

Every figure is the best of a few short stretches, as other work on the machine only makes them longer. Blocking.
"""

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from math import inf
from pathlib import Path

import torch
from torch import nn

from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler, draw_rows
from aspec.io.checkpoint import weight_files
from aspec.io.disk_probe import probe_rate
from aspec.io.host_info import cache_bytes, last_cache_bytes
from aspec.io.host_memory import available_bytes, growth_bytes, total_bytes
from aspec.io.memory import allocate
from aspec.models.attention import attend
from aspec.models.exact.modes import ExactProducts
from aspec.models.exact.paths import MaskKind
from aspec.models.exact.products import fastest
from aspec.models.kv_cache import KVCache
from aspec.models.weights.parts import Segment, as_tensor
from aspec.profiling.hardware import AttentionRates, Processor, Table
from aspec.profiling.overheads import COLUMNS, CONTEXT, HEADS, KV_HEADS, WIDTHS, measure_trees, with_overheads
from aspec.profiling.stopwatch import MEMORY_SHARE, STRETCH_S, measure_handover, seconds_of
from aspec.speculation.model_drafter import GREEDY

ROUNDS = 5  # over all products, so that a busy moment of the machine spoils only one round
ROWS = (1, 4, 16, 32, 64, 100, 200, 300)  # of products, typical of drafts and prompts; powers of two are faster
ARENA_BYTES, LEAST_ARENA_BYTES = 128 << 20, 16 << 20  # of weights that are read in turn: too many for most caches
NUM_MATRICES = 16
CACHED_BYTES = 1 << 20  # of weights that fit into any cache
VOCAB = 32768  # vocabulary entries of a measured draw
READ_S = 0.25  # of reading, with and without products beside it
SMALLEST_FILE = 1 << 20  # bytes; smaller reads do not show the rate of a disk


@torch.inference_mode()
def measure_processor(dtype: torch.dtype, threads: int) -> Processor:
    """Measure the CPU with so many compute threads and products in ``dtype``. Takes about two seconds."""
    with _threads(threads):
        name = str(dtype).removeprefix("torch.")
        table, exact = _products(dtype)
        cached = _cached_products(dtype)
        copy = torch.empty(_arena_bytes() // 4, dtype=torch.uint8)
        measured = Processor(
            flop_per_s={name: 2 * ROWS[-1] / dtype.itemsize / table[-1][1]},
            memory_bytes_per_s=1 / table[0][1],
            copy_bytes_per_s=len(copy) / 2 / seconds_of(lambda: copy[: len(copy) // 2].copy_(copy[len(copy) // 2 :])),
            cache_bytes=cache_bytes(2) or CACHED_BYTES,
            last_cache_bytes=last_cache_bytes(),
            handover_s=measure_handover(),
            product_s=_smallest_product(dtype),
            weight_s={name: table},
            exact_weight_s={name: exact},
            cached_weight_s={name: cached},
            attention=_attention(dtype, exact=False),
            exact_attention=_attention(dtype, exact=True),
            decode_weight_s={},
            int4_weight_s={},
            exact_int4_weight_s={},
            **_draws(dtype),
            **measure_trees(dtype),
        )
        return with_overheads(measured, dtype)


def measure_disk(folder: Path) -> float | None:
    """Bytes per second of reading a model's files as the disk lane does; None if the files are too small."""
    segments = files_of(folder)
    return probe_rate(segments, READ_S) if segments else None


@torch.inference_mode()
def measure_read_contention(folder: Path, dtype: torch.dtype, threads: int) -> float | None:
    """The factor by which products take longer while files are read; None if the files are too small."""
    segments = files_of(folder)
    if not segments:
        return None
    with _threads(threads), _weights(dtype) as weights:
        turn, hidden = cycle(weights), torch.ones(4, COLUMNS, dtype=dtype)
        alone = seconds_of(lambda: fastest(hidden, next(turn)))
        beside: list[float] = []
        probe_rate(
            segments, READ_S, beside=lambda: beside.append(seconds_of(lambda: fastest(hidden, next(turn)), repeats=8))
        )
    return max(1.0, beside[0] / alone)


def files_of(folder: Path) -> list[Segment]:
    """Byte ranges of a model's files from a random place on: earlier reads may be in a cache of the storage."""
    sizes = {str(file): file.stat().st_size for file in weight_files(folder)}
    total = sum(sizes.values())
    if total < SMALLEST_FILE:
        return []
    start = int(random.random() * 0.5 * total)
    later, earlier = [], []
    for file, size in sizes.items():
        cut = min(max(start, 0), size) // 4096 * 4096
        start -= size
        later.append(Segment(file, cut, size - cut, 0))
        earlier.append(Segment(file, 0, cut, 0))
    return [segment for segment in (*later, *earlier) if segment.nbytes]


def memory_bytes() -> int:
    """Memory of this machine in bytes, or of the part that this process may use."""
    return total_bytes()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- products ------------------------------------------------------------------------------------------------


def _arena_bytes() -> int:
    """Bytes of the weights of a measurement: whole rows, and few where a control group leaves little memory."""
    room = (available_bytes() - growth_bytes()) // MEMORY_SHARE
    unit = NUM_MATRICES * COLUMNS * torch.float32.itemsize
    return min(ARENA_BYTES, max(LEAST_ARENA_BYTES, room)) // unit * unit


@contextlib.contextmanager
def _weights(dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Matrices in the kind of memory that slots use."""
    arena = allocate(_arena_bytes())
    whole = as_tensor(arena.view).view(dtype).view(NUM_MATRICES, -1, COLUMNS)
    whole.copy_(torch.randn(COLUMNS).to(dtype))  # products of zeros are faster
    weights = list(whole)
    yield weights
    weights.clear()
    del whole
    arena.close()


def _products(dtype: torch.dtype) -> tuple[Table, Table]:
    """Seconds per byte of weights by rows: of plain products, and of exact ones."""
    with _weights(dtype) as weights:
        turn, nbytes = cycle(weights), weights[0].nbytes
        plain, exact = dict.fromkeys(ROWS, inf), dict.fromkeys(ROWS, inf)
        for _ in range(ROUNDS):
            for best, context in ((plain, contextlib.nullcontext()), (exact, ExactProducts())):
                for rows in best:
                    hidden = torch.randn(rows, COLUMNS).to(dtype)
                    with context:
                        seconds = seconds_of(partial(_next_product, hidden, turn), repeats=2)
                    best[rows] = min(best[rows], seconds / nbytes)
    return tuple(plain.items()), tuple(exact.items())


def _next_product(hidden: torch.Tensor, turn: Iterator[torch.Tensor]) -> torch.Tensor:
    return fastest(hidden, next(turn))


def _cached_products(dtype: torch.dtype) -> Table:
    side = 512
    weights = [torch.ones(side, side, dtype=dtype) for _ in range(CACHED_BYTES // (side * side * dtype.itemsize))]
    turn = cycle(weights)

    def one(rows: int) -> float:
        hidden = torch.ones(rows, side, dtype=dtype)
        return seconds_of(lambda: fastest(hidden, next(turn)), stretch_s=STRETCH_S / 2) / weights[0].nbytes

    return tuple((rows, one(rows)) for rows in (1, 16, 64, 256))


def _smallest_product(dtype: torch.dtype) -> float:
    hidden, weight = torch.ones(1, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)
    return seconds_of(lambda: fastest(hidden, weight))


# -- draws ---------------------------------------------------------------------------------------------------


def _draws(dtype: torch.dtype) -> dict[str, float]:
    logits = torch.rand(1, 4, VOCAB).to(dtype)
    sampled = Sampler(SamplingParams(temperature=1.0))

    def per_entry(sampler: Sampler) -> float:
        return seconds_of(lambda: draw_rows([sampler], logits, [[1, 2, 3, 4]])) / logits.numel()

    return {"greedy_s": per_entry(GREEDY), "sampled_s": per_entry(sampled)}


# -- attention -----------------------------------------------------------------------------------------------

NUM_ROWS = 16


def _attention(dtype: torch.dtype, *, exact: bool) -> AttentionRates:
    """Rates solved from a few calls: short and long contexts, one and many tokens, one and several rows."""
    narrow, wide = (_AttentionTimer(width, dtype, exact) for width in WIDTHS)
    long, many = CONTEXT, 64
    pairs = (many - 1) * long * HEADS
    pair_s = [max(0.0, call.seconds(many, long) - call.seconds(1, long)) / pairs for call in (narrow, wide)]
    width_s = max(0.0, pair_s[1] - pair_s[0]) / (WIDTHS[1] - WIDTHS[0])
    one, eight = wide.seconds(1, 64), wide.seconds(1, 64, rows=NUM_ROWS)
    far = wide.seconds(1, CONTEXT, rows=NUM_ROWS)  # more keys than fit into caches, as in a real pass
    key_s = max(0.0, (far - eight) / (NUM_ROWS * (CONTEXT - 64)) - HEADS * pair_s[1])
    keys_s = 64 * (key_s + HEADS * pair_s[1])
    row_s = max(0.0, (eight - one) / (NUM_ROWS - 1) - keys_s)
    own_s = max(0.0, wide.seconds(many, 128, star=True) - wide.seconds(many, 128)) if exact else 0.0
    return AttentionRates(
        call_s=max(0.0, one - row_s - keys_s),
        row_s=row_s,
        kv_byte_s=key_s / (KV_HEADS * 2 * WIDTHS[1] * dtype.itemsize),
        score_s=max(0.0, pair_s[0] - width_s * WIDTHS[0]),
        width_s=width_s,
        own_score_s=own_s / (many * 64 * KV_HEADS),
    )


class _AttentionTimer:
    """Measures attention with one width of heads."""

    def __init__(self, width: int, dtype: torch.dtype, exact: bool) -> None:
        self._cache = KVCache([(KV_HEADS, width, width)], NUM_ROWS, CONTEXT, dtype, exact=exact)
        self._width, self._dtype = width, dtype

    def seconds(self, tokens: int, keys: int, *, rows: int = 1, star: bool = False) -> float:
        """Seconds for so many new tokens in every row; ``keys`` include them. ``star``: they are leaves of one root."""
        parents = [[-1, *(0,) * (tokens - 1)]] * rows if star else None
        step = self._cache.step(list(range(rows)), [keys - tokens] * rows, [tokens] * rows, parents)
        query = torch.ones(rows, HEADS, tokens, self._width, dtype=self._dtype)
        key, value = self._cache.keys[0], self._cache.values[0]
        assert key is not None
        assert value is not None
        key, value = key[:rows, :, : step.high], value[:rows, :, : step.high]
        mask, module = step.seen(MaskKind()), nn.Module()
        return seconds_of(lambda: attend(module, query, key, value, mask))
