"""Parts: which bytes of which files go where in a buffer, and which parameters use them, as records.

A part is a unit of weights that is loaded at once; ``layout.py`` cuts a checkpoint into parts. This file reads no
weights.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from aspec.models.formats.int4.form import Int4, WriteInt4
from aspec.models.formats.packed import PackedWeight
from aspec.models.hf_compat import WeightConverter
from aspec.models.weights.merge import LowRank, temporary_bytes

PAGE = 4096  # bytes; offsets, addresses and lengths of direct reads are multiples of it
MERGE_COPIES = (
    4  # a weight that an adapter changes costs about as many copies of it (measured: 3 at rank 16, 5.5 at 64)
)
REST = -1  # the layer number of tensors that belong to no layer


@dataclass(frozen=True, slots=True)
class Segment:
    """Read ``file[offset : offset + nbytes]`` into ``buffer[at : at + nbytes]``."""

    file: str
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Binding:
    """The parameter or buffer ``target`` is a contiguous view from byte ``at`` on, with this dtype and shape."""

    target: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int

    @property
    def nbytes(self) -> int:
        """Bytes of the view."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Source:
    """A stored weight in the buffer: a plain tensor, or the tensors of a packed one, which is decoded to ``made``."""

    name: str
    pattern: str | None  # of a converter, which the name matched
    stored: tuple[Binding, ...]
    packed: PackedWeight | None = None
    made: Binding | None = None  # in the part's scratch; may be the target itself, or a piece of it


@dataclass(frozen=True, slots=True)
class Conversion:
    """Stored weights are converted to ``targets``; their ``at`` counts from the part's scratch."""

    name: str
    sources: tuple[Source, ...]
    targets: tuple[Binding, ...]
    converter: WeightConverter | None  # None: the target is the only plain source, cast, or what the packed ones make
    updates: Mapping[str, LowRank[Binding]] = field(default_factory=dict)  # by target, merged while it is made


@dataclass(frozen=True, slots=True)
class Factor:
    """The weight of the linear module of ``target``, which products take packed: see ``formats/int4/form.py``.

    ``codes`` and ``scales`` are in the buffer as they were read, or in the part's scratch if ``write`` makes them.
    """

    target: str
    sizes: Int4
    codes: Binding
    scales: Binding
    stored: tuple[Binding, ...] = ()  # in the buffer, for ``write``
    write: WriteInt4 | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of weights that is loaded at once, and its bindings in the model.

    Its scratch is ``scratch_bytes`` from byte ``scratch_at`` of its layer's scratch: parts of one layer are bound at
    the same time, so their converted tensors must not share memory.
    """

    index: int
    layer: int  # REST for embeddings, norms and head
    segments: tuple[Segment, ...]
    bindings: tuple[Binding, ...]
    conversions: tuple[Conversion, ...]
    nbytes: int  # bytes to read
    size: int  # bytes of the buffer, whole pages
    scratch_bytes: int
    scratch_at: int
    workspace: Binding | None = None  # in the scratch; for decoding, one weight after another
    shift: int = 0  # bytes before the part in a device's buffer, so that its tensors are aligned
    updates: tuple[tuple[Binding, LowRank[Binding]], ...] = ()  # merged into bindings, in the buffer
    factors: tuple[Factor, ...] = ()  # weights that products take packed

    def targets(self) -> tuple[Binding, ...]:
        """All bindings of the part; ``at`` counts in the buffer, or in the scratch for converted tensors."""
        return self.bindings + tuple(target for conversion in self.conversions for target in conversion.targets)

    @property
    def merges(self) -> tuple[tuple[Binding, LowRank[Binding]], ...]:
        """All updates of an adapter, each with its weight."""
        made = {target.target: target for conversion in self.conversions for target in conversion.targets}
        converted = (pair for conversion in self.conversions for pair in conversion.updates.items())
        return (*self.updates, *((made[name], update) for name, update in converted))

    @property
    def made_bytes(self) -> int:
        """Bytes of the parameters, in the dtypes that the model computes in."""
        stored = {binding.at: binding.nbytes for binding in self.bindings}
        made = {target.at: target.nbytes for conversion in self.conversions for target in conversion.targets}
        factors = sum(factor.sizes.nbytes for factor in self.factors)
        return sum(stored.values()) + sum(made.values()) + factors

    @property
    def passes_through(self) -> bool:
        """Whether nothing reads its buffer once it is bound: all its parameters are in its scratch."""
        return not self.bindings and all(factor.write is not None for factor in self.factors)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the part while it stays bound."""
        return self.size * (not self.passes_through) + self.scratch_bytes

    @property
    def decoded_bytes(self) -> int:
        """Bytes that binding writes, after every read; 0 where weights are used as they were read."""
        return self.scratch_bytes + sum(MERGE_COPIES * weight.nbytes for weight, _ in self.merges)


def scratch_bytes(parts: Iterable[Part]) -> int:
    """Bytes of scratch for these parts if layers use it one after another."""
    return max((part.scratch_at + part.scratch_bytes for part in parts), default=0)


def merge_bytes(parts: Iterable[Part]) -> int:
    """Bytes that merging an adapter takes for a moment, one weight after another; 0 without an adapter."""
    merges = (pair for part in parts for pair in part.merges)
    return max((temporary_bytes(weight.shape, rank=update.a.shape[0]) for weight, update in merges), default=0)


def view(buffer: torch.Tensor, binding: Binding) -> torch.Tensor:
    """The tensor of ``binding`` in ``buffer`` (uint8 [nbytes]): a view, or a copy if its bytes are not aligned."""
    stored = buffer[binding.at : binding.at + binding.nbytes]
    if stored.storage_offset() % binding.dtype.itemsize:
        stored = stored.clone()
    return stored.view(binding.dtype).view(binding.shape)


def as_tensor(buffer: memoryview) -> torch.Tensor:
    """A uint8 [nbytes] tensor over the same bytes."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


def layer_of(name: str, layers: str) -> int:
    """The layer of a parameter; REST if it belongs to none. ``layers``: the name of the list of layers."""
    match = re.match(re.escape(layers) + r"\.(\d+)\.", name)
    return int(match[1]) if match else REST
