"""The CUDA backend beyond the contract: events, poison across streams, pinned memory; and a real device if any."""

import asyncio
import threading
import time
import warnings

import pytest
import torch

from aspec.backends.cuda import TorchDevice
from aspec.backends.event_lane import EventLane
from aspec.errors import DeviceError, InternalError
from aspec.io.pinned import PinnedMemory
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.task import COMPUTE, DRAFT_COMPUTE, H2D, Completion, LayerWork, Load, Task
from tests.fake_device import FakeDevice, FakeEvent, Mark
from tests.test_backend_contract import PART_BYTES, Rig, embed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def conclude(value):
    return lambda error: error or Completion(value, value)


async def test_events_resolve_in_order_with_few_wakeups():
    lane, marks, futures = EventLane("test", asyncio.get_running_loop()), [], []
    for i in range(500):
        event = FakeEvent()
        event.mark = Mark()
        marks.append(event.mark)
        futures.append(asyncio.get_running_loop().create_future())
        lane.wait(event, conclude(i), futures[-1])
    order = []
    for future in futures:
        future.add_done_callback(lambda done: order.append(done.result().start_s))
    await asyncio.sleep(0.01)
    assert not any(future.done() for future in futures)
    for mark in marks:
        mark.done.set()
    await asyncio.gather(*futures)
    assert order == list(range(500))
    lane.close()


async def test_an_event_lane_waits_on_after_an_error():
    lane, loop = EventLane("test", asyncio.get_running_loop()), asyncio.get_running_loop()
    events = [FakeEvent(), FakeEvent()]
    for event in events:
        event.mark = Mark()
    failed, later, bare = (loop.create_future() for _ in range(3))
    lane.wait(events[0], conclude(0), failed)
    lane.wait(events[1], conclude(1), later)
    lane.wait(None, conclude(2), bare)
    events[0].mark.error = OSError("device")
    events[0].mark.done.set()
    with pytest.raises(OSError, match="device"):
        await failed
    await asyncio.sleep(0.01)
    assert not later.done()
    assert not bare.done()
    events[1].mark.done.set()
    assert (await later, await bare) == (Completion(1, 1), Completion(2, 2))
    lane.close()


async def test_an_event_lane_that_cannot_end_says_so():
    lane, event = EventLane("test", asyncio.get_running_loop()), FakeEvent()
    event.mark = Mark()
    lane.wait(event, conclude(0), asyncio.get_running_loop().create_future())
    with pytest.raises(DeviceError, match="did not complete within"):
        lane.close(timeout_s=0.05)
    event.mark.done.set()
    lane.close()


async def test_few_events_serve_a_whole_run(tmp_path):
    rig = Rig("cuda", tmp_path)
    try:
        spans = await rig.serve()
    finally:
        await rig.close()
    assert len(spans) > 60
    assert rig.device.num_events < 40


async def test_an_event_is_not_used_again_while_a_task_behind_it_is_under_way(tmp_path):
    rig = Rig("cuda", tmp_path)
    gate, run = threading.Event(), rig.runner.run

    def held(task):
        if task.id == 1:
            gate.wait(10)
        return run(task)

    rig.runner.run = held
    try:
        first = rig.watched.issue(embed(0, DRAFT_COMPUTE))
        second = rig.watched.issue(embed(1), (0,))
        await first
        await rig.watched.issue(embed(2, DRAFT_COMPUTE))
        assert rig.device.num_events == 6  # two each: those of task 0 are still held by task 1
        await rig.watched.issue(embed(3, DRAFT_COMPUTE))
        assert rig.device.num_events == 6  # those of task 2 are free
        gate.set()
        await second
        for task_id in range(4, 8):
            await rig.watched.issue(embed(task_id))
        assert rig.device.num_events == 6
    finally:
        gate.set()
        await rig.close()


@pytest.mark.parametrize("seed", range(3))
async def test_a_fault_on_the_device_fails_what_is_behind_it_on_every_stream(seed, tmp_path):
    rig = Rig("cuda", tmp_path, device=FakeDevice(seed))
    check = rig.runner.check

    def broken(task):
        if task.id == 1:
            raise OSError("the device fell over")
        check(task)

    rig.runner.check = broken
    try:
        chain = [(COMPUTE, ()), (COMPUTE, (0,)), (DRAFT_COMPUTE, (1,)), (COMPUTE, (2,))]
        futures = [rig.watched.issue(embed(i, resource), after) for i, (resource, after) in enumerate(chain)]
        first, *rest = await asyncio.gather(*futures, return_exceptions=True)
    finally:
        await rig.close()
    assert isinstance(first, Completion)
    assert len({id(error) for error in rest}) == 1
    assert isinstance(rest[0], OSError)
    assert rig.runner.ended == {0}


async def test_a_task_launched_before_a_failing_one_still_succeeds(tmp_path):
    rig = Rig("cuda", tmp_path, fail=(Op.EMBED, 2), device=FakeDevice(pace_s=0.02))
    try:
        slow, failing = rig.watched.issue(embed(0, DRAFT_COMPUTE)), None
        while not rig.runner.started:
            await asyncio.sleep(0.001)
        failing = rig.watched.issue(embed(1))
        results = await asyncio.gather(slow, failing, return_exceptions=True)
        behind = await asyncio.gather(rig.watched.issue(embed(2, DRAFT_COMPUTE)), return_exceptions=True)
    finally:
        await rig.close()
    assert isinstance(results[0], Completion)
    assert isinstance(results[1], OSError)
    assert behind == [results[1]]
    assert rig.runner.started == {0, 1}


async def test_a_task_that_fails_after_launching_ends_when_its_launches_have(tmp_path):
    rig = Rig("cuda", tmp_path)
    ended = []

    def half(task):
        rig.device.launch(lambda: time.sleep(0.03), lambda: ended.append(task.id))
        raise OSError("half way")

    rig.runner.run = half
    try:
        with pytest.raises(OSError, match="half way"):
            await rig.watched.issue(embed(0))
        assert ended == [0]
    finally:
        await rig.close()


async def test_a_launcher_waits_until_the_event_it_needs_is_recorded(tmp_path):
    """An unrecorded event counts as complete: to wait for it on the device alone would be a race."""
    rig = Rig("cuda", tmp_path)
    gate, run = threading.Event(), rig.runner.run

    def held(task):
        if task.id == 0:
            gate.wait(10)
        return run(task)

    rig.runner.run = held
    try:
        first = rig.watched.issue(embed(0, DRAFT_COMPUTE))
        second = rig.watched.issue(embed(1), (0,))
        await asyncio.sleep(0.02)
        assert rig.runner.started == set()
        gate.set()
        before, after = await first, await second
        assert before.stop_s <= after.start_s
    finally:
        gate.set()
        await rig.close()


async def test_nothing_is_issued_after_close(tmp_path):
    rig = Rig("cuda", tmp_path)
    await rig.close()
    with pytest.raises(InternalError, match="closed"):
        rig.watched.issue(embed(0))


async def test_host_parts_are_copied_without_staging(tmp_path):
    rig = Rig("cuda", tmp_path)
    try:
        await rig.watched.issue(Task(0, Op.COPY, H2D, 0, payload=Load(2, 1, PART_BYTES, slot=1)))
        rig.runner.check(Task(1, Op.LAYER, COMPUTE, 0, payload=LayerWork(1, ((2, 1),))))
        assert rig.runner.wrong == []
    finally:
        await rig.close()


def test_memory_that_cannot_be_pinned_is_used_with_one_warning():
    memory = PinnedMemory(lambda address, nbytes: False, lambda address: pytest.fail("was never pinned"))
    with pytest.warns(RuntimeWarning, match="pageable") as caught:
        buffers = [memory.allocate(5000) for _ in range(3)]
    assert len(caught) == 1
    assert not any(buffer.pinned for buffer in buffers)
    buffers[0].view[:3] = b"abc"
    assert bytes(buffers[0].tensor[:3].numpy()) == b"abc"
    del buffers
    memory.close()


def test_pinned_memory_is_bounded_exact_and_given_back():
    pinned = {}
    memory = PinnedMemory(lambda a, n: pinned.update({a: n}) is None, pinned.pop, limit_bytes=3 * 8192)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffers = [memory.allocate(5000) for _ in range(3)]
    assert set(pinned.values()) == {8192}
    assert memory.pinned_bytes == 3 * 8192
    with pytest.warns(RuntimeWarning, match="limit"):
        assert not memory.allocate(1).pinned
    del buffers
    memory.close()
    memory.close()
    assert not pinned


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_the_error_says_what_to_do():
    with pytest.raises(DeviceError, match="CUDA build"):
        TorchDevice()


class OnTorch(TorchDevice):
    """The real device under the stub runner: it checks slots on the host, after its stream has caught up."""

    def launch(self, *steps):
        torch.cuda.current_stream().synchronize()
        for step in steps:
            step()


@needs_gpu
async def test_a_whole_run_on_a_real_device(tmp_path):
    rig = Rig("cuda", tmp_path, device=OnTorch())
    rig.runner.slots = Downloads(rig.runner.slots)
    try:
        spans = await rig.serve()
    finally:
        await rig.close()
    assert rig.runner.wrong == []
    assert find_races(spans, tolerance_s=1e-4) == []


class Downloads:
    """Device slots, read on the host."""

    def __init__(self, slots):
        self.slots = slots

    def __getitem__(self, slot):
        return self.slots[slot].cpu()


@needs_gpu
def test_device_times_are_on_the_clock_of_the_host():
    device = TorchDevice()
    stream, event = device.create_stream(-1), device.create_event()
    before = time.perf_counter()
    device.record(event, stream)
    event.synchronize()
    assert before - 1e-4 <= device.seconds_of(event) <= time.perf_counter() + 1e-4
    device.free()


@needs_gpu
def test_host_buffers_are_pinned_at_their_exact_size():
    device = TorchDevice()
    buffer = device.allocate_host(3 << 20)
    assert buffer.pinned
    assert len(buffer.view) == 3 << 20
    slot = device.allocate(3 << 20)
    buffer.tensor.fill_(7)
    stream = device.create_stream(0)
    device.copy_async(slot, buffer.tensor, stream)
    stream.synchronize()
    assert int(slot.sum()) == 7 * (3 << 20)
    del buffer
    device.free()
