"""Writing one shard so that it is whole or absent: into a file of another name, synced, read back, then renamed.

The header is padded with blanks to whole pages, which the format allows: https://github.com/huggingface/safetensors.
"""

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from aspec.errors import WriteError
from aspec.io.checkpoint import DTYPES
from aspec.io.durable import FULL, sync_folder
from aspec.io.memory import PAGE
from aspec.preparing.order import Shard
from aspec.preparing.pieces import NewTensor, Reader

NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
PARTIAL = ".partial"  # ends the name of a file that is not whole yet


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is on the disk as it should be: its bytes and their CRC-32."""

    nbytes: int
    checksum: int


def header(tensors: Sequence[NewTensor]) -> bytes:
    """The first bytes of a shard, whole pages: where each tensor's bytes are."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def write_shard(folder: Path, shard: Shard, reader: Reader, told: Callable[[int], None]) -> Written:
    """Write a shard into a folder; ``told`` receives the bytes of every chunk that was written.

    Raises WriteError if the disk is full or fails, or gives other bytes back, ReadError if a source cannot be read. No
    file is left then.
    """

    def data() -> Iterator[memoryview | bytes]:
        yield header([placed.tensor for placed in shard.tensors])
        for placed in shard.tensors:
            for chunk in placed.piece.data(placed.index, reader):
                yield chunk
                told(len(chunk))

    return write_file(folder / shard.name, data())


def write_file(path: Path, data: Iterator[memoryview | bytes]) -> Written:
    """Write a file as a whole, also in place of another one, and read it back. Raises WriteError, and leaves none."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        try:
            written = _write(partial, data)
            found = checksum_of(partial)
            if found != written:
                raise WriteError(
                    f"{path}: the disk gives other bytes back than were written: expected {written.nbytes} bytes with "
                    f"CRC-32 {written.checksum:08x}, found {found.nbytes} with {found.checksum:08x}. Check the disk, "
                    f"or take a folder on another one."
                )
            os.replace(partial, path)
            sync_folder(path.parent)
            return written
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise write_error(path, error) from error


def checksum_of(path: Path) -> Written:
    """The bytes of a file and their CRC-32, read past the page cache. Raises ReadError."""
    reader, checksum, nbytes = Reader(), 0, os.stat(path).st_size
    try:
        for chunk in reader.chunks(str(path), 0, nbytes):
            checksum = zlib.crc32(chunk, checksum)
    finally:
        reader.close()
    return Written(nbytes, checksum)


def _write(path: Path, data: Iterator[memoryview | bytes]) -> Written:
    nbytes = checksum = 0
    with path.open("wb", buffering=0) as file:
        for chunk in data:
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
            checksum, nbytes = zlib.crc32(chunk, checksum), nbytes + len(chunk)
        os.fsync(file.fileno())
    return Written(nbytes, checksum)


def write_error(path: Path, error: OSError) -> WriteError:
    """The system's error as a message with a remedy."""
    if error.errno in FULL:
        return WriteError(
            f"{path} cannot be written: {error.strerror}. The files that are finished are kept, and the folder is no "
            f"checkpoint before the last one is. Free some space (or raise the quota) and run the same command again: "
            f"it continues where it stopped."
        )
    return WriteError(
        f"{path} cannot be written: {error.strerror or error}. Take a folder that can be written, on a disk "
        f"that works; with the same folder the command continues where it stopped."
    )
