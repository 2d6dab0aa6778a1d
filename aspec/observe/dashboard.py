"""Shows a run while it runs: a live dashboard on a terminal, plain lines elsewhere, nothing when quiet.

A thread of its own draws the dashboard 4 times per second, from a snapshot that the loop makes on request. So a slow
terminal never blocks the loop, and a busy loop never freezes the dashboard.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil

from aspec.observe.console import Console, progress_line
from aspec.observe.frame import Frame
from aspec.observe.monitor import Monitor
from aspec.observe.ticker import OnLoop, Ticker

FRAME_S = 0.25  # between two frames
LINE_S = 5.0  # between two plain lines
ANSWER_S = 0.05  # longest wait of a frame for the loop; after it the frame shows the previous state

ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
ENTER_LINE, LEAVE_LINE = "\x1b[?25l", "\r\x1b[K\x1b[?7h\x1b[?25h"
BEGIN_FRAME, END_FRAME = "\x1b[?2026h\x1b[?7l", "\x1b[?7h\x1b[?2026l"  # synchronized, without wrapped lines
HOME, CLEAR_LINE, CLEAR_REST = "\x1b[H", "\x1b[2K", "\x1b[J"


class TerminalDisplay:
    """Draws on the terminal of stderr until ``close``; mutable, because it leaves the terminal and comes back.

    It draws only while the process is in the foreground of its terminal: what else is there belongs to others.
    """

    def __init__(self, draw: Callable[[], str], *, covers: bool) -> None:
        self.covers = covers
        self.leave = LEAVE_SCREEN if covers else LEAVE_LINE
        self._enter, self._draw = ENTER_SCREEN if covers else ENTER_LINE, draw
        self._shown = False
        self._ticker = Ticker(FRAME_S, self._tick, "display")

    def close(self) -> None:
        """Stop drawing and give the terminal back. Raises the error of ``draw``, if there was one."""
        try:
            self._ticker.close()
        finally:
            self._hide()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Give the terminal back until the block ends; the next frame takes it again."""
        with self._ticker.paused():
            self._hide()
            yield

    def _tick(self) -> None:
        if not _in_foreground():
            self._hide()
            return
        frame = self._draw()
        _send(("" if self._shown else self._enter) + BEGIN_FRAME + frame + END_FRAME)
        self._shown = True

    def _hide(self) -> None:
        if self._shown:
            self._shown = False
            _send(self.leave)


def _send(text: str) -> None:
    """Write to the terminal past ``sys.stderr``: a signal handler may do so in the midst of another write."""
    with contextlib.suppress(OSError):  # progress is worth less than answers
        if os.name == "nt":
            sys.stderr.write(text)
            sys.stderr.flush()
            return
        data = text.encode(sys.stderr.encoding, "replace")
        while data:
            data = data[os.write(sys.stderr.fileno(), data) :]


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except (AttributeError, OSError):  # Windows; not the terminal that controls this process
        return True


@contextlib.contextmanager
def watch(monitor: Monitor, console: Console, *, dashboard: bool = True) -> Iterator[None]:
    """Show a run until the block ends; call it on the loop's thread."""
    latest = OnLoop(asyncio.get_running_loop(), lambda: monitor.snapshot(time.perf_counter()))

    process = psutil.Process()

    def frame() -> str:
        snapshot = replace(latest.get(ANSWER_S), process_bytes=process.memory_info().rss)
        with console.stderr.capture() as drawn:
            console.stderr.print(Frame(snapshot), end="")
        lines = drawn.get().removesuffix("\n").split("\n")
        # cleared before it is drawn: behind the last column of a line the cursor stands on that column
        return HOME + "".join(f"{CLEAR_LINE}{line}\r\n" for line in lines[:-1]) + CLEAR_REST + lines[-1]

    with show(console, frame, lambda: progress_line(latest.get(ANSWER_S)), covers=True, live=dashboard):
        yield


@contextlib.contextmanager
def show(
    console: Console, draw: Callable[[], str], line: Callable[[], str | None], *, covers: bool, live: bool
) -> Iterator[None]:
    """Until the block ends, show what ``draw`` makes on a terminal if ``live``, elsewhere the plain ``line``."""
    if console.quiet:
        yield
    elif live and console.can_display:
        display = TerminalDisplay(draw, covers=covers)
        with console.shown(display):
            try:
                yield
            finally:
                display.close()
    else:
        ticker = Ticker(LINE_S, lambda: console.progress(text) if (text := line()) else None, "progress")
        try:
            yield
        finally:
            ticker.close()
