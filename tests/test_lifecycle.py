"""Opening, closing and ending under faults and cancellation: nothing is left, every stream hears of it."""

import asyncio
import gc
import os
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest

from aspec.backends.cpu import CpuBackend
from aspec.backends.event_lane import EventLane
from aspec.backends.streams import StreamBackend
from aspec.backends.thread_lane import ThreadLane
from aspec.engine import allocate as assembly
from aspec.engine import engine, streams
from aspec.engine import load as loading
from aspec.engine.engine import open_engine
from aspec.engine.model_runner import ModelRunner
from aspec.errors import ClosedError, DeviceError, InternalError, NumericError, PromptError, ReadError, UserError
from aspec.generation.params import SamplingParams
from aspec.generation.stats import RequestStats
from aspec.generation.text.time_limit import TimeLimit, TimeLimitError
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io import disk
from aspec.io.disk import DiskLane
from aspec.io.loop.mailbox import LoopMailbox
from aspec.io.memory import PAGE, SlotMemory, allocate, freeze
from aspec.models.model import Model
from aspec.tasks.experts.prefetch import ExpertCounts
from aspec.tasks.rows import RowTable
from aspec.tasks.task import Completion, Op, RequestAdded
from tests import tiny
from tests.fake_device import EagerDevice
from tests.simulate import make_plan
from tests.test_disk import Seg

SMALL = dict(max_context=96, prefill_tokens=32, device_memory=3 << 20, resident_memory=0, threads=1, max_batch=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("lifecycle") / "target", "llama")
    return target, tiny.noisy_copy(target, target.parent / "draft", 0.1)


@pytest.fixture
def arenas(monkeypatch):
    """All memory for weights that is alive."""
    alive = weakref.WeakSet()
    real = SlotMemory.__init__

    def made(self, nbytes):
        real(self, nbytes)
        alive.add(self)

    monkeypatch.setattr(SlotMemory, "__init__", made)
    return alive


def open_files():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_file(fd))


def _is_file(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors")
    except OSError:
        return False


async def check_nothing_left(arenas):
    for _ in range(200):  # a thread of the loop's pool lets go of what it raised a moment after it told the loop
        gc.collect()
        if all(memory._map.closed for memory in arenas):
            break
        await asyncio.sleep(0.01)
    assert open_files() == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("aspec")] == []
    assert [memory for memory in arenas if not memory._map.closed] == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def drain(stream):
    return [piece async for piece in stream]


async def collect(opened, prompt, **params):
    pieces = [piece async for piece in opened.stream(prompt, SamplingParams(**{"ignore_eos": True, **params}))]
    return [token for piece in pieces for token in piece.token_ids]


# -- closing -----------------------------------------------------------------------------------------------------


async def test_closing_ends_every_stream_with_one_error_and_refuses_new_ones(pair):
    async with open_engine(target=pair[0], link_rate=300e3, **SMALL) as opened:
        streams = [opened.stream([7 + i, 8, 9], SamplingParams(max_new_tokens=60, ignore_eos=True)) for i in range(3)]
        first = await anext(streams[0])
        assert first.token_ids
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams[1:]]
        await asyncio.sleep(0)
    async with asyncio.timeout(30):
        for one in (drain(streams[0]), *waiting):
            with pytest.raises(ClosedError, match="closed"):
                await one
        with pytest.raises(StopAsyncIteration):
            await anext(streams[0])
        with pytest.raises(ClosedError, match="closed"):
            await collect(opened, [1, 2], max_new_tokens=2)


async def test_a_run_that_is_cancelled_ends_every_stream(pair):
    async with open_engine(target=pair[0], link_rate=300e3, **SMALL) as opened:
        task = asyncio.ensure_future(collect(opened, [7, 8, 9], max_new_tokens=60))
        await asyncio.sleep(0.1)
        opened._running.cancel()
        async with asyncio.timeout(30):
            with pytest.raises(ClosedError, match="cancelled"):
                await task
            with pytest.raises(ClosedError, match="cancelled"):
                await collect(opened, [1, 2], max_new_tokens=2)


async def test_an_engine_that_is_not_open_says_so(pair):
    opened = open_engine(target=pair[0], **SMALL)
    with pytest.raises(UserError, match="not open"):
        await collect(opened, [1], max_new_tokens=1)


# -- faults and cancels while it opens and closes ----------------------------------------------------------------


def injected(*args, **kwargs):
    raise OSError("injected fault")


def second_time(real):
    """Works once, then fails."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs) if len(calls) == 1 else injected()

    return call


OPENING = {
    "assemble": lambda patch: patch.setattr(engine, "assemble", injected),
    "second arena": lambda patch: patch.setattr(assembly, "allocate", second_time(assembly.allocate)),
    "caches": lambda patch: patch.setattr(assembly, "KVCache", injected),
    "disk lane": lambda patch: patch.setattr(engine, "DiskLane", injected),
    "second bounce buffer": lambda patch: patch.setattr(disk, "allocate", second_time(disk.allocate)),
    "second thread of the disk": lambda patch: patch.setattr(
        threading.Thread, "start", second_time(threading.Thread.start)
    ),
    "read": lambda patch: patch.setattr(disk, "transfer", second_time(disk.transfer)),
    "bind": lambda patch: patch.setattr(loading, "bind_load", second_time(loading.bind_load)),
    "backend": lambda patch: patch.setattr(assembly, "CpuBackend", injected),
    "second lane": lambda patch: patch.setattr("aspec.backends.cpu.ThreadLane", second_time(ThreadLane)),
    "scheduler": lambda patch: patch.setattr(engine, "Scheduler", injected),
    "executor": lambda patch: patch.setattr(engine, "Executor", injected),
}


@pytest.mark.parametrize("point", OPENING)
async def test_a_fault_while_it_opens_leaves_nothing(pair, point, monkeypatch, arenas):
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, int)  # a thread of the loop's pool is there
    with monkeypatch.context() as patch:
        OPENING[point](patch)
        with pytest.raises(OSError, match="injected fault"):
            async with open_engine(target=pair[0], draft=pair[1], **SMALL):
                pytest.fail("it opened")
    await check_nothing_left(arenas)


def blocking(real, reached, go_on):
    def call(*args, **kwargs):
        reached.set()
        assert go_on.wait(30)
        return real(*args, **kwargs)

    return call


CANCELLED = {
    "assemble": (engine, "assemble"),
    "read": (disk, "transfer"),
    "bind": (loading, "bind_load"),
}


@pytest.mark.parametrize("point", CANCELLED)
async def test_a_cancel_while_it_opens_waits_for_what_runs_and_leaves_nothing(pair, point, monkeypatch, arenas):
    reached, go_on = threading.Event(), threading.Event()
    where, name = CANCELLED[point]
    monkeypatch.setattr(where, name, blocking(getattr(where, name), reached, go_on))

    async def main():
        async with open_engine(target=pair[0], draft=pair[1], **SMALL):
            pytest.fail("it opened")

    task = asyncio.ensure_future(main())
    await asyncio.to_thread(reached.wait, 30)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done(), "a thread still runs"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await check_nothing_left(arenas)


CLOSING = {
    "lane": lambda patch: patch.setattr(ThreadLane, "close", failing_after(ThreadLane.close)),
    "disk": lambda patch: patch.setattr(DiskLane, "close", failing_after(DiskLane.close)),
    "backend": lambda patch: patch.setattr(CpuBackend, "close", failing_later(CpuBackend.close)),
    "forget": lambda patch: patch.setattr(Model, "forget", failing_after(Model.forget)),
}


def failing_after(real):
    def call(*args):
        real(*args)
        injected()

    return call


def failing_later(real):
    async def call(*args):
        await real(*args)
        injected()

    return call


@pytest.mark.parametrize("point", CLOSING)
async def test_a_fault_while_it_closes_keeps_nothing_else_from_closing(pair, point, monkeypatch, arenas):
    async def main():
        async with open_engine(target=pair[0], draft=pair[1], **SMALL) as opened:
            await collect(opened, [1, 2, 3], max_new_tokens=2)
            CLOSING[point](monkeypatch)

    with pytest.raises(OSError, match="injected fault"):
        await main()
    await check_nothing_left(arenas)


async def test_a_cancel_while_it_closes_releases_everything_and_is_raised(pair, monkeypatch, arenas):
    reached, go_on = threading.Event(), threading.Event()
    real = ModelRunner.run

    def run(self, task):
        if task.op is Op.HEAD:
            reached.set()
            assert go_on.wait(30)
        return real(self, task)

    monkeypatch.setattr(ModelRunner, "run", run)

    async def main():
        async with open_engine(target=pair[0], draft=pair[1], **SMALL) as opened:
            stream = asyncio.ensure_future(collect(opened, [1, 2, 3], max_new_tokens=2))
            await asyncio.to_thread(reached.wait, 30)
        return stream

    task = asyncio.ensure_future(main())
    await asyncio.to_thread(reached.wait, 30)
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done(), "what was issued is settled first"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)
    del task
    await check_nothing_left(arenas)


# -- loading by way of a device ------------------------------------------------------------------------------------


class Card(EagerDevice):
    """Refuses its second host buffer, if told to; counts those that are not free."""

    def __init__(self, refuse=None):
        super().__init__()
        self.asked, self.refuse = 0, refuse

    def allocate_host(self, nbytes):
        self.asked += 1
        if self.asked == self.refuse:
            raise DeviceError("no memory left")
        return super().allocate_host(nbytes)


async def test_a_window_that_cannot_be_had_frees_those_that_were(tmp_path):
    device, lane = Card(refuse=2), DiskLane(asyncio.get_running_loop())
    with pytest.raises(DeviceError, match="no memory left"):
        await loading.load_all([], lane, device, lambda nbytes: None)
    assert not device.host._buffers
    lane.close()
    device.free()


# -- lanes -----------------------------------------------------------------------------------------------------------


def test_results_outlive_their_loop():
    """A result that comes when the loop has closed is there when the lane has."""
    loop = asyncio.new_event_loop()
    go_on = threading.Event()

    def work():
        assert go_on.wait(30)
        return Completion(1.0, 2.0)

    async def submit():
        made = ThreadLane("test", loop)
        waits = EventLane("test-wait", loop)
        futures = [made.submit(work), loop.create_future()]
        waits.wait(None, lambda error: work(), futures[1])
        return made, waits, futures

    made, waits, futures = loop.run_until_complete(submit())
    loop.close()
    go_on.set()
    made.close()
    waits.close()
    assert [future.result() for future in futures] == [Completion(1.0, 2.0)] * 2


async def test_the_mailbox_wakes_the_loop_once_for_a_burst():
    loop = asyncio.get_running_loop()
    mailbox, calls, real = LoopMailbox(loop), [], loop.call_soon_threadsafe
    futures = [loop.create_future() for _ in range(5)]
    loop.call_soon_threadsafe = lambda *args: (calls.append(args), real(*args))
    futures[1].cancel()
    for i, future in enumerate(futures):
        mailbox.post(future, ValueError("odd") if i % 2 else i)
    del loop.call_soon_threadsafe
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(result) for result in results] == [int, asyncio.CancelledError, int, ValueError, int]
    assert len(calls) == 1


async def test_closing_a_disk_lane_fails_what_was_not_read(tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(bytes(64 * PAGE))
    reached, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(disk, "transfer", blocking(disk.transfer, reached, go_on))
    made = DiskLane(asyncio.get_running_loop(), num_threads=1, chunk_bytes=PAGE)
    memory = allocate(64 * PAGE)
    reads = [made.read([Seg(str(tmp_path / "blob"), 0, 64 * PAGE, 0)], memory.view) for _ in range(2)]
    await asyncio.to_thread(reached.wait, 30)
    threading.Timer(0.05, go_on.set).start()
    made.close()
    async with asyncio.timeout(30):
        for read in reads:
            with pytest.raises(ReadError, match="closed"):
                await read
    with pytest.raises(InternalError, match="closed"):
        made.read([], memory.view)
    memory.close()


async def test_a_thread_that_is_stuck_keeps_the_others_from_nothing(tmp_path, monkeypatch):
    (tmp_path / "blob.safetensors").write_bytes(bytes(64 * PAGE))
    reached, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(disk, "transfer", blocking(disk.transfer, reached, go_on))
    monkeypatch.setattr(disk, "LONGEST_JOIN_S", 0.1)
    made = DiskLane(asyncio.get_running_loop(), num_threads=3)
    memory = allocate(64 * PAGE)
    read = made.read([Seg(str(tmp_path / "blob.safetensors"), 0, 64 * PAGE, 0)], memory.view)
    await asyncio.to_thread(reached.wait, 30)
    with pytest.raises(DeviceError, match="did not answer"):
        made.close()
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("aspec-disk")]) == 1
    go_on.set()
    await read
    made.close()
    assert open_files() == [], "the thread that was stuck has closed what it read"
    memory.close()


async def test_an_abandoned_read_skips_what_has_not_begun(tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(bytes(64 * PAGE))
    done, real = [], disk.transfer
    reached, go_on = threading.Event(), threading.Event()
    slow = blocking(real, reached, go_on)
    monkeypatch.setattr(disk, "transfer", lambda *args: (done.append(args), slow(*args)))
    made = DiskLane(asyncio.get_running_loop(), num_threads=1, chunk_bytes=PAGE)
    memory = allocate(64 * PAGE)
    read = made.read([Seg(str(tmp_path / "blob"), 0, 64 * PAGE, 0)], memory.view)
    await asyncio.to_thread(reached.wait, 30)
    made.abandon(read)
    go_on.set()
    with pytest.raises(ReadError, match="abandoned"):
        await read
    assert len(done) == 1
    made.close()
    memory.close()


@pytest.mark.parametrize("kind", [CpuBackend, StreamBackend])
async def test_a_lane_that_does_not_close_keeps_no_other_from_it(kind, monkeypatch):
    device = EagerDevice()
    made = CpuBackend(None, {}, [], None) if kind is CpuBackend else StreamBackend(device, None, {}, None, None)
    monkeypatch.setattr(ThreadLane, "close", failing_after(ThreadLane.close))
    with pytest.raises(OSError, match="injected fault"):
        await made.close()
    device.free()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("aspec")] == []


# -- sequences that are left before they have a row ------------------------------------------------------------------


def test_seats_tell_those_that_will_not_get_a_row():
    seats = RowTable(num_rows=1)
    for sequence in range(3):
        seats.add(RequestAdded(sequence, 4, 4))
    seats.assign_rows()
    assert seats.cancel(0) == [], "it sits in a row"
    assert seats.cancel(2) == [2]
    assert seats.cancel() == [1]


async def test_a_sequence_that_is_left_before_it_has_a_row_is_forgotten(pair):
    async with open_engine(target=pair[0], **SMALL) as opened:
        runner = opened._open.runner
        for seed in range(3):
            stream = opened.stream([5, 6, seed], SamplingParams(max_new_tokens=4))
            task = asyncio.ensure_future(anext(stream))
            while not runner._sequences:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await collect(opened, [1, 2, 3], max_new_tokens=2)
        assert not runner._sequences


# -- a row whose logits are not numbers ------------------------------------------------------------------------------

SHAPES = {"off": {}, "chain": {"num_draft_tokens": 3}, "tree": {"speculation": "tree", "num_draft_tokens": 8}}


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_bad_row_fails_alone(pair, shape, params, monkeypatch):
    draft = None if shape == "off" else pair[1]
    asked = {"max_new_tokens": 20, **params}
    good, bad = [7, 8, 9], [30, 31, 32]
    async with open_engine(target=pair[0], draft=draft, dtype="float32", **SHAPES[shape], **SMALL) as opened:
        plain = [await collect(opened, prompt, **asked) for prompt in (good, bad)]
        real = Model.head

        def head(self, activation, last):
            logits = real(self, activation, last)
            for place, row in enumerate(activation.step._rows.tolist() if self is opened._open.target else []):
                sequence = opened._open.runner.sequence_in(row)
                if sequence.tokens[:3] == bad and sequence.num_new >= 4:
                    logits[place] = float("nan")
                    activation.step.storage.values[0][row] = float("nan")  # as an overflow does
            return logits

        with monkeypatch.context() as patch:
            patch.setattr(Model, "head", head)
            begun, pieces = asyncio.ensure_future(collect(opened, good, **asked)), []
            stream = opened.stream(bad, SamplingParams(ignore_eos=True, **asked))

            async def hear(stream=stream, pieces=pieces):
                async for piece in stream:
                    assert piece.finish_reason is None
                    pieces += piece.token_ids

            with pytest.raises(NumericError, match="finite number"):
                await hear()
            assert len(pieces) >= 4
            assert pieces == plain[1][: len(pieces)]
            assert await begun == plain[0]
        again = await asyncio.gather(*(collect(opened, prompt, **asked) for prompt in (bad, good)))
        assert again == [plain[1], plain[0]], "what it left in its row spoils nothing"


async def test_a_bad_request_is_an_answer_of_its_own(pair, monkeypatch):
    """What a batch file gets: an error for that row."""
    from aspec.serving.dispatch import PreparedRequest, answer
    from aspec.serving.openai_requests import COMPLETION, Request
    from aspec.serving.refusals import Refusal

    real = Model.head
    monkeypatch.setattr(Model, "head", lambda self, *args: real(self, *args) * float("nan"))
    async with open_engine(target=pair[0], **SMALL) as opened:
        one = PreparedRequest("1", Request(COMPLETION, "x", {}), [1, 2], SamplingParams(max_new_tokens=3))
        outcome = await answer(opened, one, asyncio.get_running_loop().create_future())
    assert isinstance(outcome, NumericError)
    assert Refusal.of(outcome).code == "numeric_error"


# -- observers -------------------------------------------------------------------------------------------------------


async def test_an_observer_that_raises_is_dropped_and_the_run_goes_on(pair):
    heard, calls = [], []

    def bad(*args):
        calls.append(args)
        raise ValueError("no reason")

    opened = engine.Engine(engine.EngineOptions(target=pair[0], **SMALL), [bad, heard.append], [bad])
    with pytest.warns(RuntimeWarning, match=r"observer .*bad raised ValueError: no reason") as caught:
        async with opened:
            assert len(await collect(opened, [1, 2, 3], max_new_tokens=4)) == 4
    assert len(calls) == len([one for one in caught if "observer" in str(one.message)]) == 2, "once as each observer"
    assert heard


async def test_the_engines_own_bookkeeping_is_not_dropped(pair, monkeypatch):
    monkeypatch.setattr("aspec.engine.streams.Streams.observe", injected)
    async with open_engine(target=pair[0], **SMALL) as opened:
        with pytest.raises(OSError, match="injected fault"):
            await collect(opened, [1, 2, 3], max_new_tokens=4)


# -- prompts ---------------------------------------------------------------------------------------------------------

ENDLESS = "{% for x in range(99999) %}{% for y in range(99999) %}{% set z = x %}{% endfor %}{% endfor %}"
CHAT = [{"role": "user", "content": "a"}]


async def test_prompts_become_tokens_and_weights_are_bound_beside_the_loop(pair, monkeypatch):
    threads = set()

    def noting(real):
        def call(*args, **kwargs):
            threads.add(threading.current_thread())
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(Tokenizer, "encode", noting(Tokenizer.encode))
    monkeypatch.setattr(loading, "bind_load", noting(loading.bind_load))
    async with open_engine(target=pair[0], **SMALL) as opened:
        await collect(opened, "a b", max_new_tokens=1)
    assert threads
    assert threading.current_thread() not in threads


async def test_a_template_that_does_not_end_is_an_error_and_the_engine_lives_on(pair, monkeypatch):
    monkeypatch.setattr(engine, "TEMPLATE_S", 0.2)
    async with open_engine(target=pair[0], **SMALL) as opened:
        opened.tokenizer._inner.chat_template = ENDLESS
        stream = asyncio.ensure_future(collect(opened, CHAT, max_new_tokens=1))
        assert await collect(opened, [1, 2], max_new_tokens=1), "beside it"
        with pytest.raises(PromptError, match=r"template .* did not end within 0.2 s"):
            await stream
        assert await collect(opened, [1, 2], max_new_tokens=1)


@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_a_template_is_ended_when_nothing_waits_for_it(pair, how, monkeypatch):
    monkeypatch.setattr(engine, "TEMPLATE_S", 1e6)
    async with open_engine(target=pair[0], **SMALL) as opened:
        opened.tokenizer._inner.chat_template = ENDLESS
        stream = asyncio.ensure_future(collect(opened, CHAT, max_new_tokens=1))
        await asyncio.sleep(0.05)
        if how == "cancelled":
            stream.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stream
    if how == "closed":
        with pytest.raises(ClosedError):
            await stream


def endless():
    while True:
        len("")


def test_a_time_limit_ends_python_code_and_nothing_else():
    before = sys.gettrace()
    with pytest.raises(TimeLimitError), TimeLimit(0.01):
        endless()
    limit = TimeLimit(1e6)
    limit.stop()
    with pytest.raises(TimeLimitError), limit:
        endless()
    with TimeLimit(1e6):
        assert sum(abs(i) for i in range(1000)) == 499500
    assert sys.gettrace() is before


class _Nobody:
    """A runner and a scheduler that have nothing to do."""

    expert_counts = ExpertCounts()

    def take_dropped(self):
        return []

    def sequences_in_rows(self):
        return []

    def admit(self, sequence):
        pass


async def test_streams_that_begin_together_share_the_first_pass_in_the_order_of_their_calls(monkeypatch):
    monkeypatch.setattr(streams, "GATHER_S", 1e6)
    posted = []
    opened = streams.Streams(make_plan(num_rows=3), _Nobody(), _Nobody(), posted.append, reuse=True)

    def sequence(number):
        return SimpleNamespace(id=number, num_prompt=4, max_new_tokens=2, tokens=[1, 2, 3, 4], scored=False)

    with opened.encoding():
        with opened.encoding():
            opened.open(sequence(2), RequestStats())
            assert posted == [], "two others are about to begin"
        opened.open(sequence(1), RequestStats())
        assert posted == []
    opened.open(sequence(0), RequestStats())
    assert [event.sequence for event in posted] == [1, 2, 0], "nobody waits once nobody comes"
    with opened.encoding():
        opened.open(sequence(3), RequestStats())
        opened.close(0)
    assert posted[-1].sequence == 3, "where rows are at work nobody is waited for"


async def test_a_prompt_that_takes_long_to_become_tokens_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(streams, "GATHER_S", 0.0)
    posted = []
    opened = streams.Streams(make_plan(), _Nobody(), _Nobody(), posted.append, reuse=True)
    one = SimpleNamespace(id=0, num_prompt=4, max_new_tokens=2, tokens=[1, 2], scored=False)
    with opened.encoding():
        opened.open(one, RequestStats())
        while not posted:
            await asyncio.sleep(0)


# -- garbage collections ---------------------------------------------------------------------------------------


@pytest.fixture
def thawed(monkeypatch):
    """Nothing is frozen, as in an ordinary process."""
    monkeypatch.setattr(engine, "freeze", freeze)
    gc.unfreeze()
    yield
    gc.freeze()


async def test_what_an_open_engine_needs_is_kept_out_of_collections(pair, thawed):
    async with open_engine(target=pair[0], **SMALL):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


async def test_what_an_application_has_frozen_stays_frozen(pair, thawed):
    gc.freeze()
    async with open_engine(target=pair[0], **SMALL):
        pass
    assert gc.get_freeze_count() > 0
