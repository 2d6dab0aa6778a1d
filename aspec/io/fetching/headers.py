"""Headers of shards by range requests: a shard is its first bytes, in a folder beside the small files.

A plan needs no weights. The folder is read as any other checkpoint; ``SIZES`` holds the sizes of the whole shards, so
that the headers are checked against them. A server that ignores ranges sends the whole shard: the connection is closed
after its header.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from huggingface_hub import DryRunFileInfo, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from aspec.io.fetching.files import SIZES

FIRST_BYTES = 1 << 18  # of the first request; most headers are shorter
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
TIMEOUT_S = 30.0  # without a byte from the server


class BadHeaderError(Exception):
    """A file of the repository does not begin as a safetensors file."""


def fetch_headers(
    name: str, shards: list[DryRunFileInfo], small: Path, folder: Path, report: Callable[[int], None]
) -> None:
    """Make ``folder``: the header of each shard, links to the files of ``small``, and the sizes of the shards.

    ``report`` receives the number of shards that are done. The sizes are written last: with them the folder is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for count, shard in enumerate(shards):
        report(count)
        if not (folder / shard.filename).exists():
            replace(folder / shard.filename, _header(name, shard))
    for file in small.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            _link(file.resolve(), folder / file.name)
    sizes = {shard.filename: shard.file_size for shard in shards}
    replace(folder / SIZES, json.dumps(sizes).encode())


def replace(path: Path, data: bytes, more: Mapping[int, bytes] = MappingProxyType({})) -> None:
    """Write a file as a whole: another process sees all of it or nothing. ``more``: bytes by their places behind."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            for place, piece in more.items():
                file.seek(place)
                file.write(piece)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # a link whose file has gone
    try:
        target.symlink_to(source)
    except FileExistsError:  # another process was faster
        pass
    except OSError:  # a system without links
        replace(target, source.read_bytes())


def _header(name: str, shard: DryRunFileInfo) -> bytes:
    """The length and the header of one shard, from the local copy if there is one. Raises BadHeaderError."""
    if shard.is_cached:
        with open(shard.local_path, "rb") as file:
            begin = file.read(FIRST_BYTES)
            return begin[: _length(shard, begin)] + file.read(max(0, _length(shard, begin) - len(begin)))
    url = hf_hub_url(name, shard.filename, revision=shard.commit_hash)
    begin = read_range(url, 0, FIRST_BYTES)
    end = _length(shard, begin)
    return begin[:end] if end <= len(begin) else begin + read_range(url, len(begin), end)


def _length(shard: DryRunFileInfo, begin: bytes) -> int:
    """The bytes up to the end of the header. Raises BadHeaderError if there is none."""
    length = int.from_bytes(begin[:8], "little") if len(begin) >= 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > (shard.file_size or 8 + length):
        raise BadHeaderError(
            f"{shard.filename} is truncated or no safetensors file: its first bytes promise a header of {length} "
            f"bytes, found a file of {shard.file_size}"
        )
    return 8 + length


def read_range(url: str, begin: int, end: int) -> bytes:
    """Bytes of a file; fewer if it ends before. Of an answer without range, the bytes before ``begin`` are skipped."""
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    made, broken = bytearray(), None
    with http_stream_backoff("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else begin
        try:
            for chunk in response.iter_raw():
                made += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(made) >= end - begin:
                    break  # the rest of an answer without range is not read
        except Exception as error:  # raised below: the library's generator cannot try again from here
            broken = error
    if broken is not None:
        raise broken
    return bytes(made[: end - begin])
