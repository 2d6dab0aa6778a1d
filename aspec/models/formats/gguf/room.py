"""Buffers in a weight's workspace, and the steps that the decoders of several types share. They allocate nothing.

A packed byte holds fields of neighbours, so the steps work on words of eight bytes: one operation for eight of them.
Small operations cost their call, so views are made once a weight, and constants are tensors, which need no cast.
"""

import math
from functools import cache

import torch

ALIGNMENT = 256  # bytes
BYTES = (torch.int64, torch.int32, torch.int16, torch.uint8)  # the widest first


class Room:
    """Hands out buffers of a workspace, one after the other."""

    def __init__(self, workspace: torch.Tensor, used: int = 0) -> None:
        self._workspace = workspace
        self.used = used  # bytes

    @classmethod
    def endless(cls) -> "Room":
        """A room that only counts: its buffers have no memory."""
        return cls(torch.empty(1 << 46, dtype=torch.uint8, device="meta"))

    def after(self, used: int) -> "Room":
        """A room of the same workspace, whose buffers begin behind the first ``used`` bytes."""
        return Room(self._workspace, used)

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer with undefined contents."""
        begin = self.used
        end = begin + math.prod(shape) * dtype.itemsize
        self.used = end + -end % ALIGNMENT
        return self._workspace[begin:end].view(dtype).view(shape)


@cache
def constant(value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A number; it may stand beside tensors of any device."""
    return torch.tensor(value, dtype=dtype, device="cpu")


@cache
def numbers(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Words, one for each element of the first dimension of a tensor [len(values), any, any, any]."""
    return torch.tensor(values, device=device).view(-1, 1, 1, 1)


def word(*values: int) -> int:
    """A word of eight bytes, as the signed number that torch wants; one value stands for eight."""
    return int.from_bytes(bytes(values * (8 // len(values))), "little", signed=True)


def mask(byte: int) -> torch.Tensor:
    """A word of eight equal bytes."""
    return constant(word(byte))


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as words of eight bytes."""
    return tensor.view(torch.int64)


def widest(stored: torch.Tensor, begin: int, end: int) -> torch.dtype:
    """The widest words that bytes ``begin`` to ``end`` of all blocks [n, nbytes] consist of."""
    step = math.gcd(begin, end, stored.stride(0), 8)
    return next(kind for kind in BYTES if step % kind.itemsize == 0)


def part(stored: torch.Tensor, begin: int, end: int, kind: torch.dtype | None = None) -> torch.Tensor:
    """Bytes ``begin`` to ``end`` of all blocks [n, nbytes], in the widest words or as ``kind``."""
    return stored[:, begin:end].view(kind or widest(stored, begin, end))


class Nibbles:
    """Splits every 16 bytes into 32 codes: the low halves of all, then the high ones. ``codes`` [n, 32] uint8."""

    def __init__(self, room: Room, stored: torch.Tensor, begin: int, end: int, count: int) -> None:
        num_bytes = end - begin
        self.codes = room.take(count * num_bytes // 16, 32, dtype=torch.uint8)
        packed, half = (room.take(count, num_bytes, dtype=torch.uint8) for _ in range(2))
        self._stored = part(stored, begin, end)
        self._packed, self._words, self._half = packed.view(self._stored.dtype), words(packed), words(half)
        halves = self.codes.view(torch.complex128)  # an element of 16 bytes: copies of many short rows are slow
        self._low, self._high, self._from = halves[:, 0], halves[:, 1], half.view(torch.complex128).view(-1)

    def split(self, begin: int, end: int) -> None:
        """The codes of some blocks."""
        self._packed.copy_(self._stored[begin:end])
        torch.bitwise_and(self._words, mask(0x0F), out=self._half)
        self._low.copy_(self._from)
        torch.bitwise_right_shift(self._words, constant(4), out=self._half)
        self._half.bitwise_and_(mask(0x0F))
        self._high.copy_(self._from)
