"""A header-only index of one or many safetensors shards: where each tensor's bytes are.

Nothing but headers is read, and everything that can be checked without the data is: a header that lies about
offsets, a truncated shard or two shards that hold the same tensor are refused before the first weight travels.
Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON, data).
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from aspec.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
AGAIN = "Download the checkpoint again."


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A stored tensor: ``nbytes`` bytes from byte ``offset`` of ``file``."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """``file[offset : offset + nbytes]`` must land at ``buffer[at : at + nbytes]``."""

    file: str
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All stored tensors of a model folder, by name."""

    folder: Path
    tensors: Mapping[str, TensorRef]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Index a folder. Raises CheckpointError, naming the file or tensor, for anything damaged."""
        tensors: dict[str, TensorRef] = {}
        for file in _shards(folder):
            for ref in read_header(file):
                if ref.name in tensors:
                    raise CheckpointError(
                        f"tensor {ref.name} is stored twice, in {tensors[ref.name].file} and in {file}: expected once. "
                        f"Remove the stale shard."
                    )
                tensors[ref.name] = ref
        return cls(folder, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(ref.nbytes for ref in self.tensors.values())


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: expected a model folder with config.json and *.safetensors.")
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        others = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".gguf"))[:3])
        raise CheckpointError(
            f"{folder} has no shards: expected {SINGLE} or {INDEX}, found {others or 'neither'}. Point to a folder "
            f"that holds the model in safetensors format."
        )
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of shards: expected JSON with a weight_map ({error}). {AGAIN}"
        ) from error
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{index} names {len(files)} shards, of which {len(missing)} are missing: {', '.join(missing[:3])}. {AGAIN}"
        )
    return [folder / name for name in files]


def read_header(path: Path) -> list[TensorRef]:
    """The tensors of one shard in file order. Raises CheckpointError if the header lies or the file is cut."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: not a complete safetensors file: its header claims {max(length, 0)} bytes, the file has "
                    f"{size}. {AGAIN}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}). {AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object. {AGAIN}")
    header.pop("__metadata__", None)
    refs = sorted((_ref(path, name, entry, 8 + length) for name, entry in header.items()), key=lambda r: r.offset)
    _check_cover(path, refs, 8 + length, size)
    return refs


def _ref(path: Path, name: str, entry: Any, base: int) -> TensorRef:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {name} has a header entry that is not understood ({error!r}). {AGAIN}"
        ) from error
    expected = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    if end - begin != expected or begin < 0 or any(n < 0 for n in shape):
        raise CheckpointError(
            f"{path}: the header lies about tensor {name}: {dtype} {list(shape)} takes {expected} bytes, its offsets "
            f"{begin} .. {end} hold {end - begin}. {AGAIN}"
        )
    return TensorRef(name, str(path), dtype, shape, base + begin, expected)


def _check_cover(path: Path, refs: list[TensorRef], base: int, size: int) -> None:
    """Tensors must follow one another without overlap and end where the file ends."""
    end = base
    for ref in refs:
        if ref.offset < end:
            raise CheckpointError(f"{path}: tensor {ref.name} overlaps the one before it at byte {ref.offset}. {AGAIN}")
        end = ref.offset + ref.nbytes
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {refs[-1].name} ends at byte {end}, the file has {size}. {AGAIN}"
        )
