"""What a backend is: resources, a clock, and a way to issue a task. One contract suite holds all of them.

Contract. ``issue`` may be called only on the loop's thread, with tasks whose dependencies are met by the
graph's rules; the future it returns resolves when the task has ended and nothing of it touches a buffer any
more, in error too. Cancelling that future is not allowed: the executor shields it. A failed task poisons its
domain: tasks issued behind it fail with the same error and do not run. ``close`` settles what is in flight,
frees every buffer and thread, and may be called twice.
"""

import asyncio
from typing import Protocol

from aspec.tasks.task import Completion, Resource, Task


class Backend(Protocol):
    """A machine that runs tasks: simulated, CPU or CUDA."""

    @property
    def resources(self) -> tuple[Resource, ...]:
        """The workers this backend offers."""
        ...

    def now(self) -> float:
        """Seconds on the only clock there is."""
        ...

    def issue(self, task: Task, after: tuple[int, ...] = ()) -> asyncio.Future[Completion]:
        """Start a task behind the issued tasks ``after`` of its domain."""
        ...

    async def close(self) -> None:
        """Settle, free, join."""
        ...
