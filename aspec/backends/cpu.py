"""The CPU backend: the device is this machine's memory under a budget, so reads fill the slots directly.

Four workers: the disk lane (a few threads), one compute lane for target and draft, one lane for small host work, and
one that decodes stored weights (as many threads as the plan says).
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from aspec.backends.thread_lane import ThreadLane
from aspec.errors import InternalError
from aspec.io.disk import DiskLane
from aspec.io.loop.settling import close_all, settle, settle_all
from aspec.models.weights.parts import Part
from aspec.tasks.task import COMPUTE, CPU, DECODE, DISK, Completion, Load, Report, Resource, Task


class Runner(Protocol):
    """Computes tasks; a lane's thread calls it, never the loop."""

    def run(self, task: Task) -> Report:
        """Compute one task."""
        ...


class CpuBackend:
    """Runs tasks on this machine's processors and disk."""

    def __init__(
        self,
        runner: Runner,
        parts: Mapping[int, Part],
        slots: Sequence[memoryview],
        disk: DiskLane,
        *,
        num_decoders: int = 1,
    ) -> None:
        """``num_decoders``: threads that decode stored weights."""
        loop = asyncio.get_running_loop()
        self.resources = (
            Resource(DISK, depth=3, in_order=False),
            Resource(COMPUTE, depth=2, domain="host"),
            Resource(CPU, depth=1),
            Resource(DECODE, depth=num_decoders + 1, in_order=num_decoders == 1),
        )
        self._runner, self._parts, self._slots, self._disk = runner, parts, slots, disk
        self._lanes: dict[str, ThreadLane] = {}
        try:
            for name, number in ((COMPUTE, 1), (CPU, 1), (DECODE, num_decoders)):
                self._lanes[name] = ThreadLane(name, loop, number)
        except BaseException:
            close_all(lane.close for lane in self._lanes.values())
            raise
        self._in_flight: set[asyncio.Future[Completion]] = set()
        self._closed = False

    def now(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()

    def issue(self, task: Task, after: tuple[int, ...] = ()) -> asyncio.Future[Completion]:
        """Start a task. Tasks of one domain share a thread, which runs them in order: ``after`` needs no check."""
        if self._closed:
            raise InternalError(f"{task.label} (task {task.id}) was issued to a backend that is closed")
        if isinstance(task.payload, Load):
            future: asyncio.Future[Completion] = asyncio.ensure_future(self._read(task.payload, task.priority))
        else:
            future = self._lanes[task.resource].submit(lambda: self._compute(task))
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        return future

    async def close(self) -> None:
        """Settle the tasks in flight and join the lanes; the caller closes the disk lane."""
        try:
            await settle_all(self._in_flight)
        finally:
            if not self._closed:
                self._closed = True
                close_all(lane.close for lane in self._lanes.values())

    async def _read(self, load: Load, priority: int) -> Completion:
        assert load.slot is not None, "the device is the host's own memory: reads fill slots"
        done = await settle(self._disk.read(self._parts[load.part].segments, self._slots[load.slot], priority))
        return Completion(done.start_s, done.stop_s)

    def _compute(self, task: Task) -> Completion:
        start = time.perf_counter()
        report = self._runner.run(task)
        return Completion(start, time.perf_counter(), report)
