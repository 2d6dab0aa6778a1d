"""The raw rate of a disk, measured on given ranges of files in the way the disk lane reads them."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence

from aspec.io.disk import CHUNK_BYTES, LIMITED_CHUNK_BYTES, NUM_THREADS, Chunk, OpenFiles, Segment, cut
from aspec.io.memory import PAGE, SlotMemory, allocate
from aspec.io.rate_limit import RateLimit


class _Probe:
    """The state that the reading threads share."""

    def __init__(self, chunks: Sequence[Chunk], seconds: float, rate_bytes_per_s: float | None) -> None:
        self.files, self.limit, self.stopping = OpenFiles(), RateLimit(rate_bytes_per_s), threading.Event()
        self.done: list[int] = []  # bytes of each chunk that was read
        self.failures: list[BaseException] = []
        self.started_s = time.perf_counter()
        self._seconds = seconds
        self._chunks = itertools.cycle(chunks)
        self._lock = threading.Lock()  # of ``_chunks``

    def read(self, memory: SlotMemory) -> None:
        """Read chunk after chunk into ``memory`` until the time is over, at least one; on a thread of its own."""
        try:
            while not self.stopping.is_set() and (not self.done or self._seconds_left() > 0.0):
                with self._lock:
                    chunk = next(self._chunks)
                deadline = self.limit.reserve(chunk.nbytes)
                skew = chunk.offset % PAGE
                rounded = -(-(skew + chunk.nbytes) // PAGE) * PAGE
                self.files[chunk.file].read(memory.view[:rounded], chunk.offset - skew, skew + chunk.nbytes)
                self.limit.wait_until(deadline, self.stopping)
                self.done.append(chunk.nbytes)
        except BaseException as error:
            self.failures.append(error)

    def _seconds_left(self) -> float:
        return self.started_s + self._seconds - time.perf_counter()


def probe_rate(
    segments: Sequence[Segment],
    seconds: float = 0.5,
    *,
    num_threads: int = NUM_THREADS,
    rate_bytes_per_s: float | None = None,
    beside: Callable[[], object] = lambda: None,
) -> float:
    """Raw bytes per second of these very ranges, read as the lane reads them, while only ``beside`` runs.

    Blocks for about ``seconds``. Raises ReadError if a file cannot be read.
    """
    chunk_bytes = LIMITED_CHUNK_BYTES if rate_bytes_per_s else CHUNK_BYTES
    chunks = [c for s in segments for c in cut(s, s.offset, s.offset + s.nbytes, chunk_bytes - PAGE, True)]
    memories = [allocate(chunk_bytes + PAGE) for _ in range(num_threads)]
    probe = _Probe(chunks, seconds, rate_bytes_per_s)
    threads = [threading.Thread(target=probe.read, args=(memory,), name="aspec-probe") for memory in memories]
    try:
        for thread in threads:
            thread.start()
        beside()
    except BaseException:
        probe.stopping.set()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        elapsed = time.perf_counter() - probe.started_s
        probe.files.close()
        for memory in memories:
            memory.close()
    if probe.failures:
        raise probe.failures[0]
    return sum(probe.done) / elapsed
