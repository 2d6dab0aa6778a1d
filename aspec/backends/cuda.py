"""CUDA by way of torch: streams and events, memory of the device, pinned memory of the host.

The only module that asks torch for CUDA. What may NOT go in: device-wide synchronisation, an allocator's flush.
"""

import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from aspec.backends.cuda_graphs import TorchCapture
from aspec.errors import DeviceError
from aspec.io.pinned import HostBuffer, PinnedMemory

EPOCH_S = 30.0  # CUDA counts elapsed time in fp32 milliseconds: within 30 s the step is 2 us, and clocks drift little

WORKSPACES = 256 << 20
"""Bytes: cuBLAS keeps up to 33 MiB per thread and stream, of which three multiply; draws in blocks hold 64 MiB."""

_cuda: Any = torch.cuda  # torch leaves the signatures of its streams and events untyped


def name() -> str:
    """What the device calls itself."""
    return str(_cuda.get_device_name())


def free_bytes() -> int:
    """Of the device's memory, what nobody uses at present."""
    return int(_cuda.mem_get_info()[0])


class TorchDevice:
    """One CUDA device by way of torch."""

    def __init__(self, index: int = 0, pinned_limit_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("torch finds no CUDA device: install a CUDA build of torch, or run with --device cpu.")
        self._device = torch.device("cuda", index)
        _cuda.reset_peak_memory_stats(self._device)
        self._buffers: list[torch.Tensor] = []
        self._host = PinnedMemory(_register, _unregister, pinned_limit_bytes)
        self._clock: torch.cuda.Stream = _cuda.Stream(self._device)  # always empty: an event on it completes at once
        self._epoch_lock = threading.Lock()
        self._epoch = self._new_epoch()  # an event, and when it completed on the host's clock

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors live."""
        return self._device

    @property
    def peak_bytes(self) -> int:
        """The most that torch's tensors have held at once since this was opened."""
        return int(_cuda.max_memory_allocated(self._device))

    def create_capture(self) -> TorchCapture:
        """CUDA graphs."""
        return TorchCapture()

    def synchronize(self) -> None:
        """Wait for this thread's current stream."""
        _cuda.current_stream(self._device).synchronize()

    def create_stream(self, priority: int) -> torch.cuda.Stream:
        """A stream that does not wait for the default stream."""
        stream: torch.cuda.Stream = _cuda.Stream(self._device, priority=priority)
        return stream

    def create_event(self) -> torch.cuda.Event:
        """An event whose wait sleeps (``torch.Event`` ignores ``blocking``); the driver makes it when recorded."""
        event: torch.cuda.Event = _cuda.Event(enable_timing=True, blocking=True)
        return event

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        """Put the event behind everything launched on the stream so far."""
        event.record(stream)

    def wait_event(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Hold the stream until the event's last recording has completed."""
        stream.wait_event(event)

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Copy on the stream; overlaps with compute where the source is pinned."""
        with self.on(stream):
            target.copy_(source, non_blocking=True)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """This thread's current stream, inside."""
        return torch.cuda.stream(stream)

    def seconds_of(self, event: torch.cuda.Event) -> float:
        """By the distance to the epoch event, which moves on every ``EPOCH_S``."""
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
        """A host buffer, pinned where the system allows it."""
        return self._host.allocate(nbytes)

    def free_host(self, buffer: HostBuffer) -> None:
        """Unpin a buffer and give it back."""
        self._host.free(buffer)

    def free(self) -> None:
        """Let go of every buffer; streams go with their last reference."""
        self._buffers.clear()
        self._host.close()

    def _new_epoch(self) -> tuple[torch.cuda.Event, float]:
        """The tightest of a few tries: the event completed between two looks at the host's clock."""
        tries = []
        for _ in range(5):
            event: torch.cuda.Event = _cuda.Event(enable_timing=True)  # spins: a sleeper would wake late
            before = time.perf_counter()
            event.record(self._clock)
            event.synchronize()
            after = time.perf_counter()
            tries.append((after - before, event, (before + after) / 2))
        _, event, at_s = min(tries, key=lambda found: found[0])
        return event, at_s


def _register(address: int, nbytes: int) -> bool:
    """Pin pages; False where the system refuses.

    A refusal stays behind as the calling thread's last CUDA error and would surface in its next kernel launch
    (vllm PR 50070); torch has no call that clears it, so it is left to a thread that ends.
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
