"""The weight stream and the tasks of one target pass.

The stream is an endless sequence of loads: it repeats the streamed parts in order, load ``n`` into slot
``n % num_slots``. A load is emitted as soon as every reader of its slot's present content was emitted. So the stream
continues across the end of a pass until every slot is full: weights depend on no token. Weights that are not stored as
products take them are decoded likewise, layer after layer, into scratch buffers in turn: streamed parts from their
slots, resident ones from where they are. The parts of a layer have places of their own there, so that several threads
decode them side by side.
Pure policy: no torch, no asyncio, no clock.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from aspec.plan import Plan, PlannedPart, Tier
from aspec.tasks.op import Op
from aspec.tasks.task import (
    COMPUTE,
    CPU,
    D2H,
    DECODE,
    DISK,
    H2D,
    H2D_RESULTS,
    Access,
    Decoding,
    LayerWork,
    Load,
    Task,
    WorkItem,
    attention_buffer,
    crossing_buffer,
    decoded_buffer,
    draft_kv_buffer,
    draws_buffer,
    hidden_buffer,
    kv_buffer,
    proposal_buffer,
    rows_kv_buffer,
    scratch_buffer,
    sequence_buffer,
    slot_buffer,
    staging_buffer,
    weights_buffer,
)

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


def emit_pass(
    number: int,
    items: Sequence[WorkItem],
    stream: WeightStream,
    next_id: Numbering,
    plan: Plan,
    inputs: Callable[[WorkItem], tuple[Access, ...]],
) -> list[Task]:
    """The tasks of pass ``number`` over ``items``: embed, then every layer for every item; ``emit_end`` has the rest.

    ``inputs`` returns the buffers of an item's tokens (the committed tokens, and the proposal if there is one). One
    loaded part serves all items before its slot is free; the load that reuses the slot is emitted directly behind them.
    Decoded weights serve all items from their scratch; their slot is free as soon as they are decoded.
    """
    tasks = [_embed(number, item, next_id, inputs(item)) for item in items]
    for layer in range(plan.num_layers):
        weights = stream.bind(layer)
        if plan.attention_resource == COMPUTE:
            tasks.extend(_layer(number, layer, item, next_id, weights, first=item is items[0]) for item in items)
        else:
            split = _SplitLayer(number, layer, plan.attention_resource, next_id, weights, plan.crossing_of(layer))
            tasks.extend(split.emit(items))
        stream.mark_read(layer)
        tasks.extend(stream.fill())
    return tasks


def _layer(number: int, layer: int, item: WorkItem, next_id: Numbering, weights: Weights, *, first: bool) -> Task:
    """A whole layer for one item."""
    hidden = hidden_buffer(item)
    reads = (Access(hidden, f"pass {number} L{layer}"), *weights.reads(first=first))
    writes = (
        *weights.writes(first=first),
        Access(hidden, f"pass {number} L{layer + 1}"),
        Access(kv_buffer(item.group, layer), f"pass {number} item {item.index}"),
    )
    priority = PREFILL if item.prefill else VERIFY
    work = LayerWork(layer, weights.slots)
    return Task(next_id(), Op.LAYER, COMPUTE, priority, reads, writes, number, item, work)


@dataclass(frozen=True, slots=True)
class _SplitLayer:
    """A layer of a pass in three tasks per item; its attention has a resource of its own.

    With ``crossing``, attention and its KV are in host memory, across a device's link: two more tasks per item bring
    the queries there and the result back. ``crossing`` gives the bytes per token of both ways.
    """

    number: int
    layer: int
    resource: str
    next_id: Numbering
    weights: Weights
    crossing: tuple[int, int] | None

    def emit(self, items: Sequence[WorkItem]) -> Iterator[Task]:
        """Emit all projections, then all attention, then the rest, so that one item attends while others compute.

        There are two exceptions. A chunk of a prompt projects behind the attention of the chunk before it, because
        that attention reads the KV which the chunk writes. An item that shares its attention buffer with an earlier
        item is emitted behind all tasks of that item.
        """
        projected: list[WorkItem] = []
        unfinished: list[WorkItem] = []
        for item in items:
            shares = next((other for other in unfinished if attention_buffer(other) == attention_buffer(item)), None)
            if shares is not None or any(other.rows == item.rows for other in projected):
                yield from self._attend(projected)
                projected.clear()
            if shares is not None:
                unfinished.remove(shares)
                yield self._finish(shares)
            yield self._project(item, first=item is items[0])
            if self.crossing is not None:
                yield self._send(item, self.crossing[0])
            projected.append(item)
            unfinished.append(item)
        yield from self._attend(projected)
        yield from map(self._finish, unfinished)

    def _project(self, item: WorkItem, *, first: bool) -> Task:
        reads = (self._hidden(item), *self.weights.reads(first=first))
        stored = () if self.crossing is not None else (self._kv(item),)
        writes = (*self.weights.writes(first=first), self._attention(item, "queries"), *stored)
        return self._task(Op.PROJECT, COMPUTE, item, reads, writes)

    def _send(self, item: WorkItem, token_bytes: int) -> Task:
        queries, crossed = self._attention(item, "queries"), self._crossing(item, "queries")
        return self._task(Op.SEND, D2H, item, (queries,), (crossed,), token_bytes)

    def _attend(self, items: Sequence[WorkItem]) -> Iterator[Task]:
        for item in items:
            result = self._attention(item, "result")
            if self.crossing is None:
                reads = (self._attention(item, "queries"), self._kv(item))
                yield self._task(Op.ATTEND, self.resource, item, reads, (result,))
                continue
            arrived, made = self._crossing(item, "queries"), self._crossing(item, "result")
            yield self._task(Op.ATTEND, self.resource, item, (arrived,), (self._kv(item), made))
            yield self._task(Op.RETURN, H2D_RESULTS, item, (made,), (result,), self.crossing[1])

    def _finish(self, item: WorkItem) -> Task:
        reads = (self._hidden(item), self._attention(item, "result"), *self.weights.reads(first=False))
        return self._task(Op.FFN, COMPUTE, item, reads, (self._hidden(item, further=1),))

    def _hidden(self, item: WorkItem, further: int = 0) -> Access:
        return Access(hidden_buffer(item), f"pass {self.number} L{self.layer + further}")

    def _attention(self, item: WorkItem, what: str) -> Access:
        return Access(attention_buffer(item), f"pass {self.number} L{self.layer} item {item.index} {what}")

    def _crossing(self, item: WorkItem, what: str) -> Access:
        return Access(crossing_buffer(item), f"pass {self.number} L{self.layer} item {item.index} {what}")

    def _kv(self, item: WorkItem) -> Access:
        return Access(rows_kv_buffer(item, self.layer), f"pass {self.number} item {item.index}")

    def _task(
        self,
        op: Op,
        resource: str,
        item: WorkItem,
        reads: tuple[Access, ...],
        writes: tuple[Access, ...],
        token_bytes: int = 0,
    ) -> Task:
        """One task of the layer; it transfers ``token_bytes`` per token across a link."""
        priority = PREFILL if item.prefill else VERIFY
        slots = self.weights.slots if resource == COMPUTE else ()
        work = LayerWork(self.layer, slots, token_bytes * item.padded_tokens)
        return Task(self.next_id(), op, resource, priority, reads, writes, self.number, item, work)


def _embed(number: int, item: WorkItem, next_id: Numbering, inputs: tuple[Access, ...]) -> Task:
    """The task from token ids to hidden state, positions and masks."""
    writes = (Access(hidden_buffer(item), f"pass {number} L0"),)
    priority = PREFILL if item.prefill else VERIFY
    return Task(next_id(), Op.EMBED, COMPUTE, priority, inputs, writes, number, item)


def emit_end(number: int, items: Sequence[WorkItem], next_id: Numbering, plan: Plan) -> list[Task]:
    """The end of a pass for every item that draws: the target's draws, then their comparison with the proposal.

    The inner chunks of a scored prompt have a head, too; the lane runs it before the head of the last chunk.

    These tasks run behind all draft tasks emitted before them: ACCEPT writes the proposal and the draft's KV, and
    moves the KV of an accepted path to the positions where plain decoding would have put it.
    """
    return [task for item in items for task in _end_item(number, item, next_id, plan)]


def _end_item(number: int, item: WorkItem, next_id: Numbering, plan: Plan) -> tuple[Task, ...]:
    if not item.samples and not item.scored:
        return ()
    drawn = Access(draws_buffer(item), f"pass {number}")
    last = (Access(hidden_buffer(item), f"pass {number} L{plan.num_layers}"),)
    head = Task(next_id(), Op.HEAD, COMPUTE, VERIFY, last, (drawn,), number, item)
    if not item.samples:
        return (head,)
    written = [sequence_buffer(item.group)]
    if plan.max_draft_tokens:
        written += [proposal_buffer(item.group), draft_kv_buffer(item.group)]
    written += [_kv_of(item, layer, plan) for layer in range(plan.num_layers)]  # also clears a row that fails
    writes = tuple(Access(buffer, f"pass {number} item {item.index}") for buffer in written)
    accept = Task(next_id(), Op.ACCEPT, CPU, VERIFY, (drawn,), writes, number, item)
    return head, accept


def _kv_of(item: WorkItem, layer: int, plan: Plan) -> str:
    """The buffer of an item's keys and values of one layer: one per group, or for split layers per set of rows."""
    return kv_buffer(item.group, layer) if plan.attention_resource == COMPUTE else rows_kv_buffer(item, layer)
