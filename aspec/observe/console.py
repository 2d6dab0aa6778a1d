"""The output of a command: messages and plain progress on stderr, generated text on stdout."""

import sys

import rich.console

from aspec.errors import printable
from aspec.observe.snapshot import Snapshot
from aspec.observe.timeline import bottleneck, lane_use
from aspec.units import format_bytes

RECENT_S = 5.0  # a progress line measures the lanes over this time


class Console:
    """The terminal of one command; mutable, because it holds output back while a dashboard covers it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.stderr = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._covered = False
        self._notes: list[str] = []  # held back while the dashboard covers the terminal
        self._text: list[str] = []  # likewise, if stdout is the same terminal
        self._warnings: dict[str, bool] = {}  # text -> whether it has been shown; any thread may add

    def note(self, text: str) -> None:
        """Print a line of information; nothing when quiet."""
        if self._covered:
            self._notes.append(text)
        elif not self.quiet:
            self.stderr.print(f"aspec: {printable(text)}", markup=False, style="dim")

    def error(self, text: str) -> None:
        """Print an error in one paragraph, also when quiet."""
        self.stderr.print("error:", style="bold red", end=" ")
        self.stderr.print(printable(text), markup=False)

    def warn(self, text: str) -> None:
        """Hold a warning back until ``show_warnings``; the same text is shown once. Any thread may call it."""
        self._warnings.setdefault(printable(" ".join(text.split())), False)

    def show_warnings(self) -> None:
        """Print the warnings that were not shown yet, one line each; nothing when quiet."""
        for text in [text for text, shown in self._warnings.items() if not (shown or self.quiet)]:
            self._warnings[text] = True
            self.stderr.print("warning:", style="bold yellow", end=" ")
            self.stderr.print(text, markup=False)

    def write(self, text: str) -> None:
        """Write generated text to stdout: at once, or after the dashboard if it covers the same terminal."""
        if self._covered and sys.stdout.isatty():
            self._text.append(text)
            return
        sys.stdout.write(text)
        sys.stdout.flush()

    def cover(self) -> None:
        """Hold output back from now on: a dashboard covers the terminal."""
        self._covered = True

    def uncover(self) -> None:
        """The dashboard has closed: print the output that was held back."""
        self._covered = False
        notes, self._notes = self._notes, []
        text, self._text = "".join(self._text), []
        self.write(text)
        if text and not text.endswith("\n"):
            self.write("\n")
        for line in notes:
            self.note(line)


def progress_line(snapshot: Snapshot) -> str | None:
    """The state of a run in one plain line; None if there is nothing to show yet."""
    done, total = snapshot.done, snapshot.total
    if snapshot.stage == "decode":
        words = [f"decode: {done} of at most {total} tokens"]
        if snapshot.tokens_per_s:
            words.append(f"{snapshot.tokens_per_s:.2f} tokens/s")
        if snapshot.tokens_per_pass:
            words.append(f"{snapshot.tokens_per_pass:.2f} tokens per pass")
        since = snapshot.now_s - RECENT_S
        words.append(bottleneck([lane_use(lane.name, lane.work, since, snapshot.now_s) for lane in snapshot.lanes]))
        return ", ".join(words)
    if not total:
        return f"{snapshot.stage} ..." if snapshot.stage_s > 1 else None
    words = [f"{snapshot.stage}: {format_bytes(done)} of {format_bytes(total)}"]
    if 0 < done < total and snapshot.stage_s > 0:
        words.append(f"{(total - done) * snapshot.stage_s / done:.0f} s left")
    return ", ".join(words)
