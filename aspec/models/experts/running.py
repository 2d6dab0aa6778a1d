"""The experts of a layer that are read one by one: from their bytes to the result of the layer's module.

Computes what transformers' ``grouped_mm_experts_forward`` computes, expert by expert. Every expert's results are put at
their tokens' places, and are weighted and added at the end in the order of the routes, so no bit depends on the order
in which the experts came.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from aspec.errors import InternalError
from aspec.models.exact.products import expert_product
from aspec.models.experts.layout import RoutedLayer, RoutedLayers
from aspec.models.experts.pause import Pause, call_experts
from aspec.models.weights.binding import make
from aspec.models.weights.parts import Part, view


@dataclass(slots=True)
class RoutedItem:
    """An item between a layer's router and the end of the layer; mutable, because every expert adds its results."""

    pause: Pause
    places: dict[int, torch.Tensor]  # by expert, in the order of numbers: its places [n] in the flat index [N * k]
    made: torch.Tensor | None = None  # [N * k, H]: the results of the experts so far
    missing: int = 0  # experts that have not been computed

    @classmethod
    def of(cls, pause: Pause, number: int) -> "RoutedItem":
        """The item at its pause; an expert from ``number`` on is none."""
        flat = pause.index.reshape(-1)
        experts, order = torch.sort(flat, stable=True)
        chosen, counts = torch.unique_consecutive(experts, return_counts=True)
        places = dict(zip(chosen.tolist(), torch.split(order, counts.tolist()), strict=True))
        own = {expert: place for expert, place in places.items() if expert < number}
        return cls(pause, own, missing=len(own))

    @property
    def route(self) -> tuple[tuple[int, int], ...]:
        """The chosen experts and the number of tokens that each is given."""
        return tuple((expert, len(places)) for expert, places in self.places.items())


class ExpertRunner:
    """Runs the experts of all routed layers from their slots."""

    def __init__(self, routed: RoutedLayers, model: PreTrainedModel) -> None:
        """``model``: the one that has the layers. From now on their experts' modules run only in a paused layer."""
        self._layers, self._model = routed.layers, model
        self._parts: dict[tuple[int, int], Part] = {}  # by layer and expert
        self._slots: Sequence[torch.Tensor] = ()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        for layer in routed.layers.values():
            layer.module.forward = call_experts

    def use(self, slots: Sequence[torch.Tensor], scratch: torch.Tensor) -> None:
        """Take the experts from these buffers, uint8; decoded ones pass through ``scratch``."""
        self._slots, self._scratch = slots, scratch

    def forget(self) -> None:
        """Drop all views of buffers."""
        self._slots, self._scratch = (), self._scratch[:0]

    def part(self, layer: int, expert: int) -> Part:
        """What to read for an expert."""
        if (layer, expert) not in self._parts:
            self._parts[layer, expert] = self._layers[layer].part(expert)
        return self._parts[layer, expert]

    def item(self, layer: int, pause: Pause) -> RoutedItem:
        """An item that has reached the experts of a layer."""
        return RoutedItem.of(pause, self._layers[layer].experts.number)

    def compute(self, layer: int, item: RoutedItem, experts: Sequence[tuple[int, int]]) -> None:
        """Compute (expert, slot) pairs of an item. Raises InternalError if the item has not chosen one."""
        for expert, slot in experts:
            if expert not in item.places:
                raise InternalError(f"expert {expert} of L{layer} was not chosen, or is computed twice")
            weights = self._weights(layer, expert, slot)
            places = item.places[expert]
            made = self._run(
                self._layers[layer], expert, item.pause.hidden[places // item.pause.index.shape[1]], weights
            )
            if item.made is None:
                item.made = made.new_zeros(item.pause.index.numel(), made.shape[-1])
            item.made[places] = made
            item.missing -= 1

    def combine(self, layer: int, item: RoutedItem) -> torch.Tensor:
        """The result of the layer's experts [N, H]. Raises InternalError if one of them was not computed."""
        pause = item.pause
        if item.made is None or item.missing:
            raise InternalError(f"{item.missing} experts of L{layer} were not computed")
        weighted = item.made * pause.weights.reshape(-1, 1)
        item.made = None
        return weighted.view(*pause.index.shape, -1).sum(dim=1).to(pause.hidden.dtype)

    def _weights(self, layer: int, expert: int, slot: int) -> Mapping[str, torch.Tensor]:
        """An expert's matrices by the name of the fused weight, views of its slot or of the scratch."""
        part, buffer = self.part(layer, expert), self._slots[slot]
        buffer = buffer[part.shift :]
        for conversion in part.conversions:
            make(part, conversion, buffer, self._scratch, self._model)
        made = {target.target: view(self._scratch, target)[0] for own in part.conversions for target in own.targets}
        return made | {binding.target: view(buffer, binding)[0] for binding in part.bindings}

    def _run(
        self, layer: RoutedLayer, expert: int, rows: torch.Tensor, weights: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The results [n, H] of one expert for ``rows`` [n, H]."""
        kind, (up, down) = layer.experts, (weights[entry.name] for entry in layer.entries)
        made = self._product(layer, kind.up, expert, rows, up)
        made = self._product(layer, kind.down, expert, kind.act(made), down)
        return made if kind.norm is None else kind.norm(made)

    def _product(
        self, layer: RoutedLayer, name: str, expert: int, rows: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        made = expert_product(rows.to(weight.dtype), weight if layer.experts.transposed else weight.mT)
        if layer.experts.biased:
            made.add_(layer.module.get_parameter(f"{name}_bias")[expert])
        return made
