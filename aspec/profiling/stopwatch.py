"""Measures the seconds of a call, and those from a task to the next one.

A call takes the best of a few stretches, as other work on the machine only makes them longer.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from statistics import median

import torch

from aspec.backends.thread_lane import ThreadLane
from aspec.io.host_info import last_cache_bytes
from aspec.io.host_memory import available_bytes, growth_bytes
from aspec.tasks.executor import Executor
from aspec.tasks.op import Op
from aspec.tasks.task import COMPUTE, CPU, Completion, Event, Resource, Span, Task

REPEATS, STRETCH_S = 5, 2e-3  # stretches, and the shortest duration of one
LEAST_COLD_BYTES, MOST_COLD_BYTES = 16 << 20, 128 << 20
"""Read before a call, so that it finds cold caches: twice the last one, as far as the process may take memory."""
COLD_CALLS = 8
MEMORY_SHARE = 4  # of the memory that this process may still take, a measurement takes at most one part of so many

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
    return cold_seconds_each({"": work})[""]


def cold_seconds_each(works: Mapping[str, Work]) -> dict[str, float]:
    """Seconds of calls that follow one another, each with cold caches: the best of a few rounds."""
    clock, best = clock_of_calls(), dict.fromkeys(works, inf)
    room = min(MOST_COLD_BYTES, (available_bytes() - growth_bytes()) // MEMORY_SHARE)
    other_bytes = torch.ones(max(LEAST_COLD_BYTES, min(2 * last_cache_bytes(), room)), dtype=torch.uint8)
    for _ in range(COLD_CALLS):
        for name, work in works.items():
            other_bytes.sum(dtype=torch.uint8)
            start = clock()
            work()
            best[name] = min(best[name], clock() - start)
    return best


def clock_of_calls() -> Callable[[], float]:
    """The clock for measurements: with one compute thread, the CPU time of this thread; otherwise wall time."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


# -- from task to task -------------------------------------------------------------------------------------------------

TASKS, WARM_UP = 300, 50  # of the chain; the first of them do not count


def measure_handover() -> float:
    """Seconds from the end of a task to the start of the next one; takes about a tenth of a second.

    A chain of tasks without work runs on two lanes in turn, through the executor and threads of a real machine; each is
    emitted when the one before it has ended, as the tasks behind a router's choice are.
    """

    async def main() -> list[float]:
        chain, lanes = _Chain(), _Lanes()
        try:
            await Executor(chain, lanes).run()
        finally:
            await lanes.close()
        return chain.gaps_s

    with ThreadPoolExecutor(1) as pool:  # the calling thread may have a loop
        gaps_s = pool.submit(lambda: asyncio.run(main())).result()
    return median(gaps_s[WARM_UP:])


class _Chain:
    """A policy that emits a task when the one before it has ended; mutable, because it counts."""

    idle, waits_for = False, ""

    def __init__(self) -> None:
        self.done = False
        self.gaps_s: list[float] = []
        self._emitted = 0
        self._stop_s: float | None = None

    def handle(self, events: Sequence[Event]) -> Sequence[Task]:
        """See ``Policy``."""
        for span in events:
            if isinstance(span, Span):
                if self._stop_s is not None:
                    self.gaps_s.append(span.start_s - self._stop_s)
                self._stop_s = span.stop_s
        self.done = self._emitted == TASKS
        if self.done:
            return ()
        self._emitted += 1
        return (Task(self._emitted, Op.ACCEPT, (COMPUTE, CPU)[self._emitted % 2], 0),)


class _Lanes:
    """A backend whose tasks do nothing."""

    resources = (Resource(COMPUTE, depth=2, domain="host"), Resource(CPU, depth=1))

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._lanes = {resource.name: ThreadLane(resource.name, loop) for resource in self.resources}

    def now(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()

    def issue(self, task: Task, after: tuple[int, ...] = ()) -> asyncio.Future[Completion]:
        """Start a task."""
        return self._lanes[task.resource].submit(_nothing)

    async def close(self) -> None:
        """Join the lanes."""
        for lane in self._lanes.values():
            lane.close()


def _nothing() -> Completion:
    now = time.perf_counter()
    return Completion(now, now)
