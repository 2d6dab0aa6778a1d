"""Shows a run while it runs: a live dashboard on a terminal, plain lines elsewhere, nothing when quiet.

A thread of its own draws the dashboard 4 times per second, from a snapshot that the loop makes on request. So a slow
terminal never blocks the loop, and a busy loop never freezes the dashboard.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator

from rich.live import Live

from aspec.observe.console import Console, progress_line
from aspec.observe.frame import Frame
from aspec.observe.monitor import Monitor
from aspec.observe.snapshot import Snapshot
from aspec.observe.ticker import OnLoop, Ticker

FRAME_S = 0.25  # between two frames
LINE_S = 5.0  # between two plain lines
ANSWER_S = 0.05  # longest wait of a frame for the loop; after it the frame shows the previous state


@contextlib.contextmanager
def watch(monitor: Monitor, console: Console, *, dashboard: bool = True) -> Iterator[None]:
    """Show a run until the block ends; call it on the loop's thread."""
    if console.quiet:
        yield
        return
    latest = OnLoop(asyncio.get_running_loop(), lambda: monitor.snapshot(time.perf_counter()))
    if dashboard and console.stderr.is_terminal and not console.stderr.is_dumb_terminal:
        with _live_frames(latest, console):
            yield
    else:
        with _plain_lines(latest, console):
            yield


@contextlib.contextmanager
def _live_frames(latest: OnLoop[Snapshot], console: Console) -> Iterator[None]:
    console.cover()
    try:
        with Live(
            console=console.stderr, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            ticker = Ticker(FRAME_S, lambda: live.update(Frame(latest.get(ANSWER_S)), refresh=True), "dashboard")
            try:
                yield
            finally:
                ticker.close()
    finally:
        console.uncover()


@contextlib.contextmanager
def _plain_lines(latest: OnLoop[Snapshot], console: Console) -> Iterator[None]:
    def print_line() -> None:
        if line := progress_line(latest.get(ANSWER_S)):
            console.note(line)

    ticker = Ticker(LINE_S, print_line, "progress")
    try:
        yield
    finally:
        ticker.close()
