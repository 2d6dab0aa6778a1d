"""Attention by a compiled kernel: its results, its bits beside other queries, and what is proven before it is used."""

import math
from dataclasses import replace

import pytest
import torch

from aspec.io.host_info import compiler
from aspec.models.attention import attend
from aspec.models.exact import attention as exact_attention
from aspec.models.exact import compiled_attention, known_recipes, paths
from aspec.models.exact.attention import attend_by_paths, attend_otherwise, prove_attention
from aspec.models.exact.compiled_attention import (
    FEW,
    MANY,
    OTHERWISE,
    attend_compiled,
    attention_kind,
    probe_attention,
)
from aspec.models.exact.paths import MaskKind
from aspec.models.exact.recipe import COMPILED
from aspec.models.exact.scoring import Scoring
from aspec.models.kv_cache import KVCache

pytestmark = pytest.mark.skipif(not compiler(), reason="without llvmlite (pip install 'aspec[fast]') nothing compiles")

GROUPS, WIDTH, CAPACITY = 2, 32, 512
KINDS = {"whole": MaskKind(), "window": MaskKind(window=40), "chunk": MaskKind(chunk=100)}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Case:
    """A cache of some rows that hold random keys and values, and one step of it."""

    def __init__(self, starts, counts, links=None, *, heads=6, value_width=WIDTH, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = len(starts)
        self.cache = KVCache([(GROUPS, WIDTH, value_width)], rows, CAPACITY, torch.bfloat16, exact=True)
        self.key = torch.randn(rows, GROUPS, CAPACITY, WIDTH, generator=generator).bfloat16()
        self.value = torch.randn(rows, GROUPS, CAPACITY, value_width, generator=generator).bfloat16()
        self.step = self.cache.step(list(range(rows)), starts, counts, links)
        tokens = self.step.position_ids.shape[1]
        self.query = torch.randn(rows, heads, tokens, WIDTH, generator=generator).bfloat16()
        self.sinks = torch.randn(heads, generator=generator)

    def run(self, kind=MaskKind(), *, sinks=False, attend=attend_compiled, tokens=None):
        scoring = Scoring(WIDTH**-0.5, None, self.sinks if sinks else None)
        made = torch.full((len(self.query), self.query.shape[2], self.query.shape[1], self.value.shape[-1]), 7.0)
        made = made.bfloat16()
        attend(made, self.query, self.key, self.value, self.step.paths(kind), scoring)
        return made


TREE = [-1, 0, 0, 1, 1, 2, 5, 3, 7]
CASES = {
    "a token": ([300], [1], None),
    "the first tokens": ([0], [70], None),
    "a prompt longer than a block": ([0], [300], None),
    "rows of other lengths": ([5, 200, 130], [3, 3, 3], None),
    "a tree": ([150], [9], [TREE]),
    "a tree at the end of a tile, and a chain": ([126, 60], [9, 9], [TREE, [-1, *range(8)]]),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_are_those_of_the_other_ways(case, kind, sinks):
    own = Case(*case)
    made, other = own.run(kind, sinks=sinks), own.run(kind, sinks=sinks, attend=attend_otherwise)
    assert torch.allclose(made.float(), other.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(("heads", "value_width"), [(2, 32), (16, 64), (6, 16)])
def test_any_number_of_heads_shares_keys_and_values_may_be_of_another_width(heads, value_width):
    own = Case([100], [5], heads=heads, value_width=value_width)
    assert torch.allclose(own.run().float(), own.run(attend=attend_otherwise).float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_query_has_the_same_bits_alone_in_a_chain_and_with_any_threads(threads, kind):
    torch.set_num_threads(threads)
    together = Case([90], [50])
    made = together.run(kind)
    torch.set_num_threads(1)
    for token in (0, 1, 2, 36, 37, 38, 49):
        alone = Case([90 + token], [1])
        alone.query = together.query[:, :, token : token + 1]
        assert torch.equal(alone.run(kind)[:, 0], made[:, token])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_node_of_a_tree_has_the_bits_of_its_path_as_a_chain(kind):
    tree = Case([150], [9], [TREE])
    made = tree.run(kind)
    for node in range(9):
        path, at = [], node
        while at >= 0:
            path.insert(0, at)
            at = TREE[at]
        chain = Case([150], [len(path)])
        chain.query = tree.query[:, :, path]
        chain.key[:, :, 150 : 150 + len(path)] = tree.key[:, :, [150 + one for one in path]]
        chain.value[:, :, 150 : 150 + len(path)] = tree.value[:, :, [150 + one for one in path]]
        assert torch.equal(chain.run(kind)[:, -1], made[:, node])


def test_what_lies_beyond_a_path_changes_nothing():
    own = Case([200, 64], [3, 3])
    made = own.run()
    own.key[:, :, 203:], own.value[:, :, 203:] = 1e30, math.nan
    own.key[1, :, 67:], own.value[1, :, 67:] = math.nan, math.inf
    assert torch.equal(own.run(), made)


def test_records_of_few_queries_are_made_once_for_all_layers(monkeypatch):
    made = []
    honest = compiled_attention._records
    monkeypatch.setattr(compiled_attention, "_records", lambda *given: made.append(0) or honest(*given))
    few, many = Case([100], [2]), Case([0], [400])
    results = [few.run() for _ in range(3)]
    assert all(torch.equal(one, results[0]) for one in results)
    assert len(made) == 1
    few.run(sinks=True)
    assert len(made) == 2, "another layout"
    monkeypatch.setattr(paths, "MOST_TOLD_BYTES", 80 << 10)
    many.run()
    many.run()
    assert len(made) == 2 + 2 + 1, "of two blocks the second one is too much to keep beside the first"


# -- the proof -----------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    """Compiled attention counts as faster than any other."""
    monkeypatch.setattr(compiled_attention, "FASTER", math.inf)


def kind(dtype=torch.bfloat16, width=WIDTH, value_width=WIDTH):
    states = (torch.empty(1, GROUPS, 1, own, dtype=dtype, device="meta") for own in (width, value_width))
    return attention_kind(*states)


def test_attention_is_compiled_where_that_is_faster(fast, monkeypatch):
    assert probe_attention(kind()) == COMPILED
    monkeypatch.setattr(compiled_attention, "FASTER", 0.0)
    assert probe_attention(kind()) == OTHERWISE


@pytest.mark.parametrize("other", [{"dtype": torch.float32}, {"width": 24}, {"value_width": 40}], ids=str)
def test_other_widths_and_dtypes_are_not_compiled(other, fast):
    assert probe_attention(kind(**other)) == OTHERWISE


LIES = {
    "alone": lambda made, query: made.mul_(1.01) if query.shape[2] == 1 else made,
    "in a chain": lambda made, query: made[:, 33].mul_(1.01) if query.shape[2] > 1 else made,
    "always": lambda made, query: made.mul_(1.1),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_kernel_that_lies_is_not_used(lie, fast, monkeypatch):
    honest = attend_compiled

    def lies(output, query, *rest):
        honest(output, query, *rest)
        lie(output, query)

    monkeypatch.setattr(compiled_attention, "attend_compiled", lies)
    assert probe_attention(kind()) == OTHERWISE


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_compiler_that_fails_is_not_used(error, fast, monkeypatch):
    def fails(*_):
        raise error("no such processor")

    monkeypatch.setattr(compiled_attention, "attention", fails)
    assert probe_attention(kind()) == OTHERWISE


def test_a_kernel_that_is_slow_with_prompts_serves_few_queries(monkeypatch):
    monkeypatch.setattr(compiled_attention, "_share", lambda _, sizes: 2.0 if sizes == [MANY] else 0.5)
    assert probe_attention(kind()) == replace(COMPILED, highest=FEW)


@pytest.fixture
def used(monkeypatch, tmp_path):
    """Calls of the kernel by ``attend_by_paths``; no kind is proven yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(known_recipes, "_known", {})
    used = []
    monkeypatch.setattr(exact_attention, "attend_compiled", lambda *given: used.append(0) or attend_compiled(*given))
    return used


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_not_exact_has_the_bits_of_an_exact_one(name, fast, used):
    own = Case(*CASES[name])
    expected = own.run()
    own.step.exact = False
    made = torch.empty_like(expected)
    scoring = Scoring(WIDTH**-0.5, None, None)
    assert attend_by_paths(made, own.query, own.key, own.value, own.step.seen(MaskKind()), scoring)
    assert torch.equal(made, expected)
    assert used == [0]


@pytest.mark.parametrize(("tokens", "by_paths"), [(FEW, True), (FEW + 1, False)])
def test_a_step_that_is_not_exact_takes_a_mask_where_that_is_faster(tokens, by_paths, used, monkeypatch):
    monkeypatch.setitem(known_recipes._known, kind(), replace(COMPILED, highest=FEW))
    own = Case([0], [tokens])
    expected = own.run()
    made = torch.zeros_like(expected)
    for exact in (False, True):
        own.step.exact = exact
        given = (made, own.query, own.key, own.value, own.step.seen(MaskKind()), Scoring(WIDTH**-0.5, None, None))
        assert attend_by_paths(*given) is (by_paths or exact)
        assert torch.equal(made, expected) is (by_paths or exact)
    assert len(used) == 1 + by_paths
    own.step.exact = False
    stored = (states[:, :, : own.step.high] for states in (own.key, own.value))
    made, _ = attend(None, own.query, *stored, own.step.seen(MaskKind()))
    torch.testing.assert_close(made, expected, atol=0.02, rtol=0.02)


def test_an_exact_step_uses_it_where_it_is_proven(fast, used):
    prove_attention({(GROUPS, WIDTH, WIDTH)}, torch.bfloat16)
    own = Case([100], [2])
    made, given, seen = own.run(), (own.query, own.key, own.value), own.step.seen(MaskKind())
    attend_by_paths(made, *given, seen, Scoring(WIDTH**-0.5, None, None))
    assert torch.equal(made, own.run())
    assert used == [0]
    capped, other = Scoring(0.1, 30.0, None), own.run()
    attend_by_paths(made, *given, seen, capped)
    attend_otherwise(other, *given, seen.paths(), capped)
    assert torch.equal(made, other), "a cap is not in the kernel"
    assert used == [0]
    scattered = replace(capped, softcap=None)
    gaps = torch.stack([own.key, own.key], -1)[..., 0]
    attend_by_paths(made, own.query, gaps, own.value, seen, scattered)
    assert used == [0], "numbers that do not lie together"
