"""The header of a GGUF file, of one file or of a split set: metadata, and where each tensor's bytes are.

Only headers are read, and no more of a file than its header. Every count and length is checked against the bytes that
are left before anything of that size is read, so that a lie costs nothing.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NoReturn

import torch

from aspec.errors import CheckpointError, shown
from aspec.io.checkpoint import FETCH_AGAIN, MAX_BYTES, TensorRef, sizes_elsewhere, unreadable, version_of
from aspec.io.disk import FileVersion
from aspec.io.fetching.gguf_files import check_begin, split_set

VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 << 20  # a vocabulary of 260,000 tokens takes 13 MB
MAX_STRING_BYTES = 16 << 20  # of a value: the longest are chat templates, of some 100 KB
MAX_KEY_BYTES = (1 << 16) - 1  # the format's own limit
MAX_NAME_BYTES = 1024  # of a tensor; ggml's limit is 64
MAX_DIMENSIONS = 4  # ggml's limit
ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 20  # bytes: where no key says otherwise, and the most that makes sense
WINDOW = 1 << 20  # bytes that are read at once

Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
"""A value of the metadata."""

SCALARS: Mapping[int, struct.Struct] = MappingProxyType(
    {
        kind: struct.Struct(f"<{code}")
        for kind, code in {
            0: "B",
            1: "b",
            2: "H",
            3: "h",
            4: "I",
            5: "i",
            6: "f",
            7: "B",
            10: "Q",
            11: "q",
            12: "d",
        }.items()
    }
)
"""The number of a type of value -> its bytes."""
BOOL, STRING, ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of tensor: rows are stored as blocks of ``size`` elements in ``nbytes`` bytes."""

    name: str
    size: int = 1
    nbytes: int = 1
    dtype: torch.dtype | None = None  # of a plain type; None: elements are packed


TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        0: BlockType("F32", 1, 4, torch.float32),
        1: BlockType("F16", 1, 2, torch.float16),
        2: BlockType("Q4_0", 32, 18),
        3: BlockType("Q4_1", 32, 20),
        6: BlockType("Q5_0", 32, 22),
        7: BlockType("Q5_1", 32, 24),
        8: BlockType("Q8_0", 32, 34),
        9: BlockType("Q8_1", 32, 40),
        10: BlockType("Q2_K", 256, 84),
        11: BlockType("Q3_K", 256, 110),
        12: BlockType("Q4_K", 256, 144),
        13: BlockType("Q5_K", 256, 176),
        14: BlockType("Q6_K", 256, 210),
        15: BlockType("Q8_K", 256, 292),
        16: BlockType("IQ2_XXS", 256, 66),
        17: BlockType("IQ2_XS", 256, 74),
        18: BlockType("IQ3_XXS", 256, 98),
        19: BlockType("IQ1_S", 256, 50),
        20: BlockType("IQ4_NL", 32, 18),
        21: BlockType("IQ3_S", 256, 110),
        22: BlockType("IQ2_S", 256, 82),
        23: BlockType("IQ4_XS", 256, 136),
        24: BlockType("I8", 1, 1, torch.int8),
        25: BlockType("I16", 1, 2, torch.int16),
        26: BlockType("I32", 1, 4, torch.int32),
        27: BlockType("I64", 1, 8, torch.int64),
        28: BlockType("F64", 1, 8, torch.float64),
        29: BlockType("IQ1_M", 256, 56),
        30: BlockType("BF16", 1, 2, torch.bfloat16),
        34: BlockType("TQ1_0", 256, 54),
        35: BlockType("TQ2_0", 256, 66),
        39: BlockType("MXFP4", 32, 17),
        40: BlockType("NVFP4", 64, 36),
        41: BlockType("Q1_0", 128, 18),
    }
)
"""The number of a type -> the type, of all that ggml has."""

REMOVED: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
"""Types that ggml has no more."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor. Of a packed type, ``ref`` has dtype uint8 and the bytes of a row as its last size."""

    ref: TensorRef
    kind: str  # the type's name: "Q4_K"
    shape: tuple[int, ...]  # of its elements, the rows last


@dataclass(frozen=True, slots=True)
class Gguf:
    """A model in GGUF files, from their headers."""

    path: Path  # the first file
    metadata: Mapping[str, Value]  # of the first file
    tensors: Mapping[str, GgufTensor]  # in the order of the files
    files: Mapping[str, FileVersion]  # as they were when their headers were read


@dataclass(frozen=True, slots=True)
class Header:
    """What one file holds."""

    metadata: dict[str, Value]
    tensors: list[GgufTensor]


def read_gguf(path: Path) -> Gguf:
    """The model of a GGUF file; any file of a split set stands for the set.

    Raises CheckpointError for a damaged file and for a set that is not complete.
    """
    paths, sizes = split_set(path), sizes_elsewhere(path.parent)
    files: dict[str, FileVersion] = {}
    metadata: dict[str, Value] = {}
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(paths):
        files[str(file)] = version_of(file)  # first: what changes from now on is found
        header = _open_header(file, sizes.get(file.name))
        _check_split(file, header.metadata, number, len(paths))
        metadata = metadata or header.metadata
        for tensor in header.tensors:
            if (other := tensors.get(tensor.ref.name)) is not None:
                raise CheckpointError(
                    f"{file}: tensor {shown(tensor.ref.name)} is stored a second time: expected once, found it in "
                    f"{other.ref.file} too. {FETCH_AGAIN}"
                )
            tensors[tensor.ref.name] = tensor
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(paths) > 1 and expected != len(tensors):
        raise CheckpointError(
            f"{paths[0]}: expected {shown(expected)} tensors in {len(paths)} files, found {len(tensors)}. {FETCH_AGAIN}"
        )
    return Gguf(paths[0], MappingProxyType(metadata), MappingProxyType(tensors), MappingProxyType(files))


def _check_split(path: Path, metadata: Mapping[str, Value], number: int, count: int) -> None:
    """Raise CheckpointError unless a file's header says what its name says about its place in a split set."""
    place = (metadata.get("split.no", 0), metadata.get("split.count", 1))
    if place == (number, count) or (count == 1 and place == (0, 0)):
        return
    what = f"file {number + 1} of {count}" if count > 1 else "a whole model (its name has no number)"
    raise CheckpointError(
        f"{path}: expected {what}, found a header that says split.no {shown(place[0])} of split.count "
        f"{shown(place[1])}. Rename the files as they were published, NAME-00001-of-00002.gguf, or fetch them again."
    )


def read_header(path: Path, file: BinaryIO, size: int) -> Header:
    """The header at the beginning of a file of ``size`` bytes, of which ``path`` is the name in messages."""
    return _Reader(path, file, size).header()


def _open_header(path: Path, size: int | None) -> Header:
    try:
        size = path.stat().st_size if size is None else size
        with path.open("rb") as file:
            return read_header(path, file, size)
    except OSError as error:
        raise unreadable(path, error) from error


class _Reader:
    """Reads a header from front to back, and refuses what the file cannot hold."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._end = min(size, MAX_HEADER_BYTES)  # the header has to end before
        self._window, self._at, self._base = b"", 0, 0  # bytes of the file; the next one; the window's place

    def header(self) -> Header:
        num_tensors, num_values = self._counts()
        metadata = dict(self._values(num_values))
        if len(metadata) < num_values:
            self._refuse("every key once", "a key that is there twice")
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._refuse(f"general.alignment to be a power of two from 8 to {MAX_ALIGNMENT}", alignment)
        infos = [self._info() for _ in self._counted(num_tensors, 24, "tensors")]
        return Header(metadata, self._placed(infos, alignment))

    def _counts(self) -> tuple[int, int]:
        """The numbers of tensors and of values."""
        start = self._take(min(8, self._size), "a GGUF file")
        check_begin(self._path, start)
        version = int.from_bytes(start[4:], "little")
        if version not in VERSIONS:
            kind = f"version {version}"
            if version and not version & 0xFFFF:
                kind = f"a big-endian file of version {int.from_bytes(start[4:], 'big')}"
            raise CheckpointError(
                f"{self._path}: expected GGUF of version {' or '.join(map(str, VERSIONS))}, little-endian, found "
                f"{kind}. Convert the model again with a current llama.cpp."
            )
        num_tensors, num_values = struct.unpack("<QQ", self._take(16, "the numbers of tensors and values"))
        return num_tensors, num_values

    def _values(self, count: int) -> Iterator[tuple[str, Value]]:
        for _ in self._counted(count, 13, "values"):
            key = self._string("a key", MAX_KEY_BYTES)
            kind = self._number(4, f"the type of {shown(key)}")
            yield key, self._array(key) if kind == ARRAY else self._value(key, kind)

    def _value(self, key: str, kind: int) -> Value:
        if kind == STRING:
            return self._string(key, MAX_STRING_BYTES)
        if kind not in SCALARS:
            self._refuse(f"{shown(key)} to have a type of value from 0 to 12", kind)
        form = SCALARS[kind]
        (value,) = form.unpack(self._take(form.size, key))
        if kind != BOOL:
            return value  # type: ignore[no-any-return]
        if value > 1:
            self._refuse(f"{shown(key)} to be 0 or 1, a truth value", value)
        return bool(value)

    def _array(self, key: str) -> Value:
        kind = self._number(4, f"the type of {shown(key)}")
        count = self._number(8, f"the length of {shown(key)}")
        if kind == STRING:
            return [self._string(key, MAX_STRING_BYTES) for _ in self._counted(count, 8, f"texts in {shown(key)}")]
        if kind not in SCALARS:
            self._refuse(f"{shown(key)} to be a list of numbers, truth values or texts", f"a list of type {kind}")
        form = SCALARS[kind]
        self._counted(count, form.size, f"numbers in {shown(key)}")
        numbers: array[int] | array[float] = array(form.format[1:], self._take(count * form.size, key))
        if sys.byteorder == "big":
            numbers.byteswap()
        return list(map(bool, numbers)) if kind == BOOL else numbers

    def _info(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        """Name, type, shape and offset of a tensor."""
        name = self._string("the name of a tensor", MAX_NAME_BYTES)
        tensor = f"tensor {shown(name)}"
        num_sizes = self._number(4, tensor)
        if not 1 <= num_sizes <= MAX_DIMENSIONS:
            self._refuse(f"{tensor} to have 1 to {MAX_DIMENSIONS} dimensions", num_sizes)
        sizes = struct.unpack(f"<{num_sizes}Q", self._take(8 * num_sizes, tensor))
        number = self._number(4, tensor)
        offset = self._number(8, tensor)
        kind = TYPES.get(number)
        if kind is None:
            found = f"{REMOVED[number]}, which ggml has no more" if number in REMOVED else f"number {number}"
            self._refuse(f"{tensor} to have a type that ggml has", found)
        if not all(sizes):
            self._refuse(f"{tensor} to have sizes of 1 or more", list(sizes))
        if sizes[0] % kind.size:
            self._refuse(
                f"{tensor} to have rows of whole {kind.name} blocks, of {kind.size} each", f"rows of {sizes[0]}"
            )
        return name, kind, sizes[::-1], offset  # ggml names the size of a row first

    def _placed(self, infos: list[tuple[str, BlockType, tuple[int, ...], int]], alignment: int) -> list[GgufTensor]:
        """The tensors with their places in the file, where each follows the one before it."""
        position = self._base + self._at
        base = position + -position % alignment
        end, tensors, names = 0, [], set()
        for name, kind, shape, offset in infos:
            tensor = f"tensor {shown(name)}"
            if name in names:
                self._refuse(f"{tensor} once", "it twice")
            names.add(name)
            if offset != end:
                what = "it overlaps another one" if offset < end else "bytes before it belong to no tensor"
                self._refuse(f"{tensor} at byte {end} of the data", f"it at byte {offset}: {what}")
            nbytes = kind.nbytes
            for size in (*shape[:-1], shape[-1] // kind.size):
                nbytes *= size
                if nbytes > MAX_BYTES:  # step by step: a hostile shape has a product of 256 bits
                    self._refuse(f"{tensor} to have at most {MAX_BYTES} bytes", f"shape {list(shape)}")
            if base + offset + nbytes > self._size:
                raise CheckpointError(
                    f"{self._path} is truncated: {tensor} ends at byte {base + offset + nbytes}, found a file of "
                    f"{self._size}. {FETCH_AGAIN}"
                )
            stored = shape if kind.dtype is not None else (*shape[:-1], shape[-1] // kind.size * kind.nbytes)
            ref = TensorRef(name, str(self._path), kind.dtype or torch.uint8, stored, base + offset, nbytes)
            tensors.append(GgufTensor(ref, kind.name, shape))
            end = offset + nbytes + -nbytes % alignment
        return tensors

    def _counted(self, count: int, least: int, what: str) -> range:
        """``range(count)``, if the file can hold so many of at least ``least`` bytes each."""
        if count > (most := (self._end - self._base - self._at) // least):
            self._refuse(f"at most {most} {what}, for which the file has room", f"a count of {count}")
        return range(count)

    def _string(self, what: str, most: int) -> str:
        length = self._number(8, what)
        if length > most:
            self._refuse(f"{shown(what)} to have at most {most} bytes", f"a length of {length}")
        raw = self._take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"{shown(what)} to be text in UTF-8", raw)

    def _number(self, nbytes: int, what: str) -> int:
        return int.from_bytes(self._take(nbytes, what), "little")

    def _take(self, nbytes: int, what: str) -> bytes:
        """The next bytes. Raises CheckpointError if the header has no more so many."""
        begin = self._at
        if len(self._window) - begin < nbytes:
            self._refill(nbytes, what)
            begin = 0
        self._at = begin + nbytes
        return self._window[begin : self._at]

    def _refill(self, nbytes: int, what: str) -> None:
        rest = self._window[self._at :]
        self._base, self._at = self._base + self._at, 0
        left = self._end - self._base
        if nbytes <= left:
            rest += self._file.read(min(max(nbytes, WINDOW), left) - len(rest))
        self._window = rest
        if len(rest) < nbytes:
            kind = "truncated" if self._size <= MAX_HEADER_BYTES else "damaged"
            raise CheckpointError(
                f"{self._path} is {kind}: expected {nbytes} bytes for {shown(what)} at byte {self._base} of the "
                f"header, found {max(left, 0)}. {FETCH_AGAIN}"
            )

    def _refuse(self, expected: str, found: object) -> NoReturn:
        raise CheckpointError(f"{self._path}: expected {expected}, found {shown(found)}. {FETCH_AGAIN}")
