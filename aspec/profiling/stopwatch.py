"""Measures seconds of a call: the best of a few stretches, as other work on the machine only makes them longer."""

import time
from collections.abc import Callable
from math import inf

import torch

REPEATS, STRETCH_S = 5, 2e-3  # stretches, and the shortest duration of one
COLD_BYTES, COLD_CALLS = 16 << 20, 8  # bytes read before each call, so that it finds cold caches; calls

Work = Callable[[], object]


def seconds_of(work: Work, repeats: int = REPEATS, stretch_s: float = STRETCH_S) -> float:
    """Seconds of one call: the best of a few stretches, after one call that does not count."""
    clock = clock_of_calls()
    work()
    best = inf
    for _ in range(repeats):
        calls, start = 0, clock()
        elapsed = 0.0
        while elapsed < stretch_s:
            work()
            calls += 1
            elapsed = clock() - start
        best = min(best, elapsed / calls)
    return best


def cold_seconds_of(work: Work) -> float:
    """Seconds of one call with cold caches: the best of a few calls."""
    clock, other_bytes, best = clock_of_calls(), torch.ones(COLD_BYTES, dtype=torch.uint8), inf
    for _ in range(COLD_CALLS):
        other_bytes.sum(dtype=torch.uint8)
        start = clock()
        work()
        best = min(best, clock() - start)
    return best


def clock_of_calls() -> Callable[[], float]:
    """The clock for measurements: with one compute thread, the CPU time of this thread; otherwise wall time."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
