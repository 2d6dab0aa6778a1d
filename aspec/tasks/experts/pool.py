"""The slots of one memory, and which expert is in which: the caches of the layers, and slots that serve all of them."""

from collections.abc import Collection, Iterable, Sequence

from aspec.expert_plan import ExpertSlots
from aspec.tasks.experts.cache import ExpertCache, Placement


class SlotPool:
    """Gives slots to experts."""

    def __init__(self, slots: ExpertSlots, layers: Iterable[int]) -> None:
        self._caches = {layer: ExpertCache(slots.slots_of(layer)) for layer in layers}
        self._passing = list(slots.passing_slots)  # experts beyond the caches pass through them in turn
        self._next = 0  # the place in this list whose turn it is
        self.contents: dict[int, str] = {}  # by slot

    def __contains__(self, layer: int) -> bool:
        return layer in self._caches

    @property
    def num_passing(self) -> int:
        """The number of slots that serve all layers."""
        return len(self._passing)

    def held(self, layer: int) -> Collection[int]:
        """The experts of a layer that are in its cache."""
        return self._caches[layer].experts

    def held_slot(self, layer: int, expert: int) -> int | None:
        """The slot of an expert in its layer's cache; None if it is not there."""
        return self._caches[layer].slot_of(expert)

    def place(self, layer: int, chosen: Sequence[int]) -> Placement:
        """See ``ExpertCache``."""
        return self._caches[layer].place(chosen)

    def keep(self, layer: int, expert: int, slot: int) -> None:
        """An admitted expert is in the passing ``slot`` already: the slot that it was admitted to passes instead."""
        self._passing[self._passing.index(slot)] = self._caches[layer].exchange(expert, slot)

    def slot_for(self, expert: int, placed: Placement, avoided: Collection[int] = ()) -> int:
        """The slot of an expert that is not there yet: its own, or the next one that serves all layers.

        ``avoided``: slots whose turn is left out, unless there is no other one.
        """
        return placed.admitted[expert] if expert in placed.admitted else self.pass_through(avoided)

    def pass_through(self, avoided: Collection[int] = ()) -> int:
        """The next slot that serves all layers."""
        for turn in range(len(self._passing)):
            place = (self._next + turn) % len(self._passing)
            if self._passing[place] not in avoided:
                break
        else:
            place = self._next
        self._next = (place + 1) % len(self._passing)
        return self._passing[place]
