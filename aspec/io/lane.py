"""A lane: one thread that runs callables in order and hands results to the loop.

Used for CPU compute, for small host work, and as the launcher thread of a device stream: the loop itself never
calls torch. A failure poisons the lane: what was issued behind it fails with the same error and does not run.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable

from aspec.errors import DeviceError
from aspec.tasks.task import Completion

Work = Callable[[], Completion]


class ThreadLane:
    """Runs work in order of submission on a thread of its own."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Work, asyncio.Future[Completion]] | None] = queue.SimpleQueue()
        self._finished: deque[tuple[asyncio.Future[Completion], Completion | BaseException]] = deque()
        self._armed = False  # a drain is on its way to the loop; a race costs one empty drain
        self._error: BaseException | None = None  # sticky
        self._thread = threading.Thread(target=self._run, name=f"aspec-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> asyncio.Future[Completion]:
        """Queue work; only on the loop's thread."""
        future: asyncio.Future[Completion] = self._loop.create_future()
        self._queue.put((work, future))
        return future

    def close(self, timeout_s: float = 30.0) -> None:
        """Run what is queued, then join. Raises DeviceError if the thread does not end in time."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeviceError(f"{self._thread.name} did not finish its work within {timeout_s:g} s of closing")

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            del item
            result: Completion | BaseException
            if self._error is not None:
                result = self._error
            else:
                try:
                    result = work()
                except BaseException as error:
                    result = self._error = error
            del work
            self._post(future, result)

    def _post(self, future: asyncio.Future[Completion], result: Completion | BaseException) -> None:
        self._finished.append((future, result))
        if not self._armed:
            self._armed = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                return  # the loop has closed: nobody waits any more

    def _drain(self) -> None:
        self._armed = False
        while self._finished:
            future, result = self._finished.popleft()
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
