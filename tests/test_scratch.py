"""Weights that are converted on their way are the same for every item of a pass."""

import asyncio
from dataclasses import replace

import pytest
import torch

from aspec.engine import design
from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.planning.footprint import request_for
from aspec.planning.placement import make_plan
from tests import tiny

PROMPTS = [[5, 6, 7], [9, 10, 11, 12], list(range(20, 60))]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("scratch") / "target", "llama", varied=True)


async def tokens(target, **options):
    async def one(engine, prompt):
        params = SamplingParams(max_new_tokens=8, ignore_eos=True)
        return [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]

    common = dict(target=target, max_context=96, device_memory=24 << 20, threads=1, dtype="bfloat16")
    async with open_engine(**common | options) as engine:
        return await asyncio.gather(*(one(engine, prompt) for prompt in PROMPTS))


@pytest.mark.parametrize("options", [{"max_batch": 3}, {"max_batch": 1, "prefill_tokens": 16}], ids=str)
async def test_items_of_a_pass_share_converted_weights(target, options):
    resident = await tokens(target, **options)
    streamed = await tokens(target, resident_memory=0, **options)
    assert streamed == resident


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("fits", [True, False])
async def test_packed_resident_weights_are_converted_in_every_pass(tmp_path, monkeypatch, buffers, fits):
    """In fp32 the weights take twice what is stored. All are resident where that fits, half of them otherwise."""
    sizes = dict(num_hidden_layers=10)
    target = tiny.build(tmp_path / "target", "llama", varied=True, dtype=torch.bfloat16, sizes=sizes)
    options = dict(max_batch=3, dtype="float32")
    expected = await tokens(target, **options)
    plans = []

    def decide(models):
        request = replace(request_for(models), scratch_buffers=buffers, keep_packed=True)
        streamed = make_plan(models.footprint(request), replace(request, resident_bytes=0))
        sizes = [part.size for part in models.parts if part.layer >= 0]
        slots = streamed.num_slots * streamed.slot_bytes - models.footprint(request).loading_bytes
        room = streamed.held_bytes + (sum(sizes) - slots if fits else sum(sizes) // 4)
        plans.append(make_plan(models.footprint(request), replace(request, budget_bytes=room)))
        return models, plans[-1]

    monkeypatch.setattr(design, "decide", decide)
    assert await tokens(target, **options) == expected
    assert any(part.packed for part in plans[0].parts)
    assert bool(plans[0].streamed) is not fits
    assert plans[0].num_scratch == buffers


async def test_control_without_conversion(target, tmp_path):
    stored = tiny.build(tmp_path / "target", "llama", varied=True, dtype=torch.bfloat16)
    options = dict(max_batch=3, prefill_tokens=16)
    assert await tokens(stored, resident_memory=0, **options) == await tokens(stored, **options)
