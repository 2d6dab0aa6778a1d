"""The executor: one worker per unit of a resource's depth, a ready queue per resource, one event queue.

Rules. Every worker is a child of the one TaskGroup of ``run``. Issued work is never abandoned: a cancelled worker
waits for its task in flight and only then releases its buffers. Tasks that were emitted and never issued are dropped.
What may NOT go in: policy (ask the scheduler), tensors, prints.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from aspec.errors import DeadlockError, first_error
from aspec.io.loop.settling import settle
from aspec.tasks.backend import Backend
from aspec.tasks.graph import Graph
from aspec.tasks.task import Completion, Event, Resource, Span, Started, Task

Observer = Callable[[Span], None]
"""Called on the loop with every finished task; must not block."""

IssueObserver = Callable[[Task, float], None]
"""Called on the loop with every task that is issued to the backend, and the time in seconds; must not block."""


class Policy(Protocol):
    """The protocol of a policy: synchronous, it never waits."""

    done: bool

    @property
    def idle(self) -> bool:
        """Whether only an event from outside can bring new tasks."""
        ...

    @property
    def waits_for(self) -> str:
        """The results without which it emits nothing more, for an error; empty if there are none."""
        ...

    def handle(self, events: Sequence[Event]) -> Sequence[Task]:
        """The tasks that follow from the events since the last call, in program order."""
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
        self._wake = {resource.name: asyncio.Event() for resource in backend.resources}
        self._graph = Graph(backend.resources, on_ready=lambda resource: self._wake[resource].set())
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._in_flight = 0
        self._at_rest = asyncio.Event()  # set while no task runs, none can start, and no event is queued
        self._recent: list[Span] = []  # the last 5 spans, for the notes of an error

    def post(self, event: Event) -> None:
        """Send the policy an event from outside; only on the loop's thread."""
        self._at_rest.clear()
        self._events.put_nowait(event)

    async def wait_rest(self) -> None:
        """Wait until no task runs and none can start before the next ``post``; this may never happen."""
        await self._at_rest.wait()

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
            if self._policy.done:
                return
            self._check_progress()
            events = [await self._events.get()]
            while not self._events.empty():
                events.append(self._events.get_nowait())

    def _check_progress(self) -> None:
        """Raise DeadlockError, with the reason, as soon as the schedule can never finish."""
        if self._graph.has_ready or self._in_flight or not self._events.empty():
            return
        if not self._policy.idle:
            blocked = "\n  ".join(self._graph.blocked()) or self._policy.waits_for or "none"
            raise DeadlockError(f"no task runs and no task can become ready; the oldest tasks:\n  {blocked}")
        self._at_rest.set()

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
                completion = await settle(future)
            except Exception as error:
                self._explain(error, task)
                raise
            finally:
                self._in_flight -= 1
            self._finish(task, completion)

    def _finish(self, task: Task, completion: Completion) -> None:
        cause = self._graph.complete(task)
        report = completion.report
        span = Span(task, completion.start_s, completion.stop_s, report.outcomes, report.grown, cause, report.routed)
        self._recent = [*self._recent[-4:], span]
        for observe in self._observers:
            observe(span)
        self._events.put_nowait(span)

    def _explain(self, error: BaseException, task: Task) -> None:
        """Add notes to an error: task, resource, buffers, last spans."""
        buffers = ", ".join(access.buffer for access in (*task.reads, *task.writes)) or "none"
        last = "; ".join(f"{s.task.label} {s.start_s:.6f}-{s.stop_s:.6f} s" for s in self._recent) or "none"
        if getattr(error, "__notes__", None):
            return  # a poisoned domain raises the same error for every task behind it
        error.add_note(f"while running {task.label} (task {task.id}, number {task.number}) on {task.resource}")
        error.add_note(f"buffers: {buffers}; last spans: {last}")
