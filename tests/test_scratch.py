"""Weights that are converted on their way are the same for every item of a pass."""

import asyncio

import pytest
import torch

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
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


async def test_control_without_conversion(target, tmp_path):
    stored = tiny.build(tmp_path / "target", "llama", varied=True, dtype=torch.bfloat16)
    options = dict(max_batch=3, prefill_tokens=16)
    assert await tokens(stored, resident_memory=0, **options) == await tokens(stored, **options)
