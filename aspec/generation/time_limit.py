"""A time limit for Python code that is not ours: a checkpoint's chat template may loop for ever.

A thread cannot be killed, so the code is traced: every so many lines and calls it is looked at how long it took, and
an exception is raised in it. The clock is the thread's own, so that a busy machine ends nothing. Loops in Python are
ended, and those of a template are; a single step in C is not (``2 ** 10 ** 9`` runs to its end).
"""

import sys
import time
from types import FrameType, TracebackType
from typing import Any, Self

LOOKED_AT_EVERY = 256  # lines and calls: about 50 us apart


class TimeLimitError(Exception):
    """The code was ended: it took too long, or nobody waits for it any more."""


class TimeLimit:
    """A context in which this thread's Python code may take ``seconds`` of its processor time, if not stopped before.

    Raises TimeLimitError in the midst of that code. Mutable, because any thread may stop it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._stopped = False
        self._deadline_s = 0.0
        self._left = LOOKED_AT_EVERY
        self._before: Any = None  # the trace function that was there: a debugger's, or one that measures coverage

    def stop(self) -> None:
        """End the code soon; from any thread, also before it has begun."""
        self._stopped = True

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        self._deadline_s = time.thread_time() + self.seconds
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        self._left -= 1
        if self._left <= 0:
            self._left = LOOKED_AT_EVERY
            if self._stopped or time.thread_time() > self._deadline_s:
                raise TimeLimitError
        return self._trace
