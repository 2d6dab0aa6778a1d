"""Experts that are read before their router has chosen them: those of the layer's previous pass that are in no cache.

A guess costs nothing that is needed. It is read only while no other load is under way, few at a time and behind every
other read; it passes through a slot that serves all layers, so it pushes no expert out of a cache; any expert that is
chosen may take its slot. When the route is known, a chosen guess is where it is wanted, and the others are forgotten.
Only a wrong guess that is still being read then makes others wait. If a share h of guesses is chosen, and f of their
reading is over when the route is known, a guess gains f of a read where it is right and loses 1 - f where it is wrong:
h f - (1 - h) (1 - f) > 0 where h + f > 1. Both are learned, and guesses pause where they lose.
Pure policy: numbers of layers, experts and slots only.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

LAST = 1 << 40  # priority of guesses: behind demand, and behind the weight stream
IN_FLIGHT = 2  # guesses: a router's choice waits for no more than these
AHEAD = 4  # layers from the next route on
LEAST_WORTH = 1.3  # of h + f: more than 1, because bytes read in vain take the time of memory and loop, too
FIRST_WORTH = 1.5  # before any guess was settled
MEMORY = 0.98  # factor on earlier guesses, at each: about the last fifty count
PRIOR = 4.0  # guesses: the weight of FIRST_WORTH
TRY_EVERY = 64  # times that a guess could be made, while they pause


@dataclass(slots=True)
class Guess:
    """An expert in a passing slot, or on its way there; mutable, because it lands."""

    slot: int
    content: str  # of the slot, as long as no other expert took it
    task: int  # id of the task that fills the slot
    landed: bool = False


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What happened to experts since the engine was opened; two of them differ by what happened between them."""

    chosen: int = 0  # each counted once per layer and pass
    guessed: int = 0  # read before they were chosen
    used: int = 0  # guesses that were chosen
    wasted_bytes: int = 0  # of the others

    def __add__(self, other: "ExpertCounts") -> "ExpertCounts":
        return ExpertCounts(
            self.chosen + other.chosen,
            self.guessed + other.guessed,
            self.used + other.used,
            self.wasted_bytes + other.wasted_bytes,
        )

    def __sub__(self, other: "ExpertCounts") -> "ExpertCounts":
        return ExpertCounts(
            self.chosen - other.chosen,
            self.guessed - other.guessed,
            self.used - other.used,
            self.wasted_bytes - other.wasted_bytes,
        )


NO_COUNTS = ExpertCounts()


class Guesses:
    """What the layers chose in their previous passes, and which of it is read again ahead of its route."""

    def __init__(self, layers: Sequence[int]) -> None:
        """``layers``: those with experts on demand, in order."""
        self._layers = layers
        self._previous: dict[int, tuple[int, ...]] = {}  # by layer: what its last pass chose, the most wanted first
        self._guesses: dict[tuple[int, int], Guess] = {}  # by layer and expert
        self._in_flight: dict[int, int] = {}  # task id -> slot
        self._worth, self._settled = PRIOR * FIRST_WORTH, PRIOR  # decayed sums: of chosen and of landed ones; of all
        self._paused = 0  # guesses that were not made since the last one

    @property
    def room(self) -> int:
        """Guesses that may be read now, beside those in flight."""
        return IN_FLIGHT - len(self._in_flight)

    def pays(self) -> bool:
        """Whether guesses gain more than they lose; if not, a rare one keeps the estimate current. Call it for each."""
        self._paused += 1
        if self._worth > LEAST_WORTH * self._settled or self._paused >= TRY_EVERY:
            self._paused = 0
        return not self._paused

    @property
    def coming(self) -> Collection[int]:
        """The slots that guesses in flight will fill."""
        return self._in_flight.values()

    def live(self, contents: Mapping[int, str]) -> set[int]:
        """The slots of guesses whose layers may still choose them."""
        self._guesses = {key: own for key, own in self._guesses.items() if contents[own.slot] == own.content}
        return {own.slot for own in self._guesses.values()}

    def candidates(self, layer: int, held: Callable[[int], Collection[int]]) -> Iterator[tuple[int, int]]:
        """(layer, expert) pairs to read ahead, the soonest first; the next route is that of ``layer`` or a later one.

        ``held``: the experts of a layer that need no read.
        """
        start = bisect_left(self._layers, layer)
        for place in range(start, start + min(AHEAD, len(self._layers))):
            ahead = self._layers[place % len(self._layers)]
            for expert in self._previous.get(ahead, ()):
                if expert not in held(ahead) and (ahead, expert) not in self._guesses:
                    yield ahead, expert

    def add(self, layer: int, expert: int, guess: Guess) -> None:
        """A guess is on its way."""
        self._guesses[layer, expert] = guess
        self._in_flight[guess.task] = guess.slot

    def land(self, task: int) -> None:
        """A task has ended: if it filled a slot with a guess, the guess is there."""
        if self._in_flight.pop(task, None) is not None:
            for guess in self._guesses.values():
                guess.landed = guess.landed or guess.task == task

    def settle(self, layer: int, chosen: Iterable[int], contents: Mapping[int, str]) -> dict[int, Guess]:
        """The guesses that a layer has chosen, by expert; its others are forgotten."""
        self._previous[layer] = tuple(chosen)
        own = {expert: guess for (at, expert), guess in self._guesses.items() if at == layer}
        self._guesses = {key: guess for key, guess in self._guesses.items() if key[0] != layer}
        own = {expert: guess for expert, guess in own.items() if contents[guess.slot] == guess.content}
        found = {expert: own[expert] for expert in self._previous[layer] if expert in own}
        for expert, guess in own.items():
            self._worth = MEMORY * self._worth + guess.landed + (expert in found)
            self._settled = MEMORY * self._settled + 1.0
        return found
