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
from aspec.tasks.task import (
    COMPUTE,
    CPU,
    DECODE,
    DISK,
    EXPERT_DISK,
    Completion,
    ExpertLoad,
    Load,
    Report,
    Resource,
    Task,
)

EXPERTS_IN_FLIGHT = 8  # reads: one NVMe reached 0.6 GB/s with one reader, 2.0 GB/s with eight


class Runner(Protocol):
    """Computes tasks; a lane's thread calls it, never the loop."""

    def run(self, task: Task) -> Report:
        """Compute one task."""
        ...


class ExpertSource(Protocol):
    """Knows where the experts are stored that are read on demand."""

    def part(self, layer: int, expert: int) -> Part:
        """What to read for one expert."""
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
        experts: ExpertSource | None = None,
        expert_slots: Sequence[memoryview] = (),
    ) -> None:
        """``num_decoders``: threads that decode stored weights. ``experts`` are read on demand into their slots."""
        loop = asyncio.get_running_loop()
        self.resources = (
            Resource(DISK, depth=3, in_order=False),
            Resource(EXPERT_DISK, depth=EXPERTS_IN_FLIGHT, in_order=False),
            Resource(COMPUTE, depth=2, domain="host"),
            Resource(CPU, depth=1),
            Resource(DECODE, depth=num_decoders + 1, in_order=num_decoders == 1),
        )
        self._runner, self._parts, self._slots, self._disk = runner, parts, slots, disk
        self._experts, self._expert_slots = experts, expert_slots
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
        if isinstance(task.payload, Load | ExpertLoad):
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

    async def _read(self, load: Load | ExpertLoad, priority: int) -> Completion:
        part, slot = self._place(load)
        done = await settle(self._disk.read(part.segments, slot, priority))
        return Completion(done.start_s, done.stop_s)

    def _place(self, load: Load | ExpertLoad) -> tuple[Part, memoryview]:
        """What a load reads, and the slot that it fills."""
        if isinstance(load, ExpertLoad):
            assert self._experts is not None, "a backend without experts is given no plan with experts on demand"
            return self._experts.part(load.layer, load.expert), self._expert_slots[load.slot]
        assert load.slot is not None, "the device is the host's own memory: reads fill slots"
        return self._parts[load.part], self._slots[load.slot]

    def _compute(self, task: Task) -> Completion:
        start = time.perf_counter()
        report = self._runner.run(task)
        return Completion(start, time.perf_counter(), report)
