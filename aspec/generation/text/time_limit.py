"""A time limit for foreign Python code: a checkpoint's chat template may loop for ever.

A thread cannot be killed, so the code is traced: after every ``CHECK_EVERY`` lines and calls the tracer reads the
clock, and raises an exception in the code if its time is over. The clock counts the thread's own processor time, so a
busy machine ends nothing. This ends loops in Python, and a template's loops are; it cannot end a single step in C
(``2 ** 10 ** 9`` runs to its end): ``template_trial.py`` does.
"""

import sys
import time
from types import FrameType, TracebackType
from typing import Any, Self

CHECK_EVERY = 256  # lines and calls: about every 50 us


class TimeLimitError(Exception):
    """The code was ended: it took too long, or ``stop`` was called."""


class TimeLimit:
    """A context that limits this thread's Python code to ``seconds`` of processor time, and that ``stop`` ends early.

    All uses of one limit share its seconds. Raises TimeLimitError inside the code. Mutable, because any thread may stop
    it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.left_s = seconds
        self._stopped = False
        self._deadline_s = 0.0
        self._left = CHECK_EVERY
        self._before: Any = None  # the earlier trace function, of a debugger or of a coverage tool

    def stop(self) -> None:
        """End the code soon; from any thread, also before it has begun."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopped

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        self._deadline_s = time.thread_time() + self.left_s
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.settrace(self._before)
        self.left_s = self._deadline_s - time.thread_time()

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        self._left -= 1
        if self._left <= 0:
            self._left = CHECK_EVERY
            if self._stopped or time.thread_time() > self._deadline_s:
                raise TimeLimitError
        return self._trace
