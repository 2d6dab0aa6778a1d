"""The output of a command: messages and plain progress on stderr, generated text on stdout."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Protocol

import rich.console
from rich.text import Text

from aspec.errors import printable
from aspec.observe.snapshot import MEASURING, Snapshot
from aspec.observe.timeline import Stops, bottleneck, lane_use
from aspec.options import MEASURE
from aspec.units import format_bytes

RECENT_S = 5.0  # a progress line measures the lanes over this time


class Display(Protocol):
    """Drawn over the terminal again and again, by a thread of its own."""

    covers: bool  # the whole terminal, not only the line of the cursor
    leave: str  # what gives the terminal back

    def paused(self) -> AbstractContextManager[None]:
        """Give the terminal back until the block ends."""
        ...


class Console:
    """The terminal of one command; mutable, because it holds output back while a dashboard covers it."""

    def __init__(self, *, quiet: bool = False) -> None:
        wraps = sys.stderr.isatty()  # at words; elsewhere a message is one line
        self.stderr = rich.console.Console(stderr=True, highlight=False, soft_wrap=not wraps)
        self.quiet = quiet
        self.stops = Stops()  # of the process
        self._display: Display | None = None
        self._notes: list[str] = []  # held back while the display covers the terminal
        self._text: list[str] = []  # likewise, if stdout is the same terminal
        self._warnings: dict[str, bool] = {}  # text -> whether it has been shown; any thread may add
        self._text_streams = False  # since the last message, text went to where the messages go
        self._line_is_open = False  # and its last line has no end yet

    def note(self, text: str) -> None:
        """Print a line of information; nothing when quiet."""
        if self._is_covered:
            self._notes.append(text)
        elif not self.quiet:
            with self._own_lines():
                self.stderr.print(f"aspec: {printable(text)}", markup=False, style="dim")

    def progress(self, text: str) -> None:
        """Print a line of progress; nothing while text streams to the same terminal or file."""
        if not self._text_streams:
            self.note(text)

    def error(self, text: str) -> None:
        """Print an error in one paragraph, also when quiet."""
        self._print_headed("error:", "bold red", text)

    def warn(self, text: str) -> None:
        """Hold a warning back until ``show_warnings``; the same text is shown once. Any thread may call it."""
        self._warnings.setdefault(printable(" ".join(text.split())), False)

    def show_warnings(self) -> None:
        """Print the warnings that were not shown yet, one line each; nothing when quiet."""
        for text in [text for text, shown in self._warnings.items() if not (shown or self.quiet)]:
            self._warnings[text] = True
            self._print_headed("warning:", "bold yellow", text)

    def write(self, text: str) -> None:
        """Write generated text to stdout: at once, or after the dashboard if it covers the same terminal.

        Raises WriteError or BrokenPipeError.
        """
        if self._is_covered and sys.stdout.isatty():
            self._text.append(text)
            return
        if text and self._shares_file:
            self._text_streams, self._line_is_open = True, not text.endswith("\n")
        self._check_encoding(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    @property
    def can_display(self) -> bool:
        """Whether messages go to a terminal that can move its cursor."""
        return sys.stderr.isatty() and not self.stderr.is_dumb_terminal and not self.stderr.legacy_windows

    @contextmanager
    def shown(self, display: Display) -> Iterator[None]:
        """``display`` uses the terminal until the block ends; then print the output that was held back."""
        self._display = display
        try:
            yield
        finally:
            self._display = None
            notes, self._notes = self._notes, []
            text, self._text = "".join(self._text), []
            try:
                self.write(text if text.endswith("\n") or not text else f"{text}\n")
            finally:
                for line in notes:
                    self.note(line)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Give the terminal back until the block ends: the process will stop."""
        if self._display is None:
            yield
            return
        with self._display.paused():
            yield

    def abandon(self) -> dict[int, str]:
        """What is left to write, by descriptor, if the process must end at once: the terminal, and the text so far."""
        left = {2: self._display.leave} if self._display else {}
        return left | {1: "".join(self._text)}

    @property
    def _is_covered(self) -> bool:
        return self._display is not None and self._display.covers

    @cached_property
    def _shares_file(self) -> bool:
        """Whether text and messages go to one terminal, file or pipe."""
        try:
            one, other = (os.fstat(stream.fileno()) for stream in (sys.stdout, sys.stderr))
        except (OSError, ValueError):
            return False  # not files
        both = sys.stdout.isatty() and sys.stderr.isatty()  # a terminal has several names
        return both or (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)

    def _check_encoding(self, text: str) -> None:
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            self.warn(
                f"standard output is {sys.stdout.encoding}, which lacks characters of the text: they are written as "
                f"escapes. Set PYTHONUTF8=1 or a UTF-8 locale."
            )

    @contextmanager
    def _own_lines(self) -> Iterator[None]:
        """What is printed in the block begins on a line of its own."""
        opened, self._text_streams, self._line_is_open = self._line_is_open, False, False
        with self.suspended():
            if opened:
                self.stderr.print()
            yield

    def _print_headed(self, head: str, style: str, text: str) -> None:
        with self._own_lines():
            self.stderr.print(Text.assemble((head, style), " ", printable(text)))


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
        doing = MEASURING if snapshot.stage == MEASURE else snapshot.stage
        return f"{doing} ..." if snapshot.stage_s > 1 else None
    if snapshot.counts_tokens:
        words = [f"{snapshot.stage}: {done} of {total} prompt tokens"]
        words += [f"{done / snapshot.stage_s:.1f} tokens/s"] if done and snapshot.stage_s > 0 else []
    else:
        words = [f"{snapshot.stage}: {format_bytes(done)} of {format_bytes(total)}"]
    if 0 < done < total and snapshot.stage_s > 0:
        words.append(f"{(total - done) * snapshot.stage_s / done:.0f} s left")
    return ", ".join(words)
