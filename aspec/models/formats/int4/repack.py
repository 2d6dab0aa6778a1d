"""From stored integers with scales by group to the form of int4 products: the same codes in another order.

Scales and offsets are rounded to bfloat16, as the product takes them. An offset is (8 - z) * s for a zero point z.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aspec.errors import CheckpointError, shown
from aspec.models.formats.int4.form import GROUPS, ZERO, Int4Factor, in_blocks, pack_codes
from aspec.models.formats.integers.packed_ints import Room
from aspec.models.formats.integers.scaled import TILE, ScaledDecode, Shared

BLOCK = 64  # a multiple of every processor's block


@dataclass(frozen=True, slots=True)
class RepackScaled:
    """Writes codes and scales of a weight that ``decode`` decodes; see ``WriteInt4``."""

    name: str  # for messages
    decode: ScaledDecode

    def __call__(
        self,
        stored: Sequence[torch.Tensor],
        block: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """See ``WriteInt4``."""
        decode, room = self.decode, Room(workspace)
        own, (height, width) = decode.sizes, _tile(decode)
        shared = decode.share(stored, decode.take_shared(own, room))
        if shared.index is not None:
            raise CheckpointError(
                f"{shown(self.name)}: expected groups of adjacent inputs for products with packed weights, found "
                f"inputs in another order (act-order). Run with --products decoded."
            )
        _write_scales(shared, scales, room.take(torch.float32, 2, own.groups, own.rows))
        blocks = in_blocks(codes, block)
        for first, row in zip(range(0, own.rows, height), decode.numbers(stored[0], height), strict=True):
            for start, words in zip(range(0, own.columns, width), row, strict=True):
                count, columns = min(height, own.rows - first), min(width, own.columns - start)
                unpack = type(decode).unpacker(own, Room(room.left), count, columns)
                unpack(words)
                rows = slice(first // block, (first + count) // block)
                pack_codes(unpack.values, block, blocks[rows, start : start + columns])


def scaled_factor(name: str, decode: ScaledDecode) -> Int4Factor | None:
    """How the weight that ``decode`` decodes becomes a factor; None if its integers, or groups, are others."""
    own = decode.sizes
    if own.bits != 4 or own.columns % own.groups or own.group not in GROUPS:
        return None
    room = Room()
    decode.take_shared(own, room)
    room.take(torch.float32, 2, own.groups, own.rows)
    type(decode).unpacker(own, room, *_tile(decode))
    rounds = own.dtype is not torch.bfloat16 or own.has_zeros
    return Int4Factor(own.group, RepackScaled(name, decode), room.counted, rounds=rounds)


def _tile(decode: ScaledDecode) -> tuple[int, int]:
    """Rows and columns that are repacked at once: whole blocks."""
    own = decode.sizes
    return min(own.rows, max(1, TILE // decode.width // BLOCK) * BLOCK), decode.width


def _write_scales(shared: Shared, out: torch.Tensor, exact: torch.Tensor) -> None:
    """Scales and offsets by group and row; ``exact`` holds them in fp32."""
    (factors, offsets), zeros = exact, shared.zeros
    factors.copy_(shared.scales.t())
    if isinstance(zeros, int):
        offsets.fill_(zeros)
    else:
        offsets.copy_(zeros.t())
    offsets.sub_(ZERO).neg_().mul_(factors)
    out[..., 0].copy_(factors)
    out[..., 1].copy_(offsets)
