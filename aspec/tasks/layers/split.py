"""A layer in three tasks per item, or five where its attention is across a device's link. Pure policy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aspec.tasks.layers.buffers import attention_buffer, crossing_buffer, hidden_buffer, rows_kv_buffer
from aspec.tasks.layers.weights import PREFILL, VERIFY, Numbering, Weights
from aspec.tasks.op import Op
from aspec.tasks.task import COMPUTE, D2H, H2D_RESULTS, Access, LayerWork, Task, WorkItem


@dataclass(frozen=True, slots=True)
class SplitLayer:
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
