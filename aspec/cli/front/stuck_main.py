"""Ctrl-C while the main thread hangs outside of Python, such as in a read of a dead network file system.

Python runs the handlers of signals on the main thread, so one that never returns from a system call or from a library
sees no Ctrl-C. Here a thread of its own takes every SIGINT and hands it to the main thread. If the main thread has run
no handler at the third one, the process ends. This needs the interpreter's lock: a library that holds it while it hangs
cannot be interrupted.
"""

import _thread
import signal
import threading
from collections.abc import Callable

MOST_INTERRUPTS = 3
if hasattr(signal, "SIGURG"):
    WAKE = signal.SIGURG  # ignored by default, and used by nobody; it interrupts a system call of the main thread


class StuckMain:
    """Counts the interrupts that the main thread has not seen; mutable for that. Use it on the main thread.

    The block must begin before other threads start: they inherit that SIGINT is blocked. After the block, while the
    interpreter waits for threads and ends, one Ctrl-C is enough.
    """

    def __init__(self, end: Callable[[int], object]) -> None:
        """``end`` ends the process with an exit code, on the thread that took the last interrupt."""
        self._end = end
        self._num_unseen = 0
        self._watches = hasattr(signal, "pthread_sigmask") and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN

    def __enter__(self) -> None:
        if self._watches:
            signal.signal(WAKE, self._seen)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            threading.Thread(target=self._run, name="aspec-interrupts", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        if self._watches:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _seen(self, *_: object) -> None:
        """The main thread runs handlers."""
        self._num_unseen = 0

    def _run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while True:
            signal.sigwait({signal.SIGINT})
            self._num_unseen += 1
            if self._num_unseen >= MOST_INTERRUPTS:
                self._end(128 + signal.SIGINT)
            _thread.interrupt_main(signal.SIGINT)
            signal.pthread_kill(main, WAKE)
