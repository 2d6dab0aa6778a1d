"""Where each expert of a layer is stored: its own part, cut out of the entries of its layer's fused weights.

A fused weight is either stored expert by expert, or as one tensor of which an expert is one slice. Experts with an
adapter's updates, and weights whose conversion mixes experts, stay with their layer.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from aspec.errors import InternalError
from aspec.expert_plan import ExpertShape
from aspec.models.formats.packed import StoredWeight
from aspec.models.hf_compat import Experts, experts_of
from aspec.models.weights.layout import lay_out
from aspec.models.weights.parts import PAGE, Part
from aspec.models.weights.tensor_map import Entry, TensorMap

SEPARATE = re.compile(r"MergeModulelist\(0\)|Concatenate\(1\)|Transpose\(1, 2\)")
"""Conversions of fused weights [E, ...] that treat every expert alike and apart from the others."""


@dataclass(frozen=True)
class RoutedLayer:
    """A layer whose experts can be read one by one."""

    layer: int
    module: nn.Module  # of its experts
    experts: Experts
    entries: tuple[Entry, ...]  # of the weights of all experts: up, down
    tensors: TensorMap
    alignment: int

    def part(self, expert: int) -> Part:
        """What to read for one expert, and where it goes in a buffer."""
        part = lay_out([entry.of(expert) for entry in self._fused], self.tensors, 0, self.alignment)
        if part.size > self.slot_bytes:
            raise InternalError(f"expert {expert} of L{self.layer} needs {part.size} bytes of {self.slot_bytes}")
        return replace(part, layer=self.layer)

    @cached_property
    def _fused(self) -> tuple["_Fused", ...]:
        return tuple(_Fused.cut(entry, self.experts.number) for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes to read for one expert."""
        return sum(entry.nbytes for entry in self.entries) // self.experts.number

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of a buffer for any expert: each stored tensor may begin anywhere in a page."""
        refs = [ref for entry in self._fused for ref in entry.of(0).refs]
        return sum(-(-(ref.nbytes + PAGE) // PAGE) * PAGE for ref in refs) + PAGE * (self.alignment > 1)

    @property
    def names(self) -> frozenset[str]:
        """The names of the weights of all experts."""
        return frozenset(entry.name for entry in self.entries)


@dataclass(frozen=True)
class RoutedLayers:
    """The layers of a model whose experts can be read one by one."""

    layers: Mapping[int, RoutedLayer]  # by number
    num_layers: int
    top_k: int

    @cached_property
    def shape(self) -> ExpertShape | None:
        """Their sizes; None if there is no such layer."""
        if not self.layers:
            return None
        every = range(self.num_layers)
        return ExpertShape(
            num_experts=tuple(self.layers[n].experts.number if n in self.layers else 0 for n in every),
            top_k=self.top_k,
            nbytes=tuple(self.layers[n].nbytes if n in self.layers else 0 for n in every),
            slot_bytes=max(layer.slot_bytes for layer in self.layers.values()),
            scratch_bytes=max(layer.part(0).scratch_bytes for layer in self.layers.values()),
        )

    def without_experts(self, tensors: TensorMap) -> TensorMap:
        """The stored tensors of all other parameters."""
        names = frozenset().union(*(layer.names for layer in self.layers.values()))
        return replace(tensors, entries=tuple(entry for entry in tensors.entries if entry.name not in names))


def find_routed(
    modules: Sequence[nn.Module], prefix: str, tensors: TensorMap, top_k: int, alignment: int
) -> RoutedLayers:
    """The routed layers among the decoder layers ``modules``, whose parameters' names begin with ``prefix``."""
    entries = {target: entry for entry in tensors.entries for target in entry.outputs}
    found = {}
    for number, module in enumerate(modules):
        own = [(name, each, kind) for name, each in module.named_modules() if (kind := experts_of(each)) is not None]
        if len(own) != 1:  # a layer that calls experts twice cannot be paused at them
            continue
        (name, experts_module, kind), path = own[0], f"{prefix}.{number}"
        weights = [entries.get(f"{path}.{name}.{weight}") for weight in (kind.up, kind.down)]
        if all(weight is not None and _can_be_cut(weight, kind.number) for weight in weights):
            chosen = tuple(weight for weight in weights if weight is not None)
            found[number] = RoutedLayer(number, experts_module, kind, chosen, tensors, alignment)
    return RoutedLayers(found, len(modules), top_k)


def _can_be_cut(entry: Entry, number: int) -> bool:
    (shape, _), *others = entry.outputs.values()
    return not others and not entry.updates and shape[0] == number and _Fused.cut(entry, number).is_separate


@dataclass(frozen=True, slots=True)
class _Fused:
    """A fused weight, whose sources are told apart by expert."""

    entry: Entry
    sources: tuple[tuple[str | None, tuple[StoredWeight, ...]], ...]  # by pattern: of every expert, or one of them all
    number: int  # of experts

    @classmethod
    def cut(cls, entry: Entry, number: int) -> "_Fused":
        """The sources of an entry by their patterns."""
        by_pattern: dict[str | None, list[StoredWeight]] = defaultdict(list)
        for stored, pattern in entry.sources:
            by_pattern[pattern].append(stored)
        return cls(entry, tuple((pattern, tuple(own)) for pattern, own in by_pattern.items()), number)

    @property
    def is_separate(self) -> bool:
        """Whether the bytes of an expert are apart from those of the others."""
        operations = () if self.entry.converter is None else self.entry.converter.operations
        apart = all(SEPARATE.fullmatch(_name(operation)) for operation in operations)
        return apart and all(self._stored(own, 0) is not None for _, own in self.sources)

    def of(self, expert: int) -> Entry:
        """The entry of one expert, if it is apart."""
        outputs = {target: ((1, *shape[1:]), dtype) for target, (shape, dtype) in self.entry.outputs.items()}
        sources = []
        for pattern, own in self.sources:
            stored = self._stored(own, expert)
            assert stored is not None, "the layer was found because its entries can be cut"
            sources.append((stored, pattern))
        return replace(self.entry, sources=tuple(sources), outputs=outputs)

    def _stored(self, own: Sequence[StoredWeight], expert: int) -> StoredWeight | None:
        """One expert's weight; None if there is no such weight, and the one that holds them all cannot be cut."""
        if len(own) == self.number:
            return own[expert]
        if len(own) != 1 or own[0].shape[:1] != (self.number,):
            return None
        return None if own[0].cut is None else own[0].cut(expert)


def _name(operation: object) -> str:
    numbers = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
    return f"{type(operation).__name__}({', '.join(map(str, numbers))})"
