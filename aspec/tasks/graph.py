"""The graph: edges derived from the buffers that tasks read and write, and a ready queue per resource.

Rules. Tasks arrive in program order. A task depends on the last writer of every buffer that it reads or writes, and
on every later reader of a buffer that it writes. A read names the content that it expects; ``add`` refuses a mismatch,
so a slot reused too early is an error and never a wrong layer. An edge inside one domain is met when the producer is
issued, any other edge when it completes. What may NOT go in: clocks, tensors, asyncio, policy.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from aspec.errors import GraphError
from aspec.tasks.task import Resource, Task


@dataclass(slots=True)
class _Buffer:
    """The present state of one buffer, in program order."""

    content: str = ""
    writer: int | None = None
    readers: list[int] = field(default_factory=list)  # since the last write


@dataclass(slots=True)
class _Node:
    """A task that has not completed."""

    task: Task
    waiting: set[int]  # dependencies not yet met
    dependencies: tuple[int, ...]
    dependents: list[int] = field(default_factory=list)
    issued: bool = False
    cause: int = -1  # the dependency met last, or the task whose end led to its emission


class Graph:
    """The tasks that were emitted and have not completed, and a queue of those that may start."""

    def __init__(
        self, resources: Iterable[Resource], on_ready: Callable[[str], object] = lambda resource: None
    ) -> None:
        """``on_ready`` is called with the name of a resource whenever a task of it becomes ready."""
        self._on_ready = on_ready
        self._resources: Mapping[str, Resource] = {resource.name: resource for resource in resources}
        self._buffers: dict[str, _Buffer] = {}
        self._nodes: dict[int, _Node] = {}
        self._ready: dict[str, list[tuple[int, int]]] = {name: [] for name in self._resources}
        self._last_id = -1

    def __len__(self) -> int:
        """The number of tasks that have not completed."""
        return len(self._nodes)

    def add(self, task: Task, cause: int = -1) -> None:
        """Add the next task of the program, emitted when task ``cause`` ended.

        Raises GraphError if it contradicts the buffers' contents, its id does not grow or its resource is unknown.
        """
        if task.id <= self._last_id or task.resource not in self._resources:
            raise GraphError(
                f"task {task.id} ({task.label}) on {task.resource!r}: ids must grow and the resource must exist"
            )
        self._last_id = task.id
        dependencies = self._derive(task)
        live = {d for d in dependencies if d in self._nodes and not self._met_at_issue(d, task)}
        node = _Node(task, live, tuple(sorted(dependencies)), cause=cause)
        self._nodes[task.id] = node
        for dependency in live:
            self._nodes[dependency].dependents.append(task.id)
        if not live:
            self._push(task)

    def pop(self, resource: str) -> Task | None:
        """The ready task of highest priority, or None."""
        queue = self._ready[resource]
        return self._nodes[heapq.heappop(queue)[1]].task if queue else None

    @property
    def has_ready(self) -> bool:
        """Whether ``pop`` would return a task of some resource."""
        return any(self._ready.values())

    def issue(self, task: Task) -> tuple[int, ...]:
        """Mark a popped task as issued; returns the ids of tasks that it must follow inside its domain."""
        node = self._nodes[task.id]
        node.issued = True
        after = tuple(d for d in node.dependencies if d in self._nodes)
        for dependent in node.dependents:
            if self._same_domain(task, self._nodes[dependent].task):
                self._meet(dependent, task.id)
        return after

    def complete(self, task: Task) -> int:
        """Remove a completed task and meet the edges to its dependents; returns the id of the cause of its start."""
        node = self._nodes.pop(task.id)
        for dependent in node.dependents:
            self._meet(dependent, task.id)
        return node.cause

    def blocked(self, limit: int = 8) -> list[str]:
        """One line for each of the oldest tasks with the reason why it does not run, for DeadlockError."""
        lines = []
        for node in list(self._nodes.values())[:limit]:
            waits = [self._nodes[d].task for d in sorted(node.waiting) if d in self._nodes]
            why = ", ".join(f"{w.label} on {w.resource}" for w in waits) or "nothing"
            state = "issued" if node.issued else f"waits for {why}"
            lines.append(f"{node.task.label} on {node.task.resource} {state}")
        return lines

    def _derive(self, task: Task) -> set[int]:
        """Derive read-after-write, write-after-read and write-after-write edges; updates the buffers."""
        dependencies: set[int] = set()
        for access in task.reads:
            buffer = self._buffers.setdefault(access.buffer, _Buffer())
            if buffer.content != access.content:
                raise GraphError(
                    f"{task.label} (task {task.id}) expects {access.content!r} in {access.buffer}, which holds "
                    f"{buffer.content!r}: a write was emitted before all readers of the previous content"
                )
            if buffer.writer is not None:
                dependencies.add(buffer.writer)
            buffer.readers.append(task.id)
        for access in task.writes:
            buffer = self._buffers.setdefault(access.buffer, _Buffer())
            dependencies.update(buffer.readers)
            if buffer.writer is not None:
                dependencies.add(buffer.writer)
            buffer.content, buffer.writer, buffer.readers = access.content, task.id, []
        dependencies.discard(task.id)
        return dependencies

    def _met_at_issue(self, dependency: int, task: Task) -> bool:
        node = self._nodes[dependency]
        return node.issued and self._same_domain(node.task, task)

    def _same_domain(self, first: Task, second: Task) -> bool:
        domain = self._resources[first.resource].domain
        return domain != "" and domain == self._resources[second.resource].domain

    def _meet(self, dependent: int, dependency: int) -> None:
        node = self._nodes.get(dependent)
        if node is None or dependency not in node.waiting:
            return
        node.waiting.remove(dependency)
        if not node.waiting:
            node.cause = dependency
            self._push(node.task)

    def _push(self, task: Task) -> None:
        heapq.heappush(self._ready[task.resource], (task.priority, task.id))
        self._on_ready(task.resource)
