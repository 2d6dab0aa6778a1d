"""What a new checkpoint is made of: tensors to write, and the pieces that give their bytes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from aspec.io.checkpoint import TensorRef
from aspec.io.disk import FileVersion, OpenFiles, split, transfer
from aspec.io.memory import PAGE, allocate
from aspec.models.weights.parts import Segment

CHUNK_BYTES = 4 << 20  # of one read; direct reads of this size run at the full rate


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor of a new checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Reader:
    """Reads ranges of files past the page cache, one at a time; mutable, because all reads share its memory."""

    def __init__(self, versions: Mapping[str, FileVersion] = MappingProxyType({})) -> None:
        """``versions``: of files when their headers were read; a read of a file that has changed raises ReadError."""
        self._files = OpenFiles(versions)
        self._memory, self._bounce = allocate(CHUNK_BYTES + 2 * PAGE), allocate(CHUNK_BYTES + 2 * PAGE)

    def read(self, file: str, offset: int, nbytes: int) -> memoryview:
        """At most ``CHUNK_BYTES``, valid until the next read. Raises ReadError."""
        at = offset % PAGE
        size = len(self._memory.view)
        for chunk in split([Segment(file, offset, nbytes, at)], self._memory.address, size, CHUNK_BYTES):
            transfer(self._files[chunk.file], chunk, self._memory.view, self._bounce)
        return self._memory.view[at : at + nbytes]

    def chunks(self, file: str, offset: int, nbytes: int, most: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """A range in pieces of ``most`` bytes; each is valid until the next one."""
        for start in range(0, nbytes, most):
            yield self.read(file, offset + start, min(most, nbytes - start))

    def close(self) -> None:
        """Close the files and free the memory."""
        self._files.close()
        for memory in (self._memory, self._bounce):
            memory.close()


class Piece(Protocol):
    """Tensors that are made together, from stored ones."""

    @property
    def tensors(self) -> tuple[NewTensor, ...]:
        """In the order in which they are read."""
        ...

    def data(self, index: int, reader: Reader) -> Iterator[memoryview]:
        """The bytes of one of them, in chunks that are valid until the next one; in the order of a shard."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """A stored tensor as it is."""

    ref: TensorRef

    @property
    def tensors(self) -> tuple[NewTensor, ...]:
        """See ``Piece``."""
        return (NewTensor(self.ref.name, self.ref.dtype, self.ref.shape),)

    def data(self, index: int, reader: Reader) -> Iterator[memoryview]:
        """See ``Piece``."""
        yield from reader.chunks(self.ref.file, self.ref.offset, self.ref.nbytes)
