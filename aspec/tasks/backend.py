"""The protocol of a backend: resources, a clock, and a way to issue a task. One contract suite tests every backend.

Contract. Call ``issue`` only on the loop's thread, with tasks whose dependencies are met by the graph's rules. The
future that it returns resolves when the task has ended, also in error, and no longer touches any buffer. Do not cancel
that future: the executor shields it. A failed task poisons its domain: tasks issued behind it fail with the same error
and do not run. ``close`` waits for the tasks in flight, frees every buffer and thread, and may be called twice.
"""

import asyncio
from typing import Protocol

from aspec.tasks.task import Completion, Resource, Task


class Backend(Protocol):
    """A machine that runs tasks: simulated, CPU or CUDA."""

    @property
    def resources(self) -> tuple[Resource, ...]:
        """The resources that this backend offers."""
        ...

    def now(self) -> float:
        """Seconds on the backend's clock, the only clock of a run."""
        ...

    def issue(self, task: Task, after: tuple[int, ...] = ()) -> asyncio.Future[Completion]:
        """Start a task; it runs behind the issued tasks with the ids ``after`` in its domain."""
        ...

    async def close(self) -> None:
        """Wait for the tasks in flight, free the buffers, join the threads."""
        ...
