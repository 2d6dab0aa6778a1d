"""The disk lane: a few threads read byte ranges of files straight into slots, past the page cache.

Where a range's file offset and its address in the buffer agree modulo a page, whole pages go straight into the
buffer; the edges that share a page with a neighbour, and ranges that do not agree, go through a small bounce
buffer. A read is settled only when every chunk of it has stopped writing, in error too: a slot is free again no
sooner. Reads overlap freely; there is no barrier between them.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from aspec.errors import DeviceError, InternalError, ReadError
from aspec.io.loop_mailbox import LoopMailbox
from aspec.io.memory import PAGE, SlotMemory, address_of, allocate
from aspec.io.rate_limit import RateLimit

NUM_THREADS = 3
CHUNK_BYTES = 4 << 20
LIMITED_CHUNK_BYTES = 1 << 20  # under a rate limit: small, so that the stream is even
BOUNCE_BYTES = 1 << 20
LONGEST_JOIN_S = 5.0  # of all threads together


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
    """When the first chunk of a read began and the last one landed, seconds on the lane's clock."""

    start_s: float
    stop_s: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One transfer. Direct: the page-rounded range lands at ``at``. Bounced: only the needed bytes are copied."""

    file: str
    offset: int  # of the needed bytes
    nbytes: int  # needed
    at: int  # where the needed bytes go in the buffer
    direct: bool


class _File:
    """A descriptor that reads past the page cache where the file system allows it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.direct = hasattr(os, "O_DIRECT")
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            self.fd = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise ReadError(f"{path}: cannot be opened: {error.strerror}.") from error
            self.direct = False
            self.fd = os.open(path, flags)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self.fd, 48, 1)  # F_NOCACHE

    def read(self, buffer: memoryview, offset: int, needed: int) -> None:
        """Fill at least ``needed`` bytes of ``buffer`` from ``offset``; both whole pages where direct."""
        got = reached = 0
        while got < needed:
            got += self._read_once(buffer[got:], offset + got)
            if got <= reached:  # a short read repeated from its last whole page brings nothing new: the end
                raise ReadError(
                    f"{self.path}: the file ends at byte {offset + got}, expected {needed - got} more: it is truncated "
                    f"or was changed while it was open. Fetch it again."
                )
            reached = got
            if self.direct and got < needed:
                got -= got % PAGE
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, needed, os.POSIX_FADV_DONTNEED)

    def _read_once(self, buffer: memoryview, offset: int) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self.fd, [buffer], offset)
            data = _seek_and_read(self.fd, len(buffer), offset)
            buffer[: len(data)] = data
            return len(data)
        except OSError as error:
            if error.errno == errno.EINVAL and self.direct:  # a device with stricter rules: read through the cache
                plain = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                try:
                    os.dup2(plain, self.fd)
                finally:
                    os.close(plain)
                self.direct = False
                return self._read_once(buffer, offset)
            raise ReadError(f"{self.path}: reading at byte {offset} failed: {error.strerror}.") from error


_SEEK_LOCK = threading.Lock()


def _seek_and_read(fd: int, nbytes: int, offset: int) -> bytes:
    """Positional read where the system has none."""
    with _SEEK_LOCK:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


class _Files:
    """Descriptors by path, opened once."""

    def __init__(self) -> None:
        self._open: dict[str, _File] = {}
        self._lock = threading.Lock()

    def __getitem__(self, path: str) -> _File:
        with self._lock:
            if path not in self._open:
                self._open[path] = _File(path)
            return self._open[path]

    def close(self) -> None:
        with self._lock:
            for file in self._open.values():
                os.close(file.fd)
            self._open.clear()


class _Job:
    """One call of ``read``; mutable under its lock, shared by the threads that work on it."""

    def __init__(self, future: asyncio.Future[ReadDone], buffer: memoryview, left: int) -> None:
        self.future, self.buffer, self.left = future, buffer, left
        self.lock = threading.Lock()
        self.start_s = self.stop_s = 0.0
        self.nbytes = 0
        self.error: BaseException | None = None  # the first one; later chunks are skipped


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
    ) -> None:
        self._loop, self._clock = loop, clock
        self._chunk_bytes = min(chunk_bytes, LIMITED_CHUNK_BYTES) if rate_bytes_per_s else chunk_bytes
        self._limit = RateLimit(rate_bytes_per_s, clock)
        self._files = _Files()
        self._order = itertools.count()
        self._queue: queue.PriorityQueue[tuple[int, int, _Job | None, Chunk | None]] = queue.PriorityQueue()
        self._mailbox: LoopMailbox[ReadDone] = LoopMailbox(loop)
        self._jobs: dict[asyncio.Future[ReadDone], _Job] = {}  # those that have not settled; loop's thread only
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
        except BaseException:  # the system has no thread left: those that run must end
            self._threads = [thread for thread in self._threads if thread.ident is not None]
            self.close()
            raise

    def read(self, segments: Sequence[Segment], buffer: memoryview, priority: int = 0) -> asyncio.Future[ReadDone]:
        """Read all segments into ``buffer``; smaller priorities go first, equal ones in order.

        The future resolves when nothing of this read touches the buffer any more: await it shielded. It raises
        ReadError for a short or failing file, and if the lane is closed before. Raises ValueError if a segment does
        not fit the buffer.
        """
        if self._stopping.is_set():
            raise InternalError("a read was asked of a disk lane that is closed")
        future: asyncio.Future[ReadDone] = self._loop.create_future()
        chunks = list(split(segments, address_of(buffer), len(buffer), self._chunk_bytes))
        job = _Job(future, buffer, len(chunks))
        if not chunks:
            future.set_result(ReadDone(self._clock(), self._clock(), 0))
        else:
            self._jobs[future] = job
            future.add_done_callback(self._jobs.pop)
        for chunk in chunks:
            self._queue.put((priority, next(self._order), job, chunk))
        return future

    def abandon(self, read: asyncio.Future[ReadDone]) -> None:
        """Skip what has not begun of a read, which then fails, settled; only on the loop's thread."""
        if (job := self._jobs.get(read)) is not None:
            job.error = job.error or ReadError("a read was abandoned")

    def close(self) -> None:
        """Settle what is in flight, fail what is not, join the threads; may be called twice.

        Raises DeviceError if a thread does not end in time. What it reads into stays allocated as long as it runs, and
        the files stay open: it closes them when it ends.
        """
        self._stopping.set()
        self._stop_threads()
        deadline = time.monotonic() + LONGEST_JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while not self._queue.empty():
            _, _, job, chunk = self._queue.get_nowait()
            if job is not None and chunk is not None:
                job.error = job.error or ReadError(f"{chunk.file}: the disk lane was closed before it was read.")
                self._settle_chunk(job)
        self._mailbox.empty()
        if self._threads:
            self._stop_threads()  # their word was taken from the queue with the rest
            raise DeviceError(f"the disk did not answer within {LONGEST_JOIN_S:g} s of closing")

    def _stop_threads(self) -> None:
        for _ in self._threads:
            self._queue.put((-(1 << 62), next(self._order), None, None))

    def _run(self, bounce: SlotMemory) -> None:
        try:
            while True:
                _, _, job, chunk = self._queue.get()
                if job is None or chunk is None:
                    break
                self._work(job, chunk, bounce)
                del job, chunk
        finally:
            bounce.close()
            with self._lock:
                self._num_running -= 1
                last = self._num_running == 0
            if last:
                self._files.close()

    def _work(self, job: _Job, chunk: Chunk, bounce: SlotMemory) -> None:
        start = self._clock()
        try:
            if job.error is None:
                deadline = self._limit.reserve(chunk.nbytes)
                transfer(self._files[chunk.file], chunk, job.buffer, bounce)
                self._limit.wait_until(deadline, self._stopping)
        except BaseException as error:
            job.error = job.error or error
        stop = self._clock()
        with job.lock:
            job.start_s = min(job.start_s or start, start)
            job.stop_s = max(job.stop_s, stop)
            job.nbytes += chunk.nbytes
        self._settle_chunk(job)

    def _settle_chunk(self, job: _Job) -> None:
        """Nothing of one more chunk touches the buffer any more."""
        with job.lock:
            job.left -= 1
            last = job.left == 0
        if last:
            self._mailbox.post(job.future, job.error or ReadDone(job.start_s, job.stop_s, job.nbytes))


def transfer(file: _File, chunk: Chunk, buffer: memoryview, bounce: SlotMemory) -> None:
    """Move one chunk; the buffer outside of it keeps its bytes, but for page slack of a direct chunk."""
    first = chunk.offset // PAGE * PAGE
    skew = chunk.offset - first
    rounded = -(-(skew + chunk.nbytes) // PAGE) * PAGE
    if chunk.direct:
        file.read(buffer[chunk.at - skew : chunk.at - skew + rounded], first, skew + chunk.nbytes)
        return
    file.read(bounce.view[:rounded], first, skew + chunk.nbytes)
    ctypes.memmove(address_of(buffer) + chunk.at, bounce.address + skew, chunk.nbytes)


def split(segments: Sequence[Segment], address: int, size: int, chunk_bytes: int) -> Iterator[Chunk]:
    """The transfers of a read into a buffer of ``size`` bytes at ``address``. Raises ValueError on a misfit."""
    ordered = sorted((s for s in segments if s.nbytes), key=lambda segment: segment.at)
    ends = [0, *(segment.at + segment.nbytes for segment in ordered)]
    begins = [*(segment.at for segment in ordered[1:]), size]
    for segment, before, after in zip(ordered, ends, begins, strict=False):
        if segment.at < before or segment.at + segment.nbytes > after:
            raise ValueError(f"segment {segment} does not fit between {before} and {after} of a buffer")
        if (address + segment.at - segment.offset) % PAGE:
            yield from _cut(segment, segment.offset, segment.offset + segment.nbytes, BOUNCE_BYTES - PAGE, False)
            continue
        yield from _direct(segment, before, after, chunk_bytes)


def _direct(segment: Segment, before: int, after: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Whole pages straight into the buffer; an edge only where its page's slack belongs to nobody else."""
    start, stop = segment.offset, segment.offset + segment.nbytes
    head, tail = -start % PAGE, stop % PAGE
    if head and segment.at - (PAGE - head) < before:
        edge = min(start + head, stop)
        yield from _cut(segment, start, edge, chunk_bytes, False)
        start = edge
    if tail and segment.at + segment.nbytes + (PAGE - tail) > after and start < stop:
        edge = max(stop - tail, start)
        yield from _cut(segment, edge, stop, chunk_bytes, False)
        stop = edge
    yield from _cut(segment, start, stop, chunk_bytes, True)


def _cut(segment: Segment, start: int, stop: int, chunk_bytes: int, direct: bool) -> Iterator[Chunk]:
    """Pieces that begin at multiples of ``chunk_bytes`` from the first page."""
    while start < stop:
        end = min(stop, start // PAGE * PAGE + max(chunk_bytes // PAGE * PAGE, PAGE))
        yield Chunk(segment.file, start, end - start, segment.at + start - segment.offset, direct)
        start = end


def probe_rate(
    segments: Sequence[Segment],
    seconds: float = 0.5,
    *,
    num_threads: int = NUM_THREADS,
    rate_bytes_per_s: float | None = None,
    beside: Callable[[], object] = lambda: None,
) -> float:
    """Raw bytes per second of these very ranges, read as the lane reads them, beside nothing but ``beside``.

    Blocks for about ``seconds``. Raises ReadError where a file cannot be read.
    """
    chunk_bytes = LIMITED_CHUNK_BYTES if rate_bytes_per_s else CHUNK_BYTES
    chunks = [c for s in segments for c in _cut(s, s.offset, s.offset + s.nbytes, chunk_bytes - PAGE, True)]
    files, limit, stopping = _Files(), RateLimit(rate_bytes_per_s), threading.Event()
    endless = itertools.cycle(chunks)
    lock = threading.Lock()
    done: list[int] = []
    failures: list[BaseException] = []
    memories = [allocate(chunk_bytes + PAGE) for _ in range(num_threads)]
    started = time.perf_counter()

    def work(memory: SlotMemory) -> None:
        try:
            while time.perf_counter() - started < seconds and not stopping.is_set():
                with lock:
                    chunk = next(endless)
                deadline = limit.reserve(chunk.nbytes)
                skew = chunk.offset % PAGE
                rounded = -(-(skew + chunk.nbytes) // PAGE) * PAGE
                files[chunk.file].read(memory.view[:rounded], chunk.offset - skew, skew + chunk.nbytes)
                limit.wait_until(deadline, stopping)
                done.append(chunk.nbytes)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(memory,), name="aspec-probe") for memory in memories]
    try:
        for thread in threads:
            thread.start()
        beside()
    except BaseException:
        stopping.set()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        elapsed = time.perf_counter() - started
        files.close()
        for memory in memories:
            memory.close()
    if failures:
        raise failures[0]
    return sum(done) / elapsed
