"""The standard streams of a command, as its results and its progress need them.

A closed descriptor is opened on the null device, because the event loop would take its number for itself. A failed read
raises UserError. Results are worth an error: what standard output refuses raises WriteError, and a character that its
encoding lacks is written as an escape. Progress is not: what standard error refuses is dropped.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from aspec.errors import UserError, WriteError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

NAMES = ("stdin", "stdout", "stderr")
CHUNK_BYTES = 4096  # a pipe that is ready takes so many without blocking (PIPE_BUF)
LONGEST_WAIT_S = 1.0  # for a pipe that takes no progress


class _Raw(io.RawIOBase):
    """Passes on to the raw file of a standard stream; subclasses decide what a failed write means."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream  # it would close the descriptor when it is collected
        self._to: Any = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer between

    def fileno(self) -> int:
        """The descriptor."""
        number: int = self._to.fileno()
        return number

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return bool(self._to.isatty())

    def writable(self) -> bool:
        """Yes."""
        return True


class _Input(_Raw):
    """Standard input: a failed read raises UserError."""

    def readable(self) -> bool:
        """Yes."""
        return True

    def writable(self) -> bool:
        """No."""
        return False

    def readinto(self, buffer: "Buffer") -> int:
        """Read some bytes; on a descriptor that does not block, wait until there are some."""
        try:
            while (read := self._to.readinto(buffer)) is None:
                select.select([self], [], [])
        except OSError as error:
            raise UserError(
                f"standard input cannot be read: {error.strerror}. Give --prompt or --file, or another input."
            ) from error
        return int(read)


class _Results(_Raw):
    """Standard output: a failed write raises WriteError once; a broken pipe stays a BrokenPipeError."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write some of ``data``; on a descriptor that does not block, wait until it takes some."""
        try:
            while (written := self._to.write(data)) is None:
                select.select([], [self], [])
        except OSError as error:
            self._give_up()
            if isinstance(error, BrokenPipeError):
                raise
            raise WriteError(
                f"standard output cannot be written: {error.strerror}. The rest of the result is lost; write to a file "
                f"or a disk that has room."
            ) from error
        return int(written)

    def _give_up(self) -> None:
        """Let all later writes succeed: the data that is buffered would fail again as the process ends."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


class _Progress(_Raw):
    """Standard error: what cannot be written is dropped, also into a pipe whose reader has stopped reading."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._wait_s = LONGEST_WAIT_S  # 0 while the pipe takes nothing

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write ``data`` or drop it."""
        left = memoryview(data)
        with suppress(OSError):
            while left and self._is_ready() and (written := self._to.write(left[:CHUNK_BYTES])):
                left = left[written:]
        return len(data)

    def _is_ready(self) -> bool:
        if self.isatty() or os.name == "nt":
            return True
        ready = bool(select.select([], [self], [], self._wait_s)[1])
        self._wait_s = LONGEST_WAIT_S if ready else 0.0
        return ready


def prepare_streams() -> None:
    """Prepare the standard streams; call it once, before anything is opened, printed or read."""
    for number, name in enumerate(NAMES):
        _open_missing(number, name)
    stdin = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BufferedReader(_Input(stdin)), encoding=stdin.encoding, errors=stdin.errors)
    sys.stdout = _text(sys.stdout, _Results)
    sys.stderr = _text(sys.stderr, _Progress)


def _open_missing(number: int, name: str) -> None:
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)
    if getattr(sys, name) is None:
        stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def _text(stream: TextIO, kind: type[_Raw]) -> TextIO:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(kind(stream)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.isatty() or kind is _Progress,
    )
