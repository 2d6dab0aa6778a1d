"""The whole engine behind a link: streams, staging, pinned parts, device memory; on a device without a GPU."""

import asyncio
import itertools
import json
import shutil
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from aspec.backends import registry as devices
from aspec.backends.registry import ALIGNMENT, Kind
from aspec.cli.main import app
from aspec.engine.design import design
from aspec.engine.engine import open_engine
from aspec.engine.load import windows
from aspec.errors import DeviceError
from aspec.generation import sampler as sampling
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler
from aspec.models.model import Model
from aspec.models.weights.parts import PAGE
from aspec.options import DEMO, EngineOptions
from aspec.plan import Tier, Workload
from aspec.planning import simulation
from aspec.planning.resolve import resolve
from aspec.profiling import profile_cache as cache
from aspec.profiling.hardware import Processor
from aspec.profiling.profile_cache import machine_profile
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from tests.compat import few
from tests.fake_capture import FakeCapture
from tests.fake_device import EagerDevice

MIB = 1 << 20
PROMPTS = ["def main():\n    ", "Once upon a time", "The "]


@pytest.fixture
def card(monkeypatch):
    """A device that is there; returns those that were opened."""
    opened = []

    def open_one():
        opened.append(EagerDevice(seed=len(opened), pace_s=1e-4, copy_pace_s=1e-4))
        return opened[-1]

    kind = Kind(torch.device("cpu"), lambda: True, lambda: 1 << 34, open_one, lambda: "a card")
    monkeypatch.setitem(devices.KINDS, "cuda", kind)
    return opened


async def collect(engine, prompt, params=SamplingParams(max_new_tokens=24, ignore_eos=True)):
    return [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]


async def generate(spans=None, temperature=0.0, new=24, **options):
    """Tokens of every prompt, and the plan."""
    params = SamplingParams(max_new_tokens=new, temperature=temperature, ignore_eos=True)
    async with open_engine(observers=[] if spans is None else [spans.append], max_context=128, **options) as engine:
        return await asyncio.gather(*(collect(engine, prompt, params) for prompt in PROMPTS)), engine.plan


@pytest.mark.parametrize("temperature", few([0.0, 1.0], 1))
@pytest.mark.parametrize("speculation", ["off", "chain", "tree"])
async def test_tokens_are_those_of_the_host(card, speculation, temperature):
    spans = []
    common = {"speculation": speculation, "temperature": temperature, "device_memory": 14 * MIB}
    expected, _ = await generate(device="cpu", **common)
    found, plan = await generate(spans, device="cuda", exact=True, **common)
    assert found == expected
    assert plan.streamed
    assert {span.task.op for span in spans} >= {Op.COPY, Op.LAYER, Op.HEAD}
    assert not find_races(spans)
    assert not card[0].streams  # closed


@pytest.mark.parametrize("speculation", ["chain", "tree"])
async def test_captured_draft_steps_propose_the_same(card, monkeypatch, speculation):
    """And are counted: graphs hold memory that a plan must leave them."""
    common = {"speculation": speculation, "device": "cuda", "exact": True, "device_memory": 96 * MIB}
    common |= {"resident_memory": 0, "draft_ahead": False, "draft_depth": 4}  # nothing follows the clock
    common["num_draft_tokens"] = {"chain": 4, "tree": 9}[speculation]
    expected, plain = await generate(**common)
    captures = []
    monkeypatch.setattr(EagerDevice, "capture", lambda self: captures.append(FakeCapture()) or captures[-1])
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], captures=True))
    found, plan = await generate(**common)
    assert found == expected
    assert captures[0].replays > captures[0].captures > 0
    assert plan.arithmetic["draft graphs"] > 0
    assert "draft graphs" not in plain.arithmetic


@pytest.mark.parametrize(
    ("host_memory", "tiers"),
    [
        (1 << 30, {Tier.DEVICE, Tier.HOST}),
        (8 * MIB, {Tier.DEVICE, Tier.HOST, Tier.DISK}),
        (1, {Tier.DEVICE, Tier.DISK}),
    ],
)
async def test_parts_come_from_the_host_and_beyond_it_from_the_disk(card, host_memory, tiers):
    spans = []
    common = {"device_memory": 44 * MIB, "resident_memory": 2 * MIB}
    expected, _ = await generate(device="cpu", **common)
    found, plan = await generate(spans, device="auto", exact=True, host_memory=host_memory, **common)
    assert found == expected
    assert {part.tier for part in plan.parts} == tiers
    assert (Op.READ in {span.task.op for span in spans}) == (Tier.DISK in tiers)


async def test_the_link_is_probed_both_ways_round(card):
    """A plan that reads a few bytes from the disk and copies many is bound by whichever takes longer."""
    common = {"device": "cuda", "device_memory": 31 * MIB, "max_context": 128, "max_batch": 4}
    async with open_engine(host_memory=1 << 30, **common) as engine:
        copied = await engine.probe_link_rate(0.05)
    async with open_engine(host_memory=1, link_rate=20e6, **common) as engine:
        read = await engine.probe_link_rate(0.2)
    assert copied > 0
    assert read <= 25e6


HOST, CARD = (
    Processor({"float32": flop_per_s}, memory_bytes_per_s=bytes_per_s)
    for flop_per_s, bytes_per_s in ((1e11, 1e10), (1e13, 5e11))
)


def test_a_device_is_measured_and_planned_for(card, tmp_path, monkeypatch):
    """The figures name the device; a plan for a known job is searched with them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"processor": HOST, "read_contention": 1.0, "disk": 1e9}.items():
        monkeypatch.setattr(cache, f"measure_{name}", lambda *_, value=value: value)  # of test_hardware.py
    found = machine_profile(DEMO / "target", torch.float32, 1, kind=devices.KINDS["cuda"])
    assert found.name
    assert found.processor is found.device
    assert min(found.h2d_bytes_per_s, found.d2h_bytes_per_s, found.device.memory_bytes_per_s) > 0
    again = machine_profile(DEMO / "target", torch.float32, 1, kind=devices.KINDS["cuda"])
    assert again.device == found.device
    assert len(card) == 1
    links = {"h2d_bytes_per_s": 1e9, "d2h_bytes_per_s": 1e9}
    fixed = lambda device, dtype, host, memory: replace(host, device=CARD, device_memory=memory, **links)  # noqa: E731
    monkeypatch.setattr(cache, "measure_device", fixed)
    plan = design(resolve(EngineOptions(device="cuda", device_memory=24 * MIB, workload=Workload(16, 20, 40)))).plan
    assert plan.num_staging
    assert plan.num_rows > 4


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often it looks for something to do, and how often it is asked to look again later."""

    turns = timers = 0

    def _run_once(self):
        self.turns += 1
        super()._run_once()

    def call_at(self, *args, **kwargs):
        self.timers += 1
        return super().call_at(*args, **kwargs)


class HeldLayers(EagerDevice):
    """A layer takes until another copy has ended, or long where none does."""

    LONG_S = 0.2

    def __init__(self):
        super().__init__(pace_s=1e-4, copy_pace_s=3e-3)
        self.changed = threading.Condition()
        self.copied = self.beside = 0

    def copy_async(self, target, source, stream):
        super().copy_async(target, source, stream)
        stream.queue.put(self.end_copy)

    def end_copy(self):
        with self.changed:
            self.copied += 1
            self.changed.notify_all()

    def hold_layer(self):
        with self.changed:
            before = self.copied
            self.beside += self.changed.wait_for(lambda: self.copied > before, self.LONG_S)


def test_nothing_polls_and_no_stream_waits_for_all_others(card, monkeypatch):
    """The loop wakes for tasks that end and sets no clock for them; copies end while layers compute."""
    device, spans, loop = HeldLayers(), [], CountingLoop()
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], open=lambda: device))
    layer = Model.layer
    monkeypatch.setattr(Model, "layer", lambda *args: (device.hold_layer(), layer(*args))[1])
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(generate(spans, new=8, device="cuda", device_memory=24 * MIB, max_batch=4, speculation="off"))
    assert device.beside > sum(span.task.op is Op.LAYER for span in spans) / 2
    assert loop.turns < 8 * len(spans)
    assert loop.timers <= 1, "polling asks to be woken again and again; one wait gathers streams that begin together"


# -- faults --------------------------------------------------------------------------------------------------


def failing(method, at, error):
    """The same method, which fails at the n-th call."""
    calls = itertools.count(1)

    def called(*args, **kwargs):
        if next(calls) == at:
            raise error
        return method(*args, **kwargs)

    return called


@pytest.mark.parametrize("speculation", ["off", "tree"])
async def test_memory_that_runs_out_names_the_plan_and_a_smaller_one(card, monkeypatch, speculation):
    monkeypatch.setattr(Model, "layer", failing(Model.layer, 40, torch.OutOfMemoryError("CUDA out of memory.")))
    told = r"KV cache .* of a budget of 31\.00 MiB.*--device-memory 2\dMiB, or --batch-size 2"
    with pytest.raises(DeviceError, match=told):
        await generate(device="cuda", device_memory=31 * MIB, max_batch=4, speculation=speculation)
    assert not card[0].streams


async def test_memory_that_is_refused_at_the_start_says_the_same(card, monkeypatch):
    monkeypatch.setattr(EagerDevice, "allocate", failing(EagerDevice.allocate, 2, torch.OutOfMemoryError("none")))
    with pytest.raises(DeviceError, match="--device-memory 2"):
        await generate(device="cuda", device_memory=31 * MIB, max_batch=4)
    assert not card[0].streams


async def test_a_fault_of_the_device_reaches_every_stream_once_and_nothing_runs_behind_it(card):
    async with open_engine(device="cuda", device_memory=31 * MIB, max_context=128, max_batch=4) as engine:
        streams = [asyncio.create_task(collect(engine, prompt)) for prompt in PROMPTS]
        while not card[0].num_copies:
            await asyncio.sleep(0.01)
        card[0].error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nMore follows.")
        found = await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 30)
        assert all(isinstance(one, DeviceError) and "illegal memory access" in str(one) for one in found)
        assert "More follows" not in str(found[0])
        with pytest.raises(DeviceError):
            await collect(engine, "again")


async def test_leaving_settles_what_is_under_way(card):
    for wait_s in (0.0, 0.05, 0.3):
        async with open_engine(device="cuda", device_memory=31 * MIB, max_context=128, max_batch=4) as engine:
            stream = asyncio.create_task(collect(engine, PROMPTS[0]))
            await asyncio.sleep(wait_s)
            stream.cancel()
        assert not card[-1].streams
        assert card[-1].error is None
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_peak_beyond_the_budget_is_told(card, monkeypatch):
    monkeypatch.setattr(EagerDevice, "peak_bytes", 32 * MIB)
    with pytest.warns(RuntimeWarning, match=r"held 32\.00 MiB at its peak, more than the budget of 31\.00 MiB"):
        await generate(device="cuda", device_memory=31 * MIB, max_batch=4)
    monkeypatch.setattr(EagerDevice, "peak_bytes", 31 * MIB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await generate(device="cuda", device_memory=31 * MIB, max_batch=4)


@pytest.mark.slow
def test_the_first_command_takes_the_card_and_streams(card, monkeypatch, tmp_path):
    """Nothing said but a prompt: auto finds the device, the demo fits, its layers travel. Nothing is known before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = CliRunner().invoke(app, ["generate", "--prompt", "import os\n", "-n", "12", "--json"])
    assert found.exit_code == 0, found.stderr
    assert len(card) == 2, "one was opened to be measured, before the plan"
    assert not card[1].streams, "closed"
    stats = json.loads(found.stdout)["stats"]
    assert stats["streamed_bytes"] > 0
    assert stats["device_peak_bytes"] is None, "nobody counts on this one"


def test_bench_names_the_links_and_the_device_s_peak(card, monkeypatch):
    monkeypatch.setattr(EagerDevice, "peak_bytes", 20 * MIB)
    monkeypatch.setattr(simulation, "FIT_STEPS", 1)  # what is remembered of the pair is not asked for here
    found = CliRunner().invoke(app, ["bench", "-n", "8", "--rounds", "1"])
    assert found.exit_code == 0, found.stderr
    assert "links, raw" in found.stdout
    assert "peak memory of the device              20.00 MiB" in found.stdout


def test_a_device_that_is_not_here_is_one_paragraph():
    found = CliRunner().invoke(app, ["generate", "--device", "cuda", "--prompt", "x"])
    if not torch.cuda.is_available():
        assert found.exit_code == 1
        assert "--device cpu" in found.stderr


# -- maths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9}])
def test_many_rows_at_once_draw_what_each_draws_alone(filters, monkeypatch):
    monkeypatch.setattr(sampling, "DEVICE_BLOCK", 3000)  # three rows
    sampler = Sampler(SamplingParams(temperature=0.7, seed=3, **filters))
    logits = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0)) * 3
    positions = list(range(7, 27))
    assert sampler._draw_in_blocks(logits, positions) == sampler.draw(logits, positions)


def test_windows_bring_every_byte_of_a_part_once():
    """Of parts larger than a window; pages of file and buffer keep agreeing."""
    for part in Model(DEMO / "target").parts(1 << 40):
        brought = []
        for begin, segments in windows(part, 16 * PAGE):
            for cut in segments:
                assert 0 <= cut.at < cut.at + cut.nbytes <= 16 * PAGE
                brought.append(replace(cut, at=cut.at + begin))
        for segment in part.segments:
            own = [cut for cut in brought if segment.at <= cut.at < segment.at + segment.nbytes]
            assert sum(cut.nbytes for cut in own) == segment.nbytes
            assert {cut.at - cut.offset for cut in own} == {segment.at - segment.offset}
        assert sum(cut.nbytes for cut in brought) == part.nbytes


def test_tensors_on_a_device_are_aligned(tmp_path):
    """Whatever the header's length: most by a shift of the whole part, others by a copy of their own."""
    for header in (8, 72, 4096):
        folder = shifted_copy(DEMO / "target", tmp_path / str(header), header)
        model = Model(folder)
        slot = torch.empty(64 * MIB, dtype=torch.uint8)
        for part in model.parts(1 << 20, ALIGNMENT):
            for binding in part.bindings:
                assert (binding.at + part.shift) % ALIGNMENT == 0
            assert all(target.at % ALIGNMENT == 0 for one in part.conversions for target in one.targets)
            assert max(b.at + b.nbytes for b in part.bindings) + part.shift <= part.size <= len(slot)
            assert not part.conversions, "sizes of the demo's tensors are multiples: a shift does for all"


def shifted_copy(source, folder, padding):
    """The same checkpoint with a header that is longer by so many bytes."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
            continue
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length] + b" " * padding
        (folder / file.name).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return folder


async def test_what_travelled_is_counted_once(card):
    """Bytes that reach a slot, from the host or through it from the disk."""
    common = {"device": "cuda", "device_memory": 24 * MIB, "max_context": 128, "max_batch": 4}
    for host_memory in (1 << 30, 1):
        spans = []
        async with open_engine(observers=[spans.append], host_memory=host_memory, **common) as engine:
            stream = engine.stream(PROMPTS[0], SamplingParams(max_new_tokens=12, ignore_eos=True))
            stats = [piece async for piece in stream][-1].stats
        copied = sum(span.task.nbytes for span in spans if span.task.op is Op.COPY)
        assert 0 < stats.streamed_bytes <= copied < stats.streamed_bytes + 2 * stats.bytes_per_pass
