"""The types of GGUF with 256 elements in a block, whose groups of 16 or 32 have scales of their own.

See ``blocks`` for the parts of a kernel. Scales are packed, too: they are made for many blocks at once, because an
operation on few bytes costs as much as one on many.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from aspec.models.formats.gguf.blocks import IQ4, Kernel, Scales, Step, book
from aspec.models.formats.gguf.room import Room, copy_half, every, field, words

SIX_BITS = 32  # the middle of scales of 6 bits


def _copy_bytes(out: torch.Tensor, stored: torch.Tensor) -> None:
    """Copy rows of bytes that begin at even places; two bytes at a time."""
    out.view(torch.int16).copy_(stored.view(torch.int16))


class _Scaled:
    """Scales from small integers: ``scale`` [n, groups, 1] = fp16 * integer, in fp32."""

    def __init__(self, room: Room, count: int, groups: int) -> None:
        self.scale = room.take(count, groups, 1)
        self._whole = room.take(count, 1)

    def multiply(self, blocks: torch.Tensor, at: int, integers: torch.Tensor) -> torch.Tensor:
        """``integers`` [n, groups] of one byte, times the fp16 number at byte ``at``."""
        copy_half(self._whole, blocks, at)
        values = self.scale.view(integers.shape)
        values.copy_(integers)
        return values.mul_(self._whole)


def two_bit_scales(room: Room, count: int) -> Scales:
    """Q2_K: 16 bytes, scale low and minimum high."""
    scale, minimum = _Scaled(room, count, 16), _Scaled(room, count, 16)
    packed, part = (room.take(count, 16, dtype=torch.uint8) for _ in range(2))

    def fill(blocks: torch.Tensor) -> None:
        _copy_bytes(packed, blocks[:, :16])
        field(packed, 0, 0x0F, part)
        scale.multiply(blocks, 80, part)
        field(packed, 4, 0x0F, part)
        minimum.multiply(blocks, 82, part).neg_()

    return Scales(fill, scale.scale, minimum.scale)


def three_bit_scales(room: Room, count: int) -> Scales:
    """Q3_K: 16 scales of 6 bits; 8 bytes with two low halves each, then 4 bytes with four high pairs each."""
    scale = _Scaled(room, count, 16)
    packed = room.take(count, 12, dtype=torch.uint8)
    column, high, made = (room.take(count, width, dtype=torch.uint8) for width in (4, 4, 16))

    def fill(blocks: torch.Tensor) -> None:
        _copy_bytes(packed, blocks[:, 96:108])
        stored, out = packed.view(torch.int32), made.view(torch.int32)
        low, top = column.view(torch.int32).view(-1), high.view(torch.int32).view(-1)
        for group in range(4):  # of four scales
            torch.bitwise_right_shift(stored[:, group % 2], group // 2 * 4, out=low)
            low.bitwise_and_(0x0F0F0F0F)
            torch.bitwise_right_shift(stored[:, 2], 2 * group, out=top)
            top.bitwise_and_(0x03030303).bitwise_left_shift_(4)
            torch.bitwise_or(low, top, out=out[:, group])
        scale.multiply(blocks, 108, made.view(torch.int8).sub_(SIX_BITS))

    return Scales(fill, scale.scale)


def six_bit_pairs(room: Room, count: int) -> Scales:
    """Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes (``get_scale_min_k4`` of ggml)."""
    scale, minimum = _Scaled(room, count, 8), _Scaled(room, count, 8)
    packed = room.take(count, 12, dtype=torch.uint8)
    made = room.take(count, 8, dtype=torch.uint8)
    part = room.take(count, dtype=torch.int32)

    def unpack(first: torch.Tensor, last: torch.Tensor, shift: int) -> torch.Tensor:
        out = made.view(torch.int32)
        torch.bitwise_and(first, 0x3F3F3F3F, out=out[:, 0])
        torch.bitwise_right_shift(first, 2, out=part)
        part.bitwise_and_(0x30303030)
        high = out[:, 1]
        torch.bitwise_right_shift(last, shift, out=high)
        high.bitwise_and_(0x0F0F0F0F).bitwise_or_(part)
        return made

    def fill(blocks: torch.Tensor) -> None:
        _copy_bytes(packed, blocks[:, 4:16])
        stored = packed.view(torch.int32)
        scale.multiply(blocks, 0, unpack(stored[:, 0], stored[:, 2], 0))
        minimum.multiply(blocks, 2, unpack(stored[:, 1], stored[:, 2], 4)).neg_()

    return Scales(fill, scale.scale, minimum.scale)


def byte_scales(room: Room, count: int) -> Scales:
    """Q6_K: 16 scales of a byte."""
    scale = _Scaled(room, count, 16)

    def fill(blocks: torch.Tensor) -> None:
        scale.multiply(blocks, 208, blocks[:, 192:208].view(torch.int8))

    return Scales(fill, scale.scale)


def split_scales(room: Room, count: int) -> Scales:
    """IQ4_XS: 8 scales of 6 bits; their high pairs in 2 bytes, then their low halves in 4."""
    scale = _Scaled(room, count, 8)
    made, low = (room.take(count, 1, dtype=torch.int64) for _ in range(2))
    spread = room.take(count, 1, dtype=torch.int64)

    def fill(blocks: torch.Tensor) -> None:
        made.copy_(blocks[:, 2:4].view(torch.int16)).bitwise_and_(0xFFFF)
        low.copy_(blocks[:, 4:8].view(torch.int32)).bitwise_and_(0xFFFFFFFF)
        for value, steps in (
            (made, ((24, 0x000000FF000000FF), (12, 0x000F000F000F000F), (6, every(3)))),
            (low, ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, every(0x0F)))),
        ):
            for shift, mask in steps:  # half of the fields move up, so that at last each has a byte
                torch.bitwise_left_shift(value, shift, out=spread)
                value.bitwise_or_(spread).bitwise_and_(mask)
        made.bitwise_left_shift_(4).bitwise_or_(low)
        scale.multiply(blocks, 0, made.view(torch.int8).sub_(SIX_BITS))

    return Scales(fill, scale.scale)


@dataclass(frozen=True, slots=True)
class High:
    """Where the high bits of codes are: runs of 32 bytes from byte ``at`` on.

    ``runs``: for every run of low bits, the run of high bits and the shift of those of its first field.
    """

    at: int
    bits: int
    runs: tuple[tuple[int, int], ...]
    step: int  # from a field's shift to the next one's


def planes(
    at: int, bits: int, high: High | None = None, zero: int = 0, width: int = 1
) -> Callable[[Room, int, torch.Tensor], Step]:
    """Codes in runs of 32 bytes from byte ``at`` on: the lowest ``bits`` of ``width`` runs, then the next ones of them.

    ``zero`` is subtracted.
    """
    fields, num_runs = 8 // bits, bits

    def codes(room: Room, count: int, values: torch.Tensor) -> Step:
        low = room.take(num_runs, count, 32, dtype=torch.uint8)
        made = room.take(fields, num_runs, count, 32, dtype=torch.uint8)
        top, part = (room.take(num_runs if high else 0, count, 32, dtype=torch.uint8) for _ in range(2))
        out = values.view(count, -1, fields, width, 32).permute(2, 1, 3, 0, 4)
        whole = made.view(torch.int8).view(out.shape)

        def fill(blocks: torch.Tensor) -> None:
            _copy_bytes(low, blocks[:, at : at + num_runs * 32].unflatten(1, (num_runs, 32)).transpose(0, 1))
            if high is not None:
                for run, (source, shift) in enumerate(high.runs):
                    begin = high.at + 32 * source
                    _copy_bytes(top[run], blocks[:, begin : begin + 32])
                    words(top[run]).bitwise_right_shift_(shift)
            for index in range(fields):
                field(low, bits * index, (1 << bits) - 1, made[index])
                if high is not None:
                    field(top, high.step * index - bits, (1 << high.bits) - 1 << bits, part)
                    words(made[index]).bitwise_or_(words(part))
            if zero:
                whole.sub_(zero)
            out.copy_(whole)

        return fill

    return codes


K_QUANTS = {
    "Q2_K": Kernel(two_bit_scales, planes(16, 2)),
    "Q3_K": Kernel(three_bit_scales, planes(32, 2, High(0, 1, ((0, 0), (0, 4)), 1), zero=4)),
    "Q4_K": Kernel(six_bit_pairs, planes(16, 4)),
    "Q5_K": Kernel(six_bit_pairs, planes(48, 4, High(16, 1, ((0, 0), (0, 2), (0, 4), (0, 6)), 1))),
    "Q6_K": Kernel(byte_scales, planes(0, 4, High(128, 2, ((0, 0), (0, 2), (1, 0), (1, 2)), 4), zero=32, width=2)),
    "IQ4_XS": Kernel(split_scales, book(IQ4, 8, groups=8)),
}
"""Kernels by the type's name."""
