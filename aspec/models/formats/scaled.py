"""Weights that are numbers times scales, w = (q - z) * s, written in tiles that stay in the cache.

The libraries of GPTQ, AWQ and compressed-tensors compute the product in the dtype of the stored scales, and cast it to
the model's dtype. Here it is computed in float32, where an integer of 9 bits times a scale of 16 bits is exact, and is
then rounded to the dtype of the scales: to the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aspec.errors import InternalError

ALIGNMENT = 64
TILE = 1 << 16  # weights; 256 KiB in float32
NOTHING = torch.empty(0)

Pieces = tuple[torch.Tensor, ...]


class Room:
    """Hands out a workspace, piece by piece; without a workspace it only counts the bytes."""

    def __init__(self, workspace: torch.Tensor | None = None, used: int = 0) -> None:
        self._workspace = workspace
        self.used = used  # bytes, a multiple of ALIGNMENT

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The next piece, with undefined contents. Raises InternalError if too few bytes are left."""
        start, end = self.used, self.used + torch.Size(shape).numel() * dtype.itemsize
        self.used = -(-end // ALIGNMENT) * ALIGNMENT
        if self._workspace is None:
            return NOTHING
        if end > self._workspace.numel():
            raise InternalError(f"decoding needs more than the {self._workspace.numel()} bytes of its workspace")
        return self._workspace[start:end].view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all tiles of a weight use."""

    scales: torch.Tensor  # [rows, groups], any strides
    zeros: torch.Tensor | int  # [rows, groups], any strides
    index: torch.Tensor | None = None  # int32 [columns]: the group of each column; None: groups of adjacent columns


@dataclass(frozen=True, slots=True)
class Tile:
    """Memory for some rows."""

    floats: torch.Tensor  # float32 [rows, columns]
    others: torch.Tensor  # float32 [rows, columns]
    scales: torch.Tensor  # float32 [rows, groups]
    own: Pieces  # of the decoder's class


class ScaledDecode(ABC):
    """Decodes a weight [rows, columns] that has a scale per row and group of columns; see ``Decode``."""

    multiple = 1  # of the rows of a tile, except of the last one

    def __init__(self, rows: int, columns: int, groups: int, dtype: torch.dtype) -> None:
        self.rows, self.columns, self.groups = rows, columns, groups
        self.dtype = dtype  # of the scales
        steps = max(1, TILE // max(1, columns * self.multiple))
        self._step = min(steps * self.multiple, rows)
        room = Room()
        self.take_shared(room)
        self._shared_bytes = room.used
        self._take_tile(room, self._step)
        self.workspace_bytes = room.used

    @abstractmethod
    def take_shared(self, room: Room) -> Pieces:
        """Memory for ``share``."""

    @abstractmethod
    def share(self, stored: Sequence[torch.Tensor], pieces: Pieces) -> Shared:
        """Unpack what all tiles use."""

    @abstractmethod
    def take_own(self, room: Room, rows: int) -> Pieces:
        """Memory for ``fill``, for a tile of ``rows``."""

    @abstractmethod
    def fill(self, stored: Sequence[torch.Tensor], shared: Shared, start: int, tile: Tile) -> None:
        """Write q - z of the rows from ``start`` on to ``tile.floats``."""

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """See ``Decode``. On a device, where each operation has its price, tiles are as large as the workspace."""
        room = Room(workspace)
        shared = self.share(stored, self.take_shared(room))
        step, used = self._step, room.used
        if out.device.type != "cpu":
            step *= max(1, (workspace.numel() - used) // (self.workspace_bytes - used))
        tile: Tile | None = None
        for start in range(0, self.rows, step):
            rows = min(step, self.rows - start)
            if tile is None or tile.floats.shape[0] != rows:
                tile = self._take_tile(Room(workspace, used), rows)
            tile.scales.copy_(shared.scales[start : start + rows])
            self.fill(stored, shared, start, tile)
            self._multiply(tile, shared.index)
            self._store(tile, out[start : start + rows])

    def _take_tile(self, room: Room, rows: int) -> Tile:
        floats, others = (room.take(torch.float32, rows, self.columns) for _ in range(2))
        return Tile(floats, others, room.take(torch.float32, rows, self.groups), self.take_own(room, rows))

    def _multiply(self, tile: Tile, index: torch.Tensor | None) -> None:
        if index is None:
            self.grouped(tile.floats).mul_(tile.scales.unsqueeze(-1))
        else:
            torch.index_select(tile.scales, 1, index, out=tile.others)
            tile.floats.mul_(tile.others)

    def _store(self, tile: Tile, out: torch.Tensor) -> None:
        """Round to the dtype of the scales, and cast."""
        if self.dtype not in (torch.float32, out.dtype):
            rounded = tile.others.view(-1).view(self.dtype)[: out.numel()].view(out.shape)
            rounded.copy_(tile.floats)
            (out if out.dtype is torch.float32 else tile.floats).copy_(rounded)
            if out.dtype is torch.float32:
                return
        out.copy_(tile.floats)

    def grouped(self, tile: torch.Tensor) -> torch.Tensor:
        """[rows, columns] as [rows, groups, columns of a group]."""
        return tile.view(tile.shape[0], self.groups, self.columns // self.groups)


class IntegerDecode(ScaledDecode):
    """Decodes packed integers of ``bits`` with zero points."""

    def __init__(self, rows: int, columns: int, groups: int, dtype: torch.dtype, bits: int) -> None:
        self.bits = bits
        self._signed = torch.int16 if bits == 8 else torch.int8  # holds q - z
        super().__init__(rows, columns, groups, dtype)

    @abstractmethod
    def take_words(self, room: Room, rows: int) -> Pieces:
        """Memory for ``unpack``, for a tile of ``rows``."""

    @abstractmethod
    def unpack(self, stored: torch.Tensor, start: int, values: torch.Tensor, spare: torch.Tensor, own: Pieces) -> None:
        """Write q of the rows from ``start`` on to ``values``, uint8 [rows, columns]; ``spare`` is like ``values``."""

    def take_own(self, room: Room, rows: int) -> Pieces:  # noqa: D102
        values = room.take(torch.uint8, rows, self.columns)
        spare = room.take(self._signed, rows, self.columns)
        integers, floats = room.take(self._signed, rows, self.groups), room.take(torch.float32, rows, self.groups)
        return (values, spare, integers, floats, *self.take_words(room, rows))

    def fill(self, stored: Sequence[torch.Tensor], shared: Shared, start: int, tile: Tile) -> None:  # noqa: D102
        values, spare, integers, floats, *own = tile.own
        self.unpack(stored[0], start, values, spare.view(torch.uint8)[:, : self.columns], tuple(own))
        zeros = shared.zeros
        if isinstance(zeros, torch.Tensor):
            zeros = zeros[start : start + values.shape[0]]
        if shared.index is not None and isinstance(zeros, torch.Tensor):
            floats.copy_(zeros)
            torch.index_select(floats, 1, shared.index, out=tile.others)
            torch.sub(values, tile.others, out=tile.floats)
            return
        signed = values.view(torch.int8)
        if self.bits == 8:
            signed = spare
            signed.copy_(values)
        if isinstance(zeros, torch.Tensor):
            integers.copy_(zeros)
            self.grouped(signed).sub_(integers.unsqueeze(-1))
        else:
            signed.sub_(zeros)
        tile.floats.copy_(signed)
