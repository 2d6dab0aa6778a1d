"""Where entries come from: lines of a pipe or of a simple terminal; ``prompt.py`` edits them on any other terminal."""

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
    """Reads lines of standard input, as the terminal itself edits them."""

    marks_pastes = False

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused later, alone

    def read(self) -> Entry | None:
        """The next entry, of one line or of several."""
        text = self._line(PROMPT)
        while text is not None and (begun := continued(text)) is not None:
            line = self._line(MORE)
            if line is None and is_open(text):
                raise PromptError(f"the input ends inside {QUOTES}: close it at the end of a line.")
            if line is None:
                return Entry(begun.rstrip("\n"))
            text = begun + line
        return None if text is None else Entry(text)

    def _line(self, prompt: str) -> str | None:
        """The next line. A prompt that is not for a terminal's stdout goes to stderr, apart from the answers."""
        asked = sys.stdout if sys.stdout.isatty() else sys.stderr
        if self.interactive:
            asked.write(prompt)
            asked.flush()
        line = ""
        try:
            line = sys.stdin.readline()
        finally:
            if self.interactive and not line:  # the cursor is behind the prompt
                asked.write("\n")
                asked.flush()
        return line.removeprefix("\ufeff").rstrip("\r\n") if line else None


def open_reader(commands: Iterable[str]) -> Reader:
    """The reader that fits the terminal, or the pipe; ``commands`` can be completed."""
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown", ""):
        from aspec.cli.chat.prompt import PromptReader

        return PromptReader(commands)
    return LineReader()
