"""From blocks of Q4_0 and Q4_1 to the form of int4 products: the same codes in another order.

A block has fp16 numbers, which are rounded to bfloat16 scales and offsets: (code - 8) * d of Q4_0, and code * d + m
of Q4_1, which is (code - 8) * d + (m + 8 d).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from aspec.models.formats.gguf.room import Nibbles, Room, part
from aspec.models.formats.int4.form import TILE_ROWS, ZERO, Int4Factor, in_blocks, pack_codes

GROUP = 32
STARTS = {"Q4_0": 2, "Q4_1": 4}
"""The byte of a block where its codes begin, after the scale and the minimum."""


@dataclass(frozen=True, slots=True)
class RepackBlocks:
    """Writes codes and scales of a weight; see ``WriteInt4``."""

    kind: str
    shape: tuple[int, int]
    order: torch.Tensor | None = field(compare=False)  # int64 [rows]: the stored row of every row; None: the same

    def __call__(
        self,
        stored: Sequence[torch.Tensor],
        block: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """See ``WriteInt4``."""
        rows, columns = self.shape
        lines, packed, height = stored[0].view(rows, -1), in_blocks(codes, block), self._height
        for first in range(0, rows, height):
            count = min(height, rows - first)
            tile, nibbles, factors, offsets = self._take(Room(workspace), count)
            if self.order is None:
                tile.copy_(lines[first : first + count])
            else:
                torch.index_select(lines, 0, self.order[first : first + count], out=tile)
            nibbles.split(0, count * columns // GROUP)
            pack_codes(nibbles.codes.view(count, columns), block, packed[first // block : (first + count) // block])
            blocks = tile.view(-1, lines.shape[1] * GROUP // columns)
            factors.view(-1, 1).copy_(part(blocks, 0, 2, torch.float16))
            if self.kind == "Q4_1":
                offsets.view(-1, 1).copy_(part(blocks, 2, 4, torch.float16))
                offsets.add_(factors, alpha=ZERO)
            else:
                offsets.zero_()
            target = scales[:, first : first + count]
            target[..., 0].copy_(factors.t())
            target[..., 1].copy_(offsets.t())

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace."""
        room = Room.endless()
        self._take(room, self._height)
        return room.used

    @property
    def _height(self) -> int:
        return min(TILE_ROWS, self.shape[0])

    def _take(self, room: Room, count: int) -> tuple[torch.Tensor, Nibbles, torch.Tensor, torch.Tensor]:
        """For a tile of so many rows: its stored bytes, its codes, its scales and its offsets, fp32."""
        width, start = self.shape[1] // GROUP, STARTS[self.kind]
        tile = room.take(count, width * (start + GROUP // 2), dtype=torch.uint8)
        blocks = tile.view(count * width, start + GROUP // 2)
        nibbles = Nibbles(room, blocks, start, start + GROUP // 2, count * width)
        return tile, nibbles, room.take(count, width), room.take(count, width)


def blocks_factor(
    kind: str, shape: tuple[int, ...], view: Callable[[torch.Tensor], torch.Tensor], offset: float
) -> Int4Factor | None:
    """How a stored tensor becomes a factor; None for other types, and where it fills more than whole rows.

    ``view``: from the weight to the elements that the tensor fills, in its order.
    """
    if kind not in STARTS or len(shape) != 2 or offset or shape[1] % GROUP:
        return None
    rows, columns = shape
    places = view(torch.arange(rows)[:, None].expand(rows, columns))
    across = view(torch.arange(columns)[None].expand(rows, columns))
    if places.numel() != rows * columns or not torch.equal(across, torch.arange(columns).expand(across.shape)):
        return None
    order = torch.argsort(places[..., 0].reshape(-1))
    same = torch.equal(order, torch.arange(rows))
    write = RepackBlocks(kind, (rows, columns), None if same else order)
    return Int4Factor(GROUP, write, write.workspace_bytes)
