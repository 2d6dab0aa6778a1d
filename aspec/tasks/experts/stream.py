"""The tasks of a layer whose experts are read on demand.

ROUTE computes attention and router for one item, and returns its experts. When all items' routes are known, the chosen
experts that are in no slot are read, in the order of their numbers, which is the order in files. EXPERTS computes those
of one wave, first the experts that are there already; COMBINE computes the last wave and the rest of the layer. The
results of single experts are added at the end, in an order of their own, so their bits do not depend on the waves.
A wave is no larger than the slots that its experts pass through, so a single slot is enough.
Pure policy: no torch, no asyncio, no clock.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from aspec.expert_plan import ExpertPlan
from aspec.tasks.experts.cache import ExpertCache, Placement
from aspec.tasks.layers.buffers import expert_buffer, hidden_buffer, kv_buffer, routed_buffer
from aspec.tasks.layers.weights import PREFILL, VERIFY, Numbering, Weights
from aspec.tasks.op import Op
from aspec.tasks.task import COMPUTE, EXPERT_DISK, Access, ExpertLoad, LayerWork, Task, WorkItem

DEMAND = -1  # priority of reads that a layer waits for: before those of the weight stream, whose numbers grow from 0
LEAST_WAVE = 4  # experts read for one wave of computing, if so many are read
MOST_WAVES = 8  # waves of read experts, where slots allow it: every wave is a task per item

Route = Mapping[int, int]
"""The experts of an item and the tokens that each of them is given."""

Slots = dict[int, int]
"""Experts and the slots that hold them."""


class ExpertStream:
    """Emits the tasks of routed layers, and knows which expert is in which slot."""

    def __init__(self, experts: ExpertPlan, next_id: Numbering) -> None:
        self._shape, self._next_id = experts.shape, next_id
        self._caches = {layer: ExpertCache(experts.slots_of(layer)) for layer in experts.shape.layers}
        self._passing = experts.passing_slots
        self._passed = 0  # experts that have gone through passing slots, which they take in turn
        self._contents: dict[int, str] = {}  # by slot
        self._loads = 0

    def serves(self, layer: int) -> bool:
        """Whether the experts of a layer are read on demand."""
        return layer in self._caches

    def held(self, layer: int) -> Collection[int]:
        """The experts of a layer that are in its cache."""
        return self._caches[layer].experts

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
        placed = self._caches[layer].place(sorted(wanted, key=lambda expert: (-wanted[expert], expert)))
        waves = self._waves(placed)
        for at, experts in enumerate(waves):
            slots = {expert: placed.held[expert] for expert in experts if expert in placed.held}
            for expert in sorted(experts - slots.keys()):
                slots[expert] = placed.admitted[expert] if expert in placed.admitted else self._next_passing()
                yield self._load(layer, expert, slots[expert])
            for item in items:
                own = {expert: slot for expert, slot in sorted(slots.items()) if expert in routes[item]}
                if at == len(waves) - 1:
                    yield self._combine(number, layer, item, own, at, weights)
                elif own:
                    yield self._experts(number, layer, item, own, at)

    def _waves(self, placed: Placement) -> list[set[int]]:
        """The experts that are computed together: those in slots, then the missing ones in the order of reading."""
        missing = sorted((*placed.admitted, *placed.beyond))
        size = max(LEAST_WAVE, -(-len(missing) // MOST_WAVES))
        most_passing = max(1, len(self._passing) // 2)  # one half fills while the other half is computed
        waves = [set(placed.held)] if placed.held else []
        open_wave, passing = size, 0  # experts, and those of them that pass
        for expert in missing:
            passes = expert not in placed.admitted
            if open_wave >= size or passing + passes > most_passing:
                waves.append(set())
                open_wave, passing = 0, 0
            waves[-1].add(expert)
            open_wave, passing = open_wave + 1, passing + passes
        return waves

    def _next_passing(self) -> int:
        """The slot for the next expert that no cache keeps."""
        slot = self._passing[self._passed % len(self._passing)]
        self._passed += 1
        return slot

    def _load(self, layer: int, expert: int, slot: int) -> Task:
        self._contents[slot] = content = f"L{layer} expert {expert} load {self._loads}"
        writes = (Access(expert_buffer(slot), content),)
        load = ExpertLoad(expert, layer, self._shape.nbytes[layer], slot)
        number, self._loads = self._loads, self._loads + 1
        return Task(self._next_id(), Op.LOAD_EXPERT, EXPERT_DISK, DEMAND, (), writes, number, payload=load)

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
        return tuple(Access(expert_buffer(slot), self._contents[slot]) for slot in experts.values())

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
