"""The lines of a batch's journal: a header that names what the rows depend on, then a record of every row.

Every line has a checksum of itself, so a torn or changed line is known. All functions block.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aspec.errors import UserError
from aspec.io.json_file import NotJson, parse_json
from aspec.serving.batch_input import RowId
from aspec.serving.request_fields import as_json

SUFFIX = ".journal"
FORMAT = 1  # another one is refused


@dataclass(frozen=True, slots=True)
class Record:
    """The journal's record of a row: the offset in the output where its line ends, and the line's CRC-32."""

    id: RowId
    end: int
    checksum: int
    failed: bool

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Record | None":
        """The record in a line of the journal; None if the line is not one."""
        types = {"id": str | int, "end": int, "crc": int, "failed": bool}
        fine = all(isinstance(content.get(name), type) for name, type in types.items())
        return cls(*(content[name] for name in types)) if fine else None

    def sealed(self) -> bytes:
        """The record as a line of the journal."""
        return seal({"id": self.id, "end": self.end, "crc": self.checksum, "failed": self.failed})


def journal_of(path: Path) -> Path:
    """The path of an output's journal."""
    return path.with_name(path.name + SUFFIX)


def begin_header(created: int, ties: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a job that begins now."""
    return {"aspec": "batch journal", "format": FORMAT, "created": created, "ties": dict(ties)}


def seal(content: Mapping[str, Any]) -> bytes:
    """A line of the journal: the CRC-32 of the JSON in 8 hexadecimal digits, a space, the JSON, a newline."""
    text = json.dumps(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unseal(line: bytes) -> dict[str, Any] | None:
    """The content of a journal line; None if the line is torn."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        content = parse_json(text)
    except NotJson:
        return None
    return content if isinstance(content, dict) else None


def read_header(journal: int) -> tuple[dict[str, Any] | None, int]:
    """The header and the offset where it ends; None if the first line is torn or missing."""
    with open(journal, "rb", closefd=False) as file:
        file.seek(0)
        line = file.readline()
    return unseal(line), len(line)


def check_header(header: Mapping[str, Any], ties: Mapping[str, Any], path: Path) -> None:
    """Raises a UserError that lists the differences when the output belongs to another job."""
    start_anew = "Give another -o, or start anew with --overwrite: the rows of the file are lost then."
    known = header.get("format") == FORMAT and isinstance(header.get("ties"), dict)
    if not known or not isinstance(header.get("created"), int):
        raise UserError(
            f"{path} was begun by another version of aspec; this version cannot read its journal. {start_anew}"
        )
    stored, now = header["ties"], json.loads(json.dumps(dict(ties)))
    names = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if names:
        differences = "; ".join(
            f"{name} was {as_json(stored.get(name))}, is {as_json(now.get(name))}" for name in names
        )
        raise UserError(
            f"{path} was begun by another job, so old and new rows would not belong together: {differences}. "
            f"Give the same input, model and options to continue. {start_anew}"
        )


def read_records(journal: int, start: int) -> Iterator[tuple[Record, int]]:
    """The records after the header and the offset where each ends, up to the first torn line."""
    with open(journal, "rb", closefd=False) as file:
        file.seek(start)
        for line in file:
            content = unseal(line)
            record = None if content is None else Record.of(content)
            if record is None:
                return
            start += len(line)
            yield record, start
