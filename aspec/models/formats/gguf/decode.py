"""From stored blocks to a weight: in tiles of rows that stay in the cache, through a kernel's two steps.

The stored tensors of a weight, its pieces, fill views of it, because llama.cpp stores some weights in another order
than transformers: heads of queries and keys with their rotary pairs side by side, experts without their partner.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from aspec.io.gguf import TYPES
from aspec.models.formats.gguf.blocks import BLOCKS
from aspec.models.formats.gguf.k_quants import K_QUANTS
from aspec.models.formats.gguf.room import Room
from aspec.models.formats.packed import Decode

TILE = 1 << 17  # elements that are decoded at once: 512 KiB in fp32
CHUNK = 1 << 22  # elements whose scales are made at once: an operation on few bytes costs as much as one on many

KERNELS = {**BLOCKS, **K_QUANTS}
"""The packed types that can be decoded."""
PLAIN = {kind.name: kind.dtype for kind in TYPES.values() if kind.dtype is not None and kind.dtype.is_floating_point}
SIZES = {kind.name: (kind.size, kind.nbytes) for kind in TYPES.values()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor and its place in a weight."""

    kind: str
    shape: tuple[int, ...]  # of its elements
    view: Callable[[torch.Tensor], torch.Tensor]  # from the weight to the elements that it fills, in its order
    offset: float = 0.0  # is added to every element


def decoder(pieces: Sequence[Piece]) -> tuple[Decode, int]:
    """The function that decodes a weight of these pieces, and the bytes of its workspace."""

    def decode(stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        for piece, tensor in zip(pieces, stored, strict=True):
            _fill(piece, tensor, piece.view(out), workspace)

    return decode, max(_workspace_bytes(piece.kind, piece.shape) for piece in pieces)


def _fill(piece: Piece, stored: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor) -> None:
    if piece.kind in PLAIN:
        _fill_plain(piece, stored, out, workspace)
        return
    size, nbytes = SIZES[piece.kind]
    blocks, width = stored.view(-1, nbytes), piece.shape[-1] // size
    chunk = _Chunk(piece, Room(workspace), blocks)
    tiles: dict[int, _Tile] = {}
    for target, begin, end in _tiles(out, _rows_of_tile(piece.shape)):
        count = (end - begin) * width
        if count not in tiles:  # the last one of an expert may be smaller
            tiles[count] = _Tile(piece, chunk.room(), blocks, count)
        tiles[count].decode(begin * width, target, *chunk.scales(begin * width, count))


def _fill_plain(piece: Piece, stored: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor) -> None:
    if not piece.offset:
        out.copy_(stored.view(out.shape))
        return
    flat, width = stored.view(-1, stored.shape[-1]), stored.shape[-1]
    for target, begin, end in _tiles(out, _rows_of_tile(piece.shape)):
        values = Room(workspace).take(end - begin, width)
        values.copy_(flat[begin:end]).add_(piece.offset)
        target.copy_(values.view(target.shape))


class _Chunk:
    """The scales of the blocks around a tile."""

    def __init__(self, piece: Piece, room: Room, blocks: torch.Tensor) -> None:
        self._kernel, self._room, self._blocks = KERNELS[piece.kind], room, blocks
        self._count = min(_blocks_of_chunk(piece.shape, SIZES[piece.kind][0]), blocks.shape[0])
        self._made = self._kernel.scales(room, blocks, self._count)
        self._used = room.used
        self._begin = self._end = 0

    def room(self) -> Room:
        """The room behind the scales."""
        return self._room.after(self._used)

    def scales(self, begin: int, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and minima of blocks, in the order of the file."""
        if begin + count > self._end:
            self._begin, self._end = begin, min(begin + self._count, self._blocks.shape[0])
            if self._end - begin < self._count:
                self._made = self._kernel.scales(self._room.after(0), self._blocks, self._end - begin)
            self._made.fill(begin, self._end)
        place = slice(begin - self._begin, begin - self._begin + count)
        minimum = self._made.minimum
        return self._made.scale[place], None if minimum is None else minimum[place]


class _Tile:
    """Buffers for a number of blocks."""

    def __init__(self, piece: Piece, room: Room, blocks: torch.Tensor, count: int) -> None:
        self._values, self._offset = room.take(count, SIZES[piece.kind][0]), piece.offset
        self._codes = KERNELS[piece.kind].codes(room, blocks, count, self._values)
        self._count = count

    def decode(self, begin: int, target: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> None:
        """Write the elements of the blocks from ``begin`` on to ``target``, in its dtype."""
        self._codes(begin, begin + self._count)
        grouped = self._values.view(*scale.shape[:2], -1)
        grouped.mul_(scale)
        if minimum is not None:
            grouped.add_(minimum)
        if self._offset:
            grouped.add_(self._offset)
        target.copy_(self._values.view(target.shape))


def _tiles(out: torch.Tensor, rows: int, first: int = 0) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Parts of ``out`` [..., elements of a row] with at most ``rows`` rows (or one), each with its range of rows."""
    if out.dim() < 2:
        yield out, first, first + 1
        return
    below = math.prod(out.shape[1:-1])  # rows in one element of the first dimension
    step = rows // below
    if step == 0:
        for index in range(out.shape[0]):
            yield from _tiles(out[index], rows, first + index * below)
        return
    for begin in range(0, out.shape[0], step):
        part = out[begin : begin + step]
        yield part, first + begin * below, first + (begin + part.shape[0]) * below


def _rows_of_tile(shape: tuple[int, ...]) -> int:
    return max(1, TILE // shape[-1])


def _blocks_of_chunk(shape: tuple[int, ...], size: int) -> int:
    """Whole tiles, at least one."""
    tile = _rows_of_tile(shape) * shape[-1]
    return max(1, CHUNK // tile) * tile // size


@cache
def _workspace_bytes(kind: str, shape: tuple[int, ...]) -> int:
    room, rows = Room.endless(), min(_rows_of_tile(shape), math.prod(shape[:-1]))
    if kind in PLAIN:
        room.take(rows, shape[-1])
        return room.used
    size, nbytes = SIZES[kind]
    blocks = torch.empty(math.prod(shape) // size, nbytes, dtype=torch.uint8, device="meta")
    piece = Piece(kind, shape, lambda weight: weight)
    rest = _Chunk(piece, room, blocks).room()
    _Tile(piece, rest, blocks, rows * shape[-1] // size)
    return rest.used
