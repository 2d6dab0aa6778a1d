"""Loading when an engine opens: resident weights, and the parts that stay in host memory behind a device's link."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from aspec.backends.device import DeviceLayer
from aspec.engine.allocate import ResidentLoad, bind_load
from aspec.engine.model_runner import use_threads
from aspec.errors import first_error
from aspec.io.disk import DiskLane
from aspec.io.loop.settling import close_all, in_thread, settle
from aspec.io.pinned import HostBuffer
from aspec.models.weights.parts import PAGE, Part, Segment
from aspec.threads import Threads

WINDOW_BYTES = 32 << 20  # of a part that goes through the host to a device
WINDOWS = 3  # buffers: one is read while another is copied


async def load_all(
    loads: Sequence[ResidentLoad],
    disk: DiskLane,
    device: DeviceLayer[Any, Any] | None,
    report: Callable[[int], None],
    threads: Threads | None = None,
) -> None:
    """Read and bind every part; ``report`` receives the bytes of each part that is loaded.

    Raises ReadError for a file that ends early or fails, after all reads in flight have settled.
    """
    loader = _DeviceLoader(disk, device) if device is not None else None
    turn = asyncio.Lock()  # converts one part at a time, so that the memory for it is counted once
    passage = asyncio.Lock()  # parts that pass through the same memory are read and converted one after another

    async def one(load: ResidentLoad) -> None:
        async with passage if load.passing else contextlib.nullcontext():
            await read_and_bind(load)
        report(load.part.nbytes)

    async def read_and_bind(load: ResidentLoad) -> None:
        if load.view is not None:
            await _read(disk, load.part.segments, load.view)
        else:
            assert loader is not None, "a device's part needs a device"
            await loader.load(load)
        async with turn:
            await settle(in_thread(partial(_bind, load, threads)))
            if load.passing and device is not None:
                await settle(in_thread(device.synchronize))  # before another part takes its memory

    try:
        async with asyncio.TaskGroup() as group:
            for load in loads:
                group.create_task(one(load))
        if device is not None:
            await settle(in_thread(device.synchronize))  # binding has launched conversions
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    finally:
        if loader is not None:
            loader.close()


async def _read(disk: DiskLane, segments: Sequence[Segment], view: memoryview) -> None:
    """Read into ``view``; returns or raises once no thread writes to it. A cancellation skips the rest."""
    read = disk.read(segments, view)
    await settle(read, lambda: disk.abandon(read))


def _bind(load: ResidentLoad, threads: Threads | None) -> None:
    use_threads(None if threads is None else threads.decode)
    bind_load(load)


class _DeviceLoader:
    """Loads parts into device memory, window by window through a few pinned buffers."""

    def __init__(self, disk: DiskLane, device: DeviceLayer[Any, Any]) -> None:
        self._disk, self._device = disk, device
        self._stream = device.create_stream(0)
        self._windows: asyncio.Queue[HostBuffer] = asyncio.Queue()
        self._all: list[HostBuffer] = []
        try:
            for _ in range(WINDOWS):
                self._all.append(device.allocate_host(WINDOW_BYTES))
        except BaseException:
            self.close()
            raise
        for window in self._all:
            self._windows.put_nowait(window)

    async def load(self, load: ResidentLoad) -> None:
        """Load a whole part; the windows of several parts take turns."""
        async with asyncio.TaskGroup() as group:
            for begin, segments in windows(load.part):
                group.create_task(self._load_window(load, begin, segments))

    async def _load_window(self, load: ResidentLoad, begin: int, segments: list[Segment]) -> None:
        window = await self._windows.get()
        try:
            await _read(self._disk, segments, window.view)
            await settle(in_thread(partial(self._copy, load, begin, window)))
        finally:
            self._windows.put_nowait(window)

    def _copy(self, load: ResidentLoad, begin: int, window: HostBuffer) -> None:
        assert load.buffer is not None
        target = load.buffer[load.part.shift :][begin : begin + WINDOW_BYTES]
        event = self._device.create_event()
        self._device.copy_async(target, window.tensor[: len(target)], self._stream)
        self._device.record(event, self._stream)
        event.synchronize()

    def close(self) -> None:
        """Free the buffers; may be called twice."""
        windows, self._all = self._all, []
        close_all(partial(self._device.free_host, window) for window in windows)


def windows(part: Part, nbytes: int = WINDOW_BYTES) -> Iterator[tuple[int, list[Segment]]]:
    """A part's buffer in windows of ``nbytes``, whole pages: the start of each, and its segments of the files."""
    assert nbytes % PAGE == 0, "offsets in files and buffers agree modulo a page"
    for begin in range(0, part.size, nbytes):
        own = [cut for segment in part.segments if (cut := _within(segment, begin, begin + nbytes)) is not None]
        if own:
            yield begin, own


def _within(segment: Segment, begin: int, end: int) -> Segment | None:
    """The piece of a segment in a window, relative to the window; None if there is none."""
    first, last = max(segment.at, begin), min(segment.at + segment.nbytes, end)
    if first >= last:
        return None
    return replace(segment, offset=segment.offset + first - segment.at, nbytes=last - first, at=first - begin)
