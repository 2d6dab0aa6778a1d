"""From threads to the loop: a lane's threads post results, and their futures resolve on the loop.

Wake-ups are batched: a burst of results costs the loop one call. Results of one thread arrive in the order of posting.
No result is lost: a lane calls ``empty`` when its threads have ended, which sets the results that a closed loop missed.
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
        self._armed = False  # the loop will call ``empty``; a race costs one needless call

    def post(self, future: asyncio.Future[T], result: T | BaseException) -> None:
        """Hand over a result, or an error in its place; from any thread."""
        self._posted.append((future, result))
        if not self._armed:
            self._armed = True
            with contextlib.suppress(RuntimeError):  # the loop has closed: the lane calls ``empty`` at its end
                self._loop.call_soon_threadsafe(self.empty)

    def empty(self) -> None:
        """Resolve the futures of all results that were posted; on the loop's thread, or when the loop has closed."""
        self._armed = False  # before the first result is taken: a later one makes the loop call again
        while self._posted:
            future, result = self._posted.popleft()
            if future.done():
                continue
            with contextlib.suppress(RuntimeError):  # the loop has closed: the result is set, its callbacks do not run
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
