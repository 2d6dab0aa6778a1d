"""Integers of 1 to 8 bits in 32-bit words, unpacked to bytes in tiles.

Value i of a row is the bits from ``bits * i`` on of the row's words, low bits first; 32 values take ``bits`` words, so a
value of 3 bits may lie in two words. GPTQ and compressed-tensors pack so; words that are packed along columns are
transposed first, which moves an eighth of what the values would. AWQ (gemm) packs 8 rows into a word, in another order.

No function allocates: results and intermediate values go to memory of the caller. A pass over a tile that stays in the
cache costs 0.03 to 0.1 ns per value, a look-up in a table 0.4 to 8 ns: hence the arithmetic on 2 or 8 values at once.
"""

import torch

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row of each nibble of a word of AWQ, low bits first."""

EIGHTS, PAIRS = 8, 2  # values of an int64, of an int16, one a byte


def num_words(count: int, bits: int) -> int:
    """Words of ``count`` values."""
    return -(-count * bits // 32)


def unpack(words: torch.Tensor, bits: int, values: torch.Tensor, spare: torch.Tensor) -> None:
    """Write the first values of every row.

    ``words``: int32 [rows, at least the words of the values], its last dimension contiguous. ``values``: uint8 [rows, a
    multiple of 8], contiguous; ``spare``: likewise, undefined before and after.
    """
    stored = words.view(torch.uint8)
    columns = values.shape[1]
    if bits == 8:
        values.copy_(stored[:, :columns])
    elif bits == 4:
        pairs, high = values.view(torch.int16), spare.view(torch.int16)
        pairs.copy_(stored[:, : columns // PAIRS])
        torch.bitwise_and(pairs, 0xF0, out=high)
        pairs.add_(high, alpha=0x0F)  # 0x00F0 becomes 0x0F00
    else:
        eights, high = values.view(torch.int64), spare.view(torch.int64)
        eights.zero_()
        for byte in range(bits):
            values[:, byte::EIGHTS].copy_(stored[:, byte : columns // EIGHTS * bits : bits])
        for mask, shift in _halvings(bits):
            torch.bitwise_and(eights, mask, out=high)
            eights.add_(high, alpha=shift)


def transpose(block: torch.Tensor, result: torch.Tensor, spare: torch.Tensor) -> None:
    """Write the transpose of ``block`` [a, b] to ``result`` [b, a]; ``spare`` [a, b] and both others contiguous.

    torch has a fast transpose for contiguous tensors only, so that copying the block first takes a fifth of the time.
    """
    spare.copy_(block)
    result.copy_(spare.t())


def unpack_awq(words: torch.Tensor, values: torch.Tensor, shifted: torch.Tensor, pairs: torch.Tensor) -> None:
    """Write 8 rows of values per row of words.

    ``words``, ``shifted``: int32 [rows, columns]; ``values``: uint8 [8 * rows, columns]; ``pairs``: uint8 [rows,
    columns]. All are contiguous; ``shifted`` and ``pairs`` are undefined before and after.
    """
    rows = values.view(words.shape[0], 8, words.shape[1])
    for byte in range(4):
        torch.bitwise_right_shift(words, 8 * byte, out=shifted)
        pairs.copy_(shifted)  # the lowest byte
        torch.bitwise_and(pairs, 0x0F, out=rows[:, AWQ_ROWS[2 * byte]])
        torch.bitwise_right_shift(pairs, 4, out=rows[:, AWQ_ROWS[2 * byte + 1]])


def _halvings(bits: int) -> list[tuple[int, int]]:
    """Steps from 8 adjacent values to one a byte: the mask of the values to move up, and the factor - 1 that moves them.

    Each step halves: 8 values into twice 4, these into twice 2, these into twice 1. ``x + (x & mask) * (2**n - 1)``
    moves the masked bits up by n, into bits that are zero.
    """
    steps = []
    for half in (4, 2, 1):
        upper = ((1 << half * bits) - 1) << half * bits
        mask = sum(upper << start for start in range(0, 64, 16 * half))
        steps.append((mask, (1 << half * (8 - bits)) - 1))
    return steps
