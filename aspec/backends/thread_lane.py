"""A lane: one thread that runs callables in order and hands results to the loop.

Used for CPU compute, for small host work, and as the launcher thread of a device stream: the loop itself never
calls torch. A failure poisons the lane: all later work fails with the same error and does not run.
"""

import asyncio
import queue
import threading
from collections.abc import Callable

from aspec.errors import DeviceError
from aspec.io.loop.mailbox import LoopMailbox
from aspec.tasks.task import Completion

Work = Callable[[], Completion]


class ThreadLane:
    """Runs work in order of submission on a thread of its own."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Work, asyncio.Future[Completion]] | None] = queue.SimpleQueue()
        self._mailbox: LoopMailbox[Completion] = LoopMailbox(loop)
        self._error: BaseException | None = None  # the first failure; stays
        self._thread = threading.Thread(target=self._run, name=f"aspec-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> asyncio.Future[Completion]:
        """Queue work; only on the loop's thread."""
        future: asyncio.Future[Completion] = self._loop.create_future()
        self._queue.put((work, future))
        return future

    def close(self, timeout_s: float = 30.0) -> None:
        """Run the queued work, join, hand over the results; may be called twice.

        Raises DeviceError if the thread does not end in time.
        """
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeviceError(f"{self._thread.name} did not finish its work within {timeout_s:g} s of closing")
        self._mailbox.empty()

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
            self._mailbox.post(future, result)
            del future, result
