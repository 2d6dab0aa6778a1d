"""Prompts that span several passes beside rows that decode: none waits long, and no token changes."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

from aspec.api import collect
from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.planning.simulation import simulate
from aspec.profiling.cost_tables import SimCosts
from aspec.tasks.rows import Row, prefill_items, prefill_stops
from tests import tiny
from tests.simulate import make_plan


def test_a_pass_takes_whole_items_of_the_earliest_prompts():
    rows = {0: Row(5, 100, 1), 1: Row(3, 50, 1, num_cached_tokens=10), 2: Row(4, 10, 1)}
    beside = partial(prefill_stops, rows, most_tokens=16, beside_decoding=True)
    assert beside(None) == {0: 100, 1: 50, 2: 10}
    assert beside(100) == {1: 50, 2: 10, 0: 48}
    assert beside(45) == {1: 50}
    assert beside(16) == {1: 26}


def test_where_nothing_decodes_no_prompt_is_cut():
    rows = {0: Row(5, 100, 1), 1: Row(3, 50, 1, num_cached_tokens=10), 2: Row(4, 10, 1)}
    alone = partial(prefill_stops, rows, most_tokens=16, beside_decoding=False)
    assert alone(None) == {0: 100, 1: 50, 2: 10}
    assert alone(100) == {1: 50, 2: 10}
    assert alone(45) == {1: 50}
    assert alone(16) == {1: 50}, "a longer prompt joins alone"


@pytest.mark.parametrize("most_draft_tokens", [0, 8])
def test_a_prompt_that_is_longer_than_a_pass_joins_alone(most_draft_tokens):
    plan = make_plan(num_rows=2, max_draft_tokens=most_draft_tokens, prefill_tokens=16, capacity=200)
    spans = []
    simulate(replace(plan, prefill_pass_tokens=32), SimCosts(), [(100, 4), (90, 4)], [spans.append])
    assert sum(outcome.num_new for span in spans for outcome in span.outcomes) == 8


def test_the_chunks_of_several_passes_are_those_of_one():
    row, most, items = Row(0, 100, 1, num_cached_tokens=4), 16, []
    while row.start < row.length:
        stops = prefill_stops({7: row}, 40, most, beside_decoding=True)
        items += prefill_items({7: row}, 0, most, 0, stops)
        row.num_prefilled = stops[7] - row.num_cached_tokens
        assert row.num_kv == stops[7]
    [whole] = [prefill_items({7: Row(0, 100, 1, num_cached_tokens=4)}, 0, most)]
    assert [(item.starts, item.counts, item.samples) for item in items] == [
        (item.starts, item.counts, item.samples) for item in whole
    ]


@pytest.mark.parametrize(
    ("family", "draft"), [("llama", True), pytest.param("qwen3_next", False, marks=pytest.mark.slow)]
)
async def test_a_long_prompt_joins_over_passes_and_changes_no_token(tmp_path, family, draft):
    target = tiny.build(tmp_path / "target", family, varied=True)
    pair = {"target": target, "draft": tiny.noisy_copy(target, tmp_path / "draft", 0.1) if draft else None}
    options = {
        "device": "cpu",
        "threads": 1,
        "prefill_tokens": 16,
        "max_batch": 3,
        "exact": True,
        "reuse_prefix": False,
    }
    options |= {} if draft else {"speculation": "off"}
    prompts = [[9, 8, 7], [1 + i % 90 for i in range(60)], [2 + i % 50 for i in range(50)]]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    passes = {}

    def observe(span):
        if span.task.item is not None and span.task.item.prefill:
            for row in span.task.item.rows:
                passes.setdefault(row, set()).add(span.task.number)

    async with open_engine(**pair, **options, observers=[observe]) as engine:
        alone = [(await collect(engine, prompt, params)).token_ids for prompt in prompts]
        passes.clear()
        first = asyncio.Event()
        running = asyncio.create_task(collect(engine, prompts[0], params, lambda _: first.set()))
        await first.wait()
        others = await asyncio.gather(*(collect(engine, prompt, params) for prompt in prompts[1:]))
        together = [(await running).token_ids, *(one.token_ids for one in others)]
        assert together == alone
        assert any(len(numbers) > 2 for numbers in passes.values()), "the prompt was read in one pass"


async def test_of_an_aborted_prompt_counts_what_was_read(tmp_path):
    target = tiny.build(tmp_path / "target", "llama", varied=True)
    options = {"device": "cpu", "threads": 1, "prefill_tokens": 16, "max_batch": 2, "speculation": "off"}
    prompt, params = [1 + i % 90 for i in range(150)], SamplingParams(max_new_tokens=3, ignore_eos=True)
    async with open_engine(target=target, reuse_prefix=False, exact=True, **options) as engine:
        expected = (await collect(engine, prompt, params)).token_ids
    reading = asyncio.Event()

    def observe(span):
        if span.task.item is not None and span.task.item.prefill and span.task.item.starts[0] == 48:
            reading.set()

    async with open_engine(target=target, observers=[observe], exact=True, **options) as engine:
        first = asyncio.Event()
        other = SamplingParams(max_new_tokens=100, ignore_eos=True)
        running = asyncio.create_task(collect(engine, [3, 4], other, lambda _: first.set()))
        await first.wait()
        aborted = asyncio.create_task(collect(engine, prompt, params))
        await reading.wait()
        aborted.cancel()
        async with aclosing(engine.stream(prompt, params)) as stream:
            pieces = [piece async for piece in stream]
        assert tuple(token for piece in pieces for token in piece.token_ids) == expected
        assert 48 <= pieces[-1].stats.num_cached_tokens < 149
        running.cancel()
        await asyncio.gather(running, aborted, return_exceptions=True)
