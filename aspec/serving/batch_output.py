"""Rows that are kept whatever happens: an output of lines, and the journal beside it that vouches for every one.

Rules. The journal begins with a header that ties the output to its job; it is on the disk before the output exists.
Rows are appended to the output and synced, then recorded in the journal and synced: so what the journal records
stands in the output, whole, and a crash between the two leaves lines that nobody vouches for. Opening cuts those off,
and torn ends of either file; they are made again. A journal's line carries its checksum, a record that of its row.
Nothing is ever rewritten, so nothing needs a rename. Everything here blocks: keep it off the loop.
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
class Row:
    """A line of the output, newline included, and whose it is."""

    id: str
    line: bytes
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """What the journal says of a row: where its line ends, and its checksum."""

    id: str
    end: int
    checksum: int
    failed: bool

    def sealed(self) -> bytes:
        """The journal's line."""
        return seal({"id": self.id, "end": self.end, "crc": self.checksum, "failed": self.failed})


@dataclass(frozen=True, slots=True)
class Found:
    """What stood when the output was opened."""

    done: frozenset[str]
    num_failed: int = 0
    cut_bytes: int = 0  # of lines that no journal vouched for


class Output:
    """An open output; mutable, because it grows. One process holds it: both files are locked."""

    def __init__(self, path: Path, output: int, journal: int, created: int) -> None:
        self.path = path
        self.created = created  # when the job began, seconds since the epoch
        self._output, self._journal = output, journal
        self._end = self._journal_end = 0  # what is synced in both; beyond lies nothing that counts
        self._broken: WriteError | None = None

    def append(self, rows: Sequence[Row]) -> None:
        """Write and sync rows; they count when this returns. Raises WriteError, and then takes no more."""
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
            self._broken = _refused(self.path, error)
            raise self._broken from error
        self._end, self._journal_end = end, self._journal_end + sum(map(len, records))

    def close(self) -> None:
        """Let go of both files and their locks."""
        os.close(self._output)
        os.close(self._journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, header_end: int) -> Found:
        """Hold the output against its journal, cut what is not vouched for; what counts. Raises UserError."""
        self._end, self._journal_end = 0, header_end
        done: set[str] = set()
        num_failed, size = 0, os.fstat(self._output).st_size
        for record, journal_end in _records(self._journal, header_end):
            if record.end > size:
                break  # storage that lost what it had synced, or a copy that was cut: the rest is made again
            line = os.pread(self._output, record.end - self._end, self._end)
            if zlib.crc32(line) != record.checksum or not line.endswith(NEWLINE):
                raise UserError(
                    f"{self.path} was changed: its journal expects the row of {record.id!r} at bytes {self._end} .. "
                    f"{record.end}, and other bytes are there. Restore the file; or cut it there (truncate -s "
                    f"{self._end} FILE) to have that row and what follows made again; or start afresh with --overwrite."
                )
            done.add(record.id)
            num_failed += record.failed
            self._end, self._journal_end = record.end, journal_end
        self._cut()
        return Found(frozenset(done), num_failed, max(0, size - self._end))

    def _cut(self) -> None:
        """Nothing but what counts."""
        for file, end in ((self._output, self._end), (self._journal, self._journal_end)):
            if os.fstat(file).st_size != end:
                os.ftruncate(file, end)
                os.fsync(file)


def open_output(path: Path, ties: Mapping[str, Any], created: int, *, overwrite: bool = False) -> tuple[Output, Found]:
    """Begin an output, or go on with the one that stands, and what stands of it.

    ``ties``: what the rows follow from, as JSON values; an output that was begun under others is refused. Raises
    UserError where it cannot be used, WriteError where it cannot be written.
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
        raise _refused(path, error) from error


def journal_of(path: Path) -> Path:
    """Where the journal of an output is."""
    return path.with_name(path.name + SUFFIX)


def seal(content: Mapping[str, Any]) -> bytes:
    """A line of the journal: the checksum of what follows, in 8 hexadecimal digits, and JSON."""
    text = json.dumps(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unseal(line: bytes) -> dict[str, Any] | None:
    """What a line of the journal holds; None where it is torn."""
    checksum, _, text = line.removesuffix(NEWLINE).partition(b" ")
    if not line.endswith(NEWLINE) or checksum != b"%08x" % zlib.crc32(text):
        return None
    content = json.loads(text)
    return content if isinstance(content, dict) else None


def check_startable(path: Path, *, overwrite: bool) -> None:
    """Raises UserError where an output is no file of ours; makes nothing."""
    journal = journal_of(path)
    for file in (path, journal):
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is not a regular file: rows are kept in a file and its journal. Give -o a file.")
    if not journal.exists() and path.exists() and not overwrite:
        raise _no_journal(path)


# -- inside ----------------------------------------------------------------------------------------------------


def _no_journal(path: Path) -> UserError:
    return UserError(
        f"{path} exists and has no journal ({journal_of(path).name}) that tells what is in it, so it cannot be gone on "
        f"with. Give another -o, or start afresh with --overwrite: what it holds is lost then."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _open_locked(path: Path, stack: contextlib.ExitStack) -> int:
    """A file to read and write, made where it is missing, for this process alone."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    stack.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{path} is in use by another process, which writes the same output. Wait for it or stop it, or give "
            f"another -o."
        ) from error
    return file


def _begin(output: int, journal: int, header: Mapping[str, Any]) -> int:
    """An empty output under a new header; where the header ends."""
    os.ftruncate(output, 0)
    os.fsync(output)
    os.ftruncate(journal, 0)
    line = seal(header)
    _write(journal, line, 0)
    return len(line)


def _read_header(journal: int) -> tuple[dict[str, Any] | None, int]:
    """The header and where it ends; None where the journal's very beginning is torn."""
    with open(journal, "rb", closefd=False) as file:
        file.seek(0)
        line = file.readline()
    return unseal(line), len(line)


def _check_header(header: Mapping[str, Any], ties: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where the output belongs to another job, and tells in what."""
    afresh = "Give another -o, or start afresh with --overwrite: the rows it holds are lost then."
    if header.get("format") != FORMAT:
        raise UserError(f"{path} was begun by another version of aspec, whose journal this one cannot read. {afresh}")
    stored, now = header["ties"], json.loads(json.dumps(dict(ties)))
    names = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if names:
        differences = "; ".join(f"{name} was {_brief(stored.get(name))}, is {_brief(now.get(name))}" for name in names)
        raise UserError(
            f"{path} was begun by another job, so its rows and new ones would not belong together: {differences}. "
            f"Give the same input, model and options to go on. {afresh}"
        )


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:76] + " ..."


def _records(journal: int, start: int) -> Iterator[tuple[Record, int]]:
    """The intact records behind the header and where each ends, up to the first that is torn."""
    with open(journal, "rb", closefd=False) as file:
        file.seek(start)
        for line in file:
            content = unseal(line)
            if content is None:
                return
            start += len(line)
            yield Record(content["id"], content["end"], content["crc"], content["failed"]), start


def _write(file: int, data: bytes, at: int) -> None:
    """All of it, synced. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count
    os.fsync(file)


def _sync_folder(folder: Path) -> None:
    """New names in a folder outlive a power failure."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _refused(path: Path, error: OSError) -> WriteError:
    """What the system said, and what to do about it."""
    if error.errno in FULL:
        return WriteError(
            f"{path} cannot grow: {error.strerror}. The rows that are finished are safe in it. Free some space (or "
            f"raise the quota or the file size limit) and run the same command again: it goes on where it stopped."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return WriteError(
            f"{path} cannot be written: {error.strerror}. Give -o a path in a folder that exists and may be written."
        )
    return WriteError(
        f"writing {path} failed: {error.strerror or error}. The rows that are finished are safe in it; when the disk "
        f"works again, run the same command: it goes on where it stopped."
    )
