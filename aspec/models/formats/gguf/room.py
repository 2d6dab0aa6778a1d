"""Buffers in a weight's workspace, and the steps that the decoders of several types share. They allocate nothing.

A packed byte holds fields of neighbours, so the steps work on words of eight bytes: one operation for eight of them.
Constants are written as bytes, eight times the same.
"""

import math

import torch

ALIGNMENT = 256  # bytes


class Room:
    """Hands out buffers of a workspace, one after the other."""

    def __init__(self, workspace: torch.Tensor, used: int = 0) -> None:
        self._workspace = workspace
        self.used = used  # bytes

    def after(self, used: int) -> "Room":
        """A room of the same workspace, whose buffers begin behind the first ``used`` bytes."""
        return Room(self._workspace, used)

    @classmethod
    def endless(cls) -> "Room":
        """A room that only counts: its buffers have no memory."""
        return cls(torch.empty(1 << 46, dtype=torch.uint8, device="meta"))

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer with undefined contents."""
        begin = self.used
        end = begin + math.prod(shape) * dtype.itemsize
        self.used = end + -end % ALIGNMENT
        return self._workspace[begin:end].view(dtype).view(shape)


def every(byte: int) -> int:
    """A word of eight equal bytes, as the signed number that torch wants."""
    return int.from_bytes(bytes([byte] * 8), "little", signed=True)


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as words of eight bytes."""
    return tensor.view(torch.int64)


def field(source: torch.Tensor, shift: int, mask: int, out: torch.Tensor) -> None:
    """``(source >> shift) & mask`` of every byte, ``<<`` if ``shift`` is negative. Both are contiguous."""
    into = words(out)
    if shift > 0:
        torch.bitwise_right_shift(words(source), shift, out=into)
    else:
        torch.bitwise_left_shift(words(source), -shift, out=into)
    into.bitwise_and_(every(mask))


def copy_half(out: torch.Tensor, blocks: torch.Tensor, at: int) -> None:
    """``out`` [n, 1] fp32: the fp16 number at byte ``at`` of every block."""
    out.copy_(blocks[:, at : at + 2].view(torch.float16))


class Nibbles:
    """Splits 16 bytes into 32: first the low halves of all, then the high ones. ``codes`` [n, 32] uint8."""

    def __init__(self, room: Room, count: int) -> None:
        self.codes = room.take(count, 32, dtype=torch.uint8)
        self._packed = room.take(count, 16, dtype=torch.uint8)
        self._half = room.take(count, 16, dtype=torch.uint8)
        self._halves = self.codes.view(torch.complex128)  # one element has 16 bytes: copies of many short rows are slow

    def split(self, stored: torch.Tensor) -> None:
        """``stored``: [n, 16] uint8, at even bytes if its rows are."""
        even = stored.stride(0) % 2 == 0
        kind = torch.int16 if even else torch.uint8
        self._packed.view(kind).copy_(stored.view(kind))
        for part in range(2):
            field(self._packed, 4 * part, 0x0F, self._half)
            self._halves[:, part].copy_(self._half.view(torch.complex128).view(-1))
