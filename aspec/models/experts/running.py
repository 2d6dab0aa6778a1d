"""The experts of a layer that are read one by one: from their bytes to the result of the layer's module.

Computes what transformers' ``grouped_mm_experts_forward`` computes, expert by expert. Every expert's results are put at
their tokens' places, and are weighted and added at the end in the order of the routes, so no bit depends on the order
in which the experts came.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from aspec.errors import InternalError
from aspec.models.exact.products import expert_products
from aspec.models.experts.layout import RoutedLayer, RoutedLayers
from aspec.models.experts.pause import Pause, call_experts
from aspec.models.weights.binding import make
from aspec.models.weights.parts import Part, view

MOST_ROWS = 64  # of experts that are computed in one batch: more cost time of their own, and memory

Weights = tuple[torch.Tensor, torch.Tensor]
"""Of an expert, [inputs, outputs]: up, down."""


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
        chosen: list[int] = pause.index.reshape(-1).tolist()
        places = sorted((place for place, one in enumerate(chosen) if one < number), key=chosen.__getitem__)
        counts = Counter(chosen[place] for place in places)
        split = torch.split(torch.tensor(places, device=pause.index.device), list(counts.values()))
        return cls(pause, dict(zip(counts, split, strict=True)), missing=len(counts))

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
        self._views: dict[int, tuple[tuple[int, int], Weights]] = {}  # by slot: layer and expert, and their weights
        self._scratch = torch.empty(0, dtype=torch.uint8)
        for layer in routed.layers.values():
            layer.module.forward = call_experts

    def use(self, slots: Sequence[torch.Tensor], scratch: torch.Tensor) -> None:
        """Take the experts from these buffers, uint8; decoded ones pass through ``scratch``."""
        self._slots, self._scratch = slots, scratch
        self._views.clear()

    def forget(self) -> None:
        """Drop all views of buffers."""
        self.use((), torch.empty(0, dtype=torch.uint8))

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
        routed, pause = self._layers[layer], item.pause
        for batch in self._batches(layer, item, experts):
            places = torch.cat([item.places[expert] for expert, _ in batch])
            made = self._run(routed, item, batch, pause.hidden[places // pause.index.shape[1]])
            if item.made is None:
                item.made = made.new_zeros(pause.index.numel(), made.shape[-1])
            item.made[places] = made
            item.missing -= len(batch)

    def _batches(
        self, layer: int, item: RoutedItem, experts: Sequence[tuple[int, int]]
    ) -> Iterator[list[tuple[int, int]]]:
        """Experts whose calls beside the products are made together: few rows in all; decoded ones one by one."""
        batch: list[tuple[int, int]] = []
        rows = 0
        for expert, slot in experts:
            if expert not in item.places:
                raise InternalError(f"expert {expert} of L{layer} was not chosen, or is computed twice")
            more = len(item.places[expert])
            if batch and (rows + more > MOST_ROWS or self.part(layer, expert).conversions):
                yield batch
                batch, rows = [], 0
            batch.append((expert, slot))
            rows += more
        if batch:
            yield batch

    def combine(self, layer: int, item: RoutedItem) -> torch.Tensor:
        """The result of the layer's experts [N, H]. Raises InternalError if one of them was not computed."""
        pause = item.pause
        if item.made is None or item.missing:
            raise InternalError(f"{item.missing} experts of L{layer} were not computed")
        weighted = item.made * pause.weights.reshape(-1, 1)
        item.made = None
        return weighted.view(*pause.index.shape, -1).sum(dim=1).to(pause.hidden.dtype)

    def _weights(self, routed: RoutedLayer, expert: int, slot: int) -> Weights:
        """An expert's matrices, [inputs, outputs]: up, down. Views of its slot are made once, while it is there."""
        known = self._views.get(slot)
        if known is not None and known[0] == (routed.layer, expert):
            return known[1]
        part, buffer = self.part(routed.layer, expert), self._slots[slot]
        buffer = buffer[part.shift :]
        for conversion in part.conversions:
            make(part, conversion, buffer, self._scratch, self._model)
        made = {target.target: view(self._scratch, target)[0] for own in part.conversions for target in own.targets}
        made |= {binding.target: view(buffer, binding)[0] for binding in part.bindings}
        up, down = (made[entry.name] if routed.experts.transposed else made[entry.name].mT for entry in routed.entries)
        storage = buffer.untyped_storage().data_ptr()
        if all(weight.untyped_storage().data_ptr() == storage for weight in (up, down)):  # no copies
            self._views[slot] = (routed.layer, expert), (up, down)
        return up, down

    def _run(
        self, routed: RoutedLayer, item: RoutedItem, batch: Sequence[tuple[int, int]], rows: torch.Tensor
    ) -> torch.Tensor:
        """The results [n, H] of a batch of experts for ``rows`` [n, H], those of one expert after those of another."""
        kind, counts = routed.experts, [len(item.places[expert]) for expert, _ in batch]
        weights = [self._weights(routed, expert, slot) for expert, slot in batch]
        made = self._products(routed, kind.up, batch, (rows, counts), [up for up, _ in weights])
        made = self._products(routed, kind.down, batch, (kind.act(made), counts), [down for _, down in weights])
        return made if kind.norm is None else kind.norm(made)

    def _products(
        self,
        routed: RoutedLayer,
        name: str,
        batch: Sequence[tuple[int, int]],
        groups: tuple[torch.Tensor, list[int]],
        weights: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Each expert's product of its rows, below one another; ``groups``: all rows, and how many each has."""
        rows, counts = groups
        made = expert_products(rows.to(weights[0].dtype), counts, weights)
        if routed.experts.biased:
            bias = routed.module.get_parameter(f"{name}_bias")
            for (expert, _), own in zip(batch, torch.split(made, counts), strict=True):
                own.add_(bias[expert])
        return made
