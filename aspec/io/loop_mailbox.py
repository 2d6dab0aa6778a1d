"""The hand-over from threads to the loop: results that a lane's threads post resolve their futures on the loop.

Wake-ups are batched: a burst of results costs the loop one call. Results of one thread are handed over in the order
in which they were posted. None is lost: a loop that has closed, or that closes with a result on its way, gets it from
``empty``, which a lane calls when its threads have ended.
"""

import asyncio
import contextlib
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class LoopMailbox(Generic[T]):
    """Takes results on any thread and resolves their futures on the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[asyncio.Future[T], T | BaseException]] = deque()
        self._armed = False  # ``empty`` is on its way to the loop; a race costs one empty call

    def post(self, future: asyncio.Future[T], result: T | BaseException) -> None:
        """Leave a result, or the error in its place; from any thread."""
        self._posted.append((future, result))
        if not self._armed:
            self._armed = True
            with contextlib.suppress(RuntimeError):  # the loop has closed: ``empty`` comes with the lane's end
                self._loop.call_soon_threadsafe(self.empty)

    def empty(self) -> None:
        """Resolve the futures of all results that were posted; on the loop's thread, or when the loop has closed."""
        self._armed = False  # before the first result is taken: one that is posted from now on calls again
        while self._posted:
            future, result = self._posted.popleft()
            if future.done():
                continue
            with contextlib.suppress(RuntimeError):  # the loop has closed: the result is set, its callbacks are not run
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
