"""The keyboard during an answer: keys do not print into the text, and stay for the next prompt."""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

BEGIN_PASTE, END_PASTE = "\x1b[?2004h", "\x1b[?2004l"  # the terminal marks pasted text, or stops to do so


@contextlib.contextmanager
def keys_held(*, mark_pastes: bool) -> Iterator["HeldKeys | None"]:
    """Turn the echo of standard input off, if it is a terminal, until the block ends or the process stops or exits.

    The terminal keeps what is typed: the next prompt reads it. Ctrl-C drops it. ``mark_pastes``: the next prompt
    understands bracketed paste, so the lines of a pasted text stay together.
    """
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield None
        return
    held = HeldKeys(sys.stdin.fileno(), mark_pastes)
    atexit.register(held.release)
    try:
        with _while_stopped(held):
            held.hold()
            yield held
    finally:
        held.release()
        atexit.unregister(held.release)


class HeldKeys:
    """The mode of one terminal; mutable, because it is set and restored. Not for Windows."""

    def __init__(self, descriptor: int, mark_pastes: bool) -> None:
        import termios

        self._termios, self._descriptor, self._mark_pastes = termios, descriptor, mark_pastes
        self._before: list[Any] | None = None  # the mode to restore; None: the keys are not held
        self.num_stops = 0  # how often the process was stopped meanwhile

    def hold(self) -> None:
        """Set the mode; a process in the background leaves the terminal alone."""
        with contextlib.suppress(OSError):  # it is not the terminal that controls this process
            if os.tcgetpgrp(self._descriptor) != os.getpgrp():
                return
        termios = self._termios
        self._before = termios.tcgetattr(self._descriptor)
        mode = termios.tcgetattr(self._descriptor)
        mode[3] &= ~(termios.ECHO | termios.ICANON)  # not by line: a line of the terminal holds 4096 bytes
        termios.tcsetattr(self._descriptor, termios.TCSANOW, mode)
        self._print(BEGIN_PASTE)

    def release(self) -> None:
        """Restore the mode; a terminal that has gone needs none."""
        before, self._before = self._before, None
        if before is not None:
            with contextlib.suppress(self._termios.error, OSError):
                self._termios.tcsetattr(self._descriptor, self._termios.TCSANOW, before)
                self._print(END_PASTE)

    def _print(self, sequence: str) -> None:
        if self._mark_pastes:
            os.write(sys.stdout.fileno(), sequence.encode())  # a signal may come in the midst of a write to the stream


@contextlib.contextmanager
def _while_stopped(held: HeldKeys) -> Iterator[None]:
    """Ctrl-Z: release the keys, stop, and hold them again when the process continues."""

    def stop(*_: object) -> None:
        held.release()
        signal.signal(signal.SIGTSTP, before)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, stop)
        held.num_stops += 1
        held.hold()

    before = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)
