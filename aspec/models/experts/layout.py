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


@dataclass(frozen=True, slots=True)
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
        entries = [_entry_of(entry, expert, self.experts.number) for entry in self.entries]
        assert all(entries), "the layer was found because its entries can be cut"
        part = lay_out([entry for entry in entries if entry is not None], self.tensors, 0, self.alignment)
        if part.size > self.slot_bytes:
            raise InternalError(f"expert {expert} of L{self.layer} needs {part.size} bytes of {self.slot_bytes}")
        return replace(part, layer=self.layer)

    @property
    def nbytes(self) -> int:
        """Bytes to read for one expert."""
        return sum(entry.nbytes for entry in self.entries) // self.experts.number

    @property
    def slot_bytes(self) -> int:
        """Bytes of a buffer for any expert: each stored tensor may begin anywhere in a page."""
        refs = [ref for entry in self.entries for ref in _first(entry, self.experts.number).refs]
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
    return not others and not entry.updates and shape[0] == number and _entry_of(entry, 0, number) is not None


def _first(entry: Entry, number: int) -> Entry:
    first = _entry_of(entry, 0, number)
    assert first is not None, "the layer was found because its entries can be cut"
    return first


def _entry_of(entry: Entry, expert: int, number: int) -> Entry | None:
    """The entry of one expert; None where its bytes are not apart from those of the others."""
    operations = () if entry.converter is None else entry.converter.operations
    if not all(SEPARATE.fullmatch(_name(operation)) for operation in operations):
        return None
    by_pattern: dict[str | None, list[StoredWeight]] = defaultdict(list)
    for stored, pattern in entry.sources:
        by_pattern[pattern].append(stored)
    sources = []
    for pattern, own in by_pattern.items():
        chosen = own[expert] if len(own) == number else _slice(own, expert, number)
        if chosen is None:
            return None
        sources.append((chosen, pattern))
    outputs = {target: ((1, *shape[1:]), dtype) for target, (shape, dtype) in entry.outputs.items()}
    return replace(entry, sources=tuple(sources), outputs=outputs)


def _name(operation: object) -> str:
    numbers = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
    return f"{type(operation).__name__}({', '.join(map(str, numbers))})"


def _slice(stored: Sequence[StoredWeight], expert: int, number: int) -> StoredWeight | None:
    """One expert of a tensor that holds them all; None if there is no such tensor, or it cannot be cut."""
    if len(stored) != 1 or stored[0].shape[:1] != (number,):
        return None
    return None if stored[0].cut is None else stored[0].cut(expert)
