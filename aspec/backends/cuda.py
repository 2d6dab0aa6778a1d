"""CUDA through torch: streams and events, device memory, pinned host memory.

Besides ``cuda_graphs.py`` the only module that runs work through ``torch.cuda``. What may NOT go in: device-wide
synchronisation, an allocator's flush.
"""

import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from aspec.backends.cuda_graphs import TorchCapture
from aspec.errors import DeviceError
from aspec.io.pinned import HostBuffer, PinnedMemory

EPOCH_S = 30.0  # CUDA counts elapsed time in fp32 milliseconds: up to 30 s the step is 2 us, and clocks drift little

WORKSPACES = 256 << 20
"""Bytes. cuBLAS keeps up to 33 MiB for each of three threads with a stream; draws in blocks hold 64 MiB."""

_cuda: Any = torch.cuda  # torch gives its streams and events no types


def name() -> str:
    """The device's name, from its driver."""
    return str(_cuda.get_device_name())


def free_bytes() -> int:
    """Bytes of device memory that no process uses at present."""
    return int(_cuda.mem_get_info()[0])


class TorchDevice:
    """One CUDA device, through torch."""

    def __init__(self, index: int = 0, pinned_limit_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("torch finds no CUDA device: install a CUDA build of torch, or run with --device cpu.")
        self._device = torch.device("cuda", index)
        _cuda.reset_peak_memory_stats(self._device)
        self._buffers: list[torch.Tensor] = []
        self._host = PinnedMemory(_register, _unregister, pinned_limit_bytes)
        self._clock: torch.cuda.Stream = _cuda.Stream(self._device)  # always empty: an event on it completes at once
        self._epoch_lock = threading.Lock()
        self._epoch = self._new_epoch()  # an event, and the host's clock when it completed, in seconds

    @property
    def torch_device(self) -> torch.device:
        """The device of its tensors."""
        return self._device

    @property
    def peak_bytes(self) -> int:
        """The peak bytes of torch's tensors on the device since it was opened."""
        return int(_cuda.max_memory_allocated(self._device))

    def create_capture(self) -> TorchCapture:
        """A capture that makes CUDA graphs."""
        return TorchCapture()

    def synchronize(self) -> None:
        """Wait for this thread's current stream."""
        _cuda.current_stream(self._device).synchronize()

    def create_stream(self, priority: int) -> torch.cuda.Stream:
        """A stream that does not wait for the default stream."""
        stream: torch.cuda.Stream = _cuda.Stream(self._device, priority=priority)
        return stream

    def create_event(self) -> torch.cuda.Event:
        """An event whose wait sleeps (``torch.Event`` ignores ``blocking``); its first record creates it."""
        event: torch.cuda.Event = _cuda.Event(enable_timing=True, blocking=True)
        return event

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        """Record the event after all work launched on the stream so far."""
        event.record(stream)

    def wait_event(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Hold the stream until the event's last recording has completed."""
        stream.wait_event(event)

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Copy on the stream; overlaps with compute if the source is pinned."""
        with self.on(stream):
            target.copy_(source, non_blocking=True)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """A context in which ``stream`` is this thread's current stream."""
        return torch.cuda.stream(stream)

    def seconds_of(self, event: torch.cuda.Event) -> float:
        """The completion time, from the distance to the epoch event; that event is renewed every ``EPOCH_S``."""
        epoch, at_s = self._epoch
        distance_s = float(epoch.elapsed_time(event)) / 1e3
        if distance_s > EPOCH_S:
            with self._epoch_lock:
                if self._epoch[0] is epoch:
                    self._epoch = self._new_epoch()
        return at_s + distance_s

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A device buffer [nbytes] uint8. Raises torch.OutOfMemoryError if it does not fit."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._buffers.append(buffer)
        return buffer

    def allocate_host(self, nbytes: int) -> HostBuffer:
        """A host buffer, pinned if the system allows it. Raises DeviceError if there is no memory."""
        return self._host.allocate(nbytes)

    def free_host(self, buffer: HostBuffer) -> None:
        """Unpin a buffer and free it."""
        self._host.free(buffer)

    def free(self) -> None:
        """Free every buffer; torch frees streams with their last reference."""
        self._buffers.clear()
        self._host.close()

    def _new_epoch(self) -> tuple[torch.cuda.Event, float]:
        """The best of five tries: the event completed between two readings of the host's clock."""
        tries = []
        for _ in range(5):
            event: torch.cuda.Event = _cuda.Event(enable_timing=True)  # its wait spins: a sleeping one would wake late
            before = time.perf_counter()
            event.record(self._clock)
            event.synchronize()
            after = time.perf_counter()
            tries.append((after - before, event, (before + after) / 2))
        _, event, at_s = min(tries, key=lambda found: found[0])
        return event, at_s


def _register(address: int, nbytes: int) -> bool:
    """Pin pages; False if the system refuses.

    A refusal stays the calling thread's last CUDA error and would surface in its next kernel launch (vllm PR 50070).
    torch has no call that clears it, so the call runs on a short thread of its own.
    """
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(int(_cuda.cudart().cudaHostRegister(address, nbytes, 0))), name="aspec-pin"
    )
    thread.start()
    thread.join()
    return codes == [0]


def _unregister(address: int) -> None:
    _cuda.cudart().cudaHostUnregister(address)
