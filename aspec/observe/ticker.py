"""A thread that calls a function periodically, and asks the loop for values: a busy loop must not stop it."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

LONGEST_JOIN_S = 5.0
LONGEST_PAUSE_S = 1.0


class Ticker:
    """Calls ``tick`` every ``period_s`` seconds until ``close``; an error ends it, and ``close`` raises the error."""

    def __init__(self, period_s: float, tick: Callable[[], None], name: str = "ticker") -> None:
        self._period_s, self._tick = period_s, tick
        self._stopping = threading.Event()
        self._ticking = threading.Lock()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"aspec-{name}", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let no tick run until the block ends; one that hangs is waited for a moment only."""
        mine = self._ticking.acquire(timeout=LONGEST_PAUSE_S)
        try:
            yield
        finally:
            if mine:
                self._ticking.release()

    def close(self) -> None:
        """Stop and join; it may be called twice. Raises the error of ``tick``, if there was one."""
        self._stopping.set()
        self._thread.join(LONGEST_JOIN_S)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._period_s):
                with self._ticking:
                    self._tick()
        except BaseException as error:
            self._error = error


class OnLoop(Generic[T]):
    """Lets another thread call a function on the loop's thread; if the loop is busy, it gets the previous value."""

    def __init__(self, loop: asyncio.AbstractEventLoop, make: Callable[[], T]) -> None:
        self._loop, self._make = loop, make
        self._fresh = threading.Event()
        self._value = make()

    def get(self, timeout_s: float) -> T:
        """A new value, or the previous one if the loop gives none within ``timeout_s``."""
        self._fresh.clear()
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self._renew)
        self._fresh.wait(timeout_s)
        return self._value

    def _renew(self) -> None:
        self._value = self._make()
        self._fresh.set()
