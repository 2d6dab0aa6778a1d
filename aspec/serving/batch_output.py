"""How finished rows survive a crash: an output file of lines, and a journal beside it that records every line.

Rules. The journal begins with a header that names what the rows depend on; it is on the disk before the output
exists. Rows are appended to the output and synced, then recorded in the journal and synced. So every recorded row is
complete in the output, and a crash between the two syncs leaves lines without a record. Opening cuts off these lines
and the torn end of either file; the rows are generated again. A journal line has a checksum of itself, a record also
one of its row. No byte is rewritten, so no rename is needed. All functions block: do not call them on the loop.

Another process may remove, move, replace or cut a file while it is open. So both files are looked up by their paths
before every write, and all rows are read back at the end.
"""

import contextlib
import errno
import fcntl
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aspec.errors import UserError, WriteError
from aspec.io.durable import FULL, sync_folder
from aspec.serving.batch_input import RowId
from aspec.serving.batch_journal import (
    Record,
    begin_header,
    check_header,
    journal_of,
    read_header,
    read_records,
    seal,
)
from aspec.serving.request_fields import as_json

NEWLINE = b"\n"


@dataclass(frozen=True, slots=True)
class OutputRow:
    """A line of the output, newline included, and the id of its row."""

    id: RowId
    line: bytes
    failed: bool = False


@dataclass(frozen=True, slots=True)
class FinishedRows:
    """The rows that the output held when it was opened."""

    done: frozenset[RowId]  # their ids, failed rows included
    num_failed: int = 0
    cut_bytes: int = 0  # bytes of lines without a record in the journal


class Output:
    """An open output; mutable, because it grows. Both files are locked for this process."""

    def __init__(self, path: Path, output: int, journal: int, created: int, header_end: int) -> None:
        self.path = path  # as the user gave it
        self.created = created  # when the job began, seconds since the epoch
        self._output, self._journal = output, journal
        self._journal_path = journal_of(Path(os.path.realpath(path)))
        self._header_end = header_end
        self._end = self._journal_end = 0  # bytes of synced rows and of their records; later bytes do not count
        self._broken: WriteError | None = None  # the first write error; later writes raise it again

    def append(self, rows: Sequence[OutputRow]) -> None:
        """Write and sync rows; they count when this returns. Raises WriteError, then and on every later call."""
        self.check()
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

    def check(self) -> None:
        """Raises WriteError, then and on every later call, if another process has changed one of the files."""
        if self._broken is not None:
            raise self._broken
        output, journal = (self.path, self._output, self._end), (self._journal_path, self._journal, self._journal_end)
        for path, file, end in (output, journal):
            if change := _change(path, file, end):
                self._broken = WriteError(
                    f"{path} {change} while rows were written. The finished rows are in the files that this job has "
                    f"written: put {output[0]} and {journal[0].name} back as they were and run the same command "
                    f"again; it continues where it stopped. Or start anew with --overwrite."
                )
                raise self._broken

    def verify(self) -> None:
        """Read all rows back. Raises WriteError or UserError if they are no longer those that were written."""
        self.check()
        end = 0
        for record, _ in self._finished():
            end = record.end
        if end != self._end:
            raise WriteError(
                f"{self._journal_path} was changed while rows were written: it records {end} of {self._end} bytes of "
                f"{self.path}. Run the same command again: the other rows are generated again."
            )

    def close(self) -> None:
        """Close both files, which releases their locks."""
        os.close(self._output)
        os.close(self._journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self) -> FinishedRows:
        """Compare the output with its journal, cut what has no record, return the finished rows. Raises UserError."""
        self._end, self._journal_end = 0, self._header_end
        done: set[RowId] = set()
        num_failed, size = 0, os.fstat(self._output).st_size
        for record, journal_end in self._finished():
            done.add(record.id)
            num_failed += record.failed
            self._end, self._journal_end = record.end, journal_end
        self._cut()
        return FinishedRows(frozenset(done), num_failed, max(0, size - self._end))

    def _finished(self) -> Iterator[tuple[Record, int]]:
        """The records whose rows are in the output, and the offset where each record ends. Raises UserError."""
        start, size = 0, os.fstat(self._output).st_size
        for record, journal_end in read_records(self._journal, self._header_end):
            if record.end > size:
                return  # the storage lost synced bytes, or the file is a cut copy: the rest is generated again
            line = os.pread(self._output, max(0, record.end - start), start)
            if zlib.crc32(line) != record.checksum or not line.endswith(NEWLINE):
                raise UserError(
                    f"{self.path} was changed: its journal expects the row of {as_json(record.id)} at bytes "
                    f"{start} .. {record.end}, and other bytes are there. Restore the file; or cut it there (truncate "
                    f"-s {start} FILE) to generate that row and the later rows again; or start anew with --overwrite."
                )
            yield record, journal_end
            start = record.end

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
    given, path = path, Path(os.path.realpath(path))
    journal_path = journal_of(path)
    try:
        check_startable(path, overwrite=overwrite)
        with contextlib.ExitStack() as stack:
            journal = _open_locked(journal_path, stack)
            header, header_end = read_header(journal)
            begun = header is not None and not overwrite
            if begun:
                assert header is not None
                check_header(header, ties, path)
            elif not overwrite and _size(path):
                raise _no_journal(path)
            output = _open_locked(path, stack)
            if not begun:
                header = begin_header(created, ties)
                header_end = _begin(output, journal, header)
            sync_folder(path.parent)
            assert header is not None
            opened = Output(given, output, journal, header["created"], header_end)
            found = opened.resume()
            stack.pop_all()
            return opened, found
    except OSError as error:
        raise _write_error(path, error) from error


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


def _change(path: Path, file: int, end: int) -> str | None:
    """What has become of an open file of ``end`` bytes that its path named; None if it is as it was."""
    try:
        found, opened = os.stat(path), os.fstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return "was removed or moved away"
    except OSError as error:
        return f"cannot be reached ({error.strerror})"
    if not os.path.samestat(found, opened):
        return "was replaced by another file"
    return f"was changed (it has {opened.st_size} bytes, {end} were written)" if opened.st_size != end else None


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


def _write(file: int, data: bytes, at: int) -> None:
    """Write all bytes at the offset ``at`` and sync. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count
    os.fsync(file)


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
