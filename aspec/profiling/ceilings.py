"""Measures the highest rates of this machine: the best of a few short stretches, after a warm-up.

The rates are ceilings to compare a run with, not predictions of a run. Blocking: call these functions in a thread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COPY_BYTES = 64 << 20
MATMUL_ROWS, MATMUL_SIZE = 64, 2048
REPEATS = 3
SHORTEST_S = 0.05  # shortest duration of one stretch of repeated calls


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates in bytes per second and floating-point operations per second; None if not measured."""

    disk_bytes_per_s: float | None  # direct reads of the checkpoint's streamed ranges
    copy_bytes_per_s: float  # memory to memory; each copied byte is read and written once
    memory_bytes_per_s: float  # reading weights: a matrix times one vector
    matmul_flop_per_s: float  # 64 rows through a 2048 x 2048 matrix in the run's dtype
    draft_step_s: float | None


def measure_ceilings(disk_bytes_per_s: float | None, draft_step_s: float | None, dtype: torch.dtype) -> Ceilings:
    """Measure memory and products; the caller measures the disk and the draft step, with an engine."""
    return Ceilings(disk_bytes_per_s, measure_copy(), measure_memory(dtype), measure_matmul(dtype), draft_step_s)


def measure_copy() -> float:
    """Bytes per second of copying a buffer that is larger than the caches."""
    source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.zeros(COPY_BYTES, dtype=torch.uint8)
    return COPY_BYTES / best_seconds(lambda: target.copy_(source))


def measure_memory(dtype: torch.dtype) -> float:
    """Bytes per second of reading the weights for one token: matrix times vector."""
    columns = 4096
    rows = COPY_BYTES // columns // dtype.itemsize
    weight, vector = torch.ones(rows, columns, dtype=dtype), torch.ones(1, columns, dtype=dtype)
    return COPY_BYTES / best_seconds(lambda: torch.nn.functional.linear(vector, weight))


def measure_matmul(dtype: torch.dtype) -> float:
    """Floating-point operations per second of the products in a verify pass."""
    hidden = torch.ones(MATMUL_ROWS, MATMUL_SIZE, dtype=dtype)
    weight = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    seconds = best_seconds(lambda: torch.nn.functional.linear(hidden, weight))
    return 2 * MATMUL_ROWS * MATMUL_SIZE * MATMUL_SIZE / seconds


def best_seconds(work: Callable[[], object]) -> float:
    """Seconds of one call, the best of a few stretches of calls."""
    work()
    stretches = []
    for _ in range(REPEATS):
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < SHORTEST_S:
            work()
            calls += 1
        stretches.append((time.perf_counter() - start) / calls)
    return min(stretches)
