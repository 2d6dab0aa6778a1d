"""The weight stream: the loads of streamed parts, and their decoding, pass after pass.

The stream is an endless sequence of loads: it repeats the streamed parts in order, load ``n`` into slot
``n % num_slots``. A load is emitted as soon as every reader of its slot's present content was emitted. So the stream
continues across the end of a pass until every slot is full: weights depend on no token. Weights that are not stored as
products take them are decoded likewise, layer after layer, into scratch buffers in turn: streamed parts from their
slots, resident ones from where they are. The parts of a layer have places of their own there, so that several threads
decode them side by side.
Pure policy: no torch, no asyncio, no clock.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from aspec.plan import Plan, PlannedPart, Tier
from aspec.tasks.layers.buffers import decoded_buffer, scratch_buffer, slot_buffer, staging_buffer, weights_buffer
from aspec.tasks.op import Op
from aspec.tasks.task import DECODE, DISK, H2D, Access, Decoding, Load, Task

VERIFY, PREFILL, DRAFT_AHEAD = 0, 10, 20  # priorities on a compute lane: verify first, drafts fill idle times


class Numbering:
    """Task ids in program order."""

    def __init__(self) -> None:
        self._ids = itertools.count()

    def __call__(self) -> int:
        """The next id."""
        return next(self._ids)


class WeightStream:
    """Emits the loads of streamed parts into slots and their decoding into scratch, and gives a pass its weights."""

    def __init__(self, plan: Plan, next_id: Numbering) -> None:
        self._plan, self._next_id = plan, next_id
        self._streamed, self._decoding, self._decoded = plan.streamed, plan.decoding, plan.decoded
        self._num_scratch = plan.num_scratch
        self._by_layer = tuple(plan.streamed_of(layer) for layer in range(plan.num_layers))
        self._loads = 0  # loads emitted so far
        self._read: set[int] = (
            set()
        )  # loads whose readers were all emitted, as long as their slots are not filled again
        self._uses = 0  # loads of the layers whose tasks were all emitted
        self._staged = 0  # reads into staging emitted so far
        self._needed = [0] * plan.num_layers  # by layer of the latest pass: loads that must have landed before it runs
        self._to_decode = self._decodings()  # for ever
        self._next = next(self._to_decode, None)
        self._uses_decoded = 0  # decodings of the layers whose tasks were all emitted
        self._decoded_of: dict[int, list[int]] = {layer: [] for layer in self._decoded}  # indices of parts
        for part in self._decoding:
            self._decoded_of[part.layer].append(part.index)
        self._num_places = max(map(len, self._decoded_of.values()), default=0)  # of a scratch buffer, one for each part

    def fill(self) -> list[Task]:
        """Emit every load whose slot, and every decoding whose scratch, has no reader left to emit."""
        tasks: list[Task] = []
        while True:
            if self._streamed and self._is_free(self._loads - self._plan.num_slots):
                self._read.discard(self._loads - self._plan.num_slots)
                tasks.extend(self._load(self._loads))
                self._loads += 1
            elif (decoding := self._decode()) is not None:
                tasks.append(decoding)
            else:
                return tasks

    def bind(self, layer: int) -> "Weights":
        """The weights of a layer in the latest pass."""
        parts = self._by_layer[layer]
        numbers = range(self._uses, self._uses + len(parts))
        self._needed[layer] = numbers.stop
        placed = [(part, n, n % self._plan.num_slots) for part, n in zip(parts, numbers, strict=True)]
        reads = [Access(slot_buffer(slot), f"load {n}") for part, n, slot in placed if _holds_slot(part)]
        if layer in self._decoded:
            number = self._uses_decoded
            scratch = (scratch_buffer(number % self._num_scratch, place) for place in range(self._num_places))
            modules = (decoded_buffer(layer, place) for place in range(len(self._decoded_of[layer])))
            reads += [Access(name, f"decoding {number}") for name in (*scratch, *modules)]
        own = tuple((part.index, slot) for part, _, slot in placed if not part.decoded_bytes)
        bound = (Access(weights_buffer(layer), f"load {numbers.start}"),) if own else ()
        return Weights(own, tuple(reads), bound)

    def loads_before(self, layer: int) -> int:
        """The number of loads, since the first pass, that a layer of the latest pass needs before it runs."""
        return self._needed[layer]

    def mark_read(self, layer: int) -> None:
        """Note that all readers of this layer's weights in the latest pass were emitted."""
        parts = self._by_layer[layer]
        self._read |= {self._uses + place for place, part in enumerate(parts) if _holds_slot(part)}
        self._uses += len(parts)
        self._uses_decoded += layer in self._decoded

    def _is_free(self, load: int) -> bool:
        return load < 0 or load in self._read

    def _decodings(self) -> Iterator[tuple[int, int, int | None, PlannedPart]]:
        """Numbers of the decoding, of its layer's decoding and of the load (None: it is resident), and the part."""
        loads = {part.index: load for load, part in enumerate(self._streamed)}
        turns = {layer: turn for turn, layer in enumerate(self._decoded)}
        for decoding in itertools.count() if turns else ():
            turn, place = divmod(decoding, len(self._decoding))
            part = self._decoding[place]
            load = None if part.packed else turn * len(loads) + loads[part.index]
            yield decoding, turn * len(turns) + turns[part.layer], load, part

    def _decode(self) -> Task | None:
        """The next decoding; None while its load or a reader of its scratch is still to be emitted."""
        if self._next is None:
            return None
        decoding, number, load, part = self._next
        if (load is not None and load >= self._loads) or number >= self._uses_decoded + self._num_scratch:
            return None
        self._next = next(self._to_decode)
        slot, scratch = None, number % self._num_scratch
        reads: tuple[Access, ...] = ()
        if load is not None:
            slot = load % self._plan.num_slots
            reads = (Access(slot_buffer(slot), f"load {load}"),)
            self._read |= {load} if not part.in_place else set()
        place, last = self._decoded_of[part.layer].index(part.index), len(self._decoded_of[part.layer]) - 1
        places = (place,) if place < last else range(place, self._num_places)  # those that a layer lacks are its last's
        names = (decoded_buffer(part.layer, place), *(scratch_buffer(scratch, each) for each in places))
        writes = tuple(Access(name, f"decoding {number}") for name in names)
        work = Decoding(
            part.index, part.layer, part.decoded_bytes, slot, scratch, slot is not None and not part.in_place
        )
        return Task(self._next_id(), Op.DECODE, DECODE, decoding, reads, writes, decoding, payload=work)

    def _load(self, number: int) -> Iterator[Task]:
        """The one or two tasks that bring load ``number`` into its slot."""
        part, slot = self._streamed[number % len(self._streamed)], number % self._plan.num_slots
        filled = (Access(slot_buffer(slot), f"load {number}"),)
        if not self._plan.num_staging:
            load = Load(part.index, part.layer, part.nbytes, slot)
            yield Task(self._next_id(), Op.READ, DISK, number, writes=filled, number=number, payload=load)
            return
        staged: tuple[Access, ...] = ()
        staging = None
        if part.tier is Tier.DISK:
            staging = self._staged % self._plan.num_staging
            self._staged += 1
            staged = (Access(staging_buffer(staging), f"load {number}"),)
            load = Load(part.index, part.layer, part.nbytes, staging=staging)
            yield Task(self._next_id(), Op.READ, DISK, number, writes=staged, number=number, payload=load)
        load = Load(part.index, part.layer, part.nbytes, slot, staging)
        yield Task(self._next_id(), Op.COPY, H2D, number, staged, filled, number, payload=load)


def _holds_slot(part: PlannedPart) -> bool:
    """Whether a layer's own tasks read the slot."""
    return part.in_place or not part.decoded_bytes


@dataclass(frozen=True, slots=True)
class Weights:
    """The streamed weights of a layer in one pass, and the accesses of the layer's tasks to them."""

    slots: tuple[tuple[int, int], ...]  # (part, slot) pairs that the first item binds
    loaded: tuple[Access, ...]  # the contents of slots, and decoded weights
    bound: tuple[Access, ...]  # the modules whose parameters the first item binds

    def reads(self, *, first: bool) -> tuple[Access, ...]:
        """The reads of an item; the first item may have to bind the weights, the others read them bound."""
        return self.loaded if first else (*self.loaded, *self.bound)

    def writes(self, *, first: bool) -> tuple[Access, ...]:
        """The writes of an item: only the first one binds."""
        return self.bound if first else ()
