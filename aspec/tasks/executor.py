"""The executor: one worker per unit of a resource's depth, a ready queue per resource, one event queue.

Rules. Every spawn is a child of the one TaskGroup of ``run``. Issued work is settled, never abandoned: a
cancelled worker waits for what the device has in flight, and only then lets go of its buffers. Tasks that were
emitted and never issued simply drop. What may NOT go in: policy (ask the scheduler), tensors, prints.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from aspec.errors import DeadlockError, first_error
from aspec.io.settling import settle
from aspec.tasks.backend import Backend
from aspec.tasks.graph import Graph
from aspec.tasks.task import Completion, Event, Resource, Span, Started, Task

Observer = Callable[[Span], None]
"""Called on the loop with every finished task; must not block."""

IssueObserver = Callable[[Task, float], None]
"""Called on the loop with every task that is handed to the backend, and when; must not block."""


class Policy(Protocol):
    """What the executor asks: synchronous, and free of anything that can wait."""

    done: bool

    @property
    def idle(self) -> bool:
        """Whether it waits for nothing but the outside."""
        ...

    def handle(self, events: Sequence[Event]) -> Sequence[Task]:
        """The tasks that follow from all that has happened since the last call, in program order."""
        ...


class Executor:
    """Runs a policy's tasks on a backend until the policy is done."""

    def __init__(
        self,
        policy: Policy,
        backend: Backend,
        observers: Sequence[Observer] = (),
        issue_observers: Sequence[IssueObserver] = (),
    ) -> None:
        self._policy, self._backend = policy, backend
        self._observers, self._issue_observers = observers, issue_observers
        self._graph = Graph(backend.resources)
        self._wake = {resource.name: asyncio.Event() for resource in backend.resources}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._in_flight = 0
        self._rests = asyncio.Event()  # nothing runs, nothing can start, and no event is on its way
        self._recent: list[Span] = []  # the last spans, for the notes of an error

    def post(self, event: Event) -> None:
        """Tell the policy something from outside; only on the loop's thread."""
        self._rests.clear()
        self._events.put_nowait(event)

    async def wait_rest(self) -> None:
        """Return when nothing runs and nothing will, until something is posted; for ever where that never comes."""
        await self._rests.wait()

    async def run(self) -> None:
        """Serve until the policy is done. Raises the first error of a task, after everything has settled."""
        try:
            await self._run_group()
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def _run_group(self) -> None:
        async with asyncio.TaskGroup() as group:
            workers = [
                group.create_task(self._work(resource), name=f"aspec {resource.name} {i}")
                for resource in self._backend.resources
                for i in range(resource.depth)
            ]
            try:
                await self._serve()
            finally:
                for worker in workers:
                    worker.cancel()

    async def _serve(self) -> None:
        events: list[Event] = [Started()]
        while True:
            ended = [event.task.id for event in events if isinstance(event, Span)]
            for task in self._policy.handle(events):
                self._graph.add(task, ended[-1] if ended else -1)
            self._kick()
            if self._policy.done:
                return
            self._check_progress()
            events = [await self._events.get()]
            while not self._events.empty():
                events.append(self._events.get_nowait())

    def _check_progress(self) -> None:
        """A schedule that can never finish is an error at once, with the reason."""
        ready = any(self._graph.has_ready(name) for name in self._wake)
        if ready or self._in_flight or not self._events.empty():
            return
        if not self._policy.idle:
            blocked = "\n  ".join(self._graph.blocked()) or "none"
            raise DeadlockError(f"nothing runs and nothing can become ready; the oldest tasks:\n  {blocked}")
        self._rests.set()

    def _kick(self) -> None:
        for name, wake in self._wake.items():
            if self._graph.has_ready(name):
                wake.set()

    async def _work(self, resource: Resource) -> None:
        wake = self._wake[resource.name]
        while True:
            while (task := self._graph.pop(resource.name)) is None:
                wake.clear()
                await wake.wait()
            after = self._graph.issue(task)
            self._in_flight += 1
            try:
                future = self._backend.issue(task, after)
                for observe in self._issue_observers:
                    observe(task, self._backend.now())
                self._kick()
                completion = await settle(future)
            except Exception as error:
                self._explain(error, task)
                raise
            finally:
                self._in_flight -= 1
            self._finish(task, completion)

    def _finish(self, task: Task, completion: Completion) -> None:
        cause = self._graph.complete(task)
        self._kick()
        span = Span(
            task, completion.start_s, completion.stop_s, completion.report.outcomes, completion.report.grown, cause
        )
        self._recent = [*self._recent[-4:], span]
        for observe in self._observers:
            observe(span)
        self._events.put_nowait(span)

    def _explain(self, error: BaseException, task: Task) -> None:
        """Notes on the way up: task, resource, buffers, last spans."""
        buffers = ", ".join(access.buffer for access in (*task.reads, *task.writes)) or "none"
        last = "; ".join(f"{s.task.label} {s.start_s:.6f}-{s.stop_s:.6f} s" for s in self._recent) or "none"
        if getattr(error, "__notes__", None):
            return  # a poisoned lane hands the same error to everyone behind it
        error.add_note(f"while running {task.label} (task {task.id}, number {task.number}) on {task.resource}")
        error.add_note(f"buffers: {buffers}; last spans: {last}")
