"""The backend of a device behind a link: a launcher and a waiter thread per stream; the device orders streams itself.

Rules. A task ends when its stop event has completed, also after an error. A launcher first waits, on the host, until
the earlier tasks that it needs on other streams have recorded their events (a wait for an unrecorded event returns at
once), then makes its stream wait for them. An event returns to the pool only when its own task and the tasks that wait
for it have resolved. What may NOT go in: device-wide synchronisation, Python in callbacks of the device, polling,
torch on the loop.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic

from aspec.backends.cpu import EXPERTS_IN_FLIGHT, ExpertSource, Runner
from aspec.backends.device import Buffers, DeviceLayer, E, S
from aspec.backends.event_lane import EventLane, Outcome
from aspec.backends.thread_lane import ThreadLane
from aspec.errors import DeviceError, InternalError
from aspec.io.disk import DiskLane
from aspec.io.loop.settling import close_all, settle, settle_all
from aspec.io.pinned import HostBuffer
from aspec.models.weights.parts import Part
from aspec.tasks.task import (
    COMPUTE,
    CPU,
    D2H,
    DECODE,
    DISK,
    DRAFT_COMPUTE,
    EXPERT_DISK,
    H2D,
    H2D_RESULTS,
    NOTHING,
    Completion,
    ExpertLoad,
    Load,
    Report,
    Resource,
    Task,
)

CLOSE_TIMEOUT_S = 60.0  # far longer than any task; after it the device counts as lost
JOIN_S, LATE_JOIN_S = 30.0, 0.1  # to join a thread, and one that may wait for a lost device
STREAM_PRIORITIES = {H2D: 0, D2H: 0, H2D_RESULTS: -1, COMPUTE: -1, DRAFT_COMPUTE: 0, DECODE: 0}
"""A smaller number runs first: the target before the draft, and results for its layers before weights."""
LAUNCHED_AHEAD = 4  # tasks in a stream, so that the device does not wait for the host's next launch
COPIED_AHEAD = 8  # parts in flight: a copy takes less than 1 ms, and a wait for the interpreter's lock may take as long


@dataclass(slots=True, eq=False)
class _Launch(Generic[E]):
    """A task in a stream. The launcher's thread writes it until ``launched``, the loop's thread after that."""

    task: Task
    order: int  # of issue, over all streams
    start: E
    stop: E
    after: tuple["_Launch[E]", ...]  # on other streams; emptied at the end, so that no chain keeps all tasks
    future: asyncio.Future[Completion]
    report: Report = NOTHING
    recorded: bool = False  # whether ``stop`` is in the stream
    launched: threading.Event = field(default_factory=threading.Event)
    holds: int = 1  # itself and the unresolved tasks that wait for it; at 0 its events are free (loop's thread only)


class StreamBackend(Generic[S, E]):
    """Runs tasks on the streams of one device, its disk and its host."""

    resources = (
        Resource(DISK, depth=3, in_order=False),
        Resource(EXPERT_DISK, depth=EXPERTS_IN_FLIGHT, in_order=False),
        Resource(H2D, depth=COPIED_AHEAD, domain="device"),
        Resource(D2H, depth=2, domain="device"),
        Resource(H2D_RESULTS, depth=2, domain="device"),
        Resource(COMPUTE, depth=LAUNCHED_AHEAD, domain="device"),
        Resource(DRAFT_COMPUTE, depth=2, domain="device"),
        Resource(DECODE, depth=2, domain="device"),
        Resource(CPU, depth=1),
    )

    def __init__(
        self,
        device: DeviceLayer[S, E],
        runner: Runner,
        parts: Mapping[int, Part],
        buffers: Buffers,
        disk: DiskLane,
        experts: ExpertSource | None = None,
    ) -> None:
        """``experts`` are read on demand, into slots of the buffers."""
        loop = self._loop = asyncio.get_running_loop()
        self._device, self._runner, self._parts, self._buffers, self._disk = device, runner, parts, buffers, disk
        self._experts = experts
        self._streams = {name: device.create_stream(priority) for name, priority in STREAM_PRIORITIES.items()}
        self._host_stream = device.create_stream(STREAM_PRIORITIES[COMPUTE])  # for device work of host tasks
        self._order = itertools.count()
        self._launches: dict[int, _Launch[E]] = {}  # by task id: issued to a stream and not resolved
        self._pool: list[E] = []  # free events; loop's thread only
        self._in_flight: set[asyncio.Future[Completion]] = set()
        self._poison: tuple[int, BaseException] | None = None  # tasks from this order on fail, with this error
        self._poison_lock = threading.Lock()
        self._closed = False
        self._launchers: dict[str, ThreadLane] = {}
        self._waiters: dict[str, EventLane] = {}
        try:
            for name in self._streams:
                self._launchers[name] = ThreadLane(f"launch-{name}", loop)
                self._waiters[name] = EventLane(f"wait-{name}", loop)
            self._cpu = ThreadLane(CPU, loop)
        except BaseException:  # a thread could not start; the caller frees the device
            close_all(
                [lane.close for lane in self._launchers.values()] + [lane.close for lane in self._waiters.values()]
            )
            raise

    def now(self) -> float:
        """Seconds of ``time.perf_counter``; device times are mapped to it."""
        return time.perf_counter()

    def issue(self, task: Task, after: tuple[int, ...] = ()) -> asyncio.Future[Completion]:
        """Start a task; on the device it runs after the tasks ``after``."""
        if self._closed:
            raise InternalError(f"{task.label} (task {task.id}) was issued to a backend that is closed")
        future: asyncio.Future[Completion]
        if task.resource in self._streams:
            future = self._issue_launch(task, after)
        elif isinstance(task.payload, Load | ExpertLoad):
            future = asyncio.ensure_future(self._read(task.payload, task.priority))
        else:
            future = self._cpu.submit(lambda: self._compute(task))
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        return future

    async def close(self) -> None:
        """Settle the tasks in flight, join the threads, free the device's buffers; the caller closes the disk lane.

        Raises DeviceError if the device does not finish its tasks, or a thread does not end. Then the buffers stay,
        because the device may still write to them.
        """
        try:
            await settle_all(self._in_flight, CLOSE_TIMEOUT_S)
        finally:
            if not self._closed:
                self._closed = True
                self._shut([future for future in self._in_flight if not future.done()])

    def _shut(self, late: Sequence[asyncio.Future[Completion]]) -> None:
        lanes: list[ThreadLane | EventLane] = [*self._launchers.values(), *self._waiters.values(), self._cpu]
        timeout_s = LATE_JOIN_S if late else JOIN_S
        try:
            close_all(partial(lane.close, timeout_s) for lane in lanes)
        finally:
            if late:
                raise DeviceError(f"{len(late)} tasks did not finish within {CLOSE_TIMEOUT_S:g} s of closing")
        self._pool.clear()
        self._buffers = Buffers((), ())
        self._device.free()

    # -- host ------------------------------------------------------------------------------------------------

    async def _read(self, load: Load | ExpertLoad, priority: int) -> Completion:
        host = self._host_buffer(load)
        done = await settle(self._disk.read(self._part(load).segments, host.view, priority))
        return Completion(done.start_s, done.stop_s)

    def _part(self, load: Load | ExpertLoad) -> Part:
        """What a load brings."""
        if isinstance(load, Load):
            return self._parts[load.part]
        assert self._experts is not None, "a backend without experts is given no plan with experts on demand"
        return self._experts.part(load.layer, load.expert)

    def _host_buffer(self, load: Load | ExpertLoad) -> HostBuffer:
        """Where a load is in host memory: read to there, or copied from there."""
        if isinstance(load, Load):
            return self._buffers.host_parts[load.part] if load.staging is None else self._buffers.staging[load.staging]
        assert load.host_slot is not None, "behind a link experts go through host memory"
        return self._buffers.host_experts[load.host_slot]

    def _compute(self, task: Task) -> Completion:
        """Run host work; it ends when the device work that it launched, such as moves of KV, has also ended."""
        start = time.perf_counter()
        event = self._device.create_event()
        with self._device.on(self._host_stream):
            report = self._runner.run(task)
            self._device.record(event, self._host_stream)
        event.synchronize()
        return Completion(start, time.perf_counter(), report)

    # -- device: on the loop's thread ------------------------------------------------------------------------

    def _issue_launch(self, task: Task, after: tuple[int, ...]) -> asyncio.Future[Completion]:
        before = (self._launches.get(task_id) for task_id in after)  # absent: already resolved
        others = tuple(launch for launch in before if launch and launch.task.resource != task.resource)
        for launch in others:
            launch.holds += 1
        future: asyncio.Future[Completion] = self._loop.create_future()
        launch = _Launch(task, next(self._order), self._event(), self._event(), others, future)
        self._launches[task.id] = launch
        future.add_done_callback(lambda _: self._on_resolved(launch))
        self._launchers[task.resource].submit(lambda: self._launch(launch))
        return future

    def _event(self) -> E:
        return self._pool.pop() if self._pool else self._device.create_event()

    def _on_resolved(self, launch: _Launch[E]) -> None:
        del self._launches[launch.task.id]
        for held in (launch, *launch.after):
            held.holds -= 1
            if not held.holds:
                self._pool += (held.start, held.stop)
        launch.after = ()

    # -- device: on a launcher's thread ----------------------------------------------------------------------

    def _launch(self, launch: _Launch[E]) -> Completion:
        """Launch one task on its stream, then record its stop event; never raises."""
        name = launch.task.resource
        stream = self._streams[name]
        for other in launch.after:
            other.launched.wait()  # issued earlier, so there is no deadlock
        try:
            if self._error_of(launch) is None:
                launch.recorded = True  # from here on the stream may hold work of this task
                self._fill(launch, stream)
        except BaseException as error:
            self._fail_from(launch, error)
        if launch.recorded:
            try:
                self._device.record(launch.stop, stream)
            except BaseException as error:
                launch.recorded = False  # the device is lost: it no longer writes
                self._fail_from(launch, error)
        launch.launched.set()
        event = launch.stop if launch.recorded else None
        self._waiters[name].wait(event, lambda error: self._conclude(launch, error), launch.future)
        return Completion(0.0, 0.0)  # of the launch; the waiter makes the task's own

    def _fill(self, launch: _Launch[E], stream: S) -> None:
        for other in launch.after:
            self._device.wait_event(stream, other.stop)
        with self._device.on(stream):
            self._device.record(launch.start, stream)
            if isinstance(launch.task.payload, Load | ExpertLoad):
                self._copy(launch.task.payload, stream)
            else:
                launch.report = self._runner.run(launch.task)

    def _copy(self, load: Load | ExpertLoad, stream: S) -> None:
        """Copy a part in one piece, from staging or from the host memory that keeps it."""
        assert load.slot is not None, "a copy fills a slot"
        part, slots = self._part(load), self._buffers.slots if isinstance(load, Load) else self._buffers.expert_slots
        target = slots[load.slot][part.shift : part.size]
        self._device.copy_async(target, self._host_buffer(load).tensor[: len(target)], stream)

    # -- device: on a waiter's thread ------------------------------------------------------------------------

    def _conclude(self, launch: _Launch[E], error: BaseException | None) -> Outcome:
        if error is not None:
            self._fail_from(launch, error)
        poison = self._error_of(launch)
        if poison is not None:
            return poison
        start, stop = self._device.seconds_of(launch.start), self._device.seconds_of(launch.stop)
        return Completion(start, max(start, stop), launch.report)

    # -- errors: on any thread -------------------------------------------------------------------------------

    def _error_of(self, launch: _Launch[E]) -> BaseException | None:
        """The error of this task, because it or an earlier task has failed; None if none has."""
        poison = self._poison
        return poison[1] if poison is not None and poison[0] <= launch.order else None

    def _fail_from(self, launch: _Launch[E], error: BaseException) -> None:
        """Fail all tasks from the earliest failed one on; the first error is kept."""
        with self._poison_lock:
            order, first = self._poison or (launch.order, error)
            self._poison = (min(order, launch.order), first)
