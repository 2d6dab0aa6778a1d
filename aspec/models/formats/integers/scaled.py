"""Weights that are numbers times scales, w = (q - z) * s, written in tiles that stay in the cache.

The libraries of GPTQ, AWQ and compressed-tensors compute the product in the dtype of the stored scales, and cast it to
the model's dtype. Here it is computed in float32, where an integer of 9 bits times a scale of 16 bits is exact, and is
then rounded to the dtype of the scales: to the same bits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from aspec.models.formats.integers.packed_ints import Room, Unpacker

TILE = 1 << 17  # weights; 512 KiB in float32
NARROW = 512  # columns of a tile, where a row of stored words holds columns of the weight
WORD = 32  # columns of such a tile are a multiple

Grid = list[Sequence[torch.Tensor]]
"""The tiles of a tensor, by row."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all tiles of a weight use."""

    scales: torch.Tensor  # [rows, groups], any strides
    zeros: torch.Tensor | int  # likewise
    index: torch.Tensor | None = None  # int32 [columns]: the group of each column; None: groups of adjacent columns
    damaged: torch.Tensor | None = None  # bool [], on a device: whether stored contents are damaged


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a weight: what the layout of its workspace depends on."""

    rows: int
    columns: int
    groups: int
    dtype: torch.dtype  # of the scales
    bits: int = 8
    has_zeros: bool = True
    reordered: bool = False  # whether columns may choose their groups

    @property
    def group(self) -> int:
        """Adjacent columns with one scale."""
        return self.columns // self.groups if self.columns % self.groups == 0 else self.columns


def on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be looked at: on a device that would wait for all work before."""
    return tensor.device.type == "cpu"


def grid(tensor: torch.Tensor, height: int, width: int, count: int) -> Grid:
    """The tiles of a tensor [rows, columns], ``count`` a row, or the same for all; slicing one by one is slower."""
    rows = [split(row, width, 1) for row in split(tensor, height)]
    return rows if len(rows[0]) == count else [list(row) * count for row in rows]


def split(tensor: torch.Tensor, size: int, dimension: int = 0) -> Sequence[torch.Tensor]:
    """Pieces of ``size``, the last of which may be smaller."""
    pieces: Sequence[torch.Tensor] = torch.split(tensor, size, dimension)
    return pieces


class ScaledDecode(ABC):
    """Decodes a weight that has a scale per row and group of columns; see ``Decode``."""

    narrow = False  # whether a row of stored words holds columns of the weight
    multiple = 1  # of the rows of a tile, except of the last one

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        unit = math.lcm(sizes.group, WORD) if sizes.groups > 1 else WORD
        self.width = min(max(1, NARROW // unit) * unit, sizes.columns) if self.narrow else sizes.columns
        self.height = min(max(1, TILE // self.width // self.multiple) * self.multiple, sizes.rows)
        self._shared_bytes, self.workspace_bytes = _bytes(type(self), sizes, self.height, self.width)

    @classmethod
    @abstractmethod
    def take_shared(cls, sizes: Sizes, room: Room) -> tuple[Any, ...]:
        """Memory for ``share``."""

    @abstractmethod
    def share(self, stored: Sequence[torch.Tensor], pieces: tuple[Any, ...]) -> Shared:
        """Unpack what all tiles use."""

    @classmethod
    @abstractmethod
    def unpacker(cls, sizes: Sizes, room: Room, rows: int, columns: int) -> Unpacker:
        """What unpacks the numbers of a tile, and has two bytes a weight."""

    def numbers(self, stored: torch.Tensor, height: int) -> Grid:
        """The tiles of the first stored tensor, for tiles of ``height`` and ``width`` of the weight."""
        return [(row,) for row in split(stored, height)]

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """See ``Decode``. On a device, where each operation has its price, tiles are as large as the workspace."""
        room, sizes, height = Room(workspace), self.sizes, self.height
        shared = self.share(stored, self.take_shared(sizes, room))
        scales, zeros = _prepare(sizes, room, shared)
        if not on_host(out):
            height *= max(1, room.left.numel() // (self.workspace_bytes - self._shared_bytes))
        numbers = self.numbers(stored[0], height)
        count = len(numbers[0])
        groups = sizes.groups if shared.index is not None else max(1, self.width // sizes.group)
        outs, factors = grid(out, height, self.width, count), grid(scales, height, groups, count)
        offsets: Sequence[Sequence[torch.Tensor | int]] = (
            [[zeros] * count] * len(outs) if isinstance(zeros, int) else grid(zeros, height, groups, count)
        )
        index = [None] * count if shared.index is None else split(shared.index, self.width)
        tiles: dict[torch.Size, Tile] = {}
        for row in zip(numbers, outs, factors, offsets, strict=True):
            for number, piece, factor, offset, columns in zip(*row, index, strict=True):
                tile = tiles.get(piece.shape)
                if tile is None:
                    rows, width = piece.shape
                    tile = Tile(type(self), sizes, Room(room.left), rows, width, columns is not None)
                    tiles[piece.shape] = tile
                tile.read(number, offset, columns)
                tile.multiply(factor, columns)
                tile.write(piece)


@cache
def _bytes(kind: type[ScaledDecode], sizes: Sizes, height: int, width: int) -> tuple[int, int]:
    """Bytes that all tiles share, and bytes of a workspace."""
    room = Room()
    kind.take_shared(sizes, room)
    _take_prepared(sizes, room)
    shared = room.counted
    Tile(kind, sizes, room, height, width, sizes.reordered)
    return shared, room.counted


def _take_prepared(sizes: Sizes, room: Room) -> tuple[torch.Tensor, torch.Tensor]:
    shape = sizes.rows, sizes.groups
    return room.take(torch.float32, *shape), room.take(torch.float32, *shape if sizes.has_zeros else (0, 0))


def _prepare(sizes: Sizes, room: Room, shared: Shared) -> tuple[torch.Tensor, torch.Tensor | int]:
    """Scales in float32, and zero points as they are subtracted: in int8 from integers, or in float32.

    Scales of a damaged weight are NaN, and so is the weight; a text ends with an error at its first logits.
    """
    scales, zeros = _take_prepared(sizes, room)
    scales.copy_(shared.scales)
    if shared.damaged is not None:
        scales.masked_fill_(shared.damaged, math.nan)
    if isinstance(shared.zeros, int):
        return scales, shared.zeros
    if sizes.bits < 8 and shared.index is None:
        zeros = zeros.view(-1).view(torch.int8)[: zeros.numel()].view(zeros.shape)
    return scales, zeros.copy_(shared.zeros)


class Tile:
    """Memory for a tile of one size, and views of it."""

    def __init__(
        self, kind: type[ScaledDecode], sizes: Sizes, room: Room, rows: int, columns: int, reordered: bool
    ) -> None:
        self._floats = room.take(torch.float32, rows, columns)
        self._others = room.take(torch.float32, rows, columns if reordered else 0)
        self._unpacker = kind.unpacker(sizes, room, rows, columns)
        groups = 1 if reordered else max(1, columns // sizes.group)
        self._grouped = self._floats.view(rows, groups, columns // groups)
        self._integers = self._unpacker.signed.view(rows, groups, columns // groups)
        self._rounded = self._floats
        if sizes.dtype is not torch.float32:
            self._rounded = self._unpacker.bytes.view(-1).view(sizes.dtype).view(rows, columns)

    def read(self, numbers: torch.Tensor, zeros: torch.Tensor | int, index: torch.Tensor | None) -> None:
        """q - z, with zero points by row and group, or one for all."""
        if numbers.dtype is torch.int32:
            self._unpacker(numbers)
            self._floats.copy_(self._offset(zeros))
        else:
            self._floats.copy_(numbers)
        if not isinstance(zeros, torch.Tensor) or zeros.dtype is not torch.float32:
            return
        if index is None:
            self._grouped.sub_(zeros.unsqueeze(-1))
        else:
            torch.index_select(zeros, 1, index, out=self._others)
            self._floats.sub_(self._others)

    def _offset(self, zeros: torch.Tensor | int) -> torch.Tensor:
        """The unpacked integers, without zero points that are integers."""
        if isinstance(zeros, int):
            return self._unpacker.signed.add_(-zeros)  # modulo 256
        if zeros.dtype is torch.float32:
            return self._unpacker.values
        self._integers.sub_(zeros.unsqueeze(-1))
        return self._unpacker.signed

    def multiply(self, scales: torch.Tensor, index: torch.Tensor | None) -> None:
        """(q - z) * s."""
        if index is None:
            self._grouped.mul_(scales.unsqueeze(-1))
        else:
            torch.index_select(scales, 1, index, out=self._others)
            self._floats.mul_(self._others)

    def write(self, out: torch.Tensor) -> None:
        """Round to the dtype of the scales, and cast."""
        if self._rounded.dtype in (torch.float32, out.dtype):
            out.copy_(self._floats)
        elif out.dtype is torch.float32:
            out.copy_(self._rounded.copy_(self._floats))
        else:
            out.copy_(self._floats.copy_(self._rounded.copy_(self._floats)))
