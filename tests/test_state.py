"""Recurrent layers: a node's state follows from its path, and what is not accepted leaves no trace."""

import asyncio
import dataclasses
import functools
import random

import pytest
import torch

from aspec.backends import registry as devices
from aspec.backends.registry import Kind
from aspec.engine.engine import open_engine
from aspec.errors import InternalError, UnsupportedModelError
from aspec.generation.params import SamplingParams
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.state.recurrence import Inputs
from aspec.models.state.shapes import RecurrenceShape, StateShape, node_bytes, row_bytes
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from tests import tiny
from tests.compat import few, of_kinds
from tests.fake_capture import FakeCapture
from tests.fake_device import EagerDevice
from tests.peak import Peak
from tests.test_equality import CHAIN_4, NEW, OFF, TREE_5, TREE_16, Pair, check, check_covering
from tests.test_kv import permuted, random_parents, slow_path

CHANNELS, TAPS, ROWS, LOG = 6, 4, 3, 24
KINDS = {
    "delta rule": (RecurrenceShape(2, 2, 8, 8, (1, 1)), True),
    "delta rule by channel": (RecurrenceShape(4, 1, 8, 5, (8, 1)), True),
    "state space": (RecurrenceShape(1, 4, 16, 3, (1, 1)), False),
    "selective scan": (RecurrenceShape(1, 1, 7, 12, (1, 12)), False),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Layer:
    """One recurrent layer over random inputs by token, so that a token alone decides what is added to a state."""

    def __init__(self, kind, seed=0):
        self.shape, self.delta = KINDS[kind]
        self.states = StateShape(((CHANNELS, TAPS),), self.shape)
        own, generator = self.shape, torch.Generator().manual_seed(seed)

        def normal(*sizes):
            return torch.randn(64, *sizes, generator=generator)

        heads = (own.heads,)
        self.query, self.key = normal(own.groups, own.key), normal(own.groups, own.key) / own.key**0.5
        self.value, self.rate = normal(*heads, own.value), -normal(*heads, *own.rate).abs() / 4
        self.beta = normal(*heads).sigmoid() if self.delta else None
        self.scale = normal(own.key, own.value)[0].abs() if own.rate[1] > 1 else None
        self.weight, self.bias, self.inputs = normal(CHANNELS)[:TAPS].T, normal(CHANNELS)[0], normal(CHANNELS)

    def cache(self, num_rows=ROWS, *, saves=False, exact=True):
        kept = {"states": [self.states], "log_slots": LOG, "saves": saves}
        return KVCache([None], num_rows, 200, torch.float32, exact=exact, **kept)

    def run(self, step, tokens):
        """The results of a step, by row and node, as one tensor each."""
        ids, (_, layer) = tiny.pad(tokens), step.mixer(0)
        flat = ids.flatten()
        beta = None if self.beta is None else self.beta[flat]
        given = Inputs(self.query[flat], self.key[flat], self.value[flat], self.rate[flat], beta, self.scale)
        convolved = layer.convolve(self.inputs[ids], self.weight, self.bias)
        recurred = layer.recur(given).reshape(*ids.shape, -1)
        return [torch.cat([convolved, recurred], -1)[row, : len(own)] for row, own in enumerate(tokens)]

    def decode(self, tokens):
        """[N, ...] of tokens one by one."""
        cache = self.cache(1)
        steps = [(cache.step([0], [at], [1], finals=[at + 1]), [[token]]) for at, token in enumerate(tokens)]
        return torch.cat([self.run(step, token)[0] for step, token in steps])

    def defined(self, tokens):
        """The results of a path by the definition, in double precision."""
        state = torch.zeros(self.shape.heads, self.shape.key, self.shape.value).double()
        found, padded = [], torch.cat([torch.zeros(TAPS - 1, CHANNELS), self.inputs[tokens]]).double()
        for at, token in enumerate(tokens):
            rate = self.rate[token].double() * (1 if self.scale is None else self.scale.double())
            state = state * rate.exp()
            shared = self.shape.shared
            key, query = (one[token].double().repeat_interleave(shared, 0)[..., None] for one in (self.key, self.query))
            update = self.value[token].double()
            if self.beta is not None:
                update = (update - (state * key).sum(-2)) * self.beta[token].double()[..., None]
            state = state + key * update[..., None, :]
            convolved = (padded[at : at + TAPS] * self.weight.T.double()).sum(0) + self.bias.double()
            found.append(torch.cat([convolved, (state * query).sum(-2).flatten()]))
        return torch.stack(found)


def some_tokens(dice, count):
    return [dice.randrange(64) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_recurrence_is_the_one_of_its_definition(kind):
    layer, tokens = Layer(kind), some_tokens(random.Random(kind), 30)
    assert (layer.decode(tokens) - layer.defined(tokens)).abs().max() < 1e-5


class Rows:
    """Rows of random text that decode with random trees, of which random paths are accepted."""

    def __init__(self, kind, seed, *, exact=True):
        self.dice, self.layer, self.exact = random.Random(f"{kind} {seed}"), Layer(kind), exact
        self.cache, self.texts = self.layer.cache(exact=exact), {row: [] for row in range(ROWS)}

    def chosen(self):
        return sorted(self.dice.sample(range(ROWS), self.dice.randint(1, ROWS)))

    def check(self, rows, paths, results):
        """Every node of a step equals the last of its path, decoded alone."""
        for row, own, found in zip(rows, paths, results, strict=True):
            assert len(own) == len(found)
            wanted, text = {}, self.texts[row]
            for path in sorted(own, key=len, reverse=True):
                if tuple(path) not in wanted:  # not the beginning of a longer one
                    decoded = self.layer.decode(text + path)
                    wanted |= {tuple(path[: n + 1]): decoded[len(text) + n] for n in range(len(path))}
            for path, result in zip(own, found, strict=True):
                expected = wanted[tuple(path)]
                assert torch.equal(result, expected) if self.exact else (result - expected).abs().max() < 1e-5

    def prefill(self):
        """Chunks of prompts, all of which stay."""
        rows = self.chosen()
        fed = [some_tokens(self.dice, self.dice.randint(1, 9)) for _ in rows]
        starts, counts = [len(self.texts[row]) for row in rows], [len(own) for own in fed]
        finals = [start + count for start, count in zip(starts, counts, strict=True)]
        results = self.layer.run(self.cache.step(rows, starts, counts, finals=finals), fed)
        self.check(rows, [[own[: at + 1] for at in range(len(own))] for own in fed], results)
        for row, own in zip(rows, fed, strict=True):
            self.texts[row] += own

    def verify(self):
        """The last token of some rows and a tree below it, at once; then a path is accepted."""
        rows = self.chosen()
        trees = [[-1, *(p + 1 for p in random_parents(self.dice.randint(1, 12), self.dice))] for _ in rows]
        fed = [some_tokens(self.dice, len(tree)) for tree in trees]
        starts = [len(self.texts[row]) for row in rows]
        step = self.cache.step(rows, starts, [len(own) for own in fed], trees, finals=[start + 1 for start in starts])
        self.check_trees(rows, trees, fed, self.layer.run(step, fed))
        for row, tree, own in zip(rows, trees, fed, strict=True):
            self.accept(row, slow_path(tree, self.dice.randrange(len(tree))), own)

    def grow(self):
        """A draft: new tokens of some rows, then a tree that grows by a few nodes a step; then a path is accepted."""
        rows = self.chosen()
        trees = [random_parents(self.dice.randint(1, 20), self.dice) for _ in rows]
        fed, firsts = [some_tokens(self.dice, len(tree)) for tree in trees], [0] * len(rows)
        starts = [len(self.texts[row]) for row in rows]
        while left := [at for at, tree in enumerate(trees) if firsts[at] < len(tree)]:
            counts = [self.dice.randint(1, min(7, len(trees[at]) - firsts[at])) for at in left]
            ends = [firsts[at] + count for at, count in zip(left, counts, strict=True)]
            links = [trees[at][:end] for at, end in zip(left, ends, strict=True)]
            own_rows, own_starts = [rows[at] for at in left], [starts[at] for at in left]
            begun = [firsts[at] for at in left]
            step = self.cache.step(own_rows, own_starts, counts, links, begun, finals=own_starts)
            now = [fed[at][first:end] for at, first, end in zip(left, begun, ends, strict=True)]
            results = self.layer.run(step, now)
            for row, at, first, end, found in zip(own_rows, left, begun, ends, results, strict=True):
                paths = [[fed[at][n] for n in slow_path(trees[at], node)] for node in range(first, end)]
                self.check([row], [paths], [found])
                firsts[at] = end
        for row, tree, own in zip(rows, trees, fed, strict=True):
            self.accept(row, slow_path(tree, self.dice.randrange(len(tree))), own)

    def check_trees(self, rows, trees, fed, results):
        paths = [
            [[own[n] for n in slow_path(tree, node)] for node in range(len(tree))]
            for tree, own in zip(trees, fed, strict=True)
        ]
        self.check(rows, paths, results)

    def accept(self, row, path, tokens):
        self.cache.gather(row, len(self.texts[row]), path)
        self.texts[row] += [tokens[node] for node in path]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("acts", few((4, 12, 20), 1))
def test_a_node_depends_on_its_path_only(kind, acts):
    rows = Rows(kind, acts)
    rows.prefill()
    for _ in range(acts):
        rows.dice.choice((rows.prefill, rows.verify, rows.grow))()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("acts", few((4, 20), 1))
def test_steps_that_are_not_exact_are_equal_up_to_rounding(kind, acts, monkeypatch):
    monkeypatch.setattr("aspec.models.state.nodes.PIECE", 3)
    rows = Rows(kind, f"rounded {acts}", exact=False)
    rows.prefill()
    for _ in range(acts):
        rows.dice.choice((rows.prefill, rows.verify, rows.grow))()


def test_the_order_of_siblings_does_not_matter():
    layer, dice = Layer("state space"), random.Random(2)
    tree, tokens = random_parents(11, dice), some_tokens(dice, 11)
    other, new = permuted(tree, dice)
    order = sorted(range(11), key=new.get)
    one, two = (
        layer.run(layer.cache(1).step([0], [0], [11], [links], finals=[0]), [own])[0]
        for links, own in ((tree, tokens), (other, [tokens[node] for node in order]))
    )
    assert torch.equal(two, one[order])


def test_chains_of_a_draft_are_taken_back():
    """A chain continues its own tokens before they are final; the final ones are then fed again or kept."""
    layer, dice = Layer("delta rule"), random.Random(3)
    cache, text = layer.cache(1), some_tokens(dice, 9)
    layer.run(cache.step([0], [0], [9], finals=[9]), [text])
    chain = some_tokens(dice, 5)
    for at, token in enumerate(chain):
        found = layer.run(cache.step([0], [9 + at], [1], finals=[9]), [[token]])[0]
        assert torch.equal(found[0], layer.decode(text + chain[: at + 1])[-1])
    text += [*chain[:2], some_tokens(dice, 1)[0]]
    found = layer.run(cache.step([0], [11], [1], finals=[12]), [text[11:]])[0]
    assert torch.equal(found[0], layer.decode(text)[-1])


def test_a_saved_state_is_continued_though_the_row_went_on():
    layer, dice = Layer("delta rule"), random.Random(5)
    cache, text = layer.cache(1, saves=True), some_tokens(dice, 12)
    layer.run(cache.step([0], [0], [6], finals=[5]), [text[:6]])
    cache.save(0)
    layer.run(cache.step([0], [6], [6], finals=[11]), [text[6:]])
    assert [cache.reusable(0, length) for length in (4, 5, 8, 11, 12)] == [0, 5, 5, 11, 12]
    other = text[:5] + some_tokens(dice, 4)
    found = layer.run(cache.step([0], [5], [4], finals=[9]), [other[5:]])[0]
    assert torch.equal(found, layer.decode(other)[5:])
    layer.run(cache.step([0], [0], [1], finals=[1]), [[3]])
    assert cache.reusable(0, 5) == 0


def test_what_was_cleared_and_what_is_not_known_is_not_used():
    layer, dice = Layer("delta rule"), random.Random(4)
    cache, text = layer.cache(1), some_tokens(dice, 12)
    layer.run(cache.step([0], [0], [12], finals=[10]), [text])
    assert [cache.reusable(0, length) for length in (9, 10, 12, 13)] == [0, 10, 12, 0]
    with pytest.raises(InternalError, match="continues token 9: its state is known from 10 to 12 only"):
        layer.run(cache.step([0], [9], [1], finals=[10]), [[3]])
    cache.clear(0, 11)
    assert [cache.reusable(0, length) for length in (10, 11, 12)] == [10, 11, 0]
    cache.clear(0)
    assert cache.reusable(0, 10) == 0
    again = layer.run(cache.step([0], [0], [5], finals=[5]), [text[:5]])[0]
    assert torch.equal(again, layer.decode(text[:5]))
    with pytest.raises(ValueError, match=f"25 nodes of row 0 may be taken back; the log holds {LOG}"):
        cache.step([0], [0], [30], finals=[5])


def test_bytes_of_rows_and_nodes():
    shape = StateShape(((CHANNELS, TAPS),), KINDS["delta rule by channel"][0])
    kept = {"states": [shape], "log_slots": 5, "saves": True}
    one, all_ = (KVCache([None], rows, 8, torch.bfloat16, **kept).nbytes for rows in (1, 4))
    assert all_ == 4 * one
    assert one == 2 * row_bytes([shape], torch.bfloat16) + 5 * node_bytes([shape], torch.bfloat16)
    assert row_bytes([shape], torch.bfloat16) == 2 * CHANNELS * (TAPS - 1) + 4 * 4 * 8 * 5
    assert node_bytes([shape], torch.bfloat16) == 2 * CHANNELS + 4 * 4 * (8 + 5 + 8)


# -- models --------------------------------------------------------------------------------------------------


class Bound:
    """A model whose weights are all bound."""

    def __init__(self, folder, dtype):
        self.model, self.held = Model(folder, dtype=dtype), []
        for part in self.model.parts(1 << 30):
            buffer, scratch = tiny.read_part(part), torch.empty(part.scratch_bytes, dtype=torch.uint8)
            self.model.bind(dataclasses.replace(part, scratch_at=0), buffer, scratch)
            self.held += [buffer, scratch]

    def cache(self, num_rows):
        own = self.model
        return KVCache(own.kv_shapes(), num_rows, 96, own.dtype, exact=True, states=own.state_shapes, log_slots=16)

    @torch.inference_mode()
    def run(self, tokens, step):
        activation = self.model.embed(tiny.pad(tokens), step)
        for layer in range(self.model.num_layers):
            self.model.layer(layer, activation)
        return self.model.head(activation)


BITS = [(family, dtype) for family in tiny.STATEFUL for dtype in DTYPES]
QUICK = ("falcon_h1", torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "dtype"), [pytest.param(*own, marks=() if own == QUICK else pytest.mark.slow) for own in BITS]
)
def test_chunks_and_trees_have_the_bits_of_decoding(family, dtype, tmp_path, one_thread):
    check_bits(family, dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["falcon_h1", "jamba", "kimi_linear", "qwen3_5_text"])
def test_chunks_and_trees_have_the_bits_of_decoding_with_two_threads(family, tmp_path, one_thread):
    torch.set_num_threads(2)
    check_bits(family, torch.bfloat16, tmp_path)


def check_bits(family, dtype, tmp_path):
    bound, dice = Bound(tiny.build(tmp_path, family, varied=True), dtype), random.Random(family)
    text = [dice.randrange(3, tiny.VOCAB) for _ in range(30)]
    plain = bound.cache(1)
    wanted = [bound.run([[token]], plain.step([0], [at], [1], finals=[at + 1]))[0, 0] for at, token in enumerate(text)]
    chunked, at = bound.cache(2), 0
    while at < 20:  # the same text in two rows, one of them in smaller chunks
        counts = [dice.randint(1, 7), 1]
        counts[0] = min(counts[0], 20 - at)
        step = chunked.step([0, 1], [at, at], counts, finals=[at + counts[0], at + 1])
        logits = bound.run([text[at : at + count] for count in counts], step)
        assert torch.equal(logits[0, : counts[0]], torch.stack(wanted[at : at + counts[0]]))
        assert torch.equal(logits[1, 0], wanted[at])
        for more in range(1, counts[0]):
            step = chunked.step([1], [at + more], [1], finals=[at + more + 1])
            assert torch.equal(bound.run([[text[at + more]]], step)[0, 0], wanted[at + more])
        at += counts[0]
    tree = [-1, 0, 0, 1, 1, 3, 2, 5]  # the text's own path: 0, 1, 3, 5, 7
    own = {0: 20, 1: 21, 3: 22, 5: 23, 7: 24}
    tokens = [text[own[node]] if node in own else 5 for node in range(len(tree))]
    logits = bound.run([tokens, [text[20]]], chunked.step([0, 1], [20, 20], [8, 1], [tree, [-1]], finals=[21, 21]))
    assert all(torch.equal(logits[0, node], wanted[at]) for node, at in own.items())
    chunked.gather(0, 20, list(own))
    logits = bound.run([text[25:]], chunked.step([0], [25], [5], finals=[30]))
    assert torch.equal(logits[0], torch.stack(wanted[25:]))


@pytest.mark.parametrize("family", ["recurrent_gemma", "xlstm"])
def test_states_in_other_forms_are_refused_by_name(family, tmp_path):
    tiny.REFUSED[family]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="recurrent state in a form that cannot be rolled back"):
        Model(tmp_path)


def test_attention_does_not_run_apart_from_recurrent_layers(pair):
    with pytest.raises(UnsupportedModelError, match=r"recurrent layers run in one piece.*Run it with --attention dev"):
        _ = Model(pair.target).split_bytes
    with pytest.raises(UnsupportedModelError, match="in one piece"):
        _ = Model(pair.target).offload


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = Pair(tmp_path_factory.mktemp("state"), "qwen3_5_text", cached=False)
    made.find_draft()
    return made


def test_greedy_equals_transformers(pair):
    assert sum(stats.accepted for stats in check(pair, TREE_5, 3, "some")) > 0


def test_spans_say_what_nodes_and_commits_took(pair):
    _, _, spans = pair.run(TREE_5, 3, "some")
    recurrent = [shape is not None for shape in Model(pair.target).state_shapes]
    for span in spans:
        takes = recurrent[span.task.layer] if span.task.op is Op.LAYER else span.task.op is Op.ACCEPT
        assert takes == (span.states_s > 0), span.task.label
        assert span.states_s <= span.stop_s - span.start_s


async def ask(engine, tokens, params):
    """The tokens of an answer, and how many of the prompt were cached."""
    made = [piece async for piece in engine.stream(tokens, params)]
    return [token for piece in made for token in piece.token_ids], made[-1].stats.num_cached_tokens


def test_a_prompt_continues_saved_states_only(pair):
    """After a turn, at the end of a prompt; from any other token on the prompt is computed anew."""
    prompt = pair.prompts[0]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)

    async def main(**options):
        async with open_engine(
            target=pair.target, max_batch=1, max_context=128, prefill_tokens=16, device_memory=24 << 20, **options
        ) as engine:
            said, _ = await ask(engine, prompt, params)
            turns = [prompt + said + [5, 6, 7], prompt, prompt, prompt[:-3] + [9] * 5]
            return said, [await ask(engine, tokens, params) for tokens in turns]

    drafted = {"draft": pair.draft, "speculation": "tree", "num_draft_tokens": 9}
    said, answers = asyncio.run(main(**drafted))
    _, plain = asyncio.run(main(reuse_prefix=False))
    assert [cached for _, cached in answers] == [len(prompt) + len(said) - 1, 0, len(prompt) - 1, 0]
    assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in plain]


@pytest.mark.slow
@pytest.mark.parametrize("speculation", ["chain", "tree"])
def test_behind_a_link_and_in_groups_the_tokens_are_the_same(pair, monkeypatch, speculation):
    open_device = functools.partial(EagerDevice, pace_s=1e-4, copy_pace_s=1e-4)
    kind = Kind(torch.device("cpu"), lambda: True, lambda: 1 << 34, open_device, lambda: "a card", captures=True)
    monkeypatch.setitem(devices.KINDS, "cuda", kind)
    monkeypatch.setattr(EagerDevice, "capture", lambda self: FakeCapture())
    params, spans = SamplingParams(max_new_tokens=NEW, ignore_eos=True), []

    async def main():
        async with open_engine(
            observers=[spans.append],
            target=pair.target,
            draft=pair.draft,
            speculation=speculation,
            num_draft_tokens=5,
            max_batch=2,
            num_groups=2,
            max_context=80,
            prefill_tokens=16,
            device="cuda",
            exact=True,
            device_memory=64 << 20,
            resident_memory=0,
        ) as engine:
            return [await asyncio.gather(*(ask(engine, prompt, params) for prompt in pair.prompts))]

    [answers] = asyncio.run(main())
    assert [tokens for tokens, _ in answers] == pair.wanted
    assert find_races(spans) == []


@pytest.mark.slow
def test_sampled_tokens_do_not_depend_on_draft_batch_or_plan(pair):
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True, temperature=0.8, top_p=0.95, seed=3)
    plain, _, _ = pair.run(OFF, 3, "all", params)
    drafted, stats, _ = pair.run(CHAIN_4, 2, "none", params)
    grown, tree_stats, _ = pair.run(TREE_16, 3, "some", params)
    assert grown == plain
    assert drafted == plain[:2]
    assert sum(s.accepted for s in stats) > 0
    assert sum(s.accepted for s in tree_stats) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", of_kinds(list(tiny.STATEFUL)))
def test_greedy_equals_transformers_for_all_families(family, tmp_path):
    made = Pair(tmp_path, family, cached=False)
    made.find_draft()
    check_covering(made)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", few(list(KINDS), 1))
@pytest.mark.parametrize("links", ["chain", "tree", "bush"])
def test_a_step_holds_no_more_than_is_told(kind, links, exact):
    shape, delta = KINDS[kind]
    large = dataclasses.replace(shape, key=shape.key * 16, value=shape.value * 16)
    large = dataclasses.replace(large, rate=tuple(1 if n == 1 else n * 16 for n in shape.rate))
    states, dice = StateShape((), large), random.Random(links)
    cache = KVCache([None], 1, 80, torch.float32, exact=exact, states=[states], log_slots=64)
    bushy = {"chain": 0.0, "tree": 0.5, "bush": 1.0}[links]
    tree = [-1, *(n if dice.random() >= bushy else dice.randrange(n + 1) for n in range(40))]
    count = len(tree)

    def normal(*sizes):
        return torch.ones(count, *sizes)

    heads = large.heads
    given = Inputs(
        normal(large.groups, large.key),
        normal(large.groups, large.key),
        normal(heads, large.value),
        -normal(heads, *large.rate),
        normal(heads) if delta else None,
        torch.ones(large.key, large.value) if large.rate[1] > 1 else None,
    )
    _, layer = cache.step([0], [0], [count], [tree], finals=[1]).mixer(0)
    with torch.inference_mode(), Peak() as peak:
        layer.recur(given)
    told = states.step_bytes(count, 1, count, torch.float32)
    assert told / 6 < peak.nbytes <= told
