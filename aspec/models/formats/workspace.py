"""Memory for decoding: typed tensors out of one piece of bytes, so that decoding allocates nothing."""

import math

import torch

ALIGNMENT = 64  # bytes: a cache line


class Workspace:
    """Cuts tensors from ``memory`` (uint8), one after another; their contents are undefined."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._left = memory  # not cut yet; it begins aligned

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The next tensor."""
        nbytes = math.prod(shape) * dtype.itemsize
        taken, self._left = self._left[:nbytes], self._left[room(nbytes) :]
        return taken.view(dtype).view(shape)


def room(*nbytes: int) -> int:
    """Bytes of workspace for tensors of so many bytes."""
    return sum(-(-own // ALIGNMENT) * ALIGNMENT for own in nbytes)
