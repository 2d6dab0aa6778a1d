"""The interface of a device behind a link: streams, events, memory. A file per device implements it.

``backends/streams.py`` runs tasks over it; ``backends/cuda.py`` implements it for CUDA, through torch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from aspec.backends.event_lane import DeviceEvent
from aspec.io.pinned import HostBuffer

COPIES = 8  # launched together, to measure a link

S = TypeVar("S")
E = TypeVar("E", bound=DeviceEvent)


Replay = Callable[[], object]


class Capture(Protocol):
    """Captures work that recurs, so that a device can repeat it cheaply."""

    def capture(self, work: Callable[[], object]) -> Replay:
        """A function that repeats the work in the same memory, in the current stream; nothing is computed yet.

        The caller has run the work once before. Raises RuntimeError if the device refuses.
        """
        ...


class DeviceLayer(Protocol[S, E]):
    """The operations of a device. Each stream runs in order; streams run in parallel."""

    @property
    def torch_device(self) -> torch.device:
        """The device of its tensors."""
        ...

    def create_stream(self, priority: int) -> S:
        """A new stream; a smaller priority runs first."""
        ...

    def create_event(self) -> E:
        """A new event that can be timed, and whose wait does not spin."""
        ...

    def record(self, event: E, stream: S) -> None:
        """Record the event after all work launched on the stream so far."""
        ...

    def wait_event(self, stream: S, event: E) -> None:
        """Make later work on the stream wait until the last recording of the event has completed."""
        ...

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: S) -> None:
        """Copy host bytes to a device buffer of the same size, on the stream."""
        ...

    def on(self, stream: S) -> AbstractContextManager[object]:
        """A context in which this thread launches its work on ``stream``."""
        ...

    def seconds_of(self, event: E) -> float:
        """The time at which a completed event completed, in seconds of ``time.perf_counter``."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A device buffer [nbytes] uint8. Raises torch.OutOfMemoryError if it does not fit."""
        ...

    def allocate_host(self, nbytes: int) -> HostBuffer:
        """A host buffer, pinned if possible. Raises DeviceError if there is no memory."""
        ...

    def free_host(self, buffer: HostBuffer) -> None:
        """Unpin a buffer and free it; it must not be used afterwards."""
        ...

    def create_capture(self) -> Capture | None:
        """A capture for work that recurs in a stream; None if the device has none."""
        ...

    def synchronize(self) -> None:
        """Block until the device has done all work that this thread launched outside of ``on``."""
        ...

    @property
    def peak_bytes(self) -> int | None:
        """The peak bytes of tensors on the device since it was opened; None if they are not counted."""
        ...

    def free(self) -> None:
        """Free every buffer and stream; may be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Buffers:
    """The memory of streamed weights: slots on the device, staging buffers from disk, parts that stay on the host."""

    slots: Sequence[torch.Tensor]
    staging: Sequence[HostBuffer]
    host_parts: Mapping[int, HostBuffer] = field(default_factory=dict)
    expert_slots: Sequence[torch.Tensor] = ()  # of experts that are read on demand
    host_experts: Sequence[HostBuffer] = ()  # between files and these slots


def copy_rate(device: DeviceLayer[Any, Any], buffers: Buffers, seconds: float) -> float:
    """Bytes per second of copies from host buffers to slots, by the device's own clock; takes about ``seconds``."""
    sources = [*buffers.host_parts.values(), *buffers.staging][:COPIES]
    stream = device.create_stream(0)
    copied, busy_s, begun = 0, 0.0, time.perf_counter()
    while not copied or time.perf_counter() - begun < seconds:
        start, stop = device.create_event(), device.create_event()
        device.record(start, stream)
        for index in range(COPIES):
            source, slot = sources[index % len(sources)].tensor, buffers.slots[index % len(buffers.slots)]
            nbytes = min(len(source), len(slot))
            device.copy_async(slot[:nbytes], source[:nbytes], stream)
            copied += nbytes
        device.record(stop, stream)
        stop.synchronize()
        busy_s += device.seconds_of(stop) - device.seconds_of(start)
    return copied / busy_s
