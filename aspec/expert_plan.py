"""The plan of experts that are read on demand: the experts of each layer, and the slots that hold them.

Standard library only, as ``plan.py``.
"""

from dataclasses import dataclass
from typing import Any

from aspec.errors import InternalError


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The routed experts of a model that can be read one by one."""

    num_experts: tuple[int, ...]  # by layer; 0: the layer has none, or streams whole
    top_k: int  # experts of one token
    nbytes: tuple[int, ...]  # by layer: bytes to read for one expert
    slot_bytes: int  # of a buffer that holds any one expert, whole pages
    scratch_bytes: int = 0  # decoded weights of one expert at a time; 0: used as they are stored

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose experts are read on demand."""
        return tuple(layer for layer, number in enumerate(self.num_experts) if number)

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts of all layers."""
        return sum(number * nbytes for number, nbytes in zip(self.num_experts, self.nbytes, strict=True))


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Experts that are read when a router has chosen them, and the slots for them.

    A layer's cache has slots of its own; ``passing`` slots serve all layers, for chosen experts beyond the caches.
    """

    shape: ExpertShape
    cached: tuple[int, ...]  # by layer: slots of its cache
    passing: int  # slots that serve all layers

    def __post_init__(self) -> None:
        if self.passing < 1 or len(self.cached) != len(self.shape.num_experts):
            raise InternalError(f"experts on demand need a passing slot and a cache per layer, found {self}")
        if any(slots > number for slots, number in zip(self.cached, self.shape.num_experts, strict=True)):
            raise InternalError(f"a layer's cache has more slots than the layer has experts: {self}")

    @property
    def num_slots(self) -> int:
        """All slots; those of the caches come first, layer by layer."""
        return sum(self.cached) + self.passing

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.shape.slot_bytes

    def slots_of(self, layer: int) -> range:
        """The slots of a layer's cache."""
        first = sum(self.cached[:layer])
        return range(first, first + self.cached[layer])

    @property
    def passing_slots(self) -> range:
        """The slots that serve all layers."""
        return range(sum(self.cached), self.num_slots)

    def as_dict(self) -> dict[str, Any]:
        """The plan as a JSON object, in bytes and slots."""
        shape = self.shape
        return {
            "layers": len(shape.layers),
            "experts": max(shape.num_experts),
            "top_k": shape.top_k,
            "expert_bytes": max(shape.nbytes),
            "total_bytes": shape.total_bytes,
            "slot_bytes": shape.slot_bytes,
            "cached": list(self.cached),
            "passing": self.passing,
        }


def share_slots(shape: ExpertShape, slots: int) -> tuple[int, ...]:
    """By layer, its share of ``slots`` cache slots: equal shares, at most one slot for each expert."""
    order = sorted(shape.layers, key=lambda layer: shape.num_experts[layer])
    shares: dict[int, int] = {}
    left = slots
    for place, layer in enumerate(order):
        share = min(shape.num_experts[layer], left // (len(order) - place))
        shares[layer], left = share, left - share
    return tuple(shares.get(layer, 0) for layer in range(len(shape.num_experts)))
