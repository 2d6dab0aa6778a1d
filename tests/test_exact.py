"""Exact steps: a node's logits are bit for bit those of decoding its path token by token, whatever shares the pass."""

import dataclasses
import functools
import math
import random

import pytest
import torch
import transformers

from aspec.io.host_info import compiler
from aspec.models.attention import attend
from aspec.models.exact import (
    compiled_attention,
    compiled_probe,
    flash,
    flash_probe,
    known_recipes,
    panels,
    products,
    row_probe,
    widening_probe,
)
from aspec.models.exact.compiled_attention import ATTENTION
from aspec.models.exact.modes import ExactProducts
from aspec.models.exact.paths import MaskKind
from aspec.models.exact.recipe import Recipe
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from tests import tiny
from tests.compat import few, of_kinds
from tests.test_kv import grow, permuted, random_parents, slow_path

PROVEN = {}  # recipes, kept between the tests of this file
LENGTH = 134  # committed tokens of the reference: a little more than two tiles
EDGES = (0, 1, 5, 37, 58, 60, 62, 63, 64, 65, 70, 100, 122, 126, 127, 128, 129, LENGTH)
DTYPES = [torch.bfloat16, torch.float32]
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
QUICK = ("llama", "mistral", "gemma2", "gpt_oss", "llama4_text", "mixtral", "deepseek_v3", "gpt_neox", "qwen2_moe")
OTHERS = sorted(set(tiny.FAMILIES) - set(QUICK))


@pytest.fixture(autouse=True)
def _recipes(monkeypatch):
    """Products of tiny models follow proven recipes too: elsewhere in the suite they run in blocks of one size."""
    monkeypatch.setattr(row_probe, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(known_recipes, "_known", PROVEN)
    monkeypatch.setattr(products, "_recipes", {})
    monkeypatch.setattr(known_recipes, "replace_json", lambda *_: None)
    monkeypatch.setattr(known_recipes, "read_record", lambda *_: {})  # what other tests have kept


@pytest.fixture(autouse=True)
def _threads():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Engine:
    """A model whose weights are all bound, and what it decodes token by token, from when it is first asked for."""

    def __init__(self, folder, dtype, **how):
        self.model = Model(folder, dtype=dtype, **how)
        self.held = []
        for part in self.model.parts(1 << 30):
            buffer, scratch = tiny.read_part(part), torch.empty(part.scratch_bytes, dtype=torch.uint8)
            self.model.bind(dataclasses.replace(part, scratch_at=0), buffer, scratch)
            self.held += [buffer, scratch]
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(3, tiny.VOCAB, (LENGTH,), generator=generator).tolist()

    @functools.cached_property
    def decoded(self):
        """The cache and the logits of every token."""
        cache = self.make_cache(1)
        return cache, torch.stack([self.decode(cache, at, token) for at, token in enumerate(self.tokens)])

    @property
    def logits(self):
        return self.decoded[1]

    def make_cache(self, num_rows, capacity=256):
        return KVCache(self.model.kv_shapes(), num_rows, capacity, self.model.dtype, exact=True)

    @torch.inference_mode()
    def run(self, tokens, step, keep=None):
        """Logits of a step; ``tokens`` per row."""
        activation = self.model.embed(tiny.pad(tokens), step)
        for layer in range(self.model.num_layers):
            self.model.layer(layer, activation)
        return self.model.head(activation, keep)

    def decode(self, cache, start, token):
        return self.run([[token]], cache.step([0], [start], [1]))[0, 0]

    def committed(self, starts):
        """A cache whose row ``b`` holds the first ``starts[b]`` tokens, and rubbish behind them."""
        cache = self.make_cache(len(starts))
        for storage, reference in zip((*cache.keys, *cache.values), self.storages(), strict=True):
            if storage is not None:
                storage.copy_(torch.randn(storage.shape))
                for row, start in enumerate(starts):
                    storage[row, :, :start] = reference[0, :, :start]
        return cache

    def storages(self):
        cache, _ = self.decoded
        return (*cache.keys, *cache.values)

    def tree_logits(self, start, parents, tokens):
        """Per node the logits of decoding its path alone, token by token."""
        found = {}
        leaves = set(range(len(parents))) - set(parents)
        for leaf in leaves:
            cache = self.committed([start])
            for depth, node in enumerate(slow_path(parents, leaf)):
                found[node] = self.decode(cache, start + depth, tokens[node])
        return [found[node] for node in range(len(parents))]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Builds a family once, and what it decodes once per dtype and number of threads."""
    root, folders, made = tmp_path_factory.mktemp("exact"), {}, {}

    def get(family, dtype, threads):
        torch.set_num_threads(threads)
        if family not in folders:
            folders[family] = tiny.build(root / family, family)
        if (family, dtype, threads) not in made:
            made[family, dtype, threads] = Engine(folders[family], dtype)
        return made[family, dtype, threads]

    return get


def check_chunks(engine, seed):
    """Ragged rows prefilled in chunks: logits and keys of every position."""
    generator = random.Random(seed)
    lengths = [generator.choice(EDGES[1:]) for _ in range(generator.choice((1, 2, 3)))]
    cache, done = engine.make_cache(len(lengths)), [0] * len(lengths)
    while rows := [b for b, length in enumerate(lengths) if done[b] < length]:
        starts = [done[b] for b in rows]
        counts = [min(generator.choice((1, 2, 3, 7, 30, 64, 100)), lengths[b] - done[b]) for b in rows]
        tokens = [engine.tokens[start : start + count] for start, count in zip(starts, counts, strict=True)]
        logits = engine.run(tokens, cache.step(rows, starts, counts))
        assert logits.shape[:2] == (len(rows), max(counts))
        for b, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            assert torch.equal(logits[b, :count], engine.logits[start : start + count]), (lengths, starts, counts)
            done[row] += count
    for storage, reference in zip((*cache.keys, *cache.values), engine.storages(), strict=True):
        for row, length in enumerate(lengths):
            assert storage is None or torch.equal(storage[row, :, :length], reference[0, :, :length])


def check_trees(engine, seed, num_rows=None, most=14):
    """Ragged rows of random trees, written at once or grown."""
    generator = random.Random(seed)
    num_rows = num_rows or generator.choice((1, 2, 3))
    starts = [generator.choice(EDGES) for _ in range(num_rows)]
    trees = [random_parents(generator.randint(1, most), generator, generator.random()) for _ in range(num_rows)]
    tokens = [[generator.randrange(3, tiny.VOCAB) for _ in tree] for tree in trees]
    expected = [engine.tree_logits(*row) for row in zip(starts, trees, tokens, strict=True)]
    case = f"{starts=} {trees=}"
    cache, rows = engine.committed(starts), list(range(num_rows))
    logits = engine.run(tokens, cache.step(rows, starts, [len(tree) for tree in trees], trees))
    for row, wanted in enumerate(expected):
        assert torch.equal(logits[row, : len(wanted)], torch.stack(wanted)), case
    cache = engine.committed(starts)
    for rows, firsts, counts, step in grow(cache, list(range(num_rows)), starts, trees, generator):
        own = [tokens[row][first : first + count] for row, first, count in zip(rows, firsts, counts, strict=True)]
        logits = engine.run(own, step)
        for b, (row, first, count) in enumerate(zip(rows, firsts, counts, strict=True)):
            assert torch.equal(logits[b, :count], torch.stack(expected[row][first : first + count])), case


def check(engine, seeds):
    for seed in seeds:
        check_chunks(engine, seed)
        check_trees(engine, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("family", of_kinds(QUICK))
def test_steps_equal_decoding(engine, family, dtype):
    check(engine(family, dtype, 1), range(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("family", few(["llama", "mixtral"], 1))
def test_steps_equal_decoding_with_two_threads(engine, family, dtype):
    check(engine(family, dtype, 2), range(2, 4))


EVERYWHERE = [(family, dtype, threads) for family in QUICK for dtype in DTYPES for threads in (1, 2)]
EVERYWHERE += [(family, *how) for family in OTHERS for how in ((torch.float32, 1), (torch.bfloat16, 2))]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_steps_equal_decoding_in_panels(family, tmp_path, monkeypatch):
    """On every machine, also where torch's own products are faster."""
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(known_recipes, "compiled_pays", lambda kind: False)
    monkeypatch.setattr(widening_probe, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(widening_probe, "FASTER", math.inf)
    monkeypatch.setattr(panels, "PANEL_BYTES", 1 << 13)
    torch.set_num_threads(1)
    check(Engine(tiny.build(tmp_path, family), torch.bfloat16), range(1))
    assert any(recipe.widening for recipe in known_recipes._known.values())


@pytest.mark.skipif(not compiler(), reason="without llvmlite nothing compiles")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_steps_equal_decoding_in_compiled_products(family, threads, tmp_path, monkeypatch):
    """On every machine, also where torch's own products are faster."""
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(compiled_probe, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(compiled_probe, "FASTER", math.inf)
    torch.set_num_threads(threads)
    check(Engine(tiny.build(tmp_path, family), torch.bfloat16), range(1))
    assert any(recipe.compiled for recipe in known_recipes._known.values())


@pytest.mark.skipif(not compiler(), reason="without llvmlite nothing compiles")
@pytest.mark.parametrize("family", few(["llama", "mistral", "gpt_oss", "llama4_text", "qwen2_moe"], 1))
def test_steps_equal_decoding_in_compiled_attention(family, tmp_path, monkeypatch):
    """On every machine, also where torch's own attention is faster."""
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(compiled_attention, "FASTER", math.inf)
    torch.set_num_threads(1)
    engine = Engine(tiny.build(tmp_path, family), torch.bfloat16)
    check(engine, range(1))
    check_trees(engine, 4, num_rows=1, most=40)
    assert any(recipe.compiled for kind, recipe in known_recipes._known.items() if kind.op == ATTENTION)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "threads"), EVERYWHERE)
def test_many_steps_equal_decoding(engine, family, dtype, threads):
    check(engine(family, dtype, threads), [4])
    check_trees(engine(family, dtype, threads), 16, num_rows=1, most=60)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_order_of_siblings_does_not_matter(engine, dtype):
    made = engine("llama", dtype, 1)
    generator = random.Random(7)
    parents = random_parents(24, generator)
    tokens = [generator.randrange(3, tiny.VOCAB) for _ in parents]
    first = made.run([tokens], made.committed([62]).step([0], [62], [24], [parents]))
    for seed in range(3):
        other, new = permuted(parents, random.Random(seed))
        moved = [tokens[node] for node in sorted(range(24), key=new.get)]
        logits = made.run([moved], made.committed([62]).step([0], [62], [24], [other]))
        assert torch.equal(logits[0, [new[node] for node in range(24)]], first[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_kept_columns_and_accepted_paths(engine, dtype):
    """The head at one column per row; then an accepted path goes on as a chain."""
    made = engine("llama", dtype, 1)
    parents, tokens = [-1, 0, 0, 2, 3, 3], [9, 8, 7, 6, 5, 4]
    expected = made.tree_logits(62, parents, tokens)
    cache = made.committed([62])
    kept = made.run([tokens], cache.step([0], [62], [6], [parents]), torch.tensor([[5]]))
    assert kept.shape[:2] == (1, 1)
    assert torch.equal(kept[0, 0], expected[5])
    path = slow_path(parents, 5)
    cache.gather(0, 62, path)
    alone = made.committed([62])
    for at, node in enumerate(path):
        made.decode(alone, 62 + at, tokens[node])
    assert torch.equal(made.decode(cache, 66, 77), made.decode(alone, 66, 77))


def test_the_end_of_a_cache_that_ends_within_a_tile(engine):
    made = engine("llama", torch.float32, 1)
    cache = made.make_cache(1, capacity=70)
    logits = made.run([made.tokens[:66]], cache.step([0], [0], [66]))
    assert torch.equal(logits[0], made.logits[:66])
    tree = made.run([[*made.tokens[66:69], 9]], cache.step([0], [66], [4], [[-1, 0, 1, -1]]))
    assert torch.equal(tree[0, :3], made.logits[66:69])


HEADS = [(8, 4, 32, 32), (32, 8, 128, 128), (6, 1, 64, 64), (4, 4, 48, 32)]  # heads, groups, key and value width


def check_attention(shape, dtype, start, parents, options):
    """Attention alone, at real sizes: every node against one query over its path."""
    heads, groups, width, value_width = shape
    generator = torch.Generator().manual_seed(start)
    count, capacity = len(parents), start + len(parents) + 1

    def normal(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    query = normal(1, heads, count, width)
    new = normal(1, groups, count, width), normal(1, groups, count, value_width)
    old = normal(groups, start, width), normal(groups, start, value_width)

    def result(cache, at, nodes, links):
        step = cache.step([0], [at], [len(nodes)], links)
        nodes = nodes + [nodes[-1]] * (step.slots.shape[1] - len(nodes))
        keys, values = step.update(new[0][:, :, nodes], new[1][:, :, nodes], 0)
        mask = step.seen(options.get("kind", MaskKind()))
        extra = {name: value for name, value in options.items() if name != "kind"}
        return attend(None, query[:, :, nodes], keys, values, mask, **extra)[0][0]

    def fresh():
        cache = KVCache([(groups, width, value_width)], 1, capacity, dtype, exact=True)
        cache.keys[0][0, :, :start], cache.values[0][0, :, :start] = old
        return cache

    together = result(fresh(), start, list(range(count)), [parents])
    for leaf in set(range(count)) - set(parents):
        alone = fresh()
        for depth, node in enumerate(slow_path(parents, leaf)):
            assert torch.equal(result(alone, start + depth, [node], None)[0], together[node]), (start, node)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_attention_at_size(shape, dtype, threads):
    torch.set_num_threads(threads)
    generator = random.Random(0)
    for start in (5, 60, 250, 1020):
        check_attention(shape, dtype, start, random_parents(12, generator), {})
        check_attention(shape, dtype, start, list(range(-1, 9)), {})


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", ["window", "chunk", "softcap", "sinks"])
def test_attention_of_every_kind(name, dtype):
    torch.set_num_threads(1)
    options = {
        "window": {"kind": MaskKind(window=70)},
        "chunk": {"kind": MaskKind(chunk=48)},
        "softcap": {"softcap": 5.0, "scaling": 0.3},
        "sinks": {"s_aux": torch.randn(8).to(dtype)},
    }[name]
    generator = random.Random(0)
    for start in (5, 60, 130, 250):
        check_attention(HEADS[0], dtype, start, random_parents(16, generator), options)


LONG = 700  # positions: several pieces, and keys beyond one block of torch's kernel
DEEP = [*range(-1, 89), 40, 40, 91, *range(88, 120)]  # a tree whose paths part before a piece that they reach


class Prompt:
    """The attention of one layer to LONG positions, in steps of any kind."""

    def __init__(self, shape, dtype, options):
        heads, self.groups, self.width = shape
        generator = torch.Generator().manual_seed(0)
        self.dtype, self.kind = dtype, options.get("kind", MaskKind())
        self.extra = {name: value for name, value in options.items() if name != "kind"}
        self.query, self.key, self.value = (
            (torch.randn(1, count, LONG, self.width, generator=generator) * size).to(dtype)
            for count, size in ((heads, 2), (self.groups, 1), (self.groups, 1))
        )

    def cache(self, start):
        """The keys and values before ``start``, and rubbish behind them."""
        cache = KVCache([(self.groups, self.width, self.width)], 1, LONG + 200, self.dtype, exact=True)
        for storage, known in ((cache.keys[0], self.key), (cache.values[0], self.value)):
            storage.normal_()
            storage[:, :, :start] = known[:, :, :start]
        return cache

    def attend(self, start, nodes, parents=None):
        """Attention of tokens whose queries, keys and values are those of the positions ``nodes``."""
        step = self.cache(start).step([0], [start], [len(nodes)], parents)
        keys, values = step.update(self.key[:, :, nodes], self.value[:, :, nodes], 0)
        return attend(None, self.query[:, :, nodes], keys, values, step.seen(self.kind), **self.extra)[0][0]


def check_prompt(prompt):
    """A prompt in one step, in chunks, alone, and as the paths of trees."""
    whole = prompt.attend(0, list(range(LONG)))
    for start, stop in ((0, 1), (64, 130), (100, 129), (190, 400), (255, 257), (383, 700), (511, 520), (639, 700)):
        chunk = prompt.attend(start, list(range(start, stop)))
        assert torch.equal(chunk, whole[start:stop]), (start, stop)
    for position in (0, 127, 128, 191, 192, 384, 500, 699):
        assert torch.equal(prompt.attend(position, [position])[0], whole[position]), position
    for start in (20, 127, 190, 300, 511, 560):
        for parents in (DEEP,) if start in (20, 300) else ([-1, 0, 1, 0, 3, 4, 4], [-1, -1, 0]):
            depths = [len(slow_path(parents, node)) - 1 for node in range(len(parents))]
            tree = prompt.attend(start, [start + depth for depth in depths], [parents])
            for node, depth in enumerate(depths):
                assert torch.equal(tree[node], whole[start + depth]), (start, len(parents), node)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", [(9, 3, 64), (2, 2, 48), (8, 1, 128)], ids=str)
def test_long_prompts_in_any_steps(shape, dtype, threads):
    torch.set_num_threads(threads)
    check_prompt(Prompt(shape, dtype, {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", ["window", "small window", "chunk", "large chunk", "softcap", "sinks", "both"])
def test_long_prompts_of_every_kind(name, dtype):
    torch.set_num_threads(1)
    sinks = {"s_aux": torch.randn(4, generator=torch.Generator().manual_seed(1)).to(dtype)}
    options = {
        "window": {"kind": MaskKind(window=300)},
        "small window": {"kind": MaskKind(window=70)},
        "chunk": {"kind": MaskKind(chunk=250)},
        "large chunk": {"kind": MaskKind(chunk=600)},
        "softcap": {"softcap": 5.0},
        "sinks": sinks,
        "both": {"kind": MaskKind(window=250), **sinks},
    }[name]
    check_prompt(Prompt((4, 2, 64), dtype, options))


def test_a_kernel_whose_bits_depend_on_the_number_of_queries_is_not_used(monkeypatch):
    """The rule holds with a kernel that lies; without the proof, the lie is seen."""
    true = flash_probe.flash

    def lies(rows, *others):
        mixed, exponents = true(rows, *others)
        return mixed * (1 + rows.shape[2] % 64 * 1e-3), exponents

    prompt = Prompt((4, 2, 64), torch.float32, {})
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(flash_probe, "flash", lies)
    monkeypatch.setattr(flash, "flash", lies)
    torch.set_num_threads(1)
    check_prompt(prompt)
    monkeypatch.setattr(flash, "recipe_for", lambda _: Recipe(1, 512))
    with pytest.raises(AssertionError):
        check_prompt(prompt)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("inner", "width"), [(96, 64), (512, 1408), (1408, 512), (1536, 4096)])
def test_a_product_in_blocks_does_not_depend_on_the_other_rows(inner, width, dtype, threads):
    """What exactness rests on: without the blocks, the same rows give other bits for another number of rows."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(width, inner, generator=generator) * inner**-0.5).to(dtype)
    rows = torch.randn(200, inner, generator=generator).to(dtype)
    with ExactProducts():
        expected = torch.nn.functional.linear(rows, weight)
        for count in (1, 2, 5, 17, 64, 65, 150):
            chosen = torch.randperm(200, generator=generator)[:count]
            assert torch.equal(torch.nn.functional.linear(rows[chosen], weight), expected[chosen])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("width", [1, 8, 48, 64, 96])
def test_activation_functions_do_not_depend_on_the_other_rows(width, dtype):
    rows = torch.randn(70, width).to(dtype)
    with ExactProducts():
        for function in (torch.sigmoid, torch.nn.functional.silu, torch.nn.functional.gelu, torch.Tensor.sigmoid):
            expected = function(rows)
            for start, count in ((0, 1), (3, 1), (5, 2), (7, 33), (69, 1)):
                assert torch.equal(function(rows[start : start + count]), expected[start : start + count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [8, 40, 48, 136])
def test_activation_functions_of_half_a_row_do_not_depend_on_the_other_rows(width, dtype):
    rows = (torch.randn(72, 2 * width, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    half = rows.chunk(2, -1)[0]
    with ExactProducts():
        for function in (torch.sigmoid, torch.nn.functional.silu, torch.nn.functional.gelu):
            alone = torch.cat([function(half[row : row + 1]) for row in range(72)])
            for count in (2, 7, 8, 16, 64, 72):
                assert torch.equal(function(half[:count]), alone[:count]), (function, count)


SHAPES = [(torch.float32, 8, 1, 80), (torch.bfloat16, 1, 4, 32), (torch.float32, 2, 2, 64), (torch.bfloat16, 4, 4, 128)]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("dtype", "groups", "shared", "width"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_that_are_attended_together_do_not_touch_each_other(threads, dtype, groups, shared, width, sinks):
    torch.set_num_threads(threads)
    choice, generator = random.Random(width), torch.Generator().manual_seed(0)
    kv = KVCache([(groups, width, width)], 24, 700, dtype, exact=True)
    for storage in (kv.keys[0], kv.values[0]):
        storage.normal_(generator=generator)
    starts = [choice.randint(3, 90) for _ in range(12)] + [choice.randint(200, 600) for _ in range(12)]
    counts = [choice.choice([1, 1, 2, 5]) for _ in starts]
    query = torch.randn(24, groups * shared, max(counts), width, generator=generator).to(dtype)
    extra = {"s_aux": torch.randn(groups * shared, generator=generator)} if sinks else {}

    def attended(rows):
        step = kv.step(rows, [starts[row] for row in rows], [counts[row] for row in rows])
        tokens = max(counts[row] for row in rows)
        states = (tensor[rows, :, : step.high] for tensor in (kv.keys[0], kv.values[0]))
        return attend(None, query[rows, :, :tokens], *states, step.seen(MaskKind()), **extra)[0]

    together = attended(list(range(24)))
    for row, count in enumerate(counts):
        assert torch.equal(attended([row])[0], together[row, :count]), f"row {row} of {count} tokens at {starts[row]}"
