"""Seconds of a piece of work, the best of a few stretches: whoever else works on the machine only makes them longer."""

import time
from collections.abc import Callable
from math import inf

import torch

REPEATS, STRETCH_S = 5, 2e-3
COLD_BYTES, COLD_CALLS = 16 << 20, 8  # read before each of so many calls, so that it finds cold caches

Work = Callable[[], object]


def seconds_of(work: Work, repeats: int = REPEATS, stretch_s: float = STRETCH_S) -> float:
    """Seconds of one call, the best of a few stretches; the first call does not count."""
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
    """Seconds of one call that finds other things in the caches, the best of a few."""
    clock, elsewhere, best = clock_of_calls(), torch.ones(COLD_BYTES, dtype=torch.uint8), inf
    for _ in range(COLD_CALLS):
        elsewhere.sum(dtype=torch.uint8)
        start = clock()
        work()
        best = min(best, clock() - start)
    return best


def clock_of_calls() -> Callable[[], float]:
    """With one compute thread its own time, without that in which others had the core; otherwise the wall's."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
