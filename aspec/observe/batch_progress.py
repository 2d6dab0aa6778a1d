"""Shows the progress of a batch job: one live line on a terminal, plain lines elsewhere, nothing when quiet."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.cells import set_cell_size

from aspec.observe.console import RECENT_S, Console, progress_line
from aspec.observe.dashboard import ANSWER_S, CLEAR_LINE, show
from aspec.observe.monitor import Monitor
from aspec.observe.snapshot import Snapshot
from aspec.observe.ticker import OnLoop
from aspec.observe.timeline import bottleneck, lane_use
from aspec.options import MEASURE
from aspec.tasks.task import Span

OPENING = ("index", "plan", MEASURE, "load")  # stages before the first pass


@dataclass(slots=True)
class BatchProgress:
    """Counts of a job; mutable, because they grow while it runs."""

    total: int  # rows of the input
    done: int = 0  # rows in the output, including those of earlier runs
    failed: int = 0  # errors among ``done``
    made: int = 0  # rows that this run wrote
    tokens: int = 0  # generated in this run
    prompt_tokens: int = 0  # in this run
    num_cached_tokens: int = 0  # prompt tokens whose KV was cached
    prefill_s: float = 0.0  # seconds of the target's compute on prompts
    compute_s: float = 0.0  # seconds of the target's compute
    begun_s: float = 0.0  # start of this run's first row, on the clock of time.perf_counter
    ended_s: float = 0.0  # end of this run, on the same clock

    def __call__(self, span: Span) -> None:
        """Count a finished task."""
        task = span.task
        if task.op.computes and task.item is not None:
            seconds = span.stop_s - span.start_s
            self.compute_s += seconds
            self.prefill_s += seconds if task.item.prefill else 0.0

    def count(self, tokens: int, prompt_tokens: int, num_cached_tokens: int) -> None:
        """Count the tokens of a generated row."""
        self.tokens += tokens
        self.prompt_tokens += prompt_tokens
        self.num_cached_tokens += num_cached_tokens

    def keep(self, rows: int, failed: int) -> None:
        """Count ``rows`` that are now in the output, ``failed`` of them errors."""
        self.done, self.made, self.failed = self.done + rows, self.made + rows, self.failed + failed

    def refuse(self, rows: int) -> None:
        """Count ``rows`` that are now in the output as errors without any work: they say nothing of the speed."""
        self.done, self.failed = self.done + rows, self.failed + rows

    def left_s(self, now_s: float) -> float | None:
        """Seconds to the end, if the remaining rows are like those of this run; None before the first one."""
        return (self.total - self.done) * (now_s - self.begun_s) / self.made if self.made else None

    def summary(self) -> str:
        """One line about this run."""
        seconds = self.ended_s - self.begun_s
        words = [f"{self.made} rows, {self.tokens} tokens in {duration(seconds)}"]
        if seconds > 0:
            words.append(f"{self.tokens / seconds:.2f} tokens/s")
        words.append(f"{self.prompt_tokens} prompt tokens")
        if self.num_cached_tokens:
            words.append(f"{self.num_cached_tokens} of them reused")
        if self.compute_s > 0:
            words.append(f"prefill {100 * self.prefill_s / self.compute_s:.0f} % of the target's compute")
        return ", ".join(words)


def batch_line(progress: BatchProgress, snapshot: Snapshot) -> str | None:
    """The state of a job in one line; None if there is nothing to show yet."""
    if snapshot.stage in OPENING:
        return progress_line(snapshot)
    errors = f" ({progress.failed} errors)" if progress.failed else ""
    words = [f"{progress.done} of {progress.total} rows{errors}", f"{snapshot.tokens} tokens"]
    if snapshot.tokens_per_s:
        words.append(f"{snapshot.tokens_per_s:.2f} tokens/s")
    left_s = progress.left_s(snapshot.now_s)
    words.append("time left not known yet" if left_s is None else f"{duration(left_s)} left")
    since = snapshot.now_s - RECENT_S
    words.append(bottleneck([lane_use(lane.name, lane.work, since, snapshot.now_s) for lane in snapshot.lanes]))
    return ", ".join(words)


def workers_line(progress: BatchProgress, num_open: int, num_workers: int, now_s: float) -> str:
    """The state of a job on several workers in one line, ``now_s`` on the clock of ``begun_s``."""
    errors = f" ({progress.failed} errors)" if progress.failed else ""
    words = [f"{progress.done} of {progress.total} rows{errors}", f"{num_open} of {num_workers} workers"]
    if progress.begun_s:
        words.append(f"{progress.tokens} tokens")
        if progress.tokens and now_s > progress.begun_s:
            words.append(f"{progress.tokens / (now_s - progress.begun_s):.2f} tokens/s")
        left_s = progress.left_s(now_s)
        words.append("time left not known yet" if left_s is None else f"{duration(left_s)} left")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """A duration as text: ``42 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def line_of(progress: BatchProgress, monitor: Monitor) -> Callable[[], str | None]:
    """The line of a job whose engine ``monitor`` watches; call it on the loop's thread, the result on any."""
    latest = OnLoop(asyncio.get_running_loop(), lambda: monitor.snapshot(time.perf_counter()))
    return lambda: batch_line(progress, latest.get(ANSWER_S))


@contextlib.contextmanager
def follow(line: Callable[[], str | None], console: Console, *, live: bool = True) -> Iterator[None]:
    """Show a job's line until the block ends."""

    def draw() -> str:
        return f"\r{CLEAR_LINE}" + set_cell_size(line() or "", console.stderr.width - 1).rstrip()

    with show(console, draw, line, covers=False, live=live):
        yield
