"""Integers of 1 to 8 bits in 32-bit words, unpacked to bytes in tiles.

Value i of a row is the bits from ``bits * i`` on of the row's words, low bits first; 32 values take ``bits`` words, so
a value of 3 bits may lie in two words. GPTQ and compressed-tensors pack so; words that are packed along columns are
transposed first, which moves an eighth of what the values would. AWQ packs 8 rows into a word, in another order.

Unpacking allocates nothing: all memory is of a workspace. A pass over a tile that stays in the cache costs 0.03 to 0.1
ns per value, and torch's fastest look-up (index_select) 0.35: hence the arithmetic on 2 or 8 values at once. Views are
made once per size of tile, because each costs as much as a pass over 10,000 values.
"""

import torch

from aspec.models.formats.workspace import Workspace

MOST = 1 << 50  # bytes, more than any workspace
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row of each nibble of a word of AWQ, low bits first."""

PAIR, EIGHT = 2, 8  # values of an int16, of an int64, one a byte


class Room(Workspace):
    """A workspace that tells what is left of it; without memory it counts, with tensors on meta."""

    def __init__(self, memory: torch.Tensor | None = None) -> None:
        super().__init__(torch.empty(MOST, dtype=torch.uint8, device="meta") if memory is None else memory)

    @property
    def left(self) -> torch.Tensor:
        """The memory that is not taken."""
        return self._left

    @property
    def counted(self) -> int:
        """Bytes that were taken, where it counts."""
        return MOST - self._left.numel()


def num_words(count: int, bits: int) -> int:
    """Words of ``count`` values."""
    return -(-count * bits // 32)


class Unpacker:
    """Unpacks words of rows, int32 [rows, words], to ``values``, uint8 [rows, columns]; columns a multiple of 8."""

    def __init__(self, room: Room, bits: int, rows: int, columns: int) -> None:
        self.bits = bits
        self.bytes = room.take(torch.uint8, 2, rows, columns)
        self.values: torch.Tensor = self.bytes[0]
        self.signed: torch.Tensor = self.values.view(torch.int8)
        kind = torch.int16 if bits == 4 else torch.int64
        if bits != EIGHT:
            self._together, self._high = self.bytes.view(kind)  # several values
        self._halvings = _halvings(bits)

    def __call__(self, words: torch.Tensor) -> None:
        """Unpack; the last dimension of ``words`` is contiguous."""
        self._unpack(words.view(torch.uint8))

    def _unpack(self, stored: torch.Tensor) -> None:
        columns = self.values.shape[1]
        if self.bits == EIGHT:
            self.values.copy_(stored if stored.shape[1] == columns else stored[:, :columns])
        elif self.bits == 4:
            self._together.copy_(stored if stored.shape[1] * PAIR == columns else stored[:, : columns // PAIR])
            torch.bitwise_and(self._together, 0xF0, out=self._high)
            self._together.add_(self._high, alpha=0x0F)  # 0x00F0 becomes 0x0F00
        else:
            self._together.zero_()
            for byte in range(self.bits):
                self.values[:, byte::EIGHT].copy_(stored[:, byte : columns // EIGHT * self.bits : self.bits])
            for mask, factor in self._halvings:
                torch.bitwise_and(self._together, mask, out=self._high)
                self._together.add_(self._high, alpha=factor)


class ColumnUnpacker(Unpacker):
    """Unpacks words of columns, int32 [words, rows]."""

    def __init__(self, room: Room, bits: int, rows: int, columns: int) -> None:
        super().__init__(room, bits, rows, columns)
        count = num_words(columns, bits)
        self._turn = Turn(room, count, rows)
        self._turned = self._turn.turned.view(torch.uint8)

    def __call__(self, words: torch.Tensor) -> None:  # noqa: D102
        self._turn(words)
        self._unpack(self._turned)


class AwqUnpacker(Unpacker):
    """Unpacks words of columns, int32 [columns, rows / 8], with the values of 8 rows in the order of AWQ."""

    def __init__(self, room: Room, bits: int, rows: int, columns: int) -> None:
        super().__init__(room, EIGHT, rows, columns)
        count = rows // EIGHT
        self._turn = Turn(room, columns, count)
        self._steps = room.take(torch.int32, 4)
        self._shifts = self._steps.view(4, 1, 1)
        self._shifted = room.take(torch.int32, 4, count, columns)
        self._pairs = room.take(torch.uint8, 4, count, columns)  # the bytes of the words
        self._split = self._pairs.view(2, 2, count, columns)
        # nibble h of byte 2p + a has the row 4a + 2h + p
        rows_of = self.values.view(count, 2, 2, 2, columns)
        self._low, self._high = (rows_of[:, :, half].permute(2, 1, 0, 3) for half in (0, 1))

    def __call__(self, words: torch.Tensor) -> None:  # noqa: D102
        self._turn(words)
        torch.arange(0, 32, EIGHT, out=self._steps)  # each time: tiles of other sizes use the same memory
        torch.bitwise_right_shift(self._turn.turned, self._shifts, out=self._shifted)
        self._pairs.copy_(self._shifted)  # the lowest byte
        torch.bitwise_and(self._split, 0x0F, out=self._low)
        torch.bitwise_right_shift(self._split, 4, out=self._high)


class Turn:
    """Transposes [a, b] to ``turned`` [b, a]."""

    def __init__(self, room: Room, rows: int, columns: int) -> None:
        self.turned = room.take(torch.int32, columns, rows)
        self._turned = self.turned.unsqueeze(0)  # torch takes temporary memory to transpose two dimensions

    def __call__(self, words: torch.Tensor) -> None:
        """Transpose."""
        self._turned.copy_(words.t().unsqueeze(0))


def _halvings(bits: int) -> list[tuple[int, int]]:
    """Steps from 8 adjacent values to one a byte: the mask of the values to move up, and a factor that moves them.

    Each step halves: 8 values into twice 4, these into twice 2, these into twice 1. ``x + (x & mask) * (2**n - 1)``
    moves the masked bits up by n, into bits that are zero.
    """
    steps = []
    for half in (4, 2, 1):
        upper = ((1 << half * bits) - 1) << half * bits
        mask = sum(upper << start for start in range(0, 64, 16 * half))
        steps.append((mask, (1 << half * (EIGHT - bits)) - 1))
    return steps
