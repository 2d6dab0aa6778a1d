"""A prompt that begins as an ended sequence did: only the rest of it is prefilled, and not a bit of text changes."""

import asyncio
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aspec.engine.engine import open_engine
from aspec.engine.streams import common_prefix
from aspec.generation.params import SamplingParams
from aspec.plan import Speculation
from aspec.planning.virtual_time import VirtualTimeLoop
from aspec.speculation.model_drafter import ModelDrafter
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.rows import Row, prefill_items
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import RequestAborted, RequestAdded, RowAssignment, RowOutcome, Span, Started
from tests import tiny
from tests.simulate import make_plan, simulate

NEW = 8
SMALL = dict(max_context=160, prefill_tokens=16, device_memory=8 << 20, resident_memory=0, threads=1)
DRAFTS = {
    "none": dict(speculation="off"),
    "chain": dict(speculation="chain", num_draft_tokens=4),
    "tree": dict(speculation="tree", num_draft_tokens=12),
    "ngram": dict(num_draft_tokens=6),
}
GREEDY = dict(logprobs=2)
SAMPLED = dict(temperature=0.8, seed=5, repetition_penalty=1.3, presence_penalty=0.4, logprobs=2)


def fed_tokens(spans):
    """Prompt tokens that went through the target."""
    return sum(span.task.num_tokens for span in spans if span.task.op is Op.EMBED and span.task.item.prefill)


# -- the policy ----------------------------------------------------------------------------------------------


class House:
    """A scheduler whose passes are answered at once: every row gets one token per pass."""

    def __init__(self, num_rows):
        self.scheduler = Scheduler(make_plan(num_rows=num_rows, max_draft_tokens=0, fixed_draft_tokens=0))
        self.seatings, self.prefills, self.accepting, self.rows = [], [], [], {}
        self.take(self.scheduler.handle([Started()]))

    def take(self, decision):
        self.scheduler.validate()
        changes = [row for task in decision if task.op is Op.ASSIGN_ROWS for row in task.payload.rows]
        self.rows |= {change.row: change.sequence for change in changes}
        self.seatings += [change for change in changes if change.sequence is not None]
        self.prefills += [t.item for t in decision if t.op is Op.EMBED and t.item.prefill]
        self.accepting = [t for t in decision if t.op is Op.ACCEPT] or self.accepting

    def post(self, *events):
        for event in events:
            self.take(self.scheduler.handle([event]))

    def settle(self):
        """Passes until nobody sits any more."""
        while any(sequence is not None for sequence in self.rows.values()):
            waiting, self.accepting = self.accepting, []
            for task in waiting:
                self.post(Span(task, 0.0, 1e-3, tuple(RowOutcome(row, 0, 0, 1, False) for row in task.item.rows)))


def test_an_arrival_that_follows_takes_the_row_and_prefills_the_rest():
    house = House(num_rows=2)
    house.post(RequestAdded(0, 10, 5))
    house.settle()
    house.post(RequestAdded(1, 20, 1, reuse_from=0, num_cached_tokens=14))
    assert house.seatings == [RowAssignment(0, 0), RowAssignment(0, 1, 14)]
    assert (house.prefills[-1].starts, house.prefills[-1].counts) == ((14,), (6,))


def test_a_row_that_someone_else_took_keeps_nothing():
    house = House(num_rows=1)
    house.post(
        RequestAdded(0, 10, 5), RequestAdded(1, 8, 1), RequestAdded(2, 20, 1, reuse_from=0, num_cached_tokens=14)
    )
    house.settle()
    assert house.seatings == [RowAssignment(0, 0), RowAssignment(0, 1), RowAssignment(0, 2)]
    assert (house.prefills[-1].starts, house.prefills[-1].counts) == ((0,), (20,))


def test_a_row_that_is_still_occupied_is_not_followed():
    house = House(num_rows=2)
    house.post(RequestAdded(0, 10, 5), RequestAdded(1, 20, 1, reuse_from=0, num_cached_tokens=9))
    house.settle()
    assert house.seatings == [RowAssignment(0, 0), RowAssignment(1, 1)]


def test_a_cancelled_sequence_is_followed_once_its_pass_is_over():
    house = House(num_rows=1)
    house.post(RequestAdded(0, 10, 50), RequestAborted(0), RequestAdded(1, 20, 1, reuse_from=0, num_cached_tokens=9))
    assert house.seatings == [RowAssignment(0, 0)]
    house.settle()
    assert house.seatings == [RowAssignment(0, 0), RowAssignment(0, 1, 9)]


def test_a_little_in_common_does_not_cost_a_conversation_its_row():
    house = House(num_rows=2)
    house.post(RequestAdded(0, 100, 5))
    house.settle()
    house.post(RequestAdded(1, 40, 5, reuse_from=0, num_cached_tokens=30))
    house.settle()
    house.post(
        RequestAdded(2, 120, 5, reuse_from=0, num_cached_tokens=104),
        RequestAdded(3, 60, 1, reuse_from=1, num_cached_tokens=44),
    )
    house.settle()
    assert house.seatings == [
        RowAssignment(0, 0),
        RowAssignment(1, 1),
        RowAssignment(0, 2, 104),
        RowAssignment(1, 3, 44),
    ]


def test_where_every_row_has_been_used_the_least_is_lost():
    house = House(num_rows=2)
    house.post(RequestAdded(0, 100, 1), RequestAdded(1, 30, 1))
    house.settle()
    house.post(RequestAdded(2, 50, 1))
    assert house.seatings[-1] == RowAssignment(1, 2)


def test_who_has_most_to_keep_chooses_first():
    house = House(num_rows=3)
    house.post(RequestAdded(0, 30, 1), RequestAdded(1, 10, 1))
    house.settle()
    house.post(
        RequestAdded(2, 50, 1), RequestAdded(3, 50, 1), RequestAdded(4, 40, 1, reuse_from=1, num_cached_tokens=9)
    )
    house.settle()
    assert house.seatings[-3:] == [RowAssignment(2, 2), RowAssignment(1, 4, 9), RowAssignment(0, 3)]


def test_in_virtual_time_a_second_turn_is_spared_its_first(virtual):
    turns = [(0, 200, 20), (1, 240, 20, 0, 219)]
    spans, _, _ = virtual(lambda: simulate(make_plan(num_rows=1), turns))
    whole, _, _ = virtual(lambda: simulate(make_plan(num_rows=1), [turn[:3] for turn in turns]))
    assert (fed_tokens(spans), fed_tokens(whole)) == (200 + 21, 200 + 240)
    assert max(s.stop_s for s in spans) < max(s.stop_s for s in whole)
    assert find_races(spans) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 149)).filter(lambda row: row[1] < row[0]), max_size=6),
    most=st.integers(1, 70),
)
def test_prefill_items_cover_what_is_not_kept_exactly_once(rows, most):
    seated = {number: Row(number, length, 1, num_cached_tokens=kept) for number, (length, kept) in enumerate(rows)}
    covered = {number: [] for number in seated}
    for item in prefill_items(seated, 3, most):
        assert max(item.counts) * len(item.rows) <= most
        for number, start, count in zip(item.rows, item.starts, item.counts, strict=True):
            covered[number] += range(start, start + count)
            assert item.samples == (start + count == rows[number][0])
    assert covered == {number: list(range(kept, length)) for number, (length, kept) in enumerate(rows)}


def assignments(spans):
    """Which sequence took which row, in order."""
    changes = (row for span in spans if span.task.op is Op.ASSIGN_ROWS for row in span.task.payload.rows)
    return [change for change in changes if change.sequence is not None]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), speculation=st.sampled_from(list(Speculation)), num_rows=st.integers(1, 3))
def test_whatever_arrives_is_seated_on_what_it_follows_or_on_nothing(seed, speculation, num_rows):
    chance = random.Random(seed)
    arrivals = []
    for sequence in range(chance.randint(2, 9)):
        prompt, new = chance.randint(2, 150), chance.randint(1, 20)
        reuse_from, kept = None, 0
        if sequence and chance.random() < 0.7:
            reuse_from = chance.randrange(sequence)
            kept = chance.randint(0, min(prompt - 1, arrivals[reuse_from][1] - 1))
        arrivals.append((sequence, prompt, new, reuse_from, kept))
    plan = make_plan(num_rows=num_rows, speculation=speculation, fixed_draft_tokens=None)
    loop = VirtualTimeLoop()
    try:
        spans, scheduler, _ = loop.run_until_complete(simulate(plan, arrivals))
    finally:
        loop.close()
    retained = {}
    for row, sequence, kept in (
        (change.row, change.sequence, change.num_cached_tokens) for change in assignments(spans)
    ):
        _, _, _, reuse_from, offered = arrivals[sequence]
        assert kept == (offered if reuse_from is not None and retained.get(row) == reuse_from else 0)
        retained[row] = sequence
    assert fed_tokens(spans) == sum(arrival[1] for arrival in arrivals) - sum(
        s.num_cached_tokens for s in assignments(spans)
    )
    assert scheduler.done
    assert sum(o.num_new for s in spans for o in s.outcomes) == sum(new for _, _, new, _, _ in arrivals)
    assert find_races(spans) == []


# -- the engine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target and its noisy copy of a family in a dtype, built once."""
    root, made = tmp_path_factory.mktemp("reuse"), {}

    def get(family, dtype):
        if (family, dtype) not in made:
            folder = root / f"{family}-{dtype}"
            target = tiny.build(folder / "target", family, varied=True, dtype=getattr(torch, dtype))
            made[family, dtype] = target, tiny.noisy_copy(target, folder / "draft", 0.1)
        return made[family, dtype]

    return get


def options(pair, draft="none", **more):
    folder = {"none": None, "ngram": "ngram"}.get(draft, pair[1])
    return {**SMALL, "target": pair[0], "draft": folder, "max_batch": 1, **DRAFTS[draft], **more}


async def collect(engine, prompt, **params):
    """Tokens, logprobs and statistics of one stream."""
    params = SamplingParams(**{"max_new_tokens": NEW, "ignore_eos": True, **params})
    pieces = [piece async for piece in engine.stream(prompt, params)]
    logprobs = [one for piece in pieces for one in piece.logprobs]
    return [token for piece in pieces for token in piece.token_ids], logprobs, pieces[-1].stats


async def fresh(pair, prompt, **params):
    """What an engine says that has never said anything."""
    async with open_engine(**options(pair)) as engine:
        return (await collect(engine, prompt, **params))[:2]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "bfloat16"),
        ("gemma3", "bfloat16"),
        pytest.param("gpt_oss", "float32", marks=pytest.mark.slow),
        pytest.param("llama4_text", "float32", marks=pytest.mark.slow),
    ],
)
async def test_a_second_turn_says_what_a_fresh_engine_says_of_the_whole(models, family, dtype, params):
    """Windows of 8 and chunks of 16 tokens; prompts longer than both, than a tile (64) and than an item (16)."""
    pair = models(family, dtype)
    chance = random.Random(7)
    first, more, other = ([chance.randrange(3, 256) for _ in range(n)] for n in (40, 21, 18))
    wanted = [await fresh(pair, first, **params)]
    prompts = [first, first + wanted[0][0] + more, first[:30] + other]
    wanted += [await fresh(pair, prompt, **params) for prompt in prompts[1:]]
    kept = [0, len(first) + NEW - 1, 30, len(prompts[2]) - 1]
    prompts, wanted = [*prompts, prompts[2]], [*wanted, wanted[2]]
    for draft in DRAFTS:
        spans = []
        async with open_engine(observers=[spans.append], **options(pair, draft)) as engine:
            for prompt, expected, reused in zip(prompts, wanted, kept, strict=True):
                before = fed_tokens(spans)
                tokens, logprobs, stats = await collect(engine, prompt, **params)
                assert (tokens, logprobs) == expected, (draft, reused)
                assert (stats.prompt_tokens, stats.num_cached_tokens) == (len(prompt), reused)
                assert fed_tokens(spans) - before == len(prompt) - reused
        assert find_races(spans) == []


@pytest.mark.parametrize("draft", ["chain", "ngram"])
async def test_two_conversations_keep_their_rows(models, draft):
    pair = models("llama", "float32")
    system = list(range(20, 32))
    said = [[*system, 40, 41, 42], [*system, 50, 51]]
    async with open_engine(**options(pair, draft, max_batch=2)) as engine:
        for turn in range(3):
            results = await asyncio.gather(*(collect(engine, prompt) for prompt in said))
            for index, (tokens, _, stats) in enumerate(results):
                assert tokens == (await fresh(pair, said[index]))[0]
                assert stats.num_cached_tokens == (len(said[index]) - 5 if turn else 0)
                said[index] = [*said[index], *tokens, 60 + turn, 61, 62, 63]


async def test_a_row_taken_by_another_is_prefilled_whole(models):
    pair = models("llama", "float32")
    async with open_engine(**options(pair)) as engine:
        tokens, _, _ = await collect(engine, [5, 6, 7])
        await collect(engine, [8, 9])
        again, _, stats = await collect(engine, [5, 6, 7, *tokens, 11])
    assert stats.num_cached_tokens == 0
    assert again == (await fresh(pair, [5, 6, 7, *tokens, 11]))[0]


async def test_a_sequence_that_still_runs_lends_nothing(models):
    pair = models("llama", "float32")
    async with open_engine(**options(pair, max_batch=2)) as engine:
        results = await asyncio.gather(*(collect(engine, [5, 6, 7, 8]) for _ in range(2)))
    assert [stats.num_cached_tokens for _, _, stats in results] == [0, 0]
    assert results[0][0] == results[1][0]


async def test_whoever_measures_prefills_every_prompt_whole(models):
    async with open_engine(**options(models("llama", "float32"), reuse_prefix=False)) as engine:
        results = [await collect(engine, [5, 6, 7, 8]) for _ in range(2)]
    assert [stats.num_cached_tokens for _, _, stats in results] == [0, 0]


@pytest.mark.parametrize("draft", DRAFTS)
async def test_what_was_said_before_a_stream_was_left_is_kept(models, draft):
    pair = models("llama", "bfloat16")
    async with open_engine(**options(pair, draft)) as engine:
        stream = engine.stream([5, 6, 7], SamplingParams(max_new_tokens=100, ignore_eos=True))
        heard = []
        async for piece in stream:
            heard += piece.token_ids
            if len(heard) > 8:
                break
        await stream.aclose()
        prompt = [5, 6, 7, *heard, 30, 31]
        tokens, _, stats = await collect(engine, prompt)
    assert stats.num_cached_tokens >= len(heard) + 2
    assert tokens == (await fresh(pair, prompt))[0]


@pytest.mark.parametrize("draft", ["chain", "tree"])
async def test_the_draft_goes_on_from_where_it_stood(models, draft, monkeypatch):
    """Its KV after a second turn is that of an engine which was given the whole: nothing is missing, nothing stale."""
    target = models("llama", "float32")[0]
    pair = (target, target)  # every proposal is accepted, so the draft is always a token behind
    starts, run = [], ModelDrafter._run
    monkeypatch.setattr(
        ModelDrafter, "_run", lambda self, *args, **more: (starts.append(args[1][0]), run(self, *args, **more))[1]
    )

    def draft_kv(engine):
        drafter = engine._open.runner._drafter
        return drafter._rows[0].drafted, [keys[0].clone() for keys in drafter._kv.keys]

    async with open_engine(**options(pair, draft)) as engine:
        tokens, _, _ = await collect(engine, [5, 6, 7])
        stood, num_runs = draft_kv(engine)[0], len(starts)
        prompt = [5, 6, 7, *tokens, 30, 31, 32]
        _, _, stats = await collect(engine, prompt)
        drafted, keys = draft_kv(engine)
    assert starts[num_runs] == stood < stats.num_cached_tokens == 3 + NEW - 1
    async with open_engine(**options(pair, draft)) as engine:
        await collect(engine, prompt)
        whole_drafted, whole_keys = draft_kv(engine)
    assert drafted == whole_drafted > len(prompt)
    for own, whole in zip(keys, whole_keys, strict=True):
        assert torch.allclose(own[:, :drafted], whole[:, :drafted], atol=1e-5)


@pytest.mark.parametrize(("one", "other", "shared"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1)])
def test_common_prefix(one, other, shared):
    assert common_prefix(one, other) == common_prefix(other, one) == shared
