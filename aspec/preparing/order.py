"""The order of a prepared checkpoint: a shard for every layer, in which what is read together lies side by side.

Rules. A shard begins with a header of whole pages, so that a layer is one aligned range of a file. In it weights follow
one another by name; the tensors of a packed weight are neighbours, and so are the matrices of one expert. Tensors whose
size would leave the next one unaligned come last. Tensors outside the layers are the first shard, and tensors that
text does not need are the last one. This file reads no weights.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from aspec.io.checkpoint import Checkpoint
from aspec.models.formats.packed import StoredWeight
from aspec.models.weights.layout import fused_order
from aspec.models.weights.parts import layer_of
from aspec.models.weights.tensor_map import Entry, TensorMap
from aspec.preparing.pieces import Copied, NewTensor, Piece

ALIGNMENT = 64  # bytes; the vector kernels of CPUs are fastest on such addresses

Repack = Callable[[StoredWeight, Entry], Piece | None]
"""The piece that replaces a stored weight; None: it is copied."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of a shard: the piece that makes it, and its index there."""

    tensor: NewTensor
    piece: Piece
    index: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a new checkpoint."""

    name: str
    tensors: tuple[Placed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(placed.tensor.nbytes for placed in self.tensors)


def in_streaming_order(
    checkpoint: Checkpoint, tensors: TensorMap, layers: str, repack: Repack | None = None
) -> list[Shard]:
    """The shards of a new checkpoint with the same weights. ``layers``: the name of the list of decoder layers."""
    by_layer: dict[int, list[Entry]] = defaultdict(list)
    for entry in tensors.entries:
        by_layer[layer_of(entry.name, layers)].append(entry)
    used: dict[str, None] = {}
    groups: list[list[Piece]] = []
    for layer in sorted(by_layer):
        pieces: list[Piece] = []
        for weight, entry in _weights(by_layer[layer]):
            names = [ref.name for ref in weight.refs]
            if used.keys().isdisjoint(names):  # a stored weight may serve several parameters
                made = None if repack is None else repack(weight, entry)
                pieces += [Copied(ref) for ref in weight.refs] if made is None else [made]
            used |= dict.fromkeys(names)
        groups.append(pieces)
    groups.append([Copied(ref) for name, ref in checkpoint.tensors.items() if name not in used])
    groups = [pieces for pieces in groups if pieces]
    return [
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(_aligned(pieces)))
        for number, pieces in enumerate(groups, 1)
    ]


def _weights(entries: Sequence[Entry]) -> Iterator[tuple[StoredWeight, Entry]]:
    """The weights of a layer; those of one expert are neighbours, in the order of the fused tensors."""
    experts: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        path = entry.name.rpartition(".")[0]
        if entry.converter is not None and fused_order(entry) is not None:
            experts[path].append(entry)
            continue
        yield from ((own, entry) for own, _ in entry.sources)
    for fused in experts.values():
        for same_expert in itertools.zip_longest(*map(_by_expert, fused), fillvalue=()):
            for weights in same_expert:
                yield from weights


def _by_expert(entry: Entry) -> list[list[tuple[StoredWeight, Entry]]]:
    """The weights of an entry for each expert."""
    sources = fused_order(entry) or ()
    ((shape, _),) = entry.outputs.values()
    each = len(sources) // shape[0]
    return [[(own, entry) for own, _ in sources[at : at + each]] for at in range(0, len(sources), each)]


def _aligned(pieces: Iterable[Piece]) -> list[Placed]:
    """The tensors of pieces, those that keep the next one aligned first."""
    placed = [Placed(tensor, piece, index) for piece in pieces for index, tensor in enumerate(piece.tensors)]
    return sorted(placed, key=lambda own: -own.tensor.dtype.itemsize if own.tensor.nbytes % ALIGNMENT else -ALIGNMENT)
