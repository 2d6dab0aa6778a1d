"""The tasks of a layer whose experts are read on demand.

ROUTE computes attention and router for one item, and returns its experts. When all items' routes are known, the chosen
experts that are in no slot are read, in the order of their numbers, which is the order in files; behind a device's link
they go through slots in host memory, which keep some of them, too. EXPERTS computes those
of one wave, first the experts that are there already; COMBINE computes the last wave and the rest of the layer. The
results of single experts are added at the end, in an order of their own, so their bits do not depend on the waves.
A wave is no larger than the slots that its experts pass through, so a single slot is enough.
Pure policy: no torch, no asyncio, no clock.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice, takewhile

from aspec.expert_plan import ExpertPlan
from aspec.tasks.experts.cache import Placement
from aspec.tasks.experts.pool import SlotPool
from aspec.tasks.experts.prefetch import LAST, NO_COUNTS, ExpertCounts, Guess, Guesses
from aspec.tasks.layers.buffers import expert_buffer, hidden_buffer, host_expert_buffer, kv_buffer, routed_buffer
from aspec.tasks.layers.weights import PREFILL, VERIFY, Numbering, Weights
from aspec.tasks.op import Op
from aspec.tasks.task import COMPUTE, EXPERT_DISK, H2D, Access, ExpertLoad, LayerWork, Task, WorkItem

DEMAND = -1  # priority of reads that a layer waits for: before those of the weight stream, whose numbers grow from 0
LEAST_WAVE = 4  # experts read for one wave of computing, if so many are read
MOST_WAVES = 8  # waves of read experts, where slots allow it: every wave is a task per item

Route = Mapping[int, int]
"""The experts of an item and the tokens that each of them is given."""

Slots = dict[int, int]
"""Experts and the slots that hold them."""


class ExpertStream:
    """Emits the tasks of routed layers, and knows which expert is in which slot."""

    def __init__(self, experts: ExpertPlan, next_id: Numbering, *, prefetch: bool = True) -> None:
        """``prefetch``: read experts ahead of their routes while nothing else is read."""
        self._shape, self._next_id = experts.shape, next_id
        self._slots = SlotPool(experts.slots, experts.shape.layers)
        self._host = None if experts.host is None else SlotPool(experts.host, experts.shape.layers)
        self._guesses = Guesses(experts.shape.layers)
        self._most_guesses = self._slots.num_passing // 2 if prefetch else 0
        self._loads = 0
        self.counts = NO_COUNTS

    def serves(self, layer: int) -> bool:
        """Whether the experts of a layer are read on demand."""
        return layer in self._slots

    def held(self, layer: int) -> Collection[int]:
        """The experts of a layer that are in its cache."""
        return self._slots.held(layer)

    def route(self, number: int, layer: int, items: Sequence[WorkItem], weights: Weights) -> Iterator[Task]:
        """The tasks up to the routes of all items; the first one binds the layer's other weights."""
        for item in items:
            first = item is items[0]
            reads = (Access(hidden_buffer(item), f"pass {number} L{layer}"), *weights.reads(first=first))
            writes = (
                *weights.writes(first=first),
                Access(routed_buffer(item), f"pass {number} L{layer}"),
                Access(kv_buffer(item.group, layer), f"pass {number} item {item.index}"),
            )
            yield self._task(Op.ROUTE, number, item, reads, writes, LayerWork(layer, weights.slots))

    def run(
        self, number: int, layer: int, items: Sequence[WorkItem], routes: Mapping[WorkItem, Route], weights: Weights
    ) -> Iterator[Task]:
        """The reads and products of the chosen experts, then the rest of the layer."""
        wanted: Counter[int] = Counter()
        for route in routes.values():
            wanted.update(route)
        order = sorted(wanted, key=lambda expert: (-wanted[expert], expert))
        placed = self._slots.place(layer, order)
        guesses = self._take_guesses(layer, order, placed)
        slots = placed.held | {expert: guess.slot for expert, guess in guesses.items()}
        missing = [expert for expert in order if expert not in slots]
        on_host = None if self._host is None else self._host.place(layer, missing)
        waves = self._waves(placed, guesses)
        for at, experts in enumerate(waves):
            for expert in sorted(experts - slots.keys()):
                slots[expert] = self._slots.slot_for(expert, placed, self._guesses.coming)
                yield from self._load(layer, expert, slots[expert], on_host)
            for item in items:
                own = {expert: slots[expert] for expert in sorted(experts) if expert in routes[item]}
                if at == len(waves) - 1:
                    yield self._combine(number, layer, item, own, at, weights)
                elif own:
                    yield self._experts(number, layer, item, own, at)

    def _waves(self, placed: Placement, guesses: Mapping[int, Guess]) -> list[set[int]]:
        """The experts that are computed together: those in slots, then guesses on their way, then the missing ones in
        the order of reading."""
        missing = sorted({*placed.admitted, *placed.beyond} - guesses.keys())
        size = max(LEAST_WAVE, -(-len(missing) // MOST_WAVES))
        most_passing = max(1, self._slots.num_passing // 2)  # one half fills while the other half is computed
        there = {*placed.held, *(expert for expert, guess in guesses.items() if guess.landed)}
        waves = [wave for wave in (there, guesses.keys() - there) if wave]
        open_wave, passing = size, 0  # experts, and those of them that pass
        for expert in missing:
            passes = expert not in placed.admitted
            if open_wave >= size or passing + passes > most_passing:
                waves.append(set())
                open_wave, passing = 0, 0
            waves[-1].add(expert)
            open_wave, passing = open_wave + 1, passing + passes
        return waves

    def _take_guesses(self, layer: int, order: Sequence[int], placed: Placement) -> dict[int, Guess]:
        """The guesses that a layer's routes have confirmed, by expert; admitted ones stay where they are."""
        guesses = self._guesses.settle(layer, order, self._slots.contents)
        for expert, guess in guesses.items():
            if expert in placed.admitted:
                self._slots.keep(layer, expert, guess.slot)
        used, nbytes = len(guesses), len(guesses) * self._shape.nbytes[layer]
        self.counts += ExpertCounts(len(order), used=used, wasted_bytes=-nbytes)
        return guesses

    def guess(self, layer: int) -> Iterator[Task]:
        """The reads of experts that ``layer`` and those after it may choose; call it while nothing else is read."""
        live = self._guesses.live(self._slots.contents)
        room = min(self._guesses.room, self._most_guesses - len(live))
        if room <= 0:
            return
        candidates = self._guesses.candidates(layer, self._slots.held)
        for at, expert in takewhile(lambda _: self._guesses.pays(), islice(candidates, room)):
            slot = self._slots.pass_through(live)
            live.add(slot)
            found = None if self._host is None else self._host.held_slot(at, expert)
            on_host = None if self._host is None else Placement({} if found is None else {expert: found}, {}, ())
            tasks = list(self._load(at, expert, slot, on_host, guessed=True))
            self._guesses.add(at, expert, Guess(slot, self._slots.contents[slot], tasks[-1].id))
            self.counts += ExpertCounts(guessed=1, wasted_bytes=self._shape.nbytes[at])  # until it is chosen
            yield from tasks

    def land(self, task: Task) -> None:
        """A load has ended."""
        self._guesses.land(task.id)

    def _load(
        self, layer: int, expert: int, slot: int, on_host: Placement | None, *, guessed: bool = False
    ) -> Iterator[Task]:
        """The one or two tasks that bring an expert into its slot: a read, or behind a link a copy, too."""
        nbytes, content = self._shape.nbytes[layer], f"L{layer} expert {expert} load {self._loads}"
        self._loads += 1
        self._slots.contents[slot] = content
        filled = Access(expert_buffer(slot), content)
        if self._host is None or on_host is None:
            yield self._transfer(Op.LOAD_EXPERT, ExpertLoad(expert, layer, nbytes, slot, guessed=guessed), (), filled)
            return
        if expert in on_host.held:
            host_slot = on_host.held[expert]
        else:
            host_slot = self._host.slot_for(expert, on_host)
            self._host.contents[host_slot] = content
            landed = Access(host_expert_buffer(host_slot), content)
            load = ExpertLoad(expert, layer, nbytes, host_slot=host_slot, guessed=guessed)
            yield self._transfer(Op.LOAD_EXPERT, load, (), landed)
        source = Access(host_expert_buffer(host_slot), self._host.contents[host_slot])
        load = ExpertLoad(expert, layer, nbytes, slot, host_slot, guessed)
        yield self._transfer(Op.COPY_EXPERT, load, (source,), filled)

    def _transfer(self, op: Op, load: ExpertLoad, reads: tuple[Access, ...], filled: Access) -> Task:
        resource = EXPERT_DISK if op is Op.LOAD_EXPERT else H2D
        priority = LAST if load.guessed else DEMAND
        return Task(self._next_id(), op, resource, priority, reads, (filled,), self._loads - 1, payload=load)

    def _experts(self, number: int, layer: int, item: WorkItem, experts: Slots, wave: int) -> Task:
        """Some experts of one item, whose results are put beside those of earlier waves."""
        writes = (Access(routed_buffer(item), f"pass {number} L{layer} wave {wave}"),)
        work = LayerWork(layer, experts=tuple(experts.items()))
        return self._task(Op.EXPERTS, number, item, self._reads(experts), writes, work)

    def _combine(self, number: int, layer: int, item: WorkItem, experts: Slots, wave: int, weights: Weights) -> Task:
        """The last experts of one item, and everything behind them."""
        reads = (
            Access(hidden_buffer(item), f"pass {number} L{layer}"),
            *weights.reads(first=False),
            *self._reads(experts),
        )
        writes = (
            Access(routed_buffer(item), f"pass {number} L{layer} wave {wave}"),
            Access(hidden_buffer(item), f"pass {number} L{layer + 1}"),
        )
        work = LayerWork(layer, experts=tuple(experts.items()))
        return self._task(Op.COMBINE, number, item, reads, writes, work)

    def _reads(self, experts: Slots) -> tuple[Access, ...]:
        return tuple(Access(expert_buffer(slot), self._slots.contents[slot]) for slot in experts.values())

    def _task(
        self,
        op: Op,
        number: int,
        item: WorkItem,
        reads: tuple[Access, ...],
        writes: tuple[Access, ...],
        work: LayerWork,
    ) -> Task:
        priority = PREFILL if item.prefill else VERIFY
        return Task(self._next_id(), op, COMPUTE, priority, reads, writes, number, item, work)
