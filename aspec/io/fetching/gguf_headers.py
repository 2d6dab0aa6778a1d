"""Headers of GGUF files by range requests, for plans: a file is its first bytes, beside the sizes of the whole files.

A part of the configuration is stored as tensors: factors of rotary positions. Their bytes are fetched, too.
"""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from huggingface_hub import DryRunFileInfo, hf_hub_url

from aspec.io.fetching.files import SIZES
from aspec.io.fetching.headers import read_range, replace
from aspec.io.gguf import read_header

PIECE_BYTES = 1 << 20  # of the first request; a vocabulary takes some MB
MOST_PIECE_BYTES = 8 << 20
CONFIGURES = "rope_"  # begins the names of tensors that are a part of the configuration
MOST_VALUES_BYTES = 1 << 20  # of such a tensor: it has one number for each frequency


def fetch_gguf_headers(name: str, files: Sequence[DryRunFileInfo], folder: Path, report: Callable[[int], None]) -> Path:
    """Make ``folder``: the header of each file, and their sizes. Returns the first file.

    ``report`` receives the number of files that are done. The sizes are written last: with them the folder is whole.
    Raises CheckpointError for a file that is no GGUF file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / PurePosixPath(file.filename).name for file in files]
    for count, (file, path) in enumerate(zip(files, paths, strict=True)):
        report(count)
        if not path.exists():
            replace(path, *_header(name, file))
    sizes = {path.name: file.file_size for file, path in zip(files, paths, strict=True)}
    replace(folder / SIZES, json.dumps(sizes).encode())
    return paths[0]


def _header(name: str, file: DryRunFileInfo) -> tuple[bytes, dict[int, bytes]]:
    """The first bytes of a file, with its header, and by their places the tensors that are a part of it."""
    remote = _Remote(hf_hub_url(name, file.filename, revision=file.commit_hash), file.file_size or 0)
    header = read_header(Path(file.filename), cast("BinaryIO", remote), file.file_size or 0)
    refs = [tensor.ref for tensor in header.tensors if tensor.ref.name.startswith(CONFIGURES)]
    small = [ref for ref in refs if ref.nbytes <= MOST_VALUES_BYTES]
    values = {ref.offset: read_range(remote.url, ref.offset, ref.offset + ref.nbytes) for ref in small}
    return bytes(remote.made), values


class _Remote(io.RawIOBase):
    """A file of the hub, read from front to back, in pieces. Mutable: it keeps what was read."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self.url, self.made = url, bytearray()
        self._size, self._at, self._piece = size, 0, PIECE_BYTES

    def read(self, count: int = -1) -> bytes:
        """The next bytes; fewer at the end."""
        end = min(self._at + count, self._size)
        while len(self.made) < end:
            begin = len(self.made)
            got = read_range(self.url, begin, min(max(end, begin + self._piece), self._size))
            if not got:
                break
            self.made += got
            self._piece = min(2 * self._piece, MOST_PIECE_BYTES)
        found = bytes(self.made[self._at : end])
        self._at += len(found)
        return found
