"""The types of GGUF with 32 elements in a block, and the two with a code book of 16 values.

A value is code * scale (+ minimum), in fp32, with one rounding after each: ``Kernel.scales`` makes the scales (and
minima) of many blocks, ``Kernel.codes`` the codes of some of them as fp32. Layouts: ggml-common.h and ggml-quants.c of
https://github.com/ggml-org/llama.cpp; the same arithmetic as gguf-py's ``quants.dequantize``, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from aspec.models.formats.gguf.room import Nibbles, Room, copy_half, every, words

Step = Callable[[torch.Tensor], None]
"""From blocks [n, nbytes] uint8 to a buffer."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of n blocks: [n, groups, 1] fp32, and minima of the same shape that are added."""

    fill: Step
    scale: torch.Tensor
    minimum: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a type is decoded. Both functions take their buffers from a room, for a number of blocks."""

    scales: Callable[[Room, int], Scales]
    codes: Callable[[Room, int, torch.Tensor], Step]  # the last argument is where codes go: [n, size] fp32


def one_scale(at: int = 0, minimum_at: int | None = None) -> Callable[[Room, int], Scales]:
    """Scales of a type with one fp16 scale a block."""

    def scales(room: Room, count: int) -> Scales:
        scale = room.take(count, 1, 1)
        minimum = None if minimum_at is None else room.take(count, 1, 1)

        def fill(blocks: torch.Tensor) -> None:
            copy_half(scale.view(-1, 1), blocks, at)
            if minimum is not None and minimum_at is not None:
                copy_half(minimum.view(-1, 1), blocks, minimum_at)

        return Scales(fill, scale, minimum)

    return scales


def four_bits(at: int, zero: int = 0, fifth_at: int | None = None) -> Callable[[Room, int, torch.Tensor], Step]:
    """Codes of 4 bits at byte ``at``, with a fifth bit each from byte ``fifth_at`` on, less ``zero``."""

    def codes(room: Room, count: int, values: torch.Tensor) -> Step:
        nibbles = Nibbles(room, count)
        fifth = None if fifth_at is None else room.take(count, 4, dtype=torch.int64)

        def fill(blocks: torch.Tensor) -> None:
            nibbles.split(blocks[:, at : at + 16])
            if fifth is not None and fifth_at is not None:
                spread_bits(blocks[:, fifth_at : fifth_at + 4], fifth, 4)
                words(nibbles.codes).bitwise_or_(fifth)
            if zero:
                nibbles.codes.view(torch.int8).sub_(zero)
            values.copy_(nibbles.codes.view(torch.int8))

        return fill

    return codes


def spread_bits(stored: torch.Tensor, out: torch.Tensor, to: int) -> None:
    """The bits of every byte of ``stored`` as bytes of a word, each at bit ``to``; ``out``: int64, of its shape."""
    out.copy_(stored)
    out.mul_(every(1)).bitwise_and_(int.from_bytes(bytes(1 << bit for bit in range(8)), "little", signed=True))
    out.add_(every(0x7F)).bitwise_right_shift_(7 - to).bitwise_and_(every(1 << to))  # a byte is 0, or one bit


def eight_bits(room: Room, count: int, values: torch.Tensor) -> Step:
    """Codes of 8 bits, after the scale."""

    def fill(blocks: torch.Tensor) -> None:
        values.copy_(blocks[:, 2:].view(torch.int8))

    return fill


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the numbers of mxfp4


def book(values: tuple[int, ...], at: int, groups: int = 1) -> Callable[[Room, int, torch.Tensor], Step]:
    """Codes of 4 bits that name one of 16 values, in ``groups`` of 16 bytes from byte ``at`` on."""

    def codes(room: Room, count: int, out: torch.Tensor) -> Step:
        nibbles = Nibbles(room, count * groups)
        pairs = room.take(count * groups * 16, dtype=torch.int32)
        out_pairs = out.view(torch.int64).view(-1)
        table = pair_table(values, out.device)

        def fill(blocks: torch.Tensor) -> None:
            nibbles.split(blocks[:, at:].unflatten(1, (groups, 16)).flatten(0, 1) if groups > 1 else blocks[:, at:])
            pairs.copy_(nibbles.codes.view(torch.int16).view(-1))
            torch.index_select(table, 0, pairs, out=out_pairs)

        return fill

    return codes


@cache
def pair_table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Two codes, in the low halves of two bytes -> two fp32 values as one int64: half as many look-ups."""
    single = torch.tensor(values, dtype=torch.float32)
    pairs = torch.zeros(0x0F10, 2)
    for high in range(16):
        pairs[high << 8 : (high << 8) + 16, 0] = single
        pairs[high << 8 : (high << 8) + 16, 1] = single[high]
    return pairs.view(torch.int64).view(-1).to(device)


@cache
def power_table(device: torch.device) -> torch.Tensor:
    """The byte of an e8m0 scale -> half of the power of two that it stands for; the first two are subnormal."""
    bits = [0x00200000, 0x00400000, *((byte - 1) << 23 for byte in range(2, 256))]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device)


def power_scale(room: Room, count: int) -> Scales:
    """Scales of a type with one e8m0 scale a block."""
    scale, index = room.take(count, 1, 1), room.take(count, dtype=torch.int32)
    table = power_table(scale.device)

    def fill(blocks: torch.Tensor) -> None:
        index.copy_(blocks[:, 0])
        torch.index_select(table, 0, index, out=scale.view(-1))

    return Scales(fill, scale)


BLOCKS = {
    "Q4_0": Kernel(one_scale(), four_bits(2, zero=8)),
    "Q4_1": Kernel(one_scale(0, 2), four_bits(4)),
    "Q5_0": Kernel(one_scale(), four_bits(6, zero=16, fifth_at=2)),
    "Q5_1": Kernel(one_scale(0, 2), four_bits(8, fifth_at=4)),
    "Q8_0": Kernel(one_scale(), eight_bits),
    "IQ4_NL": Kernel(one_scale(), book(IQ4, 2)),
    "MXFP4": Kernel(power_scale, book(E2M1, 1)),
}
"""Kernels by the type's name."""
