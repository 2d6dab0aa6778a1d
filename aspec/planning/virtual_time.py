"""An event loop in virtual time: its clock jumps to the next timer, and a schedule that cannot finish raises.

Equal deadlines fire in the order of their creation (in asyncio's own loop the heap decides). Deadlines are rounded to
whole nanoseconds. Threads are refused. The loop uses two private names of ``asyncio`` (``_scheduled`` and
``_clock_resolution``); a test checks that they exist.
"""

import asyncio
import heapq
import itertools
import selectors
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Never, TypeVarTuple

from aspec.errors import DeadlockError

Arguments = TypeVarTuple("Arguments")


class _Timer(asyncio.TimerHandle):
    """A timer that breaks ties by the order of its creation."""

    __slots__ = ("sequence",)
    sequence: int

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, _Timer):
            return NotImplemented
        return (self.when(), self.sequence) < (other.when(), other.sequence)


class _ClockSelector(selectors.SelectSelector):
    """A selector that never waits: it moves the loop's clock to the next deadline instead."""

    loop: "VirtualTimeLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise DeadlockError("virtual time: nothing is runnable and no timer is pending")
        if timeout > 0:
            self.loop.jump()
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose simulated hour takes no longer than its callbacks compute."""

    _scheduled: list[_Timer]

    def __init__(self) -> None:
        self._now = 0.0
        self._sequence = itertools.count()
        selector = _ClockSelector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 5e-10

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def jump(self) -> None:
        """Move the clock to the next deadline."""
        self._now = self._scheduled[0].when()

    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Schedule a callback at ``when``, virtual seconds; a deadline in the past fires now."""
        timer = _Timer(max(self._now, round(when * 1e9) * 1e-9), callback, args, self, context)
        timer.sequence = next(self._sequence)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]  # asyncio counts cancelled timers by this flag
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Schedule a callback ``delay`` virtual seconds from now."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[*Arguments], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        """Do what ``call_soon`` does. Raises RuntimeError in another thread: virtual time has one thread."""
        if self.is_running() and threading.get_ident() != self._thread_id:  # type: ignore[attr-defined]
            raise RuntimeError("a thread cannot call into virtual time")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, *args: object) -> Never:
        """Raises RuntimeError: threads cannot run in virtual time."""
        raise RuntimeError("threads cannot run in virtual time")
