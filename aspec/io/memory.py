"""Memory for weights: anonymous, page-aligned, on huge pages if the system grants them, touched before use.

Reads into 2 MiB pages cost a quarter of the CPU of reads into 4 KiB pages and keep their rate beside compute; products
read them without a miss of the address cache every 4 KiB. Touching the pages once keeps page faults out of the run.
"""

import contextlib
import ctypes
import gc
import mmap
import sys
from collections.abc import Callable, Iterator

import psutil

from aspec.errors import DeviceError

if sys.platform != "win32":
    import resource

PAGE = 4096
HUGE_PAGE = 2 << 20
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Of maps: Linux seldom gives huge pages to memory that could be shared, which is what Python asks for by default."""


class SlotMemory:
    """``view``: a writable memoryview of ``nbytes`` bytes whose address is a multiple of 2 MiB."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // PAGE) * PAGE
        try:
            self._map = mmap.mmap(-1, self.nbytes + HUGE_PAGE, **PRIVATE)
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(
                f"the system refused {self.nbytes} bytes for weights: {error}; lower --device-memory."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE") and self.nbytes >= HUGE_PAGE:
            with contextlib.suppress(OSError):  # a kernel without huge pages serves small ones
                self._map.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        skip = -address % HUGE_PAGE
        self.address = address + skip
        self._whole = memoryview(self._map)
        self.view = self._whole[skip : skip + self.nbytes]
        ctypes.memset(self.address, 0, self.nbytes)  # touch every page; drops the interpreter lock

    def close(self) -> None:
        """Free the memory once no tensor or view uses it."""
        self.view.release()
        self._whole.release()
        gc.collect(0)
        with contextlib.suppress(BufferError):  # a tensor still uses it: the map is freed with the tensor
            self._map.close()


def allocate(nbytes: int) -> SlotMemory:
    """Memory for weights, rounded up to whole pages. Raises DeviceError if the system refuses it."""
    return SlotMemory(nbytes)


def address_of(buffer: memoryview) -> int:
    """The address of a writable buffer's first byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0


def discard(view: memoryview) -> None:
    """Return the whole pages of ``view``, a part of a SlotMemory, to the system, if it can; they read as zeros then."""
    start = address_of(view)
    first, last = -(-start // PAGE) * PAGE, (start + len(view)) // PAGE * PAGE
    if sys.platform == "linux" and last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def peak_rss_bytes() -> int:
    """The peak resident memory of this process so far, in bytes.

    On Linux this is VmHWM: the value of getrusage survives exec, so a process started by a large one would show its
    parent's size.
    """
    with contextlib.suppress(OSError, IndexError, ValueError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return unused memory to the system, if the C library can."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def freeze() -> Callable[[], None]:
    """Keep the objects of this moment out of garbage collections; the call that is returned lets them in again.

    Where the application has frozen objects of its own, nothing is done: they could not be told apart.
    """
    if gc.get_freeze_count():
        return lambda: None
    gc.freeze()
    return gc.unfreeze


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Turn garbage collection off inside."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
