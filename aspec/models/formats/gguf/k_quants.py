"""The types of GGUF with 256 elements in a block, whose groups of 16 or 32 have scales of their own.

See ``blocks`` for the parts of a kernel. Scales are packed, too: they are made for many blocks at once, because an
operation on few bytes costs as much as one on many.
"""

from dataclasses import dataclass

import torch

from aspec.models.formats.gguf.blocks import IQ4, Kernel, MakeCodes, Scales, Step, book
from aspec.models.formats.gguf.room import Room, constant, mask, numbers, part, word, words

SIX_BITS = 32  # the middle of scales of 6 bits


class _Scaled:
    """Scales from small integers: ``scale`` [n, groups, 1] = integer * fp16 at byte ``at``, in fp32."""

    def __init__(self, room: Room, blocks: torch.Tensor, count: int, groups: int, at: int) -> None:
        self.scale = room.take(count, groups, 1)
        self._whole, self._stored = room.take(count, 1), part(blocks, at, at + 2, torch.float16)

    def multiply(self, begin: int, end: int, integers: torch.Tensor) -> torch.Tensor:
        """``integers``: [n, groups] of one byte."""
        self._whole.copy_(self._stored[begin:end])
        values = self.scale.view(integers.shape)
        values.copy_(integers)
        return values.mul_(self._whole)


def two_bit_scales(room: Room, blocks: torch.Tensor, count: int) -> Scales:
    """Q2_K: 16 bytes, each with a scale low and a minimum high."""
    scale, minimum = (_Scaled(room, blocks, count, 16, at) for at in (80, 82))
    packed, half = (room.take(count, 16, dtype=torch.uint8) for _ in range(2))
    stored = part(blocks, 0, 16)

    def fill(begin: int, end: int) -> None:
        packed.view(stored.dtype).copy_(stored[begin:end])
        torch.bitwise_and(words(packed), mask(0x0F), out=words(half))
        scale.multiply(begin, end, half)
        torch.bitwise_right_shift(words(packed), constant(4), out=words(half))
        words(half).bitwise_and_(mask(0x0F))
        minimum.multiply(begin, end, half).neg_()

    return Scales(fill, scale.scale, minimum.scale)


def three_bit_scales(room: Room, blocks: torch.Tensor, count: int) -> Scales:
    """Q3_K: 16 scales of 6 bits; 8 bytes with two low halves each, then 4 bytes with four high pairs each."""
    scale = _Scaled(room, blocks, count, 16, 108)
    packed, made = (room.take(count, width, dtype=torch.uint8) for width in (12, 16))
    high = room.take(count, dtype=torch.int32)
    stored, source, out = part(blocks, 96, 108), packed.view(torch.int32), made.view(torch.int32)

    def fill(begin: int, end: int) -> None:
        packed.view(stored.dtype).copy_(stored[begin:end])
        for group in range(4):  # of four scales
            low = out[:, group]
            torch.bitwise_right_shift(source[:, group % 2], group // 2 * 4, out=low)
            torch.bitwise_right_shift(source[:, 2], 2 * group, out=high)
            high.bitwise_and_(0x03030303).bitwise_left_shift_(4)
            low.bitwise_and_(0x0F0F0F0F).bitwise_or_(high)
        scale.multiply(begin, end, made.view(torch.int8).sub_(SIX_BITS))

    return Scales(fill, scale.scale)


def six_bit_pairs(room: Room, blocks: torch.Tensor, count: int) -> Scales:
    """Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes (``get_scale_min_k4`` of ggml)."""
    scale, minimum = (_Scaled(room, blocks, count, 8, at) for at in (0, 2))
    packed, made = (room.take(count, width, dtype=torch.uint8) for width in (12, 8))
    top = room.take(count, dtype=torch.int32)
    stored, source, out = part(blocks, 4, 16), packed.view(torch.int32), made.view(torch.int32)

    def fill(begin: int, end: int) -> None:
        packed.view(stored.dtype).copy_(stored[begin:end])
        scale.multiply(begin, end, unpacked(0, 0))
        minimum.multiply(begin, end, unpacked(1, 4)).neg_()

    def unpacked(column: int, shift: int) -> torch.Tensor:
        first, second = out[:, 0], out[:, 1]  # four numbers each
        torch.bitwise_and(source[:, column], 0x3F3F3F3F, out=first)
        torch.bitwise_right_shift(source[:, column], 2, out=top)
        torch.bitwise_right_shift(source[:, 2], shift, out=second)
        second.bitwise_and_(0x0F0F0F0F).bitwise_or_(top.bitwise_and_(0x30303030))
        return made

    return Scales(fill, scale.scale, minimum.scale)


def byte_scales(room: Room, blocks: torch.Tensor, count: int) -> Scales:
    """Q6_K: 16 scales of a byte."""
    scale, stored = _Scaled(room, blocks, count, 16, 208), part(blocks, 192, 208, torch.int8)

    def fill(begin: int, end: int) -> None:
        scale.multiply(begin, end, stored[begin:end])

    return Scales(fill, scale.scale)


def split_scales(room: Room, blocks: torch.Tensor, count: int) -> Scales:
    """IQ4_XS: 8 scales of 6 bits; their high pairs in 2 bytes, then their low halves in 4."""
    scale = _Scaled(room, blocks, count, 8, 0)
    made, low, moved = (room.take(count, 1, dtype=torch.int64) for _ in range(3))
    pairs, halves = part(blocks, 2, 4, torch.int16), part(blocks, 4, 8, torch.int32)

    def fill(begin: int, end: int) -> None:
        made.copy_(pairs[begin:end]).bitwise_and_(0xFFFF)
        low.copy_(halves[begin:end]).bitwise_and_(0xFFFFFFFF)
        for value, steps in (
            (made, ((24, word(0xFF, 0, 0, 0)), (12, word(0x0F, 0)), (6, word(0x03)))),
            (low, ((16, word(0xFF, 0xFF, 0, 0)), (8, word(0xFF, 0)), (4, word(0x0F)))),
        ):
            for shift, kept in steps:  # half of the fields move up, so that at last each has a byte
                torch.bitwise_left_shift(value, shift, out=moved)
                value.bitwise_or_(moved).bitwise_and_(kept)
        made.bitwise_left_shift_(4).bitwise_or_(low)
        scale.multiply(begin, end, made.view(torch.int8).sub_(SIX_BITS))

    return Scales(fill, scale.scale)


@dataclass(frozen=True, slots=True)
class High:
    """Where the high bits of codes are: in ``num_runs`` runs of 32 bytes from byte ``at`` on.

    A run of high bits serves several runs of low ones, the next one ``run_step`` bits higher; so do the fields of one.
    """

    at: int
    num_runs: int
    bits: int
    run_step: int
    field_step: int


def planes(at: int, bits: int, high: High | None = None, zero: int = 0, width: int = 1) -> MakeCodes:
    """Codes in runs of 32 bytes from byte ``at`` on: the lowest ``bits`` of ``width`` runs, then the next ones of them.

    ``zero`` is subtracted.
    """
    fields, num_runs = 8 // bits, bits

    def codes(room: Room, blocks: torch.Tensor, count: int, values: torch.Tensor) -> Step:
        low = room.take(num_runs, count, 32, dtype=torch.uint8)
        made = room.take(fields, num_runs, count, 32, dtype=torch.uint8)
        stored, into = _runs(blocks, at, num_runs, low)
        shifts = numbers(tuple(bits * index for index in range(fields)), made.device)
        kept, source, all_words = mask((1 << bits) - 1), words(low), words(made)
        top = None if high is None else _Top(high, room, blocks, made, bits)
        signed, ordered = made.view(torch.int8), values.view(count, -1, fields, width, 32)
        pairs = [  # of 32 codes each; a cast of all at once is half as fast
            (ordered[:, run // width, index, run % width], signed[index, run])
            for index in range(fields)
            for run in range(num_runs)
        ]

        def fill(begin: int, end: int) -> None:
            into.copy_(stored[:, begin:end])
            torch.bitwise_right_shift(source, shifts, out=all_words)
            all_words.bitwise_and_(kept)
            if top is not None:
                top.join(begin, end)
            if zero:
                signed.sub_(constant(zero, torch.int8))
            for out, run_codes in pairs:
                out.copy_(run_codes)

        return fill

    return codes


class _Top:
    """The high bits of codes ``made`` [fields, runs, n, 32], whose low ``bits`` are there."""

    def __init__(self, high: High, room: Room, blocks: torch.Tensor, made: torch.Tensor, bits: int) -> None:
        fields, num_runs, count, _ = made.shape
        served = num_runs // high.num_runs  # runs of low bits
        packed = room.take(high.num_runs, count, 32, dtype=torch.uint8)
        runs = room.take(num_runs, count, 32, dtype=torch.uint8)
        self._stored, self._into = _runs(blocks, high.at, high.num_runs, packed)
        self._packed = words(packed).unsqueeze(1)
        self._runs, self._each = words(runs), words(runs).view(high.num_runs, served, count, 4)
        self._run_shifts = numbers(tuple(high.run_step * run for run in range(served)), made.device).squeeze(-1)
        self._shifts = numbers(tuple(high.field_step * index for index in range(fields)), made.device)
        self._kept, self._bits = mask((1 << high.bits) - 1), constant(bits)
        self._made, self._part = words(made), words(room.take(*made.shape, dtype=torch.uint8))

    def join(self, begin: int, end: int) -> None:
        """Set the high bits of the codes."""
        self._into.copy_(self._stored[:, begin:end])
        torch.bitwise_right_shift(self._packed, self._run_shifts, out=self._each)
        torch.bitwise_right_shift(self._runs, self._shifts, out=self._part)
        self._made.bitwise_or_(self._part.bitwise_and_(self._kept).bitwise_left_shift_(self._bits))


def _runs(blocks: torch.Tensor, at: int, count: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` runs of 32 bytes from byte ``at`` on, run by run, and ``out`` in the same words."""
    stored = part(blocks, at, at + 32 * count)
    return torch.unflatten(stored, 1, (count, -1)).transpose(0, 1), out.view(stored.dtype)


K_QUANTS = {
    "Q2_K": Kernel(two_bit_scales, planes(16, 2)),
    "Q3_K": Kernel(three_bit_scales, planes(32, 2, High(0, 1, bits=1, run_step=4, field_step=1), zero=4)),
    "Q4_K": Kernel(six_bit_pairs, planes(16, 4)),
    "Q5_K": Kernel(six_bit_pairs, planes(48, 4, High(16, 1, bits=1, run_step=2, field_step=1))),
    "Q6_K": Kernel(byte_scales, planes(0, 4, High(128, 2, bits=2, run_step=2, field_step=4), zero=32, width=2)),
    "IQ4_XS": Kernel(split_scales, book(IQ4, 8, 136)),
}
"""Kernels by the type's name."""
