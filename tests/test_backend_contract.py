"""One suite holds every backend to the contract of ``aspec.tasks.backend``: simulated, CPU, and CUDA on a fake device.

The runs use the real scheduler, graph and executor; the stub runner checks every buffer a task reads, and the
slots byte for byte against the file, at the beginning and at the end of the task.
"""

import asyncio
import itertools
import random
import time
from dataclasses import replace

import pytest
import torch

from aspec.backends.cpu import CpuBackend
from aspec.backends.device import Buffers
from aspec.backends.streams import StreamBackend
from aspec.errors import ReadError
from aspec.io.disk import DiskLane
from aspec.io.memory import PAGE, allocate
from aspec.models.weights.parts import Part, Segment
from aspec.plan import Tier
from aspec.planning.sim_backend import DEVICE_RESOURCES, HOST_RESOURCES, SimBackend, SimCosts
from aspec.tasks.executor import Executor
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import (
    COMPUTE,
    CPU,
    DISK,
    H2D,
    NOTHING,
    LayerWork,
    Load,
    Report,
    RequestAdded,
    RowOutcome,
    Shutdown,
    Task,
    WorkItem,
)
from tests.fake_device import FakeDevice
from tests.simulate import Checked, asking, make_plan, with_experts

KINDS = ("sim-host", "sim-device", "cpu", "cuda")
HAS_COPY = ("sim-device", "cuda")
NUM_PARTS, PART_BYTES, SLOT_BYTES = 8, 40_000, 11 * PAGE
ARRIVALS = ((0, 20, 9), (1, 100, 7), (2, 5, 6))
CROSSING = (Op.SEND, Op.RETURN)
SPLIT = (Op.PROJECT, Op.ATTEND, Op.FFN, *CROSSING)
ON_DEMAND = (Op.ROUTE, Op.LOAD_EXPERT, Op.COPY_EXPERT, Op.EXPERTS, Op.COMBINE)
NUM_EXPERTS, EXPERT_BYTES = 6, 5000
FAULTS = [
    (kind, op) for kind in KINDS for op in Op if op not in (Op.COPY, Op.COPY_EXPERT, *CROSSING) or kind in HAS_COPY
]


def make_parts(folder, broken=None):
    """Parts at odd offsets of one file of random bytes; ``broken`` lies beyond its end. With the bytes of each."""
    file = folder / "weights"
    content = random.Random(1).randbytes(NUM_PARTS * (PART_BYTES + 1000))
    file.write_bytes(content)
    parts, expected = {}, {}
    for i in range(NUM_PARTS):
        offset = i * (PART_BYTES + 1000) + 24
        expected[i] = (offset % PAGE, torch.frombuffer(bytearray(content[offset:][:PART_BYTES]), dtype=torch.uint8))
        if i == broken:
            offset += 10 * len(content) // PAGE * PAGE
        segment = Segment(str(file), offset, PART_BYTES, offset % PAGE)
        parts[i] = Part(i, i // 2, (segment,), (), (), PART_BYTES, SLOT_BYTES, 0, 0)
    return parts, expected


class Experts:
    """Experts at odd offsets of the file of the parts; ``broken`` is the number of a read that lies beyond its end."""

    def __init__(self, folder, broken=None):
        self.file, self.broken, self.num_reads = folder / "weights", broken, 0
        self.content = self.file.read_bytes()

    def part(self, layer, expert):
        self.num_reads += 1
        offset = self.offset(layer, expert) + (1 << 30) * (self.num_reads == self.broken)
        segment = Segment(str(self.file), offset, EXPERT_BYTES, offset % PAGE)
        return Part(0, layer, (segment,), (), (), EXPERT_BYTES, SLOT_BYTES, 0, 0)

    def offset(self, layer, expert):
        return (layer * NUM_EXPERTS + expert) * (EXPERT_BYTES + 40) + 8

    def holds(self, slot, layer, expert):
        offset = self.offset(layer, expert)
        return bytes(slot[offset % PAGE :][:EXPERT_BYTES].tolist()) == self.content[offset:][:EXPERT_BYTES]


class CheckingRunner:
    """Checks what tasks read, notes what they write. ``launch`` runs steps: at once, or on the current stream."""

    def __init__(self, slots, expected, launch, fail=None, pause_s=0.0):
        self.slots, self.expected, self.launch = slots, expected, launch
        self.fail, self.pause_s = fail, pause_s
        self.contents = {}  # buffer -> content, but for slots and staging
        self.wrong = []
        self.counts = {}
        self.started, self.ended = set(), set()  # task ids
        self.num_slot_checks = 0
        self.experts, self.expert_slots = None, ()

    def run(self, task):
        self.started.add(task.id)
        self.counts[task.op] = self.counts.get(task.op, 0) + 1
        if self.fail == (task.op, self.counts[task.op]):
            raise OSError(f"injected fault in {task.label}")
        steps = (lambda: self.check(task), lambda: self.end(task))
        if task.resource != CPU:
            self.launch(*steps)
            chosen = (
                sorted({(task.number + start) % NUM_EXPERTS for start in (*task.item.starts, 1)}) if task.item else ()
            )
            return Report(routed=tuple((expert, 1) for expert in chosen)) if task.op is Op.ROUTE else NOTHING
        for step in steps:
            step()
        if task.op is not Op.ACCEPT:
            return NOTHING
        item = task.item
        counts = [1 if item.prefill else count for count in item.counts]
        return Report(tuple(RowOutcome(r, n - 1, n - 1, n, False) for r, n in zip(item.rows, counts, strict=True)))

    def check(self, task):
        for access in task.reads:
            found = self.contents.get(access.buffer, "")
            if not access.buffer.startswith(("slot:", "expert:", "host expert:")) and found != access.content:
                self.wrong.append(f"{task.label} ({task.id}): {access.buffer} holds {found!r}, not {access.content!r}")
        for part, slot in task.slots:
            self.num_slot_checks += 1
            at, content = self.expected[part]
            if not torch.equal(self.slots[slot][at : at + PART_BYTES], content):
                self.wrong.append(f"{task.label} ({task.id}): slot {slot} does not hold part {part}")
        for expert, slot in task.payload.experts if isinstance(task.payload, LayerWork) else ():
            self.num_slot_checks += 1
            if not self.experts.holds(self.expert_slots[slot], task.layer, expert):
                self.wrong.append(f"{task.label} ({task.id}): expert slot {slot} does not hold expert {expert}")

    def end(self, task):
        time.sleep(self.pause_s)
        self.check(task)
        self.contents.update({access.buffer: access.content for access in task.writes})
        self.ended.add(task.id)


class Watched:
    """A backend that remembers what was issued and checks what is resolved."""

    def __init__(self, backend, runner):
        self.backend, self.runner, self.resources = backend, runner, backend.resources
        self.now, self.close = backend.now, backend.close
        self.issued, self.ended, self.early = [], [], []

    def issue(self, task, after=()):
        future = self.backend.issue(task, after)
        self.issued.append((task, future))
        future.add_done_callback(lambda done: self.resolved(task, done))
        return future

    def resolved(self, task, future):
        self.ended.append((task, future))
        if future.exception() is None:
            unfinished = (
                self.runner
                and task.op not in (Op.READ, Op.LOAD_EXPERT, Op.COPY, Op.COPY_EXPERT)
                and task.id not in self.runner.ended
            )
            if unfinished or future.result().stop_s > self.now() + 1e-9:
                self.early.append(task.label)


class Rig:
    """A backend with everything around it; made inside a running loop."""

    def __init__(self, kind, folder, fail=None, device=None, wrap=StreamBackend, split=False, routed=False):
        self.kind, self.folder = kind, folder
        self.device = self.disk = self.runner = None
        self.memory = []
        resident = (0, 5)
        self.plan = make_plan(resident=resident, nbytes=SLOT_BYTES, num_slots=3)
        decoded = {1: True, 3: False, 4: False}  # by part: whether the layer itself reads the slot, too
        parts = (
            replace(p, decoded_bytes=100, in_place=decoded[p.index]) if p.index in decoded else p
            for p in self.plan.parts
        )
        self.plan = replace(self.plan, parts=tuple(parts))
        if split or (fail and fail[0] in SPLIT):
            self.plan = asking(self.plan, attention_resource=CPU, micro_batches=2)
        if routed or (fail and fail[0] in ON_DEMAND):
            host = (2, 2) if kind in HAS_COPY else None
            self.plan = with_experts(self.plan, 1, 3, NUM_EXPERTS, dense=(2,), nbytes=EXPERT_BYTES, host=host)
        if kind in HAS_COPY:
            parts = tuple(replace(p, tier=Tier.HOST) if p.index in (2, 7) else p for p in self.plan.parts)
            self.plan = replace(self.plan, parts=parts, num_staging=2, draft_resource="draft")
        if kind.startswith("sim"):
            resources = DEVICE_RESOURCES if kind == "sim-device" else HOST_RESOURCES
            experts = self.plan.experts.shape if self.plan.experts else None
            self.watched = Watched(SimBackend(SimCosts(), resources, fail, experts=experts), None)
            return
        self.parts, self.expected = make_parts(folder, broken=3 if fail and fail[0] is Op.READ else None)
        self.disk = DiskLane(asyncio.get_running_loop(), num_threads=2)
        backend = self.cpu(fail) if kind == "cpu" else self.cuda(fail, device or FakeDevice(), wrap)
        self.watched = Watched(backend, self.runner)

    def cpu(self, fail):
        self.memory = [allocate(SLOT_BYTES) for _ in range(self.plan.num_slots)]
        slots = [torch.frombuffer(memory.view, dtype=torch.uint8) for memory in self.memory]
        self.runner = CheckingRunner(slots, self.expected, lambda *steps: [step() for step in steps], fail, 2e-4)
        views = [memory.view for memory in self.memory]
        if self.plan.experts is None:
            return CpuBackend(self.runner, self.parts, views, self.disk, num_decoders=2)
        slots = [allocate(SLOT_BYTES) for _ in range(self.plan.experts.num_slots)]
        self.memory += slots
        self.find_experts(fail, [torch.frombuffer(memory.view, dtype=torch.uint8) for memory in slots])
        on_demand = {"experts": self.runner.experts, "expert_slots": [memory.view for memory in slots]}
        return CpuBackend(self.runner, self.parts, views, self.disk, num_decoders=2, **on_demand)

    def find_experts(self, fail, slots):
        self.runner.experts = Experts(self.folder, fail[1] if fail and fail[0] is Op.LOAD_EXPERT else None)
        self.runner.expert_slots = slots

    def cuda(self, fail, device, wrap):
        self.device = device
        if fail and fail[0] in (Op.COPY, Op.COPY_EXPERT):
            device.fail_copy = fail[1]
        slots = [device.allocate(SLOT_BYTES) for _ in range(self.plan.num_slots)]
        host_parts = {p.index: device.allocate_host(SLOT_BYTES) for p in self.plan.parts if p.tier is Tier.HOST}
        for index, buffer in host_parts.items():
            at, content = self.expected[index]
            buffer.tensor[at : at + PART_BYTES] = content
        staging = [device.allocate_host(SLOT_BYTES) for _ in range(self.plan.num_staging)]
        self.runner = CheckingRunner(slots, self.expected, device.launch, fail)
        buffers = Buffers(slots, staging, host_parts)
        if self.plan.experts is None:
            return wrap(device, self.runner, self.parts, buffers, self.disk)
        own = [device.allocate(SLOT_BYTES) for _ in range(self.plan.experts.num_slots)]
        host = [device.allocate_host(SLOT_BYTES) for _ in range(self.plan.experts.host.num_slots)]
        self.find_experts(fail, own)
        buffers = replace(buffers, expert_slots=own, host_experts=host)
        return wrap(device, self.runner, self.parts, buffers, self.disk, self.runner.experts)

    async def close(self):
        await self.watched.close()
        await self.watched.close()  # contract: may be called twice
        if self.disk is not None:
            self.disk.close()
        for memory in self.memory:
            memory.close()

    async def serve(self, observe=lambda span: None):
        """The whole workload; the spans of it."""
        spans = []
        executor = Executor(Checked(Scheduler(self.plan)), self.watched, [spans.append, observe])
        for arrival in ARRIVALS:
            executor.post(RequestAdded(*arrival))
        executor.post(Shutdown())
        async with asyncio.timeout(60):
            await executor.run()
        return spans


@pytest.fixture
def run(virtual):
    """Run a coroutine function on the loop that a kind of backend needs."""
    return lambda kind, main: virtual(main) if kind.startswith("sim") else asyncio.run(main())


def only_error(error):
    """The one error of a run, out of its groups."""
    while isinstance(error, BaseExceptionGroup):
        assert len(error.exceptions) == 1, error.exceptions
        error = error.exceptions[0]
    return error


def read_of(kind):
    """A read of part 1 into what reads fill: slot 0, or staging behind a link."""
    where = {"staging": 0} if kind in HAS_COPY else {"slot": 0}
    return Task(0, Op.READ, DISK, 0, payload=Load(1, 0, PART_BYTES, **where))


def served(run, kind, tmp_path, **settings):
    """A rig that has served all its requests, and the spans of its tasks."""

    async def main():
        rig = Rig(kind, tmp_path, **settings)
        try:
            return rig, await rig.serve()
        finally:
            await rig.close()

    return run(kind, main)


def embed(task_id, resource=COMPUTE):
    return Task(task_id, Op.EMBED, resource, 0, item=WorkItem(0, (0,), (0,), (1,)))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_has_no_race_and_the_right_bytes_in_every_slot(kind, split, run, tmp_path):
    rig, spans = served(run, kind, tmp_path, split=split)
    assert find_races(spans, tolerance_s=1e-6) == []
    absent = {Op.LAYER, *ON_DEMAND} if split else {*SPLIT, *ON_DEMAND}
    absent |= set() if kind in HAS_COPY else {Op.COPY, *CROSSING}
    assert {span.task.op for span in spans} == set(Op) - absent
    assert not rig.watched.early
    if rig.runner is not None:
        assert rig.runner.wrong == []
        assert rig.runner.num_slot_checks > 2 * NUM_PARTS
    for resource in rig.watched.resources:
        if resource.in_order:
            issued = [task.id for task, _ in rig.watched.issued if task.resource == resource.name]
            ended = [(task.id, done.result()) for task, done in rig.watched.ended if task.resource == resource.name]
            assert [task_id for task_id, _ in ended] == issued
            stops = [completion.stop_s for _, completion in ended]
            assert stops == sorted(stops)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_on_demand_are_in_their_slots_when_they_are_computed(kind, run, tmp_path):
    rig, spans = served(run, kind, tmp_path, routed=True)
    assert find_races(spans, tolerance_s=1e-6) == []
    absent = set() if kind in HAS_COPY else {Op.COPY_EXPERT}
    assert {span.task.op for span in spans} >= {*ON_DEMAND, Op.LAYER} - absent
    assert not rig.watched.early
    if rig.runner is not None:
        assert rig.runner.wrong == []
        assert rig.runner.num_slot_checks > 2 * NUM_EXPERTS


@pytest.mark.parametrize("seed", range(6))
def test_streams_out_of_step_keep_every_order(seed, run, tmp_path):
    async def main():
        slow = {"pace_s" if seed % 2 else "copy_pace_s": 1e-3}  # either the copies lag behind, or the layers do
        rig = Rig("cuda", tmp_path, device=FakeDevice(seed, **slow), split=seed > 3)
        try:
            return rig, await rig.serve()
        finally:
            await rig.close()

    rig, spans = run("cuda", main)
    assert find_races(spans, tolerance_s=1e-6) == []
    assert rig.runner.wrong == []


@pytest.mark.parametrize("pace", ["pace_s", "copy_pace_s"])
def test_a_missing_wait_between_streams_is_caught(pace, run, tmp_path):
    class Careless(StreamBackend):
        def _fill(self, launch, stream):
            launch.after, kept = (), launch.after
            super()._fill(launch, stream)
            launch.after = kept

    async def main():
        rig = Rig("cuda", tmp_path, device=FakeDevice(**{pace: 2e-3}), wrap=Careless)
        try:
            return rig, await rig.serve()
        finally:
            await rig.close()

    rig, spans = run("cuda", main)
    assert any("does not hold part" in line for line in rig.runner.wrong)
    assert find_races(spans, tolerance_s=1e-6)


@pytest.mark.parametrize(("kind", "op"), FAULTS)
def test_a_failing_task_is_one_error_after_everything_has_settled(kind, op, run, tmp_path):
    async def main():
        rig = Rig(kind, tmp_path, fail=(op, 2 if op is not Op.READ else 1))
        try:
            with pytest.raises((OSError, ReadError, BaseExceptionGroup)) as caught:
                await rig.serve()
            assert all(future.done() for _, future in rig.watched.issued)
            assert not rig.watched.early
        finally:
            await rig.close()
        return rig, only_error(caught.value)

    rig, error = run(kind, main)
    assert isinstance(error, OSError | ReadError)
    assert any(note.startswith("while running") for note in error.__notes__)
    errors = {id(future.exception()) for _, future in rig.watched.issued if future.exception()}
    assert errors == {id(error)}
    if rig.runner is not None:
        assert rig.runner.wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_issued_behind_a_failed_task_fails_with_it_and_does_not_run(kind, run, tmp_path):
    async def main():
        rig = Rig(kind, tmp_path, fail=(Op.EMBED, 2))
        try:
            futures = [rig.watched.issue(embed(i), (i - 1,) if i else ()) for i in range(4)]
            return rig, await asyncio.gather(*futures, return_exceptions=True)
        finally:
            await rig.close()

    rig, (first, second, *behind) = run(kind, main)
    assert first.stop_s >= first.start_s
    assert isinstance(second, OSError)
    assert all(error is second for error in behind)
    if rig.runner is not None:
        assert rig.runner.started == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_spans", [0, 1, 7, 40])
def test_cancelling_the_executor_settles_what_was_issued(kind, num_spans, run, tmp_path):
    async def main():
        rig = Rig(kind, tmp_path)
        seen, reached = itertools.count(1), asyncio.Event()
        if not num_spans:
            reached.set()
        try:
            serving = asyncio.create_task(rig.serve(lambda span: next(seen) == num_spans and reached.set()))
            serving.add_done_callback(lambda _: reached.set())  # a run that fails must not leave the test waiting
            await reached.wait()
            await asyncio.sleep(0)
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
            assert all(future.done() for _, future in rig.watched.issued)
        finally:
            await rig.close()
        return rig

    rig = run(kind, main)
    assert not rig.watched.early
    assert not rig.runner or not rig.runner.wrong


@pytest.mark.parametrize("kind", KINDS)
def test_close_settles_what_is_in_flight(kind, run, tmp_path):
    async def main():
        rig = Rig(kind, tmp_path)
        read = read_of(kind)
        try:
            futures = [rig.watched.issue(task) for task in (read, embed(1), embed(2))]
        finally:
            await rig.close()
        assert [future.done() and future.exception() for future in futures] == [None] * 3

    run(kind, main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_that_resolved_is_in_its_buffer(kind, run, tmp_path):
    async def main():
        rig = Rig(kind, tmp_path, device=FakeDevice(copy_pace_s=5e-3))
        try:
            await rig.watched.issue(read_of(kind))
            if kind in HAS_COPY:
                copy = Load(1, 0, PART_BYTES, slot=0, staging=0)
                await rig.watched.issue(Task(1, Op.COPY, H2D, 0, payload=copy))
            if rig.runner is not None:
                at, content = rig.expected[1]
                assert torch.equal(rig.runner.slots[0][at : at + PART_BYTES], content)
        finally:
            await rig.close()

    run(kind, main)
