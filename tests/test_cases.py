"""Cases in which other speculative and offloading engines went wrong, where they concern the whole engine."""

import asyncio
import contextlib
import itertools
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from aspec.engine.engine import open_engine
from aspec.errors import NumericError
from aspec.generation.params import SamplingParams
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.plan import Speculation
from aspec.planning.sim_backend import SimCosts
from aspec.tasks.cost_model import CostModel
from aspec.tasks.op import Op
from aspec.tasks.task import LayerWork, Span, Task, WorkItem
from tests import tiny
from tests.compat import few
from tests.simulate import make_plan, simulate
from tests.test_engine import SMALL, collect

OFF = {"speculation": "off"}
CHAIN = {"speculation": "chain", "num_draft_tokens": 4}
TREE = {"speculation": "tree", "num_draft_tokens": 9}
BOTH = pytest.mark.parametrize("speculation", [CHAIN, TREE], ids=["chain", "tree"])
GREEDY, SAMPLED = {}, {"temperature": 0.6, "top_p": 0.95, "seed": 11}
EITHER = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("cases")
    target = tiny.build(folder / "target", "llama", varied=True)
    return target, tiny.noisy_copy(target, folder / "draft", 0.07)


def edited(source, folder, edit):
    """A copy of a checkpoint after ``edit(model)``."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def opened(target, draft=None, observe=lambda span: None, **options):
    return open_engine(observers=[observe], target=target, draft=draft, **{**SMALL, "max_batch": 1, **options})


async def tokens_of(target, draft=None, prompts=(PROMPT,), options=OFF, **params):
    """The tokens of every prompt, and the last one's statistics."""
    async with opened(target, draft, **options) as engine:
        found = await asyncio.gather(*(collect(engine, prompt, **params) for prompt in prompts))
    return [tokens for _, tokens, _ in found], found[-1][2].stats


@pytest.fixture(scope="module")
def plain_tokens(pair):
    """What the target says without a draft, decoded once for all cases that want the same."""
    known = {}

    async def get(**params):
        key = tuple(sorted(params.items()))
        if key not in known:
            known[key], _ = await tokens_of(pair[0], **params)
        return known[key]

    return get


# -- drafts ------------------------------------------------------------------------------------------------


def constant(model):
    model.lm_head.weight.zero_()


def always_wrong(model):
    model.lm_head.weight.neg_()


def random_other(model):
    tiny.randomise(model, 77, varied=True)


@BOTH
@EITHER
@pytest.mark.parametrize("edit", [constant, always_wrong, random_other])
async def test_bad_drafts_change_nothing(pair, plain_tokens, tmp_path, edit, params, speculation):
    draft = edited(pair[0], tmp_path, edit)
    plain = await plain_tokens(max_new_tokens=20, **params)
    found, stats = await tokens_of(pair[0], draft, options=speculation, max_new_tokens=20, **params)
    assert found == plain
    assert stats.proposed > 0
    assert stats.accepted < stats.proposed / 5


async def test_what_the_text_has_said_before_helps_a_bad_draft(pair, tmp_path):
    """A text that goes in circles: its own past is in the tree beside what the draft model offers."""
    draft = edited(pair[0], tmp_path, random_other)
    prompt, circles = [9, 10, 11, 12] * 4, {"repetition_penalty": 0.2, "max_new_tokens": 40}
    plain, _ = await tokens_of(pair[0], prompts=[prompt], **circles)
    found, with_tree = await tokens_of(pair[0], draft, [prompt], TREE, **circles)
    _, with_chain = await tokens_of(pair[0], draft, [prompt], CHAIN, **circles)
    assert found == plain
    assert with_tree.tokens_per_pass > 1.5 * with_chain.tokens_per_pass


@EITHER
async def test_a_draft_that_is_the_target_accepts_its_whole_chain_every_time(pair, params):
    outcomes = []
    async with opened(pair[0], pair[0], lambda span: outcomes.extend(span.outcomes), **CHAIN) as engine:
        _, tokens, last = await collect(engine, PROMPT, max_new_tokens=1 + 5 * 5, **params)
    plain, _ = await tokens_of(pair[0], max_new_tokens=26, **params)
    assert tokens == plain[0]
    assert [(o.num_accepted, o.num_new) for o in outcomes] == [(0, 1)] + [(4, 5)] * 5
    assert last.stats.tokens_per_pass == 5


@BOTH
async def test_a_draft_whose_logits_are_no_numbers_is_one_error(pair, tmp_path, speculation):
    draft = edited(pair[0], tmp_path, lambda model: model.lm_head.weight[7].fill_(float("nan")))
    async with opened(pair[0], draft, **speculation) as engine:
        for prompt in (PROMPT, PROMPT):
            with pytest.raises(NumericError, match="finite"):
                await collect(engine, prompt, max_new_tokens=8)


# -- damaged weights ---------------------------------------------------------------------------------------

POISON = 77
WAYS = {
    "off": {"speculation": "off"},
    "chains in groups": {**CHAIN, "num_groups": 2},
    "trees, attention apart": {**TREE, "attention": "cpu"},
    "trees, prompts in chunks": {**TREE, "prefill_tokens": 5},
    "ngram": {},
}


def poisoned(source, folder):
    """A copy of a checkpoint with one token whose embedding is not a number."""
    return edited(source, folder, lambda model: model.model.embed_tokens.weight[POISON].fill_(float("nan")))


@pytest.mark.parametrize("way", few(WAYS, 3))
async def test_a_poisoned_token_fails_its_own_requests(pair, tmp_path, way):
    """Rows are fewer than requests, so that later requests follow failed ones; at last every row is poisoned."""
    target, draft = poisoned(pair[0], tmp_path / "target"), poisoned(pair[1], tmp_path / "draft")
    good = [[3, 10], [20, 30, 40, 50, 60, 70], [9], [8] * 12]
    bad = [[5, POISON, 6], [POISON], [5] * 11 + [POISON], [POISON] * 9]
    plain, _ = await tokens_of(target, prompts=good, max_new_tokens=12, no_repeat_ngram_size=2)
    options = {**WAYS[way], "max_batch": 3, "device_memory": 6 << 20}
    uses = {"off": None, "ngram": "ngram"}.get(way, draft)
    params = SamplingParams(max_new_tokens=12, no_repeat_ngram_size=2, ignore_eos=True)

    async def one(engine, prompt):
        try:
            return [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]
        except NumericError:
            return None

    async with opened(target, uses, **options) as engine:
        for prompts in ([*good, *bad], [*bad, *good], bad, good):
            mixed = prompts[::2] + prompts[1::2]
            found = dict(zip(map(tuple, mixed), await asyncio.gather(*(one(engine, p) for p in mixed)), strict=True))
            assert [found[tuple(prompt)] for prompt in good if prompt in prompts] == (plain if prompts != bad else [])
            assert all(found[tuple(prompt)] is None for prompt in bad if prompt in prompts)


def padded(model, size, loudness):
    """More ids than the tokenizer knows, so much louder than those."""
    std = float(model.lm_head.weight.std()) * loudness
    model.resize_token_embeddings(size, mean_resizing=False)
    model.lm_head.weight[tiny.VOCAB :].normal_(std=std, generator=torch.Generator().manual_seed(3))


@BOTH
@EITHER
@pytest.mark.parametrize(("of_target", "of_draft"), [(256, 300), pytest.param(300, 256, marks=pytest.mark.slow)])
async def test_vocabularies_padded_differently(pair, tmp_path, of_target, of_draft, params, speculation):
    target = edited(pair[0], tmp_path / "target", lambda model: padded(model, of_target, 1.0))
    draft = edited(pair[1], tmp_path / "draft", lambda model: padded(model, of_draft, 3.0))
    plain, _ = await tokens_of(target, max_new_tokens=30, **params)
    found, stats = await tokens_of(target, draft, options=speculation, max_new_tokens=30, **params)
    assert found == plain
    assert stats.accepted > 0
    assert (max(found[0]) >= tiny.VOCAB) == (of_target > tiny.VOCAB), "what the draft cannot know was said"


# -- near ties ---------------------------------------------------------------------------------------------


def with_twins(model):
    """Every other token is its neighbour's twin: their logits differ in the last bits at most."""
    head = model.lm_head.weight
    head[1::2] = torch.nextafter(head[::2], torch.tensor(torch.inf))


async def test_greedy_near_ties(pair, tmp_path):
    """Exact steps never tell; without them a text's first difference is between twins, whose tie is that near."""
    target = edited(pair[0], tmp_path / "target", with_twins)
    draft = tiny.noisy_copy(target, tmp_path / "draft", 0.07)
    prompts = [PROMPT, list(range(30, 60)), [200]]
    plain, _ = await tokens_of(target, prompts=prompts, max_new_tokens=24)
    for shape in (CHAIN, TREE):
        options = {**shape, "max_batch": 3, "device_memory": 6 << 20}
        found, _ = await tokens_of(target, draft, prompts, options, max_new_tokens=24)
        assert found == plain
        loose, stats = await tokens_of(target, draft, prompts, {**options, "exact": False}, max_new_tokens=24)
        assert stats.accepted > 0
        for one, two in zip(loose, plain, strict=True):
            differing = [(a, b) for a, b in zip(one, two, strict=True) if a != b]
            assert all(a // 2 == b // 2 for a, b in differing[:1]), differing


# -- ends --------------------------------------------------------------------------------------------------


def ending_with(target, folder, ends):
    """The same checkpoint with other end tokens."""
    folder.mkdir()
    for file in target.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.mark.parametrize("speculation", few([TREE, CHAIN], 1), ids=["tree", "chain"])
async def test_an_end_token_at_every_place_of_a_block(pair, tmp_path, speculation):
    """As the first token, inside an accepted path, as its leaf and as the bonus token; of several end ids."""
    (plain,), _ = await tokens_of(pair[0], max_new_tokens=12)
    assert len(set(plain)) == 12, "each stands where it stands for the first time"
    for place, end in enumerate(plain):
        target = ending_with(pair[0], tmp_path / f"{place}", [255, end])
        async with opened(target, pair[0], **speculation) as engine:
            text, tokens, last = await collect(engine, PROMPT, max_new_tokens=40, ignore_eos=False)
            whole = engine.tokenizer.decode(tokens[:-1])
        assert tokens == plain[: place + 1]
        assert text == whole, "an end token has no text"
        assert (last.finish_reason, last.stats.completion_tokens) == ("stop", place + 1)


@BOTH
async def test_a_stop_string_at_every_place_of_a_block(pair, speculation):
    async with opened(pair[0], pair[0], **speculation) as engine:
        text, plain, _ = await collect(engine, PROMPT, max_new_tokens=30)
        said = [engine.tokenizer.decode(plain[:count]) for count in range(31)]
        stops = [stop for at in range(len(text)) if (stop := text[at : at + 2]).isascii()]
        assert len(stops) > 4
        for stop in stops:
            cut, tokens, last = await collect(engine, PROMPT, max_new_tokens=30, stop=(stop,))
            assert cut == text[: text.index(stop)]
            assert tokens == plain[: next(count for count, start in enumerate(said) if stop in start)]
            assert (last.finish_reason, last.stats.completion_tokens) == ("stop", len(tokens))


@BOTH
async def test_a_limit_at_every_place_of_a_block(pair, speculation):
    (plain,), _ = await tokens_of(pair[0], max_new_tokens=14)
    async with opened(pair[0], pair[0], **speculation) as engine:
        for limit in range(15):
            _, tokens, last = await collect(engine, PROMPT, max_new_tokens=limit)
            assert tokens == plain[:limit]
            assert (last.finish_reason, last.stats.completion_tokens) == ("length", limit)


@BOTH
async def test_a_context_that_a_proposal_does_not_fit_into_is_filled_to_its_last_slot(pair, speculation):
    for free in (1, 2, 3, 7):
        prompt = list(range(100, 196 - free))
        plain, _ = await tokens_of(pair[0], prompts=[prompt], max_new_tokens=50)
        found, stats = await tokens_of(pair[0], pair[1], [prompt], speculation, max_new_tokens=50)
        assert found == plain
        assert stats.completion_tokens == len(found[0]) == free
        assert (stats.proposed > 0) == (free > 2)


@pytest.mark.parametrize("op", [Op.READ, Op.DRAFT_PREFILL, Op.DRAFT, Op.LAYER, Op.HEAD, Op.ACCEPT])
@BOTH
async def test_after_a_cancel_in_the_middle_the_next_request_is_as_fresh(pair, plain_tokens, op, speculation):
    reached, seen = asyncio.Event(), itertools.count(1)

    def observe(span):
        if span.task.op is op and next(seen) == (1 if op is Op.DRAFT_PREFILL else 6):
            reached.set()

    asked = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3}
    fresh = await plain_tokens(**asked)
    async with opened(pair[0], pair[1], observe, **speculation) as engine:
        task = asyncio.create_task(collect(engine, list(range(20, 60)), max_new_tokens=50))
        await reached.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        _, tokens, last = await collect(engine, PROMPT, **asked)
        assert task.cancelled()
        assert not engine._streams._queues
        assert not engine._streams._requests
    assert tokens == fresh[0]
    assert last.stats.completion_tokens == 16


# -- caches ------------------------------------------------------------------------------------------------


def fresh_cache(folder, tokens, exact):
    """A cache that holds tokens after one prefill."""
    streamed = tiny.Streamed(Model(folder))
    cache = KVCache(streamed.model.kv_shapes(), 1, len(tokens), torch.float32, exact=exact)
    streamed.run((torch.tensor([tokens]), cache.step([0], [0], [len(tokens)])))
    return cache


def stored(cache, row, length):
    return [tensor[row, :, :length].clone() for tensor in (*cache.keys, *cache.values)]


class Caches:
    """What both caches hold of a lone row's committed tokens after every round."""

    def __init__(self):
        self.engine, self.rounds, self.outcomes = None, [], []

    def observe(self, span):
        if not span.outcomes or span.task.item.prefill:
            return
        runner = self.engine._open.runner
        drafter = runner._drafter
        drafted, length = drafter._rows[0].drafted, len(runner.sequence_in(0).tokens) - 1
        self.rounds.append((stored(runner._target_kv, 0, length), stored(drafter._kv, 0, drafted), length - drafted))
        self.outcomes += span.outcomes

    def check(self, target, draft):
        """Against one fresh prefill each: what stands at a position depends on nothing behind it."""
        for of_target, of_draft, behind in self.rounds:
            for kept, fresh in ((of_target, target), (of_draft, draft)):
                for one, two in zip(kept, (*fresh.keys, *fresh.values), strict=True):
                    torch.testing.assert_close(one, two[0, :, : one.shape[1]], rtol=0, atol=2e-5)
            for one, two in zip(of_target, (*target.keys, *target.values), strict=True):
                assert torch.equal(one, two[0, :, : one.shape[1]]), "the target's are exact"
            assert behind >= -1, "a draft that went on has seen the last token, which the target has not"


@BOTH
async def test_after_every_round_both_caches_are_those_of_a_fresh_prefill(pair, speculation):
    """After a miss at the root as after a whole chain, whose last token the draft has not seen."""
    caches = Caches()
    async with opened(pair[0], pair[1], caches.observe, **speculation) as caches.engine:
        _, tokens, _ = await collect(caches.engine, PROMPT, max_new_tokens=60)
    tokens = [*PROMPT, *tokens]
    caches.check(fresh_cache(pair[0], tokens, True), fresh_cache(pair[1], tokens, False))
    accepted = [outcome.num_accepted for outcome in caches.outcomes]
    assert min(accepted) == 0
    assert max(accepted) >= 3
    assert {behind for *_, behind in caches.rounds} > {0}, "sometimes the draft has to catch up"


@EITHER
async def test_a_wrong_guess_ahead_touches_neither_output_nor_caches(pair, params):
    """Layers land slowly enough that the draft goes on between them, below what then is drawn and below what is not."""
    caches, spans = Caches(), []

    def observe(span):
        spans.append(span)
        caches.observe(span)

    slow = {**TREE, "resident_memory": 0, "link_rate": 3e6, "draft_depth": 3}
    async with opened(pair[0], pair[1], observe, **slow) as caches.engine:
        _, tokens, _ = await collect(caches.engine, PROMPT, max_new_tokens=60, **params)
    assert [tokens] == (await tokens_of(pair[0], max_new_tokens=60, **params))[0]
    tokens = [*PROMPT, *tokens]
    caches.check(fresh_cache(pair[0], tokens, True), fresh_cache(pair[1], tokens, False))
    assert any(span.task.growth and span.task.growth.ahead for span in spans)
    found = [bool(span.grown) for span in spans if span.task.op is Op.ACCEPT]
    assert any(found), "some guesses were right"
    assert not all(found[1:]), "and some were not"
    assert -1 in {behind for *_, behind in caches.rounds}


# -- streams -----------------------------------------------------------------------------------------------


async def run_resident(target, resident_bytes):
    """Tokens with their logprobs, the plan, the reads in the order of the stream, and the number of passes."""
    spans = []
    async with opened(target, observe=spans.append, resident_memory=resident_bytes, device_memory=8 << 20) as engine:
        params = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
        said = [one async for piece in engine.stream(PROMPT, params) for one in piece.logprobs]
        plan = engine.plan
    reads = sorted((span.task for span in spans if span.task.op is Op.READ), key=lambda task: task.number)
    return said, plan, reads, sum(span.task.op is Op.HEAD for span in spans)


async def test_any_resident_set_gives_the_same_logits_and_moves_the_rest_in_every_pass(pair):
    expected, plan, reads, _ = await run_resident(pair[0], None)
    assert not reads
    sizes = list(itertools.accumulate((part.resident_bytes for part in plan.parts), initial=0))
    streamed = set()
    for allowed in sizes[:-1]:
        said, plan, reads, passes = await run_resident(pair[0], allowed)
        assert said == expected, "to the last bit"
        parts = plan.streamed
        streamed.add(len(parts))
        assert sum(part.resident_bytes for part in plan.parts if part not in parts) <= allowed
        turns = [read.number for read in reads]  # those ahead of a pass that never came may have been stopped
        needed = passes * len(parts)
        assert turns[:needed] == list(range(needed))
        assert set(turns[needed:]) <= set(range(needed, needed + plan.num_slots))
        assert [read.load.part for read in reads] == [parts[turn % len(parts)].index for turn in turns]
        assert {(read.load.part, read.nbytes) for read in reads} == {(part.index, part.nbytes) for part in parts}
    assert streamed == set(range(1, len(sizes))), "from all of them down to one"


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@BOTH
@pytest.mark.parametrize("name", ROPES)
async def test_scaled_rotary_positions(tmp_path, name, speculation):
    sizes = {"rope_parameters": {"rope_theta": 10_000.0, **ROPES[name]}}
    target = tiny.build(tmp_path / "target", "llama", varied=True, sizes=sizes)
    prompt = list(range(40, 80))  # longer than the positions that are not scaled
    model = tiny.reference(target)
    plain = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    draft = tiny.noisy_copy(target, tmp_path / "draft", 0.05)
    found, stats = await tokens_of(target, draft, [prompt], speculation, max_new_tokens=20)
    assert found[0] == plain[0, len(prompt) :].tolist()
    assert stats.accepted > 0


# -- accounts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculation", [OFF, CHAIN, TREE], ids=["off", "chain", "tree"])
async def test_statistics_are_those_of_the_spans_with_and_without_a_draft(pair, speculation):
    """The prefill's token and pass count in no rate, and nothing beyond the last token does."""
    spans = []
    async with opened(pair[0], pair[1], spans.append, **speculation) as engine:
        _, tokens, last = await collect(engine, list(range(20, 60)), max_new_tokens=23)
    accepts = [span for span in spans if span.task.op is Op.ACCEPT]
    outcomes = [outcome for span in accepts[1:] for outcome in span.outcomes]
    stats = last.stats
    assert accepts[0].outcomes[0].num_new == 1
    assert stats.passes == len(outcomes)
    assert stats.completion_tokens == len(tokens) == 1 + sum(outcome.num_new for outcome in outcomes)
    assert stats.completion_tokens == 1 + stats.passes + stats.accepted
    assert stats.proposed == sum(outcome.num_proposed for outcome in outcomes)
    assert stats.decode_s == pytest.approx(accepts[-1].stop_s - accepts[0].stop_s)
    assert stats.tokens_per_s == pytest.approx(22 / stats.decode_s)
    assert (stats.tokens_per_pass == 1) == (speculation is OFF)


def observed(costs, seconds_of, rounds):
    """The cost model after some rounds whose layers take so long."""
    for number, tokens in enumerate((1, 2, 4, 8, 16) * rounds):
        task = Task(
            0, Op.LAYER, "compute", 0, number=number, item=WorkItem(0, (0,), (5,), (tokens,)), payload=LayerWork(0)
        )
        costs.observe(Span(task, 0.0, seconds_of(tokens)))
        costs.end_round(number, 0.0)
    return costs


def test_a_shift_of_costs_in_the_middle_of_a_run_is_followed():
    """A pass that costs the same for any number of tokens, then one that costs its tokens, and back."""
    plan = make_plan(num_layers=4, resident=range(8), num_slots=0, max_draft_tokens=8)
    costs = observed(CostModel(), lambda tokens: 0.1, 5)
    assert costs.best_draft_tokens(plan, 1) == 8
    assert observed(costs, lambda tokens: 0.1 * tokens, 20).best_draft_tokens(plan, 1) == 0
    assert observed(costs, lambda tokens: 0.1, 20).best_draft_tokens(plan, 1) == 8


def test_a_target_whose_passes_grow_with_their_tokens_gets_smaller_trees(virtual):
    """As a mixture of experts does: every further token touches experts that no other has touched."""
    sizes = {}
    for name, token_s in (("dense", 1e-6), ("experts", 2e-3)):
        profile = SimCosts(disk_bytes_per_s=1e12, layer_s=5e-3, layer_token_s=token_s, acceptance=0.7, draft_s=1e-4)
        plan = make_plan(speculation=Speculation.TREE, fixed_draft_tokens=None, max_draft_tokens=64, num_rows=1)
        spans, _, _ = virtual(lambda plan=plan, profile=profile: simulate(plan, [(0, 20, 200)], profile=profile))
        proposed = [outcome.num_proposed for span in spans for outcome in span.outcomes][10:]
        sizes[name] = sum(proposed) / len(proposed)
    assert 0 < sizes["experts"] < sizes["dense"] / 2
