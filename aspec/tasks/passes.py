"""The tasks of one target pass, layer by layer.

A layer whose experts are read on demand ends the list for now: its reads follow from the routes of all items.
Pure policy: no torch, no asyncio, no clock.
"""

from collections.abc import Callable, Sequence

from aspec.errors import InternalError
from aspec.plan import Plan
from aspec.tasks.experts.stream import ExpertStream, Route
from aspec.tasks.layers.buffers import (
    draft_kv_buffer,
    draws_buffer,
    hidden_buffer,
    kv_buffer,
    proposal_buffer,
    rows_kv_buffer,
    sequence_buffer,
)
from aspec.tasks.layers.split import SplitLayer
from aspec.tasks.layers.weights import PREFILL, VERIFY, Numbering, Weights, WeightStream
from aspec.tasks.op import Op
from aspec.tasks.task import COMPUTE, CPU, Access, LayerWork, Span, Task, WorkItem


class Emission:
    """The tasks of pass ``number`` over ``items``: embed, then every layer for every item; ``emit_end`` has the rest.

    One loaded part serves all items before its slot is free; the load that reuses the slot is emitted directly behind
    them. Decoded weights serve all items from their scratch; their slot is free as soon as they are decoded.
    """

    def __init__(
        self,
        number: int,
        items: Sequence[WorkItem],
        stream: WeightStream,
        experts: ExpertStream | None,
        next_id: Numbering,
        plan: Plan,
        inputs: Callable[[WorkItem], tuple[Access, ...]],
    ) -> None:
        """``inputs`` returns the buffers of an item's tokens: the committed ones, and the proposal if there is one."""
        self.number, self.items = number, items
        self._stream, self._experts, self._next_id, self._plan = stream, experts, next_id, plan
        self._inputs = inputs
        self._layer = -1  # the last layer whose tasks were emitted; -1: none
        self._routing: Weights | None = None  # of the layer whose routes are awaited
        self._routes: dict[WorkItem, Route] = {}  # of that layer, so far

    @property
    def finished(self) -> bool:
        """Whether the last layer was emitted."""
        return self._layer == self._plan.num_layers - 1 and self._routing is None

    @property
    def next_route(self) -> int:
        """The layer whose routes are awaited, or the next one to be emitted."""
        return self._layer if self._routing is not None else self._layer + 1

    @property
    def waits_for(self) -> str:
        """The routes without which nothing more can be emitted; empty if there are none."""
        if self._routing is None:
            return ""
        missing = [item.name for item in self.items if item not in self._routes]
        return f"the routes of L{self._layer} in pass {self.number} for {', '.join(missing)}"

    def take_route(self, span: Span) -> None:
        """Take note of a finished ROUTE task. Raises InternalError if it names no experts."""
        if not span.routed or span.task.item is None or self._routing is None or span.task.layer != self._layer:
            raise InternalError(f"{span.task.label} of pass {span.task.number} came back without a route")
        self._routes[span.task.item] = dict(span.routed)

    def advance(self) -> list[Task]:
        """The tasks that can be emitted now: up to the end, or to a layer whose routes are not known."""
        tasks: list[Task] = []
        if self._layer < 0:
            tasks += [_embed(self.number, item, self._next_id, self._inputs(item)) for item in self.items]
        while not self.finished and len(self._routes) == len(self.items) * (self._routing is not None):
            tasks += self._next_layer() if self._routing is None else self._run_experts(self._routing)
        return tasks

    def _next_layer(self) -> list[Task]:
        """The next layer's tasks; of a routed layer those up to its routes."""
        plan, next_id = self._plan, self._next_id
        layer = self._layer = self._layer + 1
        weights = self._stream.bind(layer)
        if self._experts is not None and self._experts.serves(layer):
            self._routing = weights
            return list(self._experts.route(self.number, layer, self.items, weights))
        if plan.attention_resource == COMPUTE:
            tasks = [
                _layer(self.number, layer, item, next_id, weights, first=item is self.items[0]) for item in self.items
            ]
        else:
            split = SplitLayer(self.number, layer, plan.attention_resource, next_id, weights, plan.crossing_of(layer))
            tasks = list(split.emit(self.items))
        return tasks + self._leave_layer()

    def _run_experts(self, weights: Weights) -> list[Task]:
        """The rest of a routed layer."""
        assert self._experts is not None
        routes, self._routes, self._routing = self._routes, {}, None
        return [*self._experts.run(self.number, self._layer, self.items, routes, weights), *self._leave_layer()]

    def _leave_layer(self) -> list[Task]:
        """The loads that follow when all readers of a layer's weights were emitted."""
        self._stream.mark_read(self._layer)
        return self._stream.fill()


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
