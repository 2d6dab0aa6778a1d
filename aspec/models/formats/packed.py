"""A weight that is stored in fewer bits: the tensors it is made from, and the function that makes it.

Every method's file turns a ``quantization_config`` and stored tensors into packed weights, or refuses them by name.
The rest of aspec knows a packed weight only: it reads the bytes of ``refs``, and has ``decode`` write the weight.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cache
from typing import Protocol

import torch

from aspec.io.checkpoint import TensorRef
from aspec.models.formats.int4.form import Int4, Int4Factor


class Decode(Protocol):
    """Writes a weight to ``out``; it allocates nothing, and may run on any thread and device."""

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """``stored``: the tensors of ``refs``, in their order, with their stored dtypes and shapes.

        ``out``: the weight's shape, contiguous, in any of float32, bfloat16 and float16. ``workspace``: uint8
        [workspace_bytes], aligned to 256 bytes, with undefined contents before and after.
        """
        ...


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One weight as it is stored."""

    name: str  # of the weight that it decodes to: "model.layers.0.mlp.up_proj.weight"
    shape: tuple[int, ...]  # as decoded
    dtype: torch.dtype  # in which the format's own library makes it, when nobody asks for another
    refs: tuple[TensorRef, ...]  # the stored tensors, in the order that ``decode`` expects
    method: str  # for people: "GPTQ, 4 bits, groups of 128"
    decode: Decode
    workspace_bytes: int
    factor: Int4Factor | None = None  # None: it must be decoded before products
    sizes: Int4 | None = None  # as products take it packed; None: it is decoded
    cut: "Callable[[int], PackedWeight] | None" = None  # of matrices [E, ...]: to one of them, [1, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(ref.nbytes for ref in self.refs)

    @property
    def is_written(self) -> bool:
        """Whether it is decoded or repacked after every read."""
        return self.sizes is None or (self.factor is not None and self.factor.write is not None)


def by_matrix(weight: PackedWeight) -> PackedWeight:
    """The same weight; if every stored tensor has one slice for each of its matrices, it can be cut into them.

    Its ``decode`` must take the number of matrices from the tensors that it is given.
    """
    number, *matrix = weight.shape
    if len(matrix) != 2 or any(ref.shape[:1] != (number,) for ref in weight.refs):
        return weight

    def cut(index: int) -> PackedWeight:
        name, refs = f"{weight.name}[{index}]", tuple(ref.cut(index) for ref in weight.refs)
        return replace(weight, name=name, shape=(1, *matrix), refs=refs)

    return replace(weight, cut=cut)


StoredWeight = TensorRef | PackedWeight
"""A weight of a checkpoint: a plain tensor, or a packed one."""


def methods_of(weights: Iterable[PackedWeight]) -> tuple[str, ...]:
    """How weights are packed, the method of the most bytes first."""
    nbytes: Counter[str] = Counter()
    for weight in weights:
        nbytes[weight.method] += weight.nbytes
    return tuple(method for method, _ in nbytes.most_common())


def packed_by_layer(
    sources: Iterable[tuple[int, Iterable[tuple[StoredWeight, object]]]],
) -> dict[int, tuple[PackedWeight, ...]]:
    """The packed weights among the ``sources`` of tensors, which come with their layers."""
    found: dict[int, list[PackedWeight]] = {}
    for layer, several in sources:
        if packed := [weight for weight, _ in several if isinstance(weight, PackedWeight)]:
            found.setdefault(layer, []).extend(packed)
    return {layer: tuple(own) for layer, own in found.items()}


class Kind(Enum):
    """What a weight is in its model: methods choose by it which weights they pack."""

    LINEAR = auto()  # a matrix of a linear layer, or of one routed expert
    HEAD = auto()  # the matrix from hidden states to logits
    EMBEDDING = auto()
    EXPERTS = auto()  # the matrices of all routed experts of a layer in one tensor
    OTHER = auto()  # norms, biases, routers


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A weight as its model has it, for a plan without the checkpoint."""

    name: str  # as published: "model.layers.0.mlp.experts.3.up_proj.weight"
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind

    @property
    def module(self) -> str:
        """The name of the module that has the weight."""
        return self.name.removesuffix(".weight")


Outline = Mapping[str, torch.Tensor]
"""Stored tensors by name, on meta; a small one whose contents a format reads is real."""


@cache
def outlined(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of an outline."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Format(Protocol):
    """A method with the settings of one checkpoint."""

    remarks: tuple[str, ...] = ()  # texts for the user

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """The packed weights among stored tensors; tensors that belong to none are stored plainly.

        Reads no weights. Raises CheckpointError for tensors that do not fit the method: missing companions, wrong
        dtypes or shapes, groups that do not divide, weights that the settings name and that are stored otherwise.
        """
        ...

    def outline(self, weight: PlainWeight) -> Outline:
        """The tensors that store a weight of a checkpoint with these settings; none if it is stored plainly.

        ``weights`` finds the weight in them. Scales of activations, which are never read, are left out.
        """
        ...
