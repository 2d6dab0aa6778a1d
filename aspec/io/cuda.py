"""The CUDA backend: one launcher thread and one waiter thread per stream; order between streams is the device's.

Rules. A task ends when its stop event has completed, in error too. A launcher first waits, on the host, until the
tasks it follows on other streams have recorded their events (to wait for an unrecorded event waits for nothing),
then makes its stream wait for them. An event returns to the pool only when its own wait and the tasks behind it
have resolved. What may NOT go in: device-wide synchronisation, Python in CUDA callbacks, polling, torch on the loop.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from aspec.errors import DeviceError, InternalError
from aspec.io.cpu import Runner
from aspec.io.disk import DiskLane
from aspec.io.events import DeviceEvent, EventLane, Outcome
from aspec.io.lane import ThreadLane
from aspec.io.layout import Part
from aspec.io.pinned import HostBuffer, PinnedMemory
from aspec.tasks.task import (
    COMPUTE,
    CPU,
    DISK,
    DRAFT_COMPUTE,
    H2D,
    NOTHING,
    Completion,
    Op,
    Report,
    Resource,
    Seating,
    Task,
)

CLOSE_TIMEOUT_S = 60.0  # far longer than any task; beyond it the device counts as lost
EPOCH_S = 30.0  # CUDA counts elapsed time in fp32 milliseconds: within 30 s the step is 2 us, and clocks drift little
STREAM_PRIORITIES = {H2D: 0, COMPUTE: -1, DRAFT_COMPUTE: 0}  # smaller goes first: the target before the draft

_cuda: Any = torch.cuda  # torch leaves the signatures of its streams and events untyped

S = TypeVar("S")
E = TypeVar("E", bound=DeviceEvent)


class DeviceLayer(Protocol[S, E]):
    """The little that the backend asks of a device; streams run in order, and beside each other."""

    def create_stream(self, priority: int) -> S:
        """A new stream; smaller priorities go first."""
        ...

    def create_event(self) -> E:
        """A new event that can be timed and waited for without spinning."""
        ...

    def record(self, event: E, stream: S) -> None:
        """Put the event behind everything launched on the stream so far."""
        ...

    def wait_event(self, stream: S, event: E) -> None:
        """Hold what is launched on the stream from now on until the last recording of the event has completed."""
        ...

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: S) -> None:
        """Copy host bytes to a device buffer of the same size, on the stream."""
        ...

    def on(self, stream: S) -> AbstractContextManager[object]:
        """What this thread launches inside goes to the stream."""
        ...

    def seconds_of(self, event: E) -> float:
        """When a completed event completed, seconds of ``time.perf_counter``."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A device buffer [nbytes] uint8. Raises DeviceError if it does not fit."""
        ...

    def allocate_host(self, nbytes: int) -> HostBuffer:
        """A host buffer, pinned where possible."""
        ...

    def free(self) -> None:
        """Let go of every buffer and stream; may be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Buffers:
    """Where parts are: device slots, host buffers between disk and device, and parts that stay on the host."""

    slots: Sequence[torch.Tensor]
    staging: Sequence[HostBuffer]
    host_parts: Mapping[int, HostBuffer] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Launch(Generic[E]):
    """A task on its way through a stream. The launcher writes it until ``launched``, the loop's thread after that."""

    task: Task
    order: int  # of issue, in the whole domain
    start: E
    stop: E
    after: tuple["_Launch[E]", ...]  # on other streams; emptied at the end, or the chain would keep every task
    future: asyncio.Future[Completion]
    report: Report = NOTHING
    recorded: bool = False  # whether ``stop`` is in the stream
    launched: threading.Event = field(default_factory=threading.Event)
    holds: int = 1  # itself and the unresolved tasks behind it; at 0 its events are free (loop's thread only)


class CudaBackend(Generic[S, E]):
    """Runs tasks on the streams of one device, its disk and its host."""

    resources = (
        Resource(DISK, depth=3, in_order=False),
        Resource(H2D, depth=2, domain="device"),
        Resource(COMPUTE, depth=2, domain="device"),
        Resource(DRAFT_COMPUTE, depth=2, domain="device"),
        Resource(CPU, depth=1),
    )

    def __init__(
        self, device: DeviceLayer[S, E], runner: Runner, parts: Mapping[int, Part], buffers: Buffers, disk: DiskLane
    ) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._device, self._runner, self._parts, self._buffers, self._disk = device, runner, parts, buffers, disk
        self._streams = {name: device.create_stream(priority) for name, priority in STREAM_PRIORITIES.items()}
        self._launchers = {name: ThreadLane(f"launch-{name}", loop) for name in self._streams}
        self._waiters = {name: EventLane(f"wait-{name}", loop) for name in self._streams}
        self._cpu = ThreadLane(CPU, loop)
        self._order = itertools.count()
        self._launches: dict[int, _Launch[E]] = {}  # issued to a stream and not resolved, by task id
        self._pool: list[E] = []  # events nobody waits for; loop's thread only
        self._in_flight: set[asyncio.Future[Completion]] = set()
        self._poison: tuple[int, BaseException] | None = None  # the order from which tasks fail, and with what
        self._poison_lock = threading.Lock()
        self._closed = False

    def now(self) -> float:
        """Seconds of ``time.perf_counter``; device times are mapped to it."""
        return time.perf_counter()

    def seat(self, seatings: Sequence[Seating]) -> None:
        """Rows change hands between passes."""
        self._runner.seat(seatings)

    def issue(self, task: Task, after: tuple[int, ...] = ()) -> asyncio.Future[Completion]:
        """Start a task; on the device it runs behind ``after``."""
        if self._closed:
            raise InternalError(f"{task.label} (task {task.id}) was issued to a backend that is closed")
        future: asyncio.Future[Completion]
        if task.resource in self._streams:
            future = self._issue_launch(task, after)
        elif task.op is Op.READ:
            future = asyncio.ensure_future(self._read(task))
        else:
            future = self._cpu.submit(lambda: self._compute(task))
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        return future

    async def close(self) -> None:
        """Settle, join the threads, free the device's buffers; the disk lane belongs to whoever made it.

        Raises DeviceError, and frees nothing, if the device does not finish what it was given.
        """
        if self._in_flight:
            _, late = await asyncio.wait(self._in_flight, timeout=CLOSE_TIMEOUT_S)
            if late:
                raise DeviceError(f"{len(late)} tasks did not finish within {CLOSE_TIMEOUT_S:g} s of closing")
        if self._closed:
            return
        self._closed = True
        lanes: list[ThreadLane | EventLane] = [*self._launchers.values(), *self._waiters.values(), self._cpu]
        for lane in lanes:
            lane.close()
        self._pool.clear()
        self._buffers = Buffers((), ())
        self._device.free()

    # -- host ------------------------------------------------------------------------------------------------

    async def _read(self, task: Task) -> Completion:
        done = await self._disk.read(
            self._parts[task.part].segments, self._buffers.staging[task.staging].view, task.priority
        )
        return Completion(done.start_s, done.stop_s)

    def _compute(self, task: Task) -> Completion:
        start = time.perf_counter()
        report = self._runner.run(task)
        return Completion(start, time.perf_counter(), report)

    # -- device: on the loop's thread ------------------------------------------------------------------------

    def _issue_launch(self, task: Task, after: tuple[int, ...]) -> asyncio.Future[Completion]:
        before = (self._launches.get(task_id) for task_id in after)  # absent: it has resolved
        others = tuple(launch for launch in before if launch and launch.task.resource != task.resource)
        for launch in others:
            launch.holds += 1
        future: asyncio.Future[Completion] = self._loop.create_future()
        launch = _Launch(task, next(self._order), self._event(), self._event(), others, future)
        self._launches[task.id] = launch
        future.add_done_callback(lambda _: self._resolved(launch))
        self._launchers[task.resource].submit(lambda: self._launch(launch))
        return future

    def _event(self) -> E:
        return self._pool.pop() if self._pool else self._device.create_event()

    def _resolved(self, launch: _Launch[E]) -> None:
        del self._launches[launch.task.id]
        for held in (launch, *launch.after):
            held.holds -= 1
            if not held.holds:
                self._pool += (held.start, held.stop)
        launch.after = ()

    # -- device: on a launcher's thread ----------------------------------------------------------------------

    def _launch(self, launch: _Launch[E]) -> Completion:
        """Put one task into its stream, and its stop event behind it; never raises."""
        name = launch.task.resource
        stream = self._streams[name]
        for other in launch.after:
            other.launched.wait()  # issued earlier, so there is no circle
        try:
            if self._poison_for(launch) is None:
                launch.recorded = True  # from here on the stream may hold something of this task
                self._fill(launch, stream)
        except BaseException as error:
            self._poison_from(launch, error)
        if launch.recorded:
            try:
                self._device.record(launch.stop, stream)
            except BaseException as error:
                launch.recorded = False  # the device is lost: it writes nothing any more
                self._poison_from(launch, error)
        launch.launched.set()
        event = launch.stop if launch.recorded else None
        self._waiters[name].wait(event, lambda error: self._conclude(launch, error), launch.future)
        return Completion(0.0, 0.0)  # of the launch; the task's own comes from the waiter

    def _fill(self, launch: _Launch[E], stream: S) -> None:
        for other in launch.after:
            self._device.wait_event(stream, other.stop)
        with self._device.on(stream):
            self._device.record(launch.start, stream)
            if launch.task.op is Op.COPY:
                self._copy(launch.task, stream)
            else:
                launch.report = self._runner.run(launch.task)

    def _copy(self, task: Task, stream: S) -> None:
        """From staging, or from the host part itself where it stays there."""
        buffers = self._buffers
        source = buffers.host_parts[task.part] if task.staging < 0 else buffers.staging[task.staging]
        size = self._parts[task.part].size
        self._device.copy_async(buffers.slots[task.slot][:size], source.tensor[:size], stream)

    # -- device: on a waiter's thread ------------------------------------------------------------------------

    def _conclude(self, launch: _Launch[E], error: BaseException | None) -> Outcome:
        if error is not None:
            self._poison_from(launch, error)
        poison = self._poison_for(launch)
        if poison is not None:
            return poison
        start, stop = self._device.seconds_of(launch.start), self._device.seconds_of(launch.stop)
        return Completion(start, max(start, stop), launch.report)

    # -- errors: on any thread -------------------------------------------------------------------------------

    def _poison_for(self, launch: _Launch[E]) -> BaseException | None:
        """The error this task fails with because it, or one issued before it, has failed."""
        poison = self._poison
        return poison[1] if poison is not None and poison[0] <= launch.order else None

    def _poison_from(self, launch: _Launch[E], error: BaseException) -> None:
        """The first error stays; it holds from the earliest task that failed."""
        with self._poison_lock:
            order, first = self._poison or (launch.order, error)
            self._poison = (min(order, launch.order), first)


class TorchDevice:
    """One CUDA device by way of torch."""

    def __init__(self, index: int = 0, pinned_limit_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("torch finds no CUDA device: install a CUDA build of torch, or run with --device cpu.")
        self._device = torch.device("cuda", index)
        self._buffers: list[torch.Tensor] = []
        self._host = PinnedMemory(_register, _unregister, pinned_limit_bytes)
        self._clock: torch.cuda.Stream = _cuda.Stream(self._device)  # always empty: an event on it completes at once
        self._epoch_lock = threading.Lock()
        self._epoch = self._new_epoch()  # an event, and when it completed on the host's clock

    def create_stream(self, priority: int) -> torch.cuda.Stream:
        """A stream that does not wait for the default stream."""
        stream: torch.cuda.Stream = _cuda.Stream(self._device, priority=priority)
        return stream

    def create_event(self) -> torch.cuda.Event:
        """An event whose wait sleeps (``torch.Event`` ignores ``blocking``); the driver makes it when recorded."""
        event: torch.cuda.Event = _cuda.Event(enable_timing=True, blocking=True)
        return event

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        """Put the event behind everything launched on the stream so far."""
        event.record(stream)

    def wait_event(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Hold the stream until the event's last recording has completed."""
        stream.wait_event(event)

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Copy on the stream; overlaps with compute where the source is pinned."""
        with self.on(stream):
            target.copy_(source, non_blocking=True)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """This thread's current stream, inside."""
        return torch.cuda.stream(stream)

    def seconds_of(self, event: torch.cuda.Event) -> float:
        """By the distance to the epoch event, which moves on every ``EPOCH_S``."""
        epoch, at_s = self._epoch
        distance_s = float(epoch.elapsed_time(event)) / 1e3
        if distance_s > EPOCH_S:
            with self._epoch_lock:
                if self._epoch[0] is epoch:
                    self._epoch = self._new_epoch()
        return at_s + distance_s

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A device buffer [nbytes] uint8. Raises DeviceError if it does not fit."""
        try:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise DeviceError(f"{self._device} has no room for {nbytes} bytes: lower --device-memory.") from error
        self._buffers.append(buffer)
        return buffer

    def allocate_host(self, nbytes: int) -> HostBuffer:
        """A host buffer, pinned where the system allows it."""
        return self._host.allocate(nbytes)

    def free(self) -> None:
        """Let go of every buffer; streams go with their last reference."""
        self._buffers.clear()
        self._host.close()

    def _new_epoch(self) -> tuple[torch.cuda.Event, float]:
        """The tightest of a few tries: the event completed between two looks at the host's clock."""
        tries = []
        for _ in range(5):
            event = self.create_event()
            before = time.perf_counter()
            event.record(self._clock)
            event.synchronize()
            after = time.perf_counter()
            tries.append((after - before, event, (before + after) / 2))
        _, event, at_s = min(tries, key=lambda found: found[0])
        return event, at_s


def _register(address: int, nbytes: int) -> bool:
    """Pin pages; False where the system refuses.

    A refusal stays behind as the calling thread's last CUDA error and would surface in its next kernel launch
    (vllm PR 50070); torch has no call that clears it, so it is left to a thread that ends.
    """
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(int(_cuda.cudart().cudaHostRegister(address, nbytes, 0))), name="aspec-pin"
    )
    thread.start()
    thread.join()
    return codes == [0]


def _unregister(address: int) -> None:
    _cuda.cudart().cudaHostUnregister(address)
