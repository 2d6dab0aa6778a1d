"""The rows of a batch file: all rows are checked before any work, then each is read again from its offset.

Memory holds only the offset, the size, a checksum and the custom_id of each row. The file stays open, and a row that
has changed since the check is an error.
"""

import hashlib
import os
import stat
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aspec.errors import PromptError, UserError
from aspec.serving.openai_requests import CHAT, COMPLETION, Request, parse_json, parse_request

MAX_LISTED = 10  # most problems that a message lists
FIELDS = ("custom_id", "method", "url", "body")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A line of the input."""

    custom_id: str
    request: Request


class BatchFile:
    """An open input file and the places of its rows; mutable while ``scan`` runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.custom_ids: list[str] = []  # in the file's order
        self._starts, self._sizes, self._checksums = array("Q"), array("Q"), array("I")
        self._sha256 = hashlib.sha256()
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise UserError(
                f"the input {path} cannot be read: {error.strerror}. Give -i a file of one JSON object per line."
            ) from error
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self.close()
            raise UserError(
                f"the input {path} is not a regular file, but its rows are read twice. Save it to a file first."
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the whole content."""
        return self._sha256.hexdigest()

    def scan(self, check: Callable[[BatchRow], None]) -> None:
        """Read and check every row; ``check`` raises PromptError for a row that cannot be served.

        Raises a UserError that lists the problems by line, if there are any.
        """
        seen: dict[str, int] = {}
        problems: list[str] = []
        num_problems, start = 0, 0
        with open(self._file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                self._sha256.update(line)
                skipped = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
                try:
                    if line[skipped:].strip():
                        self._take(line[skipped:], start + skipped, number, seen, check)
                except PromptError as error:
                    num_problems += 1
                    if len(problems) < MAX_LISTED:
                        problems.append(f"\n  line {number}: {' '.join(str(error).split())}")
                start += len(line)
        if problems:
            first = f"; the first {MAX_LISTED} are listed" if num_problems > MAX_LISTED else ""
            count = "one problem" if num_problems == 1 else f"{num_problems} problems"
            raise UserError(
                f"{self.path} has {count}{first}. No row was served. Correct the file and run again.{''.join(problems)}"
            )
        if not seen:
            raise self._empty()

    def read(self, index: int) -> BatchRow:
        """Read a row from the file. Raises UserError when the row has changed since the check."""
        line = os.pread(self._file, self._sizes[index], self._starts[index])
        if zlib.crc32(line) != self._checksums[index]:
            raise UserError(
                f"{self.path} was changed while its rows were served: the row {self.custom_ids[index]!r} is "
                f"different now. The finished rows belong to the old file: restore it and run the same command."
            )
        return parse_row(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _empty(self) -> UserError:
        return UserError(
            f"{self.path} is empty: expected one request per line, such as "
            f'{{"custom_id": "1", "method": "POST", "url": "{COMPLETION}", "body": {{"prompt": "..."}}}}.'
        )

    def _take(
        self, line: bytes, start: int, number: int, seen: dict[str, int], check: Callable[[BatchRow], None]
    ) -> None:
        row = parse_row(line)
        if row.custom_id in seen:
            raise PromptError(f"custom_id {row.custom_id!r} is already used in line {seen[row.custom_id]}")
        seen[row.custom_id] = number
        check(row)
        self.custom_ids.append(row.custom_id)
        self._starts.append(start)
        self._sizes.append(len(line))
        self._checksums.append(zlib.crc32(line))


def parse_row(line: bytes) -> BatchRow:
    """Parse a row. Raises a PromptError that names the field."""
    row = parse_json(line)
    if not isinstance(row, dict):
        raise PromptError("expected a JSON object")
    for name in row:
        if name not in FIELDS:
            raise PromptError(f"{name} is not supported; a row has {', '.join(FIELDS)}: remove it")
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise PromptError("custom_id must be a text that is not empty: it identifies the answer")
    return BatchRow(custom_id, _request(row))


def _request(row: dict[str, Any]) -> Request:
    if row.get("method") != "POST":
        raise PromptError(f"method must be POST; found {row.get('method')!r}")
    url = row.get("url")
    if url not in (CHAT, COMPLETION):
        raise PromptError(f"url must be {CHAT} or {COMPLETION}; found {url!r}")
    return parse_request(url, row.get("body"))
