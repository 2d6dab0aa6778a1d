"""The types of GGUF with 32 elements in a block.

A value is code * scale (+ minimum), in fp32, with one rounding after each: ``Kernel.scales`` makes the scales (and
minima) of many blocks, ``Kernel.codes`` the codes of some of them as fp32. Layouts: ggml-common.h and ggml-quants.c of
https://github.com/ggml-org/llama.cpp; the same arithmetic as gguf-py's ``quants.dequantize``, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from aspec.models.formats.gguf.room import Nibbles, Room, constant, mask, part, word, words

Step = Callable[[int, int], None]
"""Decodes the blocks from one number to another into buffers."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of n blocks: [n, groups, 1] fp32, and minima of the same shape that are added."""

    fill: Step
    scale: torch.Tensor
    minimum: torch.Tensor | None = None


MakeScales = Callable[[Room, torch.Tensor, int], Scales]
MakeCodes = Callable[[Room, torch.Tensor, int, torch.Tensor], Step]


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a type is decoded. Both take their buffers from a room, for a number of all blocks [all, nbytes] uint8."""

    scales: MakeScales
    codes: MakeCodes  # the last argument is where codes go: [n, size] fp32


def one_scale(at: int = 0, minimum_at: int | None = None) -> MakeScales:
    """Scales of a type with one fp16 scale a block."""

    def scales(room: Room, blocks: torch.Tensor, count: int) -> Scales:
        made = [room.take(count, 1, 1) for place in (at, minimum_at) if place is not None]
        stored = [part(blocks, place, place + 2, torch.float16) for place in (at, minimum_at) if place is not None]

        def fill(begin: int, end: int) -> None:
            for out, halves in zip(made, stored, strict=True):
                out.view(-1, 1).copy_(halves[begin:end])

        return Scales(fill, *made)

    return scales


def four_bits(at: int, zero: int = 0, fifth_at: int | None = None) -> MakeCodes:
    """Codes of 4 bits at byte ``at``, with a fifth bit each from byte ``fifth_at`` on, less ``zero``."""

    def codes(room: Room, blocks: torch.Tensor, count: int, values: torch.Tensor) -> Step:
        nibbles = Nibbles(room, blocks, at, at + 16, count)
        signed, all_words = nibbles.codes.view(torch.int8), words(nibbles.codes)
        fifth = None if fifth_at is None else _Fifth(room, blocks, fifth_at, count)

        def fill(begin: int, end: int) -> None:
            nibbles.split(begin, end)
            if fifth is not None:
                all_words.bitwise_or_(fifth.spread(begin, end))
            if zero:
                signed.sub_(constant(zero, torch.int8))
            values.copy_(signed)

        return fill

    return codes


class _Fifth:
    """The fifth bits of 32 codes, from 4 bytes of a block."""

    def __init__(self, room: Room, blocks: torch.Tensor, at: int, count: int) -> None:
        self._stored = blocks[:, at : at + 4]
        self._made = room.take(count, 4, dtype=torch.int64)

    def spread(self, begin: int, end: int) -> torch.Tensor:
        """A word for each byte, whose bits are bit 4 of the word's bytes."""
        made = self._made
        made.copy_(self._stored[begin:end])
        made.mul_(mask(1)).bitwise_and_(constant(word(*(1 << bit for bit in range(8)))))  # a byte is 0, or one bit
        return made.add_(mask(0x7F)).bitwise_right_shift_(constant(3)).bitwise_and_(mask(0x10))


def eight_bits(room: Room, blocks: torch.Tensor, count: int, values: torch.Tensor) -> Step:
    """Codes of 8 bits, after the scale."""
    stored = blocks[:, 2:].view(torch.int8)

    def fill(begin: int, end: int) -> None:
        values.copy_(stored[begin:end])

    return fill


@cache
def power_table(device: torch.device) -> torch.Tensor:
    """The byte of an e8m0 scale -> half of the power of two that it stands for; the first two are subnormal."""
    bits = [0x00200000, 0x00400000, *((byte - 1) << 23 for byte in range(2, 256))]
    return torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32).to(device)


def power_scale(room: Room, blocks: torch.Tensor, count: int) -> Scales:
    """Scales of a type with one e8m0 scale a block."""
    scale, index = room.take(count, 1, 1), room.take(count, dtype=torch.int32)
    table = power_table(scale.device)

    def fill(begin: int, end: int) -> None:
        index.copy_(blocks[begin:end, 0])
        torch.index_select(table, 0, index, out=scale.view(-1))

    return Scales(fill, scale)


def book(values: tuple[int, ...], at: int, end_at: int) -> MakeCodes:
    """Codes of 4 bits that name one of 16 values, in groups of 16 bytes."""

    def codes(room: Room, blocks: torch.Tensor, count: int, out: torch.Tensor) -> Step:
        nibbles = Nibbles(room, blocks, at, end_at, count)
        stored = nibbles.codes.view(torch.int16).view(-1)
        pairs = room.take(stored.shape[0], dtype=torch.int32)
        table, out_pairs = pair_table(values, out.device), out.view(torch.int64).view(-1)

        def fill(begin: int, end: int) -> None:
            nibbles.split(begin, end)
            pairs.copy_(stored)
            torch.index_select(table, 0, pairs, out=out_pairs)

        return fill

    return codes


@cache
def pair_table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Two codes, in the low halves of two bytes -> two fp32 values as one int64: half as many look-ups."""
    single = torch.tensor(values, dtype=torch.float32, device="cpu")
    pairs = torch.zeros(0x0F10, 2, device="cpu")
    for high in range(16):
        pairs[high << 8 : (high << 8) + 16, 0] = single
        pairs[high << 8 : (high << 8) + 16, 1] = single[high]
    return pairs.view(torch.int64).view(-1).to(device)


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the numbers of mxfp4

BLOCKS = {
    "Q4_0": Kernel(one_scale(), four_bits(2, zero=8)),
    "Q4_1": Kernel(one_scale(0, 2), four_bits(4)),
    "Q5_0": Kernel(one_scale(), four_bits(6, zero=16, fifth_at=2)),
    "Q5_1": Kernel(one_scale(0, 2), four_bits(8, fifth_at=4)),
    "Q8_0": Kernel(one_scale(), eight_bits),
    "IQ4_NL": Kernel(one_scale(), book(IQ4, 2, 18)),
    "MXFP4": Kernel(power_scale, book(E2M1, 1, 17)),
}
"""Kernels by the type's name."""
