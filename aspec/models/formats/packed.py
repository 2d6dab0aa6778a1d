"""A weight that is stored in fewer bits: the tensors it is made from, and the function that makes it.

Every method's file turns a ``quantization_config`` and stored tensors into packed weights, or refuses them by name.
The rest of aspec knows a packed weight only: it reads the bytes of ``refs``, and has ``decode`` write the weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from aspec.io.checkpoint import TensorRef


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

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(ref.nbytes for ref in self.refs)


StoredWeight = TensorRef | PackedWeight
"""A weight of a checkpoint: a plain tensor, or a packed one."""


class Format(Protocol):
    """A method with the settings of one checkpoint."""

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """The packed weights among stored tensors; tensors that belong to none are stored plainly.

        Reads no weights. Raises CheckpointError for tensors that do not fit the method: missing companions, wrong
        dtypes or shapes, groups that do not divide, weights that the settings name and that are stored otherwise.
        """
        ...
