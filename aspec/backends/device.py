"""What is asked of a device behind a link: streams, events, memory. A new device is a file that offers this.

``backends/streams.py`` runs tasks over it; ``backends/cuda.py`` is CUDA's, by way of torch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from aspec.backends.event_lane import DeviceEvent
from aspec.io.pinned import HostBuffer

COPIES = 8  # launched at once, to measure a link

S = TypeVar("S")
E = TypeVar("E", bound=DeviceEvent)


Replay = Callable[[], object]


class Capture(Protocol):
    """What a device offers for work that recurs."""

    def capture(self, work: Callable[[], object]) -> Replay:
        """What repeats the work over the same memory, in the stream it is called in; nothing is computed yet.

        Raises RuntimeError where the device refuses. The work has been done once before.
        """
        ...


class DeviceLayer(Protocol[S, E]):
    """The little that is asked of a device; streams run in order, and beside each other."""

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors live."""
        ...

    def create_stream(self, priority: int) -> S:
        """A new stream; smaller priorities go first."""
        ...

    def create_event(self) -> E:
        """A new event that can be timed and waited for without spinning."""
        ...

    def record(self, event: E, stream: S) -> None:
        """Put the event behind everything launched on the stream so far."""
        ...

    def wait_event(self, stream: S, event: E) -> None:
        """Hold what is launched on the stream from now on until the last recording of the event has completed."""
        ...

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: S) -> None:
        """Copy host bytes to a device buffer of the same size, on the stream."""
        ...

    def on(self, stream: S) -> AbstractContextManager[object]:
        """What this thread launches inside goes to the stream."""
        ...

    def seconds_of(self, event: E) -> float:
        """When a completed event completed, seconds of ``time.perf_counter``."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A device buffer [nbytes] uint8. Raises torch.OutOfMemoryError if it does not fit."""
        ...

    def allocate_host(self, nbytes: int) -> HostBuffer:
        """A host buffer, pinned where possible. Raises DeviceError if there is no memory at all."""
        ...

    def free_host(self, buffer: HostBuffer) -> None:
        """Unpin a buffer and give it back; nobody may use it any more."""
        ...

    def create_capture(self) -> Capture | None:
        """What captures work that recurs in a stream; None where there is no such thing."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done what this thread has launched outside of ``on``; blocks."""
        ...

    @property
    def peak_bytes(self) -> int | None:
        """The most that tensors have held on the device since it was opened; None where nobody counts."""
        ...

    def free(self) -> None:
        """Let go of every buffer and stream; may be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Buffers:
    """Where parts are: device slots, host buffers between disk and device, and parts that stay on the host."""

    slots: Sequence[torch.Tensor]
    staging: Sequence[HostBuffer]
    host_parts: Mapping[int, HostBuffer] = field(default_factory=dict)


def copy_rate(device: DeviceLayer[Any, Any], buffers: Buffers, seconds: float) -> float:
    """Bytes per second from the host's buffers to the slots, by the device's own clock."""
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
