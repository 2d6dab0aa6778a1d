"""The cache of one layer's experts: segmented LRU over the slots that the plan gives to the layer.

An expert enters the probationary segment. Chosen again, it moves to the protected segment, which only such experts
enter and which holds most of the slots. So a pass that touches every expert once, as a prompt does, does not push out
what the text needs again and again (Karedla, Love and Wherry, "Caching strategies to improve disk system performance",
1994). Pure policy: numbers of experts and slots only.
"""

from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass

PROTECTED = 0.8  # most of the slots for experts that were chosen again


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the chosen experts of one pass are, or will be."""

    held: dict[int, int]  # expert -> its slot, which holds it already
    admitted: dict[int, int]  # expert -> the slot that it is read into, and stays in
    beyond: tuple[int, ...]  # experts that find no place: they pass through other slots


class ExpertCache:
    """The experts of one layer that are in its slots, or on their way there."""

    def __init__(self, slots: Iterable[int]) -> None:
        self._free = sorted(slots, reverse=True)
        self._most_protected = int(PROTECTED * len(self._free))
        self._slots: dict[int, int] = {}  # by expert
        self._probationary: dict[int, None] = {}  # experts, the least recent first
        self._protected: dict[int, None] = {}  # likewise

    def __contains__(self, expert: int) -> bool:
        return expert in self._slots

    @property
    def experts(self) -> Collection[int]:
        """The experts that are in slots."""
        return self._slots.keys()

    def slot_of(self, expert: int) -> int | None:
        """The slot of an expert; None if it is in none."""
        return self._slots.get(expert)

    def exchange(self, expert: int, slot: int) -> int:
        """An expert that is in a slot takes another ``slot`` for it; returns the one that it had."""
        had, self._slots[expert] = self._slots[expert], slot
        return had

    def place(self, chosen: Sequence[int]) -> Placement:
        """Take note of a pass that uses ``chosen`` experts, the most wanted first; the cache holds them afterwards.

        No expert of the same pass is pushed out for another one.
        """
        held = {expert: self._slots[expert] for expert in chosen if expert in self._slots}
        for expert in held:
            self._promote(expert)
        admitted: dict[int, int] = {}
        beyond: list[int] = []
        for expert in chosen:
            if expert in held:
                continue
            slot = self._admit(expert, held.keys() | admitted.keys())
            if slot is None:
                beyond.append(expert)
            else:
                admitted[expert] = slot
        return Placement(held, admitted, tuple(beyond))

    def _promote(self, expert: int) -> None:
        """Make a held expert the most recent of the protected ones; the least recent of them may leave for it."""
        (self._protected if expert in self._protected else self._probationary).pop(expert)
        self._protected[expert] = None
        if len(self._protected) > self._most_protected:
            oldest = next(iter(self._protected))
            del self._protected[oldest]
            self._probationary[oldest] = None

    def _admit(self, expert: int, pinned: Set[int]) -> int | None:
        """The slot for a new expert: a free one, or that of the least recent expert on probation; None if all stay."""
        if not self._free:
            victim = next((one for one in self._probationary if one not in pinned), None)
            if victim is None:
                return None
            del self._probationary[victim]
            self._free.append(self._slots.pop(victim))
        slot = self._free.pop()
        self._slots[expert] = slot
        self._probationary[expert] = None
        return slot

    def validate(self) -> None:
        """Check the invariants; tests call it."""
        segments = [*self._probationary, *self._protected]
        assert sorted(segments) == sorted(self._slots), "an expert is in a slot and in one segment, or in neither"
        assert len({*self._slots.values(), *self._free}) == len(self._slots) + len(self._free), "a slot holds two"
        assert len(self._protected) <= self._most_protected
