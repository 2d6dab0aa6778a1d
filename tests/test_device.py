"""The whole engine behind a link: streams, staging, pinned parts, device memory; on a device without a GPU."""

import asyncio

import pytest
import torch

from aspec import devices, gauging
from aspec.cache import machine_profile
from aspec.design import design
from aspec.devices import Kind
from aspec.engine import open_engine
from aspec.needs import DEMO
from aspec.options import EngineOptions
from aspec.params import SamplingParams
from aspec.plan import Tier, Workload
from aspec.races import find_races
from aspec.tasks.task import Op
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


async def generate(spans=None, temperature=0.0, **options):
    """Tokens of every prompt, and the plan."""
    params = SamplingParams(max_new_tokens=24, temperature=temperature, ignore_eos=True)
    async with open_engine(observers=[] if spans is None else [spans.append], max_context=128, **options) as engine:

        async def one(prompt):
            return [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]

        return await asyncio.gather(*map(one, PROMPTS)), engine.plan


@pytest.mark.parametrize("temperature", [0.0, 1.0])
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
    expected, _ = await generate(device="cpu", device_memory=31 * MIB)
    found, plan = await generate(spans, device="auto", exact=True, device_memory=31 * MIB, host_memory=host_memory)
    assert found == expected
    assert {part.tier for part in plan.parts} == tiers
    assert (Op.READ in {span.task.op for span in spans}) == (Tier.DISK in tiers)


async def test_the_link_is_probed_both_ways_round(card):
    """A plan that reads a few bytes from the disk and copies many is bound by whichever takes longer."""
    common = {"device": "cuda", "device_memory": 31 * MIB, "max_context": 128}
    async with open_engine(host_memory=1 << 30, **common) as engine:
        copied = await asyncio.to_thread(engine.probe_link_rate, 0.05)
    async with open_engine(host_memory=1, link_rate=20e6, **common) as engine:
        read = await asyncio.to_thread(engine.probe_link_rate, 0.2)
    assert copied > 0
    assert read <= 25e6


def test_a_device_is_measured_and_planned_for(card, tmp_path, monkeypatch):
    """The figures name the device; a plan for a known job is searched with them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"ROWS": (1, 8, 64), "MATRIX_BYTES": 1 << 20, "REPEATS": 1, "CALLS": 2}.items():
        monkeypatch.setattr(gauging, name, value)  # a card's sizes take a processor minutes
    found = machine_profile(DEMO / "target", torch.float32, 1, kind=devices.KINDS["cuda"])
    assert found.name
    assert found.processor is found.device
    assert min(found.h2d_bytes_per_s, found.d2h_bytes_per_s, found.device.memory_bytes_per_s) > 0
    again = machine_profile(DEMO / "target", torch.float32, 1, kind=devices.KINDS["cuda"])
    assert again.device == found.device
    assert len(card) == 1
    plan = design(EngineOptions(device="cuda", device_memory=24 * MIB, workload=Workload(16, 20, 40))).plan
    assert plan.num_staging
    assert plan.num_rows > 4
