"""The modules of a model that run in ways of aspec: linear ones, by the names of their weights, norms and gates."""

from collections import Counter
from collections.abc import Iterator, Set

from torch import nn

from aspec.models.exact.elements import prove_elements, route_elements
from aspec.models.exact.products import RoutedLinear, route
from aspec.models.weights.parts import REST, Binding, Part, layer_of


class Linears:
    """Those of its frame, and of its layers. ``read``: names of weights that other modules read, too."""

    def __init__(self, frame: nn.Module, layers_model: nn.Module, layers: str, read: Set[str]) -> None:
        self._frame, self._layers = route(frame), route(layers_model)
        self._elements = [*route_elements(frame), *route_elements(layers_model)]
        self._name, self._read = layers, read

    def __iter__(self) -> Iterator[RoutedLinear]:
        yield from (*self._frame.values(), *self._layers.values())

    def of(self, weight: str) -> RoutedLinear | None:
        """The module of a weight that only the module reads; None for other weights."""
        linears = self._frame if layer_of(weight, self._name) == REST else self._layers
        return None if weight in self._read else linears.get(weight)

    def prove(self) -> None:
        """See ``Model.prove_products``."""
        for linear in self:
            linear.prove()
        prove_elements(self._elements)

    def pack(self, part: Part) -> tuple[Binding, ...]:
        """See ``Model.pack``."""
        uses = Counter(binding.at for binding in part.targets())  # tied weights have other readers
        alone = ((own, self.of(own.target)) for own in part.bindings if uses[own.at] == 1)
        return tuple(own for own, linear in alone if linear is not None and linear.pack())

    def forget(self) -> None:
        """Drop all packed weights."""
        for linear in self:
            linear.packed = None
