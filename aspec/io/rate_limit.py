"""A token bucket shared by the threads of a lane: ``--link-rate`` makes runs comparable on a disk whose rate drifts."""

import threading
import time
from collections.abc import Callable

BURST_S = 0.02  # credit that a lane may save while it is idle or sleeps too long


class RateLimit:
    """Bytes per second, for all threads together."""

    def __init__(self, bytes_per_s: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._next_s = 0.0  # the time at which all reserved bytes may have passed

    def reserve(self, nbytes: int) -> float:
        """Reserve ``nbytes``; returns the clock time, in seconds, before which they must not count as read."""
        if self.bytes_per_s is None:
            return 0.0
        with self._lock:
            start = max(self._clock() - BURST_S, self._next_s)
            self._next_s = start + nbytes / self.bytes_per_s
            return self._next_s

    def wait_until(self, deadline_s: float, stopping: threading.Event) -> None:
        """Sleep until a deadline from ``reserve``, or until the lane stops."""
        if self.bytes_per_s is not None and (left := deadline_s - self._clock()) > 0:
            stopping.wait(left)
