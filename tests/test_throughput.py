"""Many prompts at once: every row gets the tokens it would get alone, whatever shares its passes."""

import asyncio
import random

import pytest

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from tests import tiny
from tests.compat import few

SMALL = dict(device_memory=64 << 20, resident_memory=100_000, threads=1, dtype="float32", prefill_tokens=128)
LENGTHS = (1, 300, 3, 17, 64, 65, 128, 2, 129, 7, 33, 5)  # about the tiles of 64 and the items of 128 tokens
NEW = (20, 6, 12, 1, 15, 4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    sizes = dict(max_position_embeddings=1024)
    target = tiny.build(tmp_path_factory.mktemp("throughput") / "target", "llama", sizes=sizes)
    return target, tiny.noisy_copy(target, target.parent / "draft", 0.1)


@pytest.fixture(scope="module")
def job():
    choice = random.Random(5)
    prompts = [[choice.randrange(5, 60) for _ in range(length)] for length in LENGTHS]
    return [(prompt, NEW[index % len(NEW)]) for index, prompt in enumerate(prompts)]


async def serve(engine, job, temperature=0.0):
    """Tokens of every prompt, all of them sent at once; a prompt's seed is its place in the job."""

    async def one(index, prompt, new):
        params = SamplingParams(max_new_tokens=new, ignore_eos=True, temperature=temperature, seed=index)
        return [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]

    return await asyncio.gather(*(one(index, *own) for index, own in enumerate(job)))


@pytest.fixture(scope="module")
def alone(pair, job):
    """What each prompt gets in an engine with one row and no draft."""

    async def main():
        async with open_engine(target=pair[0], max_batch=1, max_context=336, **SMALL) as engine:
            return {temperature: await serve(engine, job, temperature) for temperature in (0.0, 1.0)}

    found = asyncio.run(main())
    assert all([len(tokens) for tokens in said] == [new for _, new in job] for said in found.values())
    return found


@pytest.mark.parametrize("groups", few([2, 1, 3], 1))
@pytest.mark.parametrize("speculation", ["off", "chain", "tree"])
async def test_every_row_gets_what_it_gets_alone(pair, job, alone, groups, speculation):
    spans = []
    options = dict(speculation=speculation, max_batch=6, num_groups=groups, max_context=336, **SMALL)
    async with open_engine(observers=[spans.append], target=pair[0], draft=pair[1], **options) as engine:
        for temperature in (0.0, 1.0):
            assert await serve(engine, job, temperature) == alone[temperature]
    assert find_races(spans) == []
    decoding = [s for s in spans if s.task.op is Op.HEAD and not s.task.item.prefill]
    assert max(len(s.task.item.rows) for s in decoding) == -(-6 // groups)
    joining = {s.task.number for s in spans if s.task.op is Op.HEAD and s.task.item.prefill}
    assert joining & {s.task.number for s in decoding}, "prompts join while others decode"


LONG = [([7], 300), ([9, 11], 300)]


@pytest.fixture(scope="module")
def plain(pair):
    """Two long texts, each alone."""

    async def main():
        async with open_engine(target=pair[0], max_batch=1, max_context=320, **SMALL) as engine:
            return await serve(engine, LONG)

    return asyncio.run(main())


@pytest.mark.parametrize("groups", few([1, 2], 1))
async def test_many_rounds_on_a_short_prompt(pair, plain, groups):
    """Where SpecOffload's mask, shifted by one, parts from plain decoding."""
    options = dict(speculation="chain", num_draft_tokens=3, max_batch=2, num_groups=groups, max_context=320, **SMALL)
    async with open_engine(target=pair[0], draft=pair[1], **options) as engine:
        assert await serve(engine, LONG) == plain


async def test_only_requested_tokens_count(pair, job, alone):
    options = dict(speculation="chain", num_draft_tokens=5, max_batch=6, num_groups=2, max_context=336, **SMALL)
    async with open_engine(target=pair[0], draft=pair[1], **options) as engine:
        assert await serve(engine, job) == alone[0.0]
