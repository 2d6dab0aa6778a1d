"""A lane: threads, usually one, that run callables in order and hand results to the loop.

Used for CPU compute, for small host work, and as the launcher thread of a device stream: the loop itself never
calls torch. A failure poisons the lane: all later work fails with the same error and does not run.
"""

import asyncio
import queue
import threading
from collections.abc import Callable

from aspec.errors import DeviceError
from aspec.io.loop.mailbox import LoopMailbox
from aspec.models.experts.pause import abandon
from aspec.tasks.task import Completion

Work = Callable[[], Completion]


class ThreadLane:
    """Runs work on threads of its own, which start it in the order of submission."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, num_threads: int = 1) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Work, asyncio.Future[Completion]] | None] = queue.SimpleQueue()
        self._mailbox: LoopMailbox[Completion] = LoopMailbox(loop)
        self._error: BaseException | None = None  # the first failure; stays
        names = [f"aspec-{name}", *(f"aspec-{name}-{number}" for number in range(2, num_threads + 1))]
        self._threads = [threading.Thread(target=self._run, name=own, daemon=True) for own in names]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work) -> asyncio.Future[Completion]:
        """Queue work; only on the loop's thread."""
        future: asyncio.Future[Completion] = self._loop.create_future()
        self._queue.put((work, future))
        return future

    def close(self, timeout_s: float = 30.0) -> None:
        """Run the queued work, join, hand over the results; may be called twice.

        Raises DeviceError if a thread does not end in time.
        """
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
            if thread.is_alive():
                raise DeviceError(f"{thread.name} did not finish its work within {timeout_s:g} s of closing")
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
        abandon()  # what failed work has left on this thread
