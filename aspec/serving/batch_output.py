"""How finished rows survive a crash: an output file of lines, and a journal beside it that records every line.

Rules. The journal begins with a header that names what the rows depend on; it is on the disk before the output
exists. Rows are appended to the output and synced, then recorded in the journal and synced. So every recorded row is
complete in the output, and a crash between the two syncs leaves lines without a record. Opening cuts off these lines
and the torn end of either file; the rows are generated again. A journal line has a checksum of itself, a record also
one of its row. No byte is rewritten, so no rename is needed. All functions block: do not call them on the loop.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aspec.errors import UserError, WriteError

SUFFIX = ".journal"
FORMAT = 1  # of the journal; another one is refused
NEWLINE = b"\n"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, no larger file allowed


@dataclass(frozen=True, slots=True)
class OutputRow:
    """A line of the output, newline included, and the id of its row."""

    id: str
    line: bytes
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """The journal's record of a row: the offset in the output where its line ends, and the line's CRC-32."""

    id: str
    end: int
    checksum: int
    failed: bool

    def sealed(self) -> bytes:
        """The record as a line of the journal."""
        return seal({"id": self.id, "end": self.end, "crc": self.checksum, "failed": self.failed})


@dataclass(frozen=True, slots=True)
class FinishedRows:
    """The rows that the output held when it was opened."""

    done: frozenset[str]  # their ids, failed rows included
    num_failed: int = 0
    cut_bytes: int = 0  # bytes of lines without a record in the journal


class Output:
    """An open output; mutable, because it grows. Both files are locked for this process."""

    def __init__(self, path: Path, output: int, journal: int, created: int) -> None:
        self.path = path
        self.created = created  # when the job began, seconds since the epoch
        self._output, self._journal = output, journal
        self._end = self._journal_end = 0  # bytes of synced rows and of their records; later bytes do not count
        self._broken: WriteError | None = None  # the first write error; later writes raise it again

    def append(self, rows: Sequence[OutputRow]) -> None:
        """Write and sync rows; they count when this returns. Raises WriteError, then and on every later call."""
        if self._broken is not None:
            raise self._broken
        end, records = self._end, []
        for row in rows:
            end += len(row.line)
            records.append(Record(row.id, end, zlib.crc32(row.line), row.failed).sealed())
        try:
            _write(self._output, b"".join(row.line for row in rows), self._end)
            _write(self._journal, b"".join(records), self._journal_end)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut()
            self._broken = _write_error(self.path, error)
            raise self._broken from error
        self._end, self._journal_end = end, self._journal_end + sum(map(len, records))

    def close(self) -> None:
        """Close both files, which releases their locks."""
        os.close(self._output)
        os.close(self._journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, header_end: int) -> FinishedRows:
        """Compare the output with its journal, cut what has no record, return the finished rows. Raises UserError."""
        self._end, self._journal_end = 0, header_end
        done: set[str] = set()
        num_failed, size = 0, os.fstat(self._output).st_size
        for record, journal_end in _records(self._journal, header_end):
            if record.end > size:
                break  # the storage lost synced bytes, or the file is a cut copy: the rest is generated again
            line = os.pread(self._output, record.end - self._end, self._end)
            if zlib.crc32(line) != record.checksum or not line.endswith(NEWLINE):
                raise UserError(
                    f"{self.path} was changed: its journal expects the row of {record.id!r} at bytes {self._end} .. "
                    f"{record.end}, and other bytes are there. Restore the file; or cut it there (truncate -s "
                    f"{self._end} FILE) to generate that row and the later rows again; or start anew with --overwrite."
                )
            done.add(record.id)
            num_failed += record.failed
            self._end, self._journal_end = record.end, journal_end
        self._cut()
        return FinishedRows(frozenset(done), num_failed, max(0, size - self._end))

    def _cut(self) -> None:
        """Truncate both files to the bytes that count."""
        for file, end in ((self._output, self._end), (self._journal, self._journal_end)):
            if os.fstat(file).st_size != end:
                os.ftruncate(file, end)
                os.fsync(file)


def open_output(
    path: Path, ties: Mapping[str, Any], created: int, *, overwrite: bool = False
) -> tuple[Output, FinishedRows]:
    """Begin an output, or continue the existing one; returns it and the rows that it holds.

    ``ties``: what the rows depend on, as JSON values; an output that was begun with other values is refused. Raises
    UserError when the output cannot be used, WriteError when it cannot be written.
    """
    path = Path(os.path.realpath(path))
    journal_path = journal_of(path)
    try:
        check_startable(path, overwrite=overwrite)
        with contextlib.ExitStack() as stack:
            journal = _open_locked(journal_path, stack)
            header, header_end = _read_header(journal)
            begun = header is not None and not overwrite
            if begun:
                assert header is not None
                _check_header(header, ties, path)
            elif not overwrite and _size(path):
                raise _no_journal(path)
            output = _open_locked(path, stack)
            if not begun:
                header = {"aspec": "batch journal", "format": FORMAT, "created": created, "ties": dict(ties)}
                header_end = _begin(output, journal, header)
            _sync_folder(path.parent)
            assert header is not None
            opened = Output(path, output, journal, int(header["created"]))
            found = opened.resume(header_end)
            stack.pop_all()
            return opened, found
    except OSError as error:
        raise _write_error(path, error) from error


def journal_of(path: Path) -> Path:
    """The path of an output's journal."""
    return path.with_name(path.name + SUFFIX)


def seal(content: Mapping[str, Any]) -> bytes:
    """A line of the journal: the CRC-32 of the JSON in 8 hexadecimal digits, a space, the JSON, a newline."""
    text = json.dumps(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unseal(line: bytes) -> dict[str, Any] | None:
    """The content of a journal line; None if the line is torn."""
    checksum, _, text = line.removesuffix(NEWLINE).partition(b" ")
    if not line.endswith(NEWLINE) or checksum != b"%08x" % zlib.crc32(text):
        return None
    content = json.loads(text)
    return content if isinstance(content, dict) else None


def check_startable(path: Path, *, overwrite: bool) -> None:
    """Raises UserError when the output cannot be begun or continued; creates no file."""
    journal = journal_of(path)
    for file in (path, journal):
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is not a regular file: rows need a file and its journal. Give -o a file.")
    if not journal.exists() and path.exists() and not overwrite:
        raise _no_journal(path)


# -- inside ----------------------------------------------------------------------------------------------------


def _no_journal(path: Path) -> UserError:
    return UserError(
        f"{path} exists and has no journal ({journal_of(path).name}) that records its rows, so it cannot be continued. "
        f"Give another -o, or start anew with --overwrite: the content of the file is lost then."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _open_locked(path: Path, stack: contextlib.ExitStack) -> int:
    """Open a file to read and write, create it if it is missing, and lock it for this process."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    stack.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{path} is in use by another process that writes the same output. Wait for that process, stop it, or give "
            f"another -o."
        ) from error
    return file


def _begin(output: int, journal: int, header: Mapping[str, Any]) -> int:
    """Empty the output and write a new header; returns the offset where the header ends."""
    os.ftruncate(output, 0)
    os.fsync(output)
    os.ftruncate(journal, 0)
    line = seal(header)
    _write(journal, line, 0)
    return len(line)


def _read_header(journal: int) -> tuple[dict[str, Any] | None, int]:
    """The header and the offset where it ends; None if the first line is torn or missing."""
    with open(journal, "rb", closefd=False) as file:
        file.seek(0)
        line = file.readline()
    return unseal(line), len(line)


def _check_header(header: Mapping[str, Any], ties: Mapping[str, Any], path: Path) -> None:
    """Raises a UserError that lists the differences when the output belongs to another job."""
    start_anew = "Give another -o, or start anew with --overwrite: the rows of the file are lost then."
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} was begun by another version of aspec; this version cannot read its journal. {start_anew}"
        )
    stored, now = header["ties"], json.loads(json.dumps(dict(ties)))
    names = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if names:
        differences = "; ".join(f"{name} was {_brief(stored.get(name))}, is {_brief(now.get(name))}" for name in names)
        raise UserError(
            f"{path} was begun by another job, so old and new rows would not belong together: {differences}. "
            f"Give the same input, model and options to continue. {start_anew}"
        )


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:76] + " ..."


def _records(journal: int, start: int) -> Iterator[tuple[Record, int]]:
    """The records after the header and the offset where each ends, up to the first torn line."""
    with open(journal, "rb", closefd=False) as file:
        file.seek(start)
        for line in file:
            content = unseal(line)
            if content is None:
                return
            start += len(line)
            yield Record(content["id"], content["end"], content["crc"], content["failed"]), start


def _write(file: int, data: bytes, at: int) -> None:
    """Write all bytes at the offset ``at`` and sync. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count
    os.fsync(file)


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that new names in it survive a power failure."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _write_error(path: Path, error: OSError) -> WriteError:
    """The system's error as a message with a remedy."""
    if error.errno in FULL:
        return WriteError(
            f"{path} cannot grow: {error.strerror}. The finished rows are safe in it. Free some space (or raise the "
            f"quota or the file size limit) and run the same command again: it continues where it stopped."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return WriteError(
            f"{path} cannot be written: {error.strerror}. Give -o a path in a folder that exists and is writable."
        )
    return WriteError(
        f"writing {path} failed: {error.strerror or error}. The finished rows are safe in it. When the disk works "
        f"again, run the same command: it continues where it stopped."
    )
