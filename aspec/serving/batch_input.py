"""The rows of a batch file: all rows are checked before any work, then each is read again from its offset.

Memory holds only the offset, the size, a checksum and the id of each row. The file stays open, and a row that has
changed since the check is an error. A pipe is copied to a temporary file first, because its rows are read twice. A row
that cannot be served is refused, and the others are not affected.
"""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from aspec.errors import PromptError, UserError
from aspec.serving.openai_requests import Request, parse_json, parse_request
from aspec.serving.refusals import Refusal, RequestError
from aspec.serving.request_fields import CHAT, COMPLETION, as_json, plain

PIPE = Path("-")  # standard input as the input, standard output as the output
MAX_LISTED = 20  # most problems that a message lists
LONGEST_LINE = 32 << 20  # bytes: millions of tokens; a longer line is refused unread
FIELDS = ("custom_id", "method", "url", "body")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

RowId = str | int
"""The identity of a row: its custom_id, or the number of its line if it has no custom_id of its own."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A line of the input."""

    custom_id: str
    request: Request


class BatchFile:
    """An open input file and the places of its rows; mutable while ``scan`` runs."""

    def __init__(self, path: Path) -> None:
        self.name = "standard input" if path == PIPE else str(path)
        self.ids: list[RowId] = []  # of all rows, in the file's order
        self.refused: dict[int, Refusal] = {}  # index of a row that cannot be served -> why
        self._starts, self._sizes, self._checksums = array("Q"), array("Q"), array("I")
        self._lines: dict[str, int] = {}  # custom_id -> number of its line
        self._listed: list[str] = []  # the first problems, as lines of a message
        self._same: dict[Refusal, Refusal] = {}  # equal refusals share one object
        self._file = _open(path)
        self._written = _last_write(self._file)
        self.digest = ""  # SHA-256 of the whole content, as ``scan`` found it

    def problems(self, more: str = "") -> str:
        """The rows that cannot be served, as a text of several lines: how many, ``more``, the first by line."""
        count = "one row" if len(self.refused) == 1 else f"{len(self.refused)} rows"
        first = f"; the first {MAX_LISTED} are listed" if len(self.refused) > MAX_LISTED else ""
        return f"{self.name}: {count} of {len(self.ids)} cannot be served{more}{first}:{''.join(self._listed)}"

    def scan(self, check: Callable[[BatchRow], None]) -> None:
        """Read and check every row; ``check`` raises PromptError for a row that cannot be served.

        Raises a UserError if there is no row.
        """
        sha256 = hashlib.sha256()
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            for number, (start, line, nbytes) in enumerate(_lines(file, sha256.update), 1):
                skipped = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
                if line[skipped:].strip():
                    self._take(line[skipped:], nbytes - skipped, start + skipped, number, check)
        self.digest = sha256.hexdigest()
        if not self.ids:
            raise self._empty()

    def read(self, index: int) -> BatchRow:
        """Read a row from the file. Raises UserError when the row has changed since the check."""
        return parse_row(self.read_line(index))

    def read_line(self, index: int) -> bytes:
        """The bytes of a row's line. Raises UserError when the row has changed since the check."""
        line = os.pread(self._file, self._sizes[index], self._starts[index])
        if zlib.crc32(line) != self._checksums[index]:
            raise self._changed(f"the row {as_json(self.ids[index])} is different now")
        return line

    def check_unchanged(self) -> None:
        """Raises UserError when the content is not the one that was checked; reads the file only if it was written."""
        if _last_write(self._file) == self._written:
            return
        sha256 = hashlib.sha256()
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            while data := file.read(1 << 20):
                sha256.update(data)
        if sha256.hexdigest() != self.digest:
            raise self._changed("its content is different now")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"{self.name} was changed while its rows were served: {what}. The answers belong to the old file: restore "
            f"it and run the same command, or give the new file another -o."
        )

    def _empty(self) -> UserError:
        return UserError(
            f"{self.name} is empty: expected one request per line, such as "
            f'{{"custom_id": "1", "method": "POST", "url": "{COMPLETION}", "body": {{"prompt": "..."}}}}.'
        )

    def _take(self, line: bytes, nbytes: int, start: int, number: int, check: Callable[[BatchRow], None]) -> None:
        """Note a row and its place; a row that cannot be served is refused."""
        row_id: RowId = number
        try:
            if nbytes > len(line):
                raise RequestError(f"the line has {nbytes} bytes; at most {LONGEST_LINE} are read")
            row = _object(line)
            custom_id = _custom_id(row)
            if custom_id in self._lines:
                where = self._lines[custom_id]
                raise RequestError(f"custom_id {as_json(custom_id)} is already used in line {where}", "custom_id")
            self._lines[custom_id] = number
            row_id = custom_id
            check(BatchRow(custom_id, _request(row)))
        except PromptError as error:
            self._refuse(number, Refusal.of(error))
        self.ids.append(row_id)
        self._starts.append(start)
        self._sizes.append(nbytes)
        self._checksums.append(zlib.crc32(line))

    def _refuse(self, number: int, refusal: Refusal) -> None:
        self.refused[len(self.ids)] = self._same.setdefault(refusal, refusal)
        if len(self._listed) < MAX_LISTED:
            self._listed.append(f"\n  line {number}: {refusal.message}")


# -- files -----------------------------------------------------------------------------------------------------


def _open(path: Path) -> int:
    """A file that can be read twice. Raises UserError."""
    if path == PIPE:
        if sys.stdin is None:
            raise UserError("standard input is closed, but -i - reads it. Give -i a file of one JSON object per line.")
        return _copied(sys.stdin.buffer, "standard input")
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UserError(
            f"the input {path} cannot be read: {error.strerror}. Give -i a file of one JSON object per line."
        ) from error
    kind = os.fstat(file).st_mode
    if stat.S_ISREG(kind):
        return file
    if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
        with open(file, "rb") as opened:
            return _copied(opened, str(path))
    os.close(file)
    raise UserError(f"the input {path} is not a regular file or a pipe. Give -i a file of one JSON object per line.")


def _copied(pipe: BinaryIO, name: str) -> int:
    """A temporary file, already without a name, with the content of a pipe. Blocks until the pipe ends."""
    try:
        with tempfile.TemporaryFile() as file:
            shutil.copyfileobj(pipe, file)
            file.flush()
            return os.dup(file.fileno())
    except OSError as error:
        raise UserError(
            f"{name} cannot be copied to {tempfile.gettempdir()}: {error.strerror or error}. Its rows are read twice: "
            f"free some space there, or save the rows to a file and give it to -i."
        ) from error


def _last_write(file: int) -> tuple[int, int]:
    """The size of a file, and the time of its last change in nanoseconds."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


def _lines(file: BinaryIO, each: Callable[[bytes], object]) -> Iterator[tuple[int, bytes, int]]:
    """Offset, bytes and size of every line; of a line longer than LONGEST_LINE only the first bytes.

    ``each`` is called with all bytes of the file in turn.
    """
    start = 0
    while line := file.readline(LONGEST_LINE):
        each(line)
        nbytes, rest = len(line), line
        while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE)
            each(rest)
            nbytes += len(rest)
        yield start, line, nbytes
        start += nbytes


# -- rows ------------------------------------------------------------------------------------------------------


def parse_row(line: bytes) -> BatchRow:
    """Parse a row. Raises a RequestError that names the field."""
    row = _object(line)
    return BatchRow(_custom_id(row), _request(row))


def _object(line: bytes) -> dict[str, Any]:
    row = parse_json(line.rstrip(b"\r\n"))
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object; found {as_json(row)}")
    return row


def _custom_id(row: dict[str, Any]) -> str:
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError("custom_id must be a text that is not empty: it identifies the answer", "custom_id")
    return custom_id


def _request(row: dict[str, Any]) -> Request:
    for name, value in row.items():
        if name not in FIELDS and value is not None:
            raise RequestError(f"{plain(name)} is not supported; a row has {', '.join(FIELDS)}: remove it", plain(name))
    if row.get("method") != "POST":
        raise RequestError(f"method must be POST; found {as_json(row.get('method'))}", "method")
    url = row.get("url")
    if url not in (CHAT, COMPLETION):
        raise RequestError(f"url must be {CHAT} or {COMPLETION}; found {as_json(url)}", "url")
    return parse_request(url, row.get("body"))
