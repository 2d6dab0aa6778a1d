"""Progress and messages on stderr: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time

import rich.console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY_S = 5.0  # between plain lines


class Console:
    """Everything that is not generated text."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._rich = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._bar: Progress | None = None
        self._last_s = time.monotonic()

    def note(self, text: str) -> None:
        """A line of information."""
        if not self._quiet:
            self._rich.print(f"aspec: {text}", markup=False, style="dim")

    def error(self, text: str) -> None:
        """The one paragraph of an error; never silenced."""
        self._rich.print("error:", style="bold red", end=" ")
        self._rich.print(text, markup=False)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Bytes of a stage; the signature that ``EngineOptions.progress`` wants."""
        if self._quiet:
            return
        if not self._rich.is_terminal:
            self._plain(stage, done, total)
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._rich, transient=True)
            self._bar.add_task(stage, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=stage, completed=done, total=total)
        if done >= total:
            self.finish_progress()

    def finish_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _plain(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._last_s >= LINE_EVERY_S:
            self._last_s = now
            self.note(f"{stage}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")


def write_text(text: str) -> None:
    """Generated text to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
