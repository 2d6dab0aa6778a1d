"""Who watches a run: a live picture on a terminal, plain lines elsewhere, nothing when quiet.

The picture is drawn in a thread of its own, 4 times a second, from a snapshot that the loop makes when asked:
a slow terminal never holds up the loop, and a busy loop never freezes the picture.
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

FRAME_S = 0.25
LINE_S = 5.0
ANSWER_S = 0.05  # how long a frame waits for the loop; then it shows the state before


@contextlib.contextmanager
def watch(monitor: Monitor, console: Console, *, dashboard: bool = True) -> Iterator[None]:
    """Show a run until the block ends; on the loop's thread."""
    if console.quiet:
        yield
        return
    latest = OnLoop(asyncio.get_running_loop(), lambda: monitor.snapshot(time.perf_counter()))
    if dashboard and console.stderr.is_terminal and not console.stderr.is_dumb_terminal:
        with _picture(latest, console):
            yield
    else:
        with _lines(latest, console):
            yield


@contextlib.contextmanager
def _picture(latest: OnLoop[Snapshot], console: Console) -> Iterator[None]:
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
def _lines(latest: OnLoop[Snapshot], console: Console) -> Iterator[None]:
    def say() -> None:
        if line := progress_line(latest.get(ANSWER_S)):
            console.note(line)

    ticker = Ticker(LINE_S, say, "progress")
    try:
        yield
    finally:
        ticker.close()
