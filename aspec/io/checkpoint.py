"""A header-only index of one or many safetensors shards: where each tensor's bytes are.

Only headers are read, and they are checked completely. Wrong offsets, a truncated shard, or two shards that hold the
same tensor are refused before the first weight is read.
Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON, data).
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, Self

import torch

from aspec.errors import CheckpointError, shown
from aspec.io.disk import FileVersion
from aspec.io.fetching.files import SIZES
from aspec.io.fetching.gguf_files import split_set
from aspec.io.hub import source_of
from aspec.io.json_file import DuplicateMember, NotJson, parse_json, read_json
from aspec.io.weight_format import REMEDY, folder_format

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_BYTES, MAX_DIMENSIONS = (1 << 63) - 1, 64  # of a tensor: PyTorch's limits
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
FETCH_AGAIN = "Fetch the checkpoint again."


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A stored tensor: ``nbytes`` bytes from byte ``offset`` of ``file``."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    data: bytes | None = None  # of a small tensor of an outline, which is in no file

    @property
    def refs(self) -> "tuple[TensorRef, ...]":
        """The stored tensors of this weight: itself."""
        return (self,)

    def cut(self, index: int) -> "TensorRef":
        """The slice ``index`` of the first dimension, [1, ...]."""
        nbytes = self.nbytes // self.shape[0]
        begin = index * nbytes
        data = None if self.data is None else self.data[begin : begin + nbytes]
        shape = (1, *self.shape[1:])
        return TensorRef(f"{self.name}[{index}]", self.file, self.dtype, shape, self.offset + begin, nbytes, data)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All stored tensors of a model folder, by name; ``nbytes`` counts the tensors, not the headers."""

    folder: Path
    tensors: Mapping[str, TensorRef]
    nbytes: int
    files: Mapping[str, FileVersion]  # as they were when their headers were read

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Index a folder. Raises CheckpointError, with the file or tensor, if it is damaged."""
        folder = Path(folder)
        weight_map = _read_weight_map(folder)
        sizes = sizes_elsewhere(folder)
        tensors: dict[str, TensorRef] = {}
        files: dict[str, FileVersion] = {}
        for file in sorted(set(weight_map.values())) or [SINGLE]:
            files[str(folder / file)] = version_of(folder / file)  # first: what changes from now on is found
            for ref in read_header(folder / file, sizes.get(file)):
                if (other := tensors.get(ref.name)) is not None:
                    raise CheckpointError(
                        f"{ref.file}: tensor {shown(ref.name)} is stored a second time: expected once, found it in "
                        f"{other.file} too. Remove the shard that does not belong to this checkpoint."
                    )
                tensors[ref.name] = ref
        missing = [name for name in weight_map if name not in tensors]
        if missing:
            raise CheckpointError(
                f"{folder / INDEX}: expected tensor {shown(missing[0])} in {weight_map[missing[0]]}, found no shard "
                f"with it ({len(missing)} such tensors). {FETCH_AGAIN}"
            )
        return cls(folder, MappingProxyType(tensors), sum(ref.nbytes for ref in tensors.values()), files)


def outline(folder: Path, shapes: Mapping[str, torch.Tensor]) -> Checkpoint:
    """A checkpoint made of ``shapes`` alone, for plans without weights; of real tensors (uint8) it has the contents."""
    tensors: dict[str, TensorRef] = {}
    end, file = 0, str(folder / SINGLE)
    for name, tensor in shapes.items():
        data = None if tensor.is_meta else bytes(tensor.flatten().tolist())
        tensors[name] = TensorRef(name, file, tensor.dtype, tuple(tensor.shape), end, tensor.nbytes, data)
        end += tensor.nbytes
    return Checkpoint(folder, MappingProxyType(tensors), end, {})


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors files, or an index of them, or stands for a GGUF file."""
    return source_of(folder) is not None or any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights. Raises CheckpointError if one of a split set is missing."""
    source = source_of(folder)
    return sorted(folder.glob("*.safetensors")) if source is None else split_set(source)


def _read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index; empty for a single shard without an index."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: expected a model folder with config.json and *.safetensors. Check the path."
        )
    if (folder / SINGLE).is_file():  # transformers also prefers it to an index
        return {}
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_shards(folder))
    return _read_index(folder / INDEX)


def _no_shards(folder: Path) -> str:
    expected = f"{folder} has no shards that can be read: expected {SINGLE} or {INDEX}, found"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"{expected} {', '.join(others[:3])}. Fetch the missing {INDEX}."
    if (found := folder_format(folder)) is not None:
        return f"{expected} {found[1]:.80} in {found[0]} format, which aspec does not read. {REMEDY}"
    return f"{expected} no weights at all. Point to a folder with the model in safetensors format."


def _read_index(index: Path) -> dict[str, str]:
    """The index's weight map. Raises CheckpointError if it is no index, or if a shard is missing."""
    content = read_json(index, "an index of shards", error=CheckpointError)
    try:
        weight_map: dict[str, str] = dict(content["weight_map"])
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if Path(name).name != name or not os.path.isfile(index.parent / name)]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards: expected JSON with a weight_map from tensors to files, found "
            f"{shown(repr(error))}. {FETCH_AGAIN}"
        ) from error
    if missing or not files:
        raise CheckpointError(
            f"{index} names {len(files)} shards: expected each of them in the same folder, found {len(missing)} missing"
            f"{': ' if missing else ''}{', '.join(map(shown, missing[:3]))}. {FETCH_AGAIN}"
        )
    return weight_map


def sizes_elsewhere(folder: Path) -> dict[str, int | None]:
    """Shard -> its bytes on the hub, in a folder that holds only headers; empty for any other folder."""
    if not (folder / SIZES).is_file():
        return {}
    return dict(read_json(folder / SIZES, "a list of sizes of shards", error=CheckpointError))


def read_header(path: Path, size: int | None = None) -> list[TensorRef]:
    """The tensors of one shard in file order. Raises CheckpointError if the header is wrong or the file is cut.

    ``size``: bytes of the whole shard, if ``path`` holds only its header.
    """
    entries, base, size = _read_entries(path, size)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path}: expected texts as metadata, found {shown(metadata)}. {FETCH_AGAIN}")
    refs = [_ref(path, name, entry, base) for name, entry in entries.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    _check_cover(path, refs, base, size)
    return refs


def version_of(path: Path) -> FileVersion:
    """The version of a shard. Raises CheckpointError if there is none."""
    try:
        return FileVersion.of(path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error of a file that the system does not let aspec read."""
    return CheckpointError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.")


def _read_entries(path: Path, size: int | None) -> tuple[dict[str, object], int, int]:
    """The header's JSON object, the byte where the data begins, and the file's size."""
    try:
        size = path.stat().st_size if size is None else size
        with path.open("rb") as file:
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if not 2 <= length <= MAX_HEADER_BYTES or length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: its first bytes promise a header of {length} bytes, "
                    f"found a file of {size}. {FETCH_AGAIN}"
                )
            header = parse_json(file.read(length), unique=True)
    except OSError as error:
        raise unreadable(path, error) from error
    except DuplicateMember as error:
        raise CheckpointError(
            f"{path}: tensor {shown(error.name)} is stored twice: expected once. {FETCH_AGAIN}"
        ) from error
    except NotJson as error:
        raise CheckpointError(f"{path}: expected a header in JSON, found none: {error}. {FETCH_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a JSON object as header, found {type(header).__name__}. {FETCH_AGAIN}")
    return header, 8 + length, size


def _ref(path: Path, name: str, entry: object, base: int) -> TensorRef:
    """The tensor of one header entry. Raises CheckpointError if the entry is damaged."""

    def refuse(expected: str, found: object) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {shown(name)}: expected {expected}, found {shown(found)}. {FETCH_AGAIN}")

    if not isinstance(entry, dict):
        refuse("a header entry with dtype, shape and data_offsets", entry)
    dtype = DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        refuse(f"a dtype among {', '.join(DTYPES)}", entry.get("dtype"))
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None:
        refuse("a shape of whole numbers", entry.get("shape"))
    if offsets is None or len(offsets) != 2:
        refuse("two data offsets", entry.get("data_offsets"))
    begin, end = offsets
    nbytes = dtype.itemsize
    for number in shape:  # step by step: the product of a hostile shape has millions of digits
        nbytes *= number
        if nbytes > MAX_BYTES:
            refuse(f"a tensor of at most {MAX_BYTES} bytes", f"shape {shown(list(shape))}")
    if end - begin != nbytes:
        refuse(f"{nbytes} bytes for {entry['dtype']} {list(shape)}", f"data offsets {begin} .. {end}")
    return TensorRef(name, str(path), dtype, shape, base + begin, nbytes)


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of at most 64 whole numbers from 0 to ``MAX_BYTES`` as a tuple; None for any other value."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    if not all(type(number) is int and 0 <= number <= MAX_BYTES for number in value):
        return None
    return tuple(value)


def _check_cover(path: Path, refs: list[TensorRef], base: int, size: int) -> None:
    """Raise CheckpointError unless the tensors fill the file without overlap or gap, up to its end."""
    end = base
    for ref in refs:
        if ref.offset < end:
            raise CheckpointError(
                f"{path}: tensor {shown(ref.name)} overlaps the one before it: expected it at byte {end}, found it at "
                f"{ref.offset}. {FETCH_AGAIN}"
            )
        if ref.offset > end:
            raise CheckpointError(
                f"{path}: {ref.offset - end} bytes before tensor {shown(ref.name)} belong to no tensor: expected it at "
                f"byte {end}, found it at {ref.offset}. {FETCH_AGAIN}"
            )
        end = ref.offset + ref.nbytes
    if end != size:
        what = "is truncated" if size < end else "has bytes that belong to no tensor"
        raise CheckpointError(
            f"{path} {what}: the header promises tensors up to byte {end}, found a file of {size}. {FETCH_AGAIN}"
        )
