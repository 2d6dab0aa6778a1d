"""How late the loop is: everything that answers clients waits as long as a timer does that should have fired."""

import asyncio
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

EVERY_S = 0.05  # between two timers
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)  # upper bounds of the buckets


class LoopLag:
    """A histogram of the lateness of timers; mutable, because it grows."""

    def __init__(self) -> None:
        self.sum_s = 0.0
        self._counts = [0] * (len(BOUNDS_S) + 1)  # timers by the first bound that they do not pass

    async def measure(self) -> None:
        """Measure until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self.add(max(0.0, loop.time() - due_s))

    def add(self, late_s: float) -> None:
        """Count a timer that was so late."""
        self.sum_s += late_s
        self._counts[bisect_left(BOUNDS_S, late_s)] += 1

    @property
    def count(self) -> int:
        """Number of timers."""
        return sum(self._counts)

    def buckets(self) -> Iterator[tuple[str, float]]:
        """Label and count of the timers that were at most so late, as Prometheus has it."""
        labels = [f'{{le="{bound:g}"}}' for bound in BOUNDS_S] + ['{le="+Inf"}']
        yield from zip(labels, accumulate(map(float, self._counts)), strict=True)
