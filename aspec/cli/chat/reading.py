"""Where entries come from: lines of a pipe or of a simple terminal; ``prompt.py`` edits them on any other terminal."""

import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterable
from typing import Protocol

from aspec.cli.chat.entry import MORE, PROMPT, QUOTES, Entry, continued, is_open
from aspec.errors import PromptError


class Reader(Protocol):
    """Reads entries."""

    interactive: bool  # a person types them
    marks_pastes: bool  # it understands bracketed paste

    def read(self) -> Entry | None:
        """The next entry; None at the end of the input.

        Raises PromptError if the end is inside triple quotes, KeyboardInterrupt for Ctrl-C at an empty prompt.
        """
        ...


class LineReader:
    """Reads lines of standard input; readline edits them where a terminal has it."""

    marks_pastes = False

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused later, alone
        edits = self.interactive and sys.stdout.isatty() and importlib.util.find_spec("readline")
        self._editor = importlib.import_module("readline") if edits else None  # input() uses it once it is imported

    def read(self) -> Entry | None:
        """The next entry, of one line or of several."""
        try:
            text = self._line(PROMPT)
            while text is not None and (begun := continued(text)) is not None:
                line = self._line(MORE)
                if line is None and is_open(text):
                    raise PromptError(f"the input ends inside {QUOTES}: close it at the end of a line.")
                if line is None:
                    return Entry(begun.rstrip("\n"))
                text = begun + line
        except KeyboardInterrupt:
            if not self.interactive or self._editor is None or not self._editor.get_line_buffer():
                raise
            return Entry("")
        return None if text is None else Entry(text)

    def _line(self, prompt: str) -> str | None:
        """The next line. A prompt that is not for a terminal's stdout goes to stderr, apart from the answers."""
        if self.interactive and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                sys.stdout.write("\n")
                return None
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                raise
        if self.interactive:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removeprefix("\ufeff").rstrip("\r\n") if line else None


def open_reader(commands: Iterable[str]) -> Reader:
    """The reader that fits the terminal, or the pipe; ``commands`` can be completed."""
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown", ""):
        from aspec.cli.chat.prompt import PromptReader

        return PromptReader(commands)
    return LineReader()
