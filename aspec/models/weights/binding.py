"""Binding of a skeleton's parameters to bytes: views of a part's buffer, or of scratch where bytes are converted.

A parameter is replaced in its module's own table, which costs less than a microsecond; the tensors are created once
per part and buffer. An adapter's updates are merged into the bytes that were read, so a part with updates is bound once
after each read. A parameter without bytes is on meta; ``check`` raises an error for it before a layer runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from aspec.errors import InternalError
from aspec.models.exact.products import RoutedLinear
from aspec.models.weights.linears import Linears
from aspec.models.weights.merge import LowRank, merge
from aspec.models.weights.parts import REST, Binding, Conversion, Factor, Part, Source, view
from aspec.models.weights.tensor_map import convert

Table = dict[str, torch.Tensor | None]
"""A module's own parameters or buffers."""

Assignment = tuple[Table, str, torch.Tensor]
"""A module's table, the name in it, and the tensor to put there."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """The assignments of a part in one buffer. It references the part, so that no other object gets the same id."""

    part: Part
    assignments: tuple[Assignment, ...]


class Binder:
    """Binds parts: layers in ``layers_model``, all other weights in ``frame``."""

    def __init__(
        self,
        frame: PreTrainedModel,
        layers_model: PreTrainedModel,
        layers: nn.ModuleList,
        linears: Linears,
    ) -> None:
        self._frame, self._layers_model = frame, layers_model
        self._linears = linears
        self._bound: dict[tuple[int, int], _Bound] = {}  # key: the part's id and the buffer's address
        self._empty: dict[tuple[int, str], Assignment] = {}  # by layer and target: the state before the first bind
        self._tables = [_tables(layer) for layer in layers]
        self._changes, self._changed = 0, dict[int, int]()  # changes of weights; by layer the number of the latest

    def version(self, layer: int) -> int:
        """A number that is another one after every change of the layer's weights."""
        return self._changed.get(layer, 0)

    def _change(self, layer: int) -> None:
        """The weights of a layer are other ones, or in another form."""
        self._changes += 1
        self._changed[layer] = self._changes

    def pack(self, part: Part) -> tuple[Binding, ...]:
        """See ``Model.pack``."""
        self._change(part.layer)
        return self._linears.pack(part)

    def bind(self, part: Part, buffer: torch.Tensor, scratch: torch.Tensor | None) -> None:
        """See ``Model.bind``. Raises InternalError where the buffer or the scratch is missing or too small."""
        self._change(part.layer)
        key = (id(part), buffer.data_ptr())
        bound = self._bound.get(key)
        if bound is None:
            _check_size(part, "buffer", buffer, part.size)
            made = tuple(self._place(part, binding, buffer[part.shift :]) for binding in part.bindings)
            bound = self._bound[key] = _Bound(part, made)
        for table, name, tensor in bound.assignments:
            table[name] = tensor
        for weight, update in part.updates:
            stored = view(buffer[part.shift :], weight)
            merge(stored, stored, _matrices(update, buffer[part.shift :]))
        if part.scratch_bytes or part.factors:
            self._fill(part, buffer[part.shift :], scratch)

    def _fill(self, part: Part, buffer: torch.Tensor, scratch: torch.Tensor | None) -> None:
        """Convert, repack and decode into the scratch, and bind what is made."""
        own = buffer[:0]
        if part.scratch_bytes:
            if scratch is None:
                raise InternalError(f"part {part.index} needs {part.scratch_bytes} bytes of scratch, was given none")
            _check_size(part, "scratch", scratch, part.scratch_at + part.scratch_bytes)
            own = scratch[part.scratch_at : part.scratch_at + part.scratch_bytes]
        for factor in part.factors:
            self._take(part, factor, buffer, own)
        for conversion in part.conversions:
            self._convert(part, conversion, buffer, own)

    def unbind(self, part: Part) -> None:
        """Put the part's parameters back on meta."""
        self._change(part.layer)
        for binding in part.targets():
            if (empty := self._empty.get((part.layer, binding.target))) is not None:
                table, name, tensor = empty
                table[name] = tensor
        for factor in part.factors:
            self._linear(factor).drop()

    def forget(self) -> None:
        """Drop all tensors over the buffers, so that the buffers can be freed. Unbind the parts first."""
        self._bound.clear()
        for layer in range(len(self._tables)):
            self._change(layer)

    def leave_out(self, names: Iterable[str]) -> None:
        """Let layers run without these parameters, which no part binds."""
        left = set()
        for name in names:
            path, _, last = name.rpartition(".")
            left.add((id(self._layers_model.get_submodule(path)._parameters), last))
        self._tables = [[(table, name) for table, name in own if (id(table), name) not in left] for own in self._tables]

    def check(self, layer: int) -> None:
        """Raise InternalError if a parameter of the layer is not bound."""
        for table, name in self._tables[layer]:
            tensor = table[name]
            if tensor is not None and tensor.is_meta:
                raise InternalError(f"layer {layer} runs while its {name} is not bound")

    def _convert(self, part: Part, conversion: Conversion, buffer: torch.Tensor, scratch: torch.Tensor) -> None:
        make(part, conversion, buffer, scratch, self._layers_model)
        for target in conversion.targets:
            table, name, tensor = self._place(part, target, scratch)
            table[name] = tensor

    def _take(self, part: Part, factor: Factor, buffer: torch.Tensor, scratch: torch.Tensor) -> None:
        """Have a linear module multiply by its packed weight."""
        memory = buffer if factor.write is None else scratch
        codes, scales = view(memory, factor.codes), view(memory, factor.scales)
        if factor.write is not None:
            stored = [view(buffer, binding) for binding in factor.stored]
            factor.write(stored, factor.sizes.block, codes, scales, _workspace(part, scratch))
        self._linear(factor).take(factor.sizes, codes, scales)

    def _linear(self, factor: Factor) -> RoutedLinear:
        linear = self._linears.of(factor.target)
        assert linear is not None, "a factor is the weight of a linear module"
        return linear

    def _place(self, part: Part, binding: Binding, memory: torch.Tensor) -> Assignment:
        """The assignment of a binding to ``memory``; records the tensor that was there before the first bind."""
        path, _, name = binding.target.rpartition(".")
        module = (self._frame if part.layer == REST else self._layers_model).get_submodule(path)
        table: Table = module._parameters if name in module._parameters else module._buffers
        before = table[name]
        assert before is not None
        self._empty.setdefault((part.layer, binding.target), (table, name, before))
        tensor = view(memory, binding)
        if isinstance(before, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        return table, name, tensor


def make(
    part: Part, conversion: Conversion, buffer: torch.Tensor, scratch: torch.Tensor, model: PreTrainedModel
) -> None:
    """Write the targets of a conversion to their places in the part's ``scratch``, from its bytes in ``buffer``."""
    found = [(own.name, own.pattern, _decoded(own, part, buffer, scratch)) for own in conversion.sources]
    made: dict[str, torch.Tensor] = {}
    if conversion.converter is not None:
        made = convert(conversion.converter, conversion.name, found, model)
    in_place = conversion.converter is None and conversion.sources[0].packed is not None
    filled: set[int] = set()
    for target in conversion.targets:
        if target.at in filled:  # tied names share one place
            continue
        filled.add(target.at)
        place = view(scratch, target)
        value = place if in_place else made.get(target.target, found[0][2])
        update = conversion.updates.get(target.target)
        if update is not None:
            merge(place, value, _matrices(update, buffer))
        elif not in_place:
            place.copy_(value)


def _decoded(source: Source, part: Part, buffer: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The tensor of a source: a view of the buffer, or decoded into its place in the scratch."""
    stored = [view(buffer, binding) for binding in source.stored]
    if source.packed is None or source.made is None:
        return stored[0]
    made = view(scratch, source.made)
    source.packed.decode(stored, made, _workspace(part, scratch))
    return made


def _workspace(part: Part, scratch: torch.Tensor) -> torch.Tensor:
    return scratch[:0] if part.workspace is None else view(scratch, part.workspace)


def _matrices(update: LowRank[Binding], buffer: torch.Tensor) -> LowRank[torch.Tensor]:
    return LowRank(view(buffer, update.a), view(buffer, update.b), update.scale, update.transposed)


def _tables(layer: nn.Module) -> list[tuple[Table, str]]:
    """Every parameter and stored buffer of a layer: its table and its name in the table."""
    found: list[tuple[Table, str]] = []
    for module in layer.modules():
        found += [(module._parameters, name) for name in module._parameters]  # type: ignore[misc]
        stored = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        found += [(module._buffers, name) for name in stored]
    return found


def _check_size(part: Part, what: str, memory: torch.Tensor, nbytes: int) -> None:
    if memory.dtype != torch.uint8 or memory.dim() != 1 or memory.numel() < nbytes:
        raise InternalError(
            f"part {part.index} needs a {what} of {nbytes} bytes, was given {memory.dtype} {list(memory.shape)}"
        )
