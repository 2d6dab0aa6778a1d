"""Host memory that a device reads directly: buffers pinned at their exact size, and uploads of small tensors.

Pages are registered with the driver instead of allocated by it: torch's pinned allocator rounds up to a power of
two, and registered memory keeps its huge pages. If the system refuses, copies still work, but slower.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aspec.io.memory import SlotMemory, allocate
from aspec.units import format_bytes


@dataclass(frozen=True, slots=True)
class HostBuffer:
    """The same bytes twice: ``view`` for the disk, ``tensor`` [nbytes] uint8 for the device."""

    view: memoryview
    tensor: torch.Tensor
    pinned: bool


class PinnedMemory:
    """Allocates host buffers, pins them up to a limit in bytes, and frees them."""

    def __init__(
        self,
        register: Callable[[int, int], bool],
        unregister: Callable[[int], None],
        limit_bytes: int | None = None,
    ) -> None:
        self._register, self._unregister, self._limit_bytes = register, unregister, limit_bytes
        self._buffers: list[tuple[SlotMemory, bool]] = []  # and whether they are pinned
        self._warned = False

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are pinned at present."""
        return sum(memory.nbytes for memory, pinned in self._buffers if pinned)

    def allocate(self, nbytes: int) -> HostBuffer:
        """A buffer of whole pages, pinned if possible. Raises DeviceError if there is no memory."""
        memory = allocate(nbytes)
        fits = self._limit_bytes is None or self.pinned_bytes + memory.nbytes <= self._limit_bytes
        pinned = fits and self._register(memory.address, memory.nbytes)
        if not pinned and not self._warned:
            self._warned = True
            why = "the system refused to pin it (see ulimit -l)" if fits else "the limit for pinned memory is reached"
            warnings.warn(
                f"a host buffer of {format_bytes(memory.nbytes)} stays pageable, {why}: copies to the device will be "
                f"slower and overlap less.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._buffers.append((memory, pinned))
        return HostBuffer(memory.view, torch.frombuffer(memory.view, dtype=torch.uint8), pinned)

    def free(self, buffer: HostBuffer) -> None:
        """Unpin one buffer and free it; it must not be used afterwards."""
        for place, (memory, _) in enumerate(self._buffers):
            if memory.view is buffer.view:
                self._unpin_and_close(*self._buffers.pop(place))
                return

    def close(self) -> None:
        """Unpin and free every buffer; may be called twice. The buffers must not be used afterwards."""
        while self._buffers:
            self._unpin_and_close(*self._buffers.pop())

    def _unpin_and_close(self, memory: SlotMemory, pinned: bool) -> None:
        if pinned:
            self._unregister(memory.address)
        memory.close()


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small host tensor to a device on this thread's current stream; for the host, return the tensor itself.

    A tensor that is built on a device from Python's numbers, or moved there from pageable memory, makes its thread wait
    for all work launched before. A tensor in pinned memory does not. torch keeps it until the copy has ended.
    """
    if device.type in ("cpu", "meta"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
