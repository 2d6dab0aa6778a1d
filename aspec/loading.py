"""What is read once, when an engine opens: resident weights, and what host memory keeps behind a device's link."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from aspec.assembly import ResidentLoad, bind_load
from aspec.io.device import DeviceLayer
from aspec.io.disk import DiskLane
from aspec.io.layout import PAGE, Part, Segment
from aspec.io.pinned import HostBuffer

WINDOW_BYTES = 32 << 20  # of a part on its way through the host to a device
WINDOWS = 3  # one is read while another is copied


async def load_all(
    loads: Sequence[ResidentLoad], disk: DiskLane, device: DeviceLayer[Any, Any] | None, report: Callable[[int], None]
) -> None:
    """Read and bind every part; ``report`` hears of the bytes that have landed.

    Raises ReadError for files that end early or fail, after everything under way has settled.
    """
    carrier = _Carrier(disk, device) if device is not None else None

    async def one(load: ResidentLoad) -> None:
        if load.view is not None:
            await disk.read(load.part.segments, load.view)
        else:
            assert carrier is not None, "a device's part needs a device"
            await carrier.carry(load)
        bind_load(load)
        report(load.part.nbytes)

    try:
        results = await asyncio.gather(*map(one, loads), return_exceptions=True)
    finally:
        if carrier is not None:
            carrier.close()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    if device is not None:
        device.settle()  # what binding has converted


class _Carrier:
    """Brings parts into a device's memory, window by window through a few pinned buffers."""

    def __init__(self, disk: DiskLane, device: DeviceLayer[Any, Any]) -> None:
        self._disk, self._device = disk, device
        self._stream = device.create_stream(0)
        self._windows: asyncio.Queue[HostBuffer] = asyncio.Queue()
        self._all = [device.allocate_host(WINDOW_BYTES) for _ in range(WINDOWS)]
        for window in self._all:
            self._windows.put_nowait(window)

    async def carry(self, load: ResidentLoad) -> None:
        """A whole part; windows of several parts take turns."""
        await asyncio.gather(*(self._bring(load, begin, segments) for begin, segments in windows(load.part)))

    async def _bring(self, load: ResidentLoad, begin: int, segments: list[Segment]) -> None:
        window = await self._windows.get()
        try:
            await self._disk.read(segments, window.view)
            await asyncio.to_thread(self._copy, load, begin, window)
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
        """Give the buffers back."""
        for window in self._all:
            self._device.free_host(window)


def windows(part: Part, nbytes: int = WINDOW_BYTES) -> Iterator[tuple[int, list[Segment]]]:
    """A part's buffer in windows of ``nbytes``, whole pages: where each begins, and what of the files lands in it."""
    assert nbytes % PAGE == 0, "offsets in files and buffers agree modulo a page"
    for begin in range(0, part.size, nbytes):
        own = [cut for segment in part.segments if (cut := _within(segment, begin, begin + nbytes)) is not None]
        if own:
            yield begin, own


def _within(segment: Segment, begin: int, end: int) -> Segment | None:
    """What of a segment lands in a window, as seen from there."""
    first, last = max(segment.at, begin), min(segment.at + segment.nbytes, end)
    if first >= last:
        return None
    return replace(segment, offset=segment.offset + first - segment.at, nbytes=last - first, at=first - begin)
