"""The disk lane: a few threads read byte ranges of files straight into slots, past the page cache.

Whole pages go straight into the buffer if a range's file offset and buffer address agree modulo a page. Other ranges,
and edges that share a page with a neighbour, go through a small bounce buffer. A read is settled only when all its
chunks have stopped writing, also after an error; until then its slot is not free. Reads overlap freely; there is no
barrier between them.
"""

import asyncio
import ctypes
import errno
import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, Self

from aspec.errors import DeviceError, InternalError, ReadError
from aspec.io.loop.mailbox import LoopMailbox
from aspec.io.memory import PAGE, SlotMemory, address_of, allocate
from aspec.io.rate_limit import RateLimit

NUM_THREADS = 3
CHUNK_BYTES = 4 << 20
LIMITED_CHUNK_BYTES = 1 << 20  # under a rate limit: small, so that the stream is even
BOUNCE_BYTES = 1 << 20
LONGEST_JOIN_S = 5.0  # for all threads together


class Segment(Protocol):
    """``file[offset : offset + nbytes]`` must land at ``buffer[at : at + nbytes]``."""

    @property
    def file(self) -> str: ...  # noqa: D102
    @property
    def offset(self) -> int: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    @property
    def at(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class ReadDone:
    """The start of a read's first chunk and the end of its last one, seconds of the lane's clock; the bytes read."""

    start_s: float
    stop_s: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One transfer. Direct: whole pages go into the buffer. Bounced: only the needed bytes are copied there."""

    file: str
    offset: int  # of the needed bytes
    nbytes: int  # needed
    at: int  # where the needed bytes go in the buffer
    direct: bool


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What tells a file from a changed one, at the cost of one system call."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, file: str | Path | int) -> Self:
        """The version of a path or of an open descriptor. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class _File:
    """A descriptor that reads past the page cache if the file system allows it."""

    def __init__(self, path: str, version: FileVersion | None = None) -> None:
        """``version``: of the file when its header was read; every read checks that it still is."""
        self.path, self.version = path, version
        self.direct = hasattr(os, "O_DIRECT")
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            self.fd = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                since = (
                    "" if version is None else " It could be when aspec read its header: leave a model's files alone."
                )
                raise ReadError(f"{path}: cannot be opened: {error.strerror}.{since}") from error
            self.direct = False
            self.fd = os.open(path, flags)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self.fd, 48, 1)  # F_NOCACHE

    def read(self, buffer: memoryview, offset: int, needed: int) -> None:
        """Fill ``buffer`` with at least ``needed`` bytes from ``offset``; if direct, whole pages. Raises ReadError."""
        got = reached = 0
        while got < needed:
            got += self._read_once(buffer[got:], offset + got)
            if got <= reached:  # a read repeated from the last whole page brought nothing new: the end
                self._check_version()
                raise ReadError(
                    f"{self.path}: the file ends at byte {offset + got}, expected {needed - got} more: it is truncated "
                    f"or was changed while it was open. Fetch it again."
                )
            reached = got
            if self.direct and got < needed:
                got -= got % PAGE
        self._check_version()
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, needed, os.POSIX_FADV_DONTNEED)

    def _check_version(self) -> None:
        """Raise ReadError if the file is no longer that of the header: weights would be mixed, or at other places."""
        if self.version is None or (found := FileVersion.of(self.fd)) == self.version:
            return
        what = "was truncated" if found.size < self.version.size else "was written to"
        what = what if found.inode == self.version.inode else "was replaced"
        raise ReadError(
            f"{self.path} {what} since aspec read its header: expected {_dated(self.version)}, found {_dated(found)}. "
            f"Its weights may be a mixture, so the run ends. Leave a model's files as they are while it is in use, and "
            f"run again."
        )

    def _read_once(self, buffer: memoryview, offset: int) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self.fd, [buffer], offset)
            data = _seek_and_read(self.fd, len(buffer), offset)
            buffer[: len(data)] = data
            return len(data)
        except OSError as error:
            if error.errno == errno.EINVAL and self.direct:  # the device has stricter rules: read through the cache
                plain = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                try:
                    os.dup2(plain, self.fd)
                finally:
                    os.close(plain)
                self.direct = False
                return self._read_once(buffer, offset)
            raise ReadError(f"{self.path}: reading at byte {offset} failed: {error.strerror}.") from error


def _dated(version: FileVersion) -> str:
    try:
        last = datetime.fromtimestamp(version.mtime_ns / 1e9).isoformat(" ", "milliseconds")
    except (ValueError, OverflowError, OSError):  # a file system holds times that no calendar has
        last = f"second {version.mtime_ns / 1e9:.3f}"
    return f"{version.size} bytes of {last}"


_SEEK_LOCK = threading.Lock()


def _seek_and_read(fd: int, nbytes: int, offset: int) -> bytes:
    """Positional read for systems without ``preadv``."""
    with _SEEK_LOCK:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


class OpenFiles:
    """Open files by path; each file is opened once."""

    def __init__(self, versions: Mapping[str, FileVersion] = MappingProxyType({})) -> None:
        self._versions = versions
        self._open: dict[str, _File] = {}
        self._lock = threading.Lock()

    def __getitem__(self, path: str) -> _File:
        """The open file of a path. Raises ReadError if it cannot be opened."""
        with self._lock:
            if path not in self._open:
                self._open[path] = _File(path, self._versions.get(path))
            return self._open[path]

    def close(self) -> None:
        """Close all files; may be called twice."""
        with self._lock:
            for file in self._open.values():
                os.close(file.fd)
            self._open.clear()


class _PendingRead:
    """One call of ``read``; the threads that work on it share it and change it under its lock."""

    def __init__(self, future: asyncio.Future[ReadDone], buffer: memoryview, left: int) -> None:
        self.future, self.buffer, self.left = future, buffer, left
        self.lock = threading.Lock()
        self.start_s = self.stop_s = 0.0
        self.nbytes = 0
        self.error: BaseException | None = None  # the first error; later chunks are skipped


class DiskLane:
    """Reads segments into buffers with a few threads; futures resolve on the loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        num_threads: int = NUM_THREADS,
        chunk_bytes: int = CHUNK_BYTES,
        rate_bytes_per_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        versions: Mapping[str, FileVersion] = MappingProxyType({}),
    ) -> None:
        """``versions``: of files when their headers were read; a read of a file that has changed raises ReadError."""
        self._loop, self._clock = loop, clock
        self._chunk_bytes = min(chunk_bytes, LIMITED_CHUNK_BYTES) if rate_bytes_per_s else chunk_bytes
        self._limit = RateLimit(rate_bytes_per_s, clock)
        self._files = OpenFiles(versions)
        self._order = itertools.count()
        self._queue: queue.PriorityQueue[tuple[int, int, _PendingRead | None, Chunk | None]] = queue.PriorityQueue()
        self._mailbox: LoopMailbox[ReadDone] = LoopMailbox(loop)
        self._pending: dict[asyncio.Future[ReadDone], _PendingRead] = {}  # not settled; loop's thread only
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._num_running = num_threads  # threads that have not ended; the last one closes the files
        bounces = [allocate(BOUNCE_BYTES) for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(bounce,), name=f"aspec-disk-{i}", daemon=True)
            for i, bounce in enumerate(bounces)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # a thread could not start: the running threads must end
            self._threads = [thread for thread in self._threads if thread.ident is not None]
            self.close()
            raise

    def read(self, segments: Sequence[Segment], buffer: memoryview, priority: int = 0) -> asyncio.Future[ReadDone]:
        """Read all segments into ``buffer``; smaller priorities go first, equal ones in order.

        The future resolves when this read no longer touches the buffer; await it shielded. It raises ReadError if a
        file is short or fails, or if the lane is closed first. Raises ValueError if a segment does not fit the buffer.
        """
        if self._stopping.is_set():
            raise InternalError("a read was requested from a closed disk lane")
        future: asyncio.Future[ReadDone] = self._loop.create_future()
        chunks = list(split(segments, address_of(buffer), len(buffer), self._chunk_bytes))
        pending = _PendingRead(future, buffer, len(chunks))
        if not chunks:
            future.set_result(ReadDone(self._clock(), self._clock(), 0))
        else:
            self._pending[future] = pending
            future.add_done_callback(self._pending.pop)
        for chunk in chunks:
            self._queue.put((priority, next(self._order), pending, chunk))
        return future

    def abandon(self, read: asyncio.Future[ReadDone]) -> None:
        """Skip the chunks of a read that have not begun; it fails once it has settled. Loop's thread only."""
        if (pending := self._pending.get(read)) is not None:
            pending.error = pending.error or ReadError("a read was abandoned")

    def close(self) -> None:
        """Finish the chunks in flight, fail all others, join the threads; may be called twice.

        Raises DeviceError if a thread does not end in time. Its buffers then stay allocated while it runs, and the
        files stay open: the thread closes them when it ends.
        """
        self._stopping.set()
        self._stop_threads()
        deadline = time.monotonic() + LONGEST_JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while not self._queue.empty():
            _, _, pending, chunk = self._queue.get_nowait()
            if pending is not None and chunk is not None:
                pending.error = pending.error or ReadError(
                    f"{chunk.file}: the disk lane was closed before it was read."
                )
                self._settle_chunk(pending)
        self._mailbox.empty()
        if self._threads:
            self._stop_threads()  # the loop above has also removed their stop entries
            raise DeviceError(f"the disk did not answer within {LONGEST_JOIN_S:g} s of closing")

    def _stop_threads(self) -> None:
        for _ in self._threads:
            self._queue.put((-(1 << 62), next(self._order), None, None))

    def _run(self, bounce: SlotMemory) -> None:
        try:
            while True:
                _, _, pending, chunk = self._queue.get()
                if pending is None or chunk is None:
                    break
                self._work(pending, chunk, bounce)
                del pending, chunk
        finally:
            bounce.close()
            with self._lock:
                self._num_running -= 1
                last = self._num_running == 0
            if last:
                self._files.close()

    def _work(self, pending: _PendingRead, chunk: Chunk, bounce: SlotMemory) -> None:
        start = self._clock()
        try:
            if pending.error is None:
                deadline = self._limit.reserve(chunk.nbytes)
                transfer(self._files[chunk.file], chunk, pending.buffer, bounce)
                self._limit.wait_until(deadline, self._stopping)
        except BaseException as error:
            pending.error = pending.error or error
        stop = self._clock()
        with pending.lock:
            pending.start_s = min(pending.start_s or start, start)
            pending.stop_s = max(pending.stop_s, stop)
            pending.nbytes += chunk.nbytes
        self._settle_chunk(pending)

    def _settle_chunk(self, pending: _PendingRead) -> None:
        """Count a chunk that no longer touches the buffer; the last one resolves the read."""
        with pending.lock:
            pending.left -= 1
            last = pending.left == 0
        if last:
            self._mailbox.post(
                pending.future, pending.error or ReadDone(pending.start_s, pending.stop_s, pending.nbytes)
            )


def transfer(file: _File, chunk: Chunk, buffer: memoryview, bounce: SlotMemory) -> None:
    """Read one chunk into the buffer. A direct chunk also overwrites the slack of its pages; other bytes stay."""
    first = chunk.offset // PAGE * PAGE
    skew = chunk.offset - first
    rounded = -(-(skew + chunk.nbytes) // PAGE) * PAGE
    if chunk.direct:
        file.read(buffer[chunk.at - skew : chunk.at - skew + rounded], first, skew + chunk.nbytes)
        return
    file.read(bounce.view[:rounded], first, skew + chunk.nbytes)
    ctypes.memmove(address_of(buffer) + chunk.at, bounce.address + skew, chunk.nbytes)


def split(segments: Sequence[Segment], address: int, size: int, chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of a read into a buffer of ``size`` bytes at ``address``. Raises ValueError if one does not fit."""
    ordered = sorted((s for s in segments if s.nbytes), key=lambda segment: segment.at)
    ends = [0, *(segment.at + segment.nbytes for segment in ordered)]
    begins = [*(segment.at for segment in ordered[1:]), size]
    for segment, before, after in zip(ordered, ends, begins, strict=False):
        if segment.at < before or segment.at + segment.nbytes > after:
            raise ValueError(f"segment {segment} does not fit between {before} and {after} of a buffer")
        if (address + segment.at - segment.offset) % PAGE:
            yield from cut(segment, segment.offset, segment.offset + segment.nbytes, BOUNCE_BYTES - PAGE, False)
            continue
        yield from _direct(segment, before, after, chunk_bytes)


def _direct(segment: Segment, before: int, after: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of whole pages; an edge is direct only if the slack of its page overlaps no other segment."""
    start, stop = segment.offset, segment.offset + segment.nbytes
    head, tail = -start % PAGE, stop % PAGE
    if head and segment.at - (PAGE - head) < before:
        edge = min(start + head, stop)
        yield from cut(segment, start, edge, chunk_bytes, False)
        start = edge
    if tail and segment.at + segment.nbytes + (PAGE - tail) > after and start < stop:
        edge = max(stop - tail, start)
        yield from cut(segment, edge, stop, chunk_bytes, False)
        stop = edge
    yield from cut(segment, start, stop, chunk_bytes, True)


def cut(segment: Segment, start: int, stop: int, chunk_bytes: int, direct: bool) -> Iterator[Chunk]:
    """Chunks that begin at multiples of ``chunk_bytes`` from the first page of a range of the file."""
    while start < stop:
        end = min(stop, start // PAGE * PAGE + max(chunk_bytes // PAGE * PAGE, PAGE))
        yield Chunk(segment.file, start, end - start, segment.at + start - segment.offset, direct)
        start = end
