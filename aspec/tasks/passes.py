"""The weight stream and the tasks of one target pass.

The stream is an endless sequence of loads: the streamed parts in order, again and again, load ``n`` into slot
``n % num_slots``. A load is emitted as soon as every reader of its slot's present content has been, which is
why the stream runs on across the end of a pass until every slot is full: weights depend on no token.
Pure policy: no torch, no asyncio, no clock.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from aspec.plan import Plan, Tier
from aspec.tasks.task import (
    BACK,
    COMPUTE,
    CPU,
    D2H,
    DISK,
    H2D,
    SCRATCH,
    Access,
    Op,
    Task,
    WorkItem,
    attention_buffer,
    crossing_buffer,
    draft_kv_buffer,
    draws_buffer,
    hidden_buffer,
    kv_buffer,
    proposal_buffer,
    rows_kv_buffer,
    sequence_buffer,
    slot_buffer,
    staging_buffer,
)

VERIFY, PREFILL, DRAFT_AHEAD = 0, 10, 20  # priorities on a compute lane: verify first, drafts fill the gaps


class Numbering:
    """Task ids in program order."""

    def __init__(self) -> None:
        self._ids = itertools.count()

    def __call__(self) -> int:
        """The next id."""
        return next(self._ids)


class WeightStream:
    """Emits the loads of streamed parts into slots, and tells a pass where its parts are."""

    def __init__(self, plan: Plan, next_id: Numbering) -> None:
        self._plan, self._next_id = plan, next_id
        self._streamed = plan.streamed
        self._by_layer = tuple(plan.streamed_of(layer) for layer in range(plan.num_layers))
        self._loads = 0  # loads emitted so far
        self._uses = 0  # loads whose readers have been emitted; loads - uses <= num_slots
        self._staged = 0  # reads into staging emitted so far
        self._last = [0] * plan.num_layers  # loads that have landed once a layer of the latest pass may run

    def fill(self) -> list[Task]:
        """Loads for every slot whose content has found its last reader."""
        tasks: list[Task] = []
        while self._streamed and self._loads < self._uses + self._plan.num_slots:
            tasks.extend(self._load(self._loads))
            self._loads += 1
        return tasks

    def bind(self, layer: int) -> tuple[tuple[tuple[int, int], ...], tuple[Access, ...]]:
        """The (part, slot) pairs of a layer in the running pass, and the reads that expect them."""
        parts = self._by_layer[layer]
        numbers = range(self._uses, self._uses + len(parts))
        pairs = tuple((part.index, n % self._plan.num_slots) for part, n in zip(parts, numbers, strict=True))
        reads = tuple(Access(slot_buffer(n % self._plan.num_slots), f"load {n}") for n in numbers)
        self._last[layer] = numbers.stop
        return pairs, reads

    def loads_before(self, layer: int) -> int:
        """Loads, since the first pass, without which a layer of the latest pass cannot run."""
        return self._last[layer]

    def release(self, layer: int) -> None:
        """All readers of this layer's parts in the running pass have been emitted."""
        self._uses += len(self._by_layer[layer])

    def _load(self, number: int) -> Iterator[Task]:
        """The one or two tasks that bring load ``number`` into its slot."""
        part, slot = self._streamed[number % len(self._streamed)], number % self._plan.num_slots
        filled = (Access(slot_buffer(slot), f"load {number}"),)
        read = Task(
            self._next_id(), Op.READ, DISK, number, number=number, part=part.index, layer=part.layer, nbytes=part.nbytes
        )
        if not self._plan.num_staging:
            yield replace(read, writes=filled, slot=slot)
            return
        staged: tuple[Access, ...] = ()
        if part.tier is Tier.DISK:
            staging = self._staged % self._plan.num_staging
            self._staged += 1
            staged = (Access(staging_buffer(staging), f"load {number}"),)
            read = replace(read, writes=staged, staging=staging)
            yield read
        yield replace(read, id=self._next_id(), op=Op.COPY, resource=H2D, reads=staged, writes=filled, slot=slot)


def emit_pass(
    number: int,
    items: Sequence[WorkItem],
    stream: WeightStream,
    next_id: Numbering,
    plan: Plan,
    inputs: tuple[Access, ...],
) -> list[Task]:
    """The tasks of pass ``number`` over ``items``: embed, every layer for every item; ``emit_end`` has the rest.

    ``inputs``: what the decode item's tokens come from (the committed tokens, and the proposal if there is
    one). One loaded part serves all items before its slot frees; the load that reuses the slot follows at once.
    """
    tasks = [_embed(number, item, next_id, () if item.prefill else inputs) for item in items]
    for layer in range(plan.num_layers):
        slots, reads = stream.bind(layer)
        converts = any(part.scratch_bytes for part in plan.streamed_of(layer))
        scratch = (Access(SCRATCH, f"pass {number} L{layer}"),) if converts else ()  # the first item fills it
        whole = items if plan.attention_resource == COMPUTE else ()
        if not whole:
            crossing = plan.crossing_of(layer)
            split = _SplitLayer(number, layer, plan.attention_resource, next_id, slots, reads, scratch, crossing)
            tasks.extend(split.emit(items))
        for item in whole:
            hidden = hidden_buffer(item)
            tasks.append(
                Task(
                    next_id(),
                    Op.LAYER,
                    COMPUTE,
                    PREFILL if item.prefill else VERIFY,
                    reads=(
                        Access(hidden, f"pass {number} L{layer}"),
                        *reads,
                        *(scratch if item is not items[0] else ()),
                    ),
                    writes=(
                        *(scratch if item is items[0] else ()),
                        Access(hidden, f"pass {number} L{layer + 1}"),
                        Access(kv_buffer(item.group, layer), f"pass {number} item {item.index}"),
                    ),
                    number=number,
                    item=item,
                    layer=layer,
                    slots=slots,
                )
            )
        stream.release(layer)
        tasks.extend(stream.fill())
    return tasks


@dataclass(frozen=True, slots=True)
class _SplitLayer:
    """A layer of a pass in three tasks per item, of which the attention has a resource of its own.

    With ``crossing`` it is on the other side of a device's link, as is the KV that it stores to and reads: two more
    tasks bring so many bytes of a token there and back.
    """

    number: int
    layer: int
    resource: str
    next_id: Numbering
    slots: tuple[tuple[int, int], ...]
    weights: tuple[Access, ...]
    scratch: tuple[Access, ...]
    crossing: tuple[int, int] | None

    def emit(self, items: Sequence[WorkItem]) -> Iterator[Task]:
        """All projections first, then all attention, then the rest, so that one item attends while others compute.

        But a chunk projects behind the attention of the chunk before it, which reads the KV that it writes; and an
        item that shares its attention's buffer with another one follows all of that.
        """
        projected: list[WorkItem] = []
        unfinished: list[WorkItem] = []
        for item in items:
            shares = next((one for one in unfinished if attention_buffer(one) == attention_buffer(item)), None)
            if shares is not None or any(one.rows == item.rows for one in projected):
                yield from self._attend(projected)
                projected.clear()
            if shares is not None:
                unfinished.remove(shares)
                yield self._finish(shares)
            yield self._project(item, fills_scratch=item is items[0])
            if self.crossing is not None:
                yield self._send(item, self.crossing[0])
            projected.append(item)
            unfinished.append(item)
        yield from self._attend(projected)
        yield from map(self._finish, unfinished)

    def _project(self, item: WorkItem, *, fills_scratch: bool) -> Task:
        scratch = self.scratch
        reads = (self._hidden(item), *self.weights, *(() if fills_scratch else scratch))
        stored = () if self.crossing is not None else (self._kv(item),)
        writes = (*(scratch if fills_scratch else ()), self._attention(item, "queries"), *stored)
        return self._task(Op.PROJECT, COMPUTE, item, reads, writes)

    def _send(self, item: WorkItem, token_bytes: int) -> Task:
        crossed = self._crossing(item, "queries")
        task = self._task(Op.SEND, D2H, item, (self._attention(item, "queries"),), (crossed,))
        return replace(task, nbytes=token_bytes * item.padded_tokens)

    def _attend(self, items: Sequence[WorkItem]) -> Iterator[Task]:
        for item in items:
            result = self._attention(item, "result")
            if self.crossing is None:
                reads = (self._attention(item, "queries"), self._kv(item))
                yield self._task(Op.ATTEND, self.resource, item, reads, (result,))
                continue
            arrived, made = self._crossing(item, "queries"), self._crossing(item, "result")
            yield self._task(Op.ATTEND, self.resource, item, (arrived,), (self._kv(item), made))
            back = self._task(Op.RETURN, BACK, item, (made,), (result,))
            yield replace(back, nbytes=self.crossing[1] * item.padded_tokens)

    def _finish(self, item: WorkItem) -> Task:
        reads = (self._hidden(item), self._attention(item, "result"), *self.weights, *self.scratch)
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
        self, op: Op, resource: str, item: WorkItem, reads: tuple[Access, ...], writes: tuple[Access, ...]
    ) -> Task:
        priority = PREFILL if item.prefill else VERIFY
        slots = self.slots if resource == COMPUTE else ()
        return Task(
            self.next_id(),
            op,
            resource,
            priority,
            reads,
            writes,
            number=self.number,
            item=item,
            layer=self.layer,
            slots=slots,
        )


def _embed(number: int, item: WorkItem, next_id: Numbering, inputs: tuple[Access, ...]) -> Task:
    """Token ids to hidden state, with positions and masks."""
    writes = (Access(hidden_buffer(item), f"pass {number} L0"),)
    priority = PREFILL if item.prefill else VERIFY
    return Task(next_id(), Op.EMBED, COMPUTE, priority, inputs, writes, number=number, item=item)


def emit_end(number: int, items: Sequence[WorkItem], next_id: Numbering, plan: Plan) -> list[Task]:
    """The end of a pass for every item that draws: the target's draws, then their comparison with the proposal.

    What the draft was told to do before comes first: its proposal and its KV are settled here.
    """
    return [task for item in items if item.samples for task in _end_item(number, item, next_id, plan)]


def _end_item(number: int, item: WorkItem, next_id: Numbering, plan: Plan) -> tuple[Task, Task]:
    hidden, draws = hidden_buffer(item), draws_buffer(item)
    drawn = Access(draws, f"pass {number}")
    last = (Access(hidden, f"pass {number} L{plan.num_layers}"),)
    head = Task(next_id(), Op.HEAD, COMPUTE, VERIFY, last, (drawn,), number=number, item=item)
    content = f"pass {number} item {item.index}"
    settled = [sequence_buffer(item.group)]
    if plan.max_draft_tokens:
        settled += [proposal_buffer(item.group), draft_kv_buffer(item.group)]
    writes = tuple(Access(buffer, content) for buffer in settled)
    accept = Task(next_id(), Op.ACCEPT, CPU, VERIFY, (drawn,), writes, number=number, item=item)
    return head, accept
