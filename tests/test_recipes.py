"""Recipes of exact products: what a probe proves, what a lie to it costs, what is kept, and packed weights."""

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from aspec.io.memory import allocate, discard
from aspec.models.exact import known_recipes, panels, products, row_probe, widening_probe
from aspec.models.exact import modes as modes_of
from aspec.models.exact.modes import ExactProducts, ExactStep, FastExperts, LayerModes
from aspec.models.exact.panels import in_panels, panel_outputs, widened
from aspec.models.exact.products import route
from aspec.models.exact.recipe import BLOCKS, COMPILED, IN_INTEGERS, Packing, Recipe, Widening, candidates, cost
from aspec.models.exact.row_probe import ProductKind, probe, prove
from aspec.models.weights.parts import as_tensor

DENSE = 64
PLAIN = Recipe(1, DENSE, (256,))


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No recipe of another test, and one thread."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(products, "_recipes", {})
    monkeypatch.setattr(row_probe, "SMALLEST_WEIGHT", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def honest(rows):
    """A product whose rows have the same bits in every pass."""
    return rows[..., :8] * 3


def proven(product):
    rows = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    return prove(product, rows, DENSE, [256])


def used(recipe):
    """Every number of rows that the recipe multiplies at once, for up to 2,000 rows."""
    return {size for count in range(1, 2001) for size in recipe.blocks(count)}


def test_an_honest_product_needs_no_blocks():
    assert proven(honest) == PLAIN
    assert PLAIN.blocks(33) == (33,)
    assert PLAIN.blocks(300) == (256, 44)


@pytest.mark.parametrize("odd", [1, 2, 3, 7, 33, 63, 64, 256])
def test_a_number_of_rows_with_other_bits_is_never_used(odd):
    """A product that lies at one number of rows only."""
    lies = proven(lambda rows: honest(rows) + (1e-6 if rows.shape[0] == odd else 0.0))
    assert odd not in used(lies)
    assert lies != BLOCKS or odd == 64


@pytest.mark.parametrize("many", [1, 5, 16])
def test_few_rows_with_other_bits_are_padded(many):
    lies = proven(lambda rows: honest(rows) * (1.0000001 if rows.shape[0] <= many else 1.0))
    assert lies.lowest == many + 1
    assert lies.blocks(1) == (many + 1,)


LIES = {
    "by place": lambda rows: honest(rows) + torch.arange(len(rows))[:, None] % 2 * (len(rows) > 40) * 1e-6,
    "by place, always": lambda rows: honest(rows) + torch.arange(len(rows))[:, None] * 1e-6,
    "by the row beside it": lambda rows: honest(rows) + (rows.roll(1, 0)[:, :1].abs() > 1e20) * 1e-6,
    "by alignment": lambda rows: honest(rows) + (rows.data_ptr() % 64 > 0) * 1e-6,
    "by chance": lambda rows: honest(rows) + random.random() * 1e-3,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_product_that_lies_in_another_way_runs_in_blocks_of_one_size(lie):
    found = proven(LIES[lie])
    assert found == BLOCKS or (lie == "by place" and found.highest <= 40), found


def test_blocks_cover_every_number_of_rows():
    for recipe in (BLOCKS, PLAIN, Recipe(4, 31, (512, 128)), Recipe(17, 17)):
        allowed = {*range(recipe.lowest, recipe.highest + 1), *recipe.larger}
        for count in range(1, 1500):
            sizes = recipe.blocks(count)
            assert set(sizes) <= allowed
            assert sum(sizes[:-1]) < count <= sum(sizes)


def test_the_cheapest_recipe_comes_first():
    found = candidates([0, 1, 1, 1, 2, 2], [(100, 1)])
    assert found == sorted(found, key=cost)
    assert set(found) == {Recipe(1, 1), Recipe(2, 4, (100,)), Recipe(5, 6)}
    assert candidates([0, 1, 1], [], wanted=0) == [Recipe(1, 1)]


KINDS = [
    ("linear", 0, 576, 192, False, False),
    ("linear", 0, 192, 576, False, True),
    ("linear", 0, 4, 64, False, True),
    ("addmm", 0, 96, 64, False, True),
    ("mm", 0, 96, 64, True, False),
    ("mm", 0, 64, 96, False, False),
    ("bmm", 4, 64, 64, False, False),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_proven_holds_for_ordinary_numbers(kind, dtype, threads):
    """The operands of a proof are not those of a model."""
    torch.set_num_threads(threads)
    op, batch, out, inner, transposed, bias = kind
    recipe = probe(ProductKind(op, dtype, batch, out, inner, transposed, bias, threads))
    generator = torch.Generator().manual_seed(1)
    shape = (batch, recipe.highest, inner) if batch else (recipe.highest, inner)
    rows = torch.randn(shape, generator=generator).to(dtype)
    weight = row_probe._weight(ProductKind(op, dtype, batch, out, inner, transposed, bias, threads), generator)
    added = torch.randn(out, generator=generator).to(dtype) if bias else None
    whole = row_probe.OPERATIONS[op](rows, weight, added)
    for count in range(recipe.lowest, recipe.highest):
        assert torch.equal(row_probe.OPERATIONS[op](rows[..., :count, :], weight, added), whole[..., :count, :])


def test_a_proof_is_kept_and_read_again(monkeypatch, tmp_path):
    kind = ProductKind("linear", torch.float32, 0, 64, 96, False, True, 1)
    found = known_recipes.recipe_for(kind)
    (file,) = (tmp_path / "aspec").glob("rows-*.json")
    assert list(json.loads(file.read_text())) == [kind.name]
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(known_recipes, "probe", lambda kind: pytest.fail("probed again"))
    assert known_recipes.recipe_for(kind) == found


def test_threads_that_ask_at_once_get_the_verdict_of_one_probe(monkeypatch):
    """Probes time kernels, so a second one may say something else; a step must not mix both."""
    kind = ProductKind("linear", torch.float32, 0, 64, 96, False, True, 1)
    verdicts = [PLAIN, COMPILED, BLOCKS, Recipe(2, 9)]
    at_once = threading.Barrier(len(verdicts))

    def slow_probe(kind):
        time.sleep(0.05)
        return verdicts.pop()

    def ask(_):
        at_once.wait()
        return known_recipes.recipe_for(kind)

    monkeypatch.setattr(known_recipes, "_probe", slow_probe)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert found == [Recipe(2, 9)] * 4
    assert len(verdicts) == 3


@pytest.mark.parametrize("first", [PLAIN, BLOCKS, COMPILED], ids=["plain", "blocks", "compiled"])
def test_of_two_processes_the_first_decides_for_both(first, monkeypatch, tmp_path):
    kind = ProductKind("linear", torch.float32, 0, 64, 96, False, True, 1)

    def overtaken(kind):
        monkeypatch.setattr(known_recipes, "_probe", lambda kind: first)  # what the other process does meanwhile
        known_recipes._kept(kind)
        return Recipe(2, 9)

    monkeypatch.setattr(known_recipes, "_probe", overtaken)
    assert known_recipes.recipe_for(kind) == first
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(known_recipes, "_probe", lambda kind: pytest.fail("probed again"))
    assert known_recipes.recipe_for(kind) == first


BAD = (None, 7, {}, [], [0, 4, [], []], [4, 3, [], []], [1, 4, [3], []], [1, 4, [8, 16], []], [1, 4, ["9"], []])
BAD += ([1, 4, [], [1]], [1, 4, [], [1, 1, [1, 4, [], []]]], [1, 4, [], [1, True, [0, 4, [], []]]])
BAD += ([0, [1, 4, [], []]], [2, [4, 3, [], []]], [2, 4])  # widened
BAD += (["compile", 9], "compiled", ["compiled"], ["compiled", 0], ["compiled", "9"])


@pytest.mark.parametrize("entry", BAD, ids=str)
def test_an_entry_that_is_no_recipe_is_proven_anew(entry, monkeypatch, tmp_path):
    kind = ProductKind("mm", torch.float32, 0, 64, 64, False, False, 1)
    known_recipes.recipe_for(kind)
    (file,) = (tmp_path / "aspec").glob("rows-*.json")
    file.write_text(json.dumps({kind.name: entry}))
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(known_recipes, "probe", lambda kind: PLAIN)
    assert known_recipes.recipe_for(kind) == PLAIN


def test_a_recipe_survives_its_file():
    wide = replace(BLOCKS, widening=Widening(PLAIN, 4))
    for recipe in (
        PLAIN,
        BLOCKS,
        COMPILED,
        IN_INTEGERS,
        replace(COMPILED, highest=64),
        wide,
        Recipe(2, 9, (), Packing(32, PLAIN, faster=True)),
    ):
        assert known_recipes._recipe(json.loads(json.dumps(known_recipes._entry(recipe)))) == recipe


# -- panels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", ["by output", "by input"])
@pytest.mark.parametrize(("count", "blocks"), [(5, (5,)), (5, (4, 4)), (7, (7, 1)), (1, (4,))])
def test_panels_are_one_product_in_fp32_that_is_rounded_once(count, blocks, stored, bias, monkeypatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 4 * 40 * 24)
    assert panel_outputs(40) == 24
    rows, added = torch.randn(count, 40).bfloat16(), torch.randn(100).bfloat16() if bias else None
    weight = torch.randn(100, 40).bfloat16().t() if stored == "by output" else torch.randn(40, 100).bfloat16()
    made = in_panels(rows, 100, widened(weight), blocks, added)
    exact = rows.double() @ weight.double() + (0 if added is None else added.double())
    assert made.dtype == torch.bfloat16
    assert torch.allclose(made.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("op", "out"), [("linear", 300), ("linear", 20), ("mm", 300)])
def test_panels_pay_where_they_are_faster_and_are_proven(op, out, monkeypatch):
    kind = ProductKind(op, torch.bfloat16, 0, out, 64, False, op == "linear", 1)
    monkeypatch.setattr(widening_probe, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(widening_probe, "least_seconds", lambda work: 1.0)
    assert widening_probe.probe_widening(kind) is None, "no faster"
    seconds = iter([2.0, 1.0, 3.0, 4.0, 3.0, 2.0])  # of 16 rows, 1 and 2; torch's own product first
    monkeypatch.setattr(widening_probe, "least_seconds", lambda work: next(seconds))
    monkeypatch.setattr(panels, "PANEL_BYTES", 4 * 64 * 128)
    found = widening_probe.probe_widening(kind)
    assert found.from_rows == 2
    assert max(used(found.recipe)) <= 256


def test_few_rows_of_a_step_that_is_not_exact_are_not_widened(monkeypatch):
    model = nn.Linear(64, 96, bias=False).bfloat16().requires_grad_(False)
    (linear,) = route(model).values()
    linear.recipe = replace(BLOCKS, widening=Widening(PLAIN, 4))
    calls = []
    monkeypatch.setattr(products, "in_panels", lambda rows, *how: calls.append(len(rows)) or in_panels(rows, *how))
    rows = torch.randn(2, 3, 64).bfloat16()
    assert torch.allclose(model(rows), functional.linear(rows, model.weight), rtol=2**-6, atol=1e-2)
    model(rows[:1])
    assert calls == [6]


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_a_step_that_is_not_exact_are_widened_by_their_rows(transposed, monkeypatch):
    kind = ProductKind("mm", torch.bfloat16, 0, 96, 64, transposed, False, 1)
    monkeypatch.setitem(known_recipes._known, kind, replace(BLOCKS, widening=Widening(PLAIN, 4)))
    calls = []
    monkeypatch.setattr(products, "in_panels", lambda rows, *how: calls.append(len(rows)) or in_panels(rows, *how))
    stored = torch.randn(3, 96, 64).bfloat16() if transposed else torch.randn(3, 64, 96).bfloat16()
    weights = stored.mT if transposed else stored
    rows, ends = torch.randn(12, 64).bfloat16(), torch.tensor([7, 7, 12], dtype=torch.int32)
    with torch.inference_mode(), FastExperts() as mode:
        made = torch._grouped_mm(rows, weights, offs=ends)
        assert torch._grouped_mm(rows[:5], weights, offs=torch.tensor([3, 3, 5], dtype=torch.int32)).shape == (5, 96)
    assert calls == [7, 5]
    assert mode.acted
    by_row = [rows[:7] @ weights[0], rows[7:] @ weights[2]]
    assert torch.allclose(made, torch.cat(by_row), rtol=2**-6, atol=1e-2)


def test_the_recipes_of_experts_are_proven_before_they_run(monkeypatch):
    asked = []
    monkeypatch.setattr(products, "recipe_for", lambda kind: asked.append(kind) or BLOCKS)
    products.prove_experts(torch.empty(3, 96, 64, dtype=torch.bfloat16, device="meta"), transposed=True)
    rows, weights = torch.randn(2, 64).bfloat16(), torch.randn(3, 96, 64).bfloat16().mT
    with ExactStep():
        products.expert_products(rows, [2], weights[1:2])
    assert asked[0] == asked[1]


# -- linear modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_packed_weight_has_the_bits_of_the_plain_one(dtype, bias, monkeypatch):
    """Also where packing does not pay on this machine, as long as its bits are proven."""
    model = nn.Linear(160, 224, bias=bias).to(dtype).requires_grad_(False)
    (linear,) = route(model).values()
    rows = torch.randn(300, 160).to(dtype)
    counts = (1, 2, 17, 31, 33, 64, 100, 300)
    with ExactStep():
        plain = [model(rows[:count]) for count in counts]
    assert all(torch.equal(part, plain[-1][: len(part)]) for part in plain)
    found = products._recipe("linear", model.weight, model.bias)
    if found.packing is None:
        assert not linear.pack()
        return
    always = Recipe(found.lowest, found.highest, found.larger, Packing(found.packing.hint, found.packing.recipe, True))
    monkeypatch.setattr(products, "_recipe", lambda *_: always)
    assert linear.pack()
    assert model.weight.shape == (224, 160)
    assert model.weight.isnan().all(), "who reads the weight itself would go on without a word"
    with ExactStep():
        assert all(torch.equal(model(rows[:count]), part) for count, part in zip(counts, plain, strict=True))
    assert torch.allclose(model(rows), plain[-1], rtol=0.1, atol=0.1)


class _Experts(nn.Module):
    """A layer that multiplies outside its linear modules, for several tokens only."""

    def __init__(self):
        super().__init__()
        self.linear, self.weights = nn.Linear(8, 8, bias=False), torch.randn(1, 8, 8)

    def forward(self, hidden):
        hidden = self.linear(hidden)
        return hidden if hidden.shape[1] == 1 else torch.bmm(hidden, self.weights)


def test_a_layer_without_other_products_needs_no_mode_later():
    modes, calls = LayerModes(), []
    for layer, module in enumerate((nn.Linear(8, 8), _Experts())):
        route(module)
        for tokens in (1, 1, 5, 5, 1):
            step = SimpleNamespace(exact=True, position_ids=torch.zeros(1, tokens))
            with torch.inference_mode(), modes.of(layer, step):
                module(torch.randn(1, tokens, 8))
                calls.append(bool(torch.overrides._is_torch_function_mode_enabled()))
    assert calls == [True, False, True, False, False, True, False, True, True, True]


@pytest.mark.parametrize("widens", [False, True])
def test_a_step_that_is_not_exact_needs_a_mode_where_experts_are_widened(widens, monkeypatch):
    monkeypatch.setattr(modes_of, "widens_experts", lambda weights: widens)
    modes, calls = LayerModes(), []
    rows, weights = torch.randn(5, 64).bfloat16(), torch.randn(2, 64, 64).bfloat16()
    step = SimpleNamespace(exact=False, position_ids=torch.zeros(1, 5))
    for _ in range(3):
        with torch.inference_mode(), modes.of(0, step):
            torch._grouped_mm(rows, weights, offs=torch.tensor([2, 5], dtype=torch.int32))
            calls.append(bool(torch.overrides._is_torch_function_mode_enabled()))
    assert calls == [True, widens, widens]


def test_threads_and_steps_do_not_share_their_exactness():
    weight = torch.randn(64, 64).bfloat16()
    with ExactProducts():
        assert products._thread.exact
    assert not products._thread.exact
    assert functional.linear(weight, weight).shape == (64, 64)


def test_discarded_pages_read_as_zeros_and_their_neighbours_stay():
    memory = allocate(5 * 4096)
    whole = as_tensor(memory.view)
    whole.fill_(7)
    discard(memory.view[100 : 3 * 4096 + 50])
    assert whole[:4096].eq(7).all()
    assert whole[3 * 4096 :].eq(7).all()
    assert whole[4096 : 3 * 4096].eq(0).all()
    del whole
    memory.close()


def test_works_are_timed_in_turns_and_their_first_call_does_not_count(monkeypatch):
    calls = []
    costs = {"one": [50, 2, 3, 2], "other": [1, 8, 4, 9]}
    now = 0.0

    def perf_counter():
        return now

    def work(name):
        def run():
            nonlocal now
            now += costs[name][min(calls.count(name), 3)]
            calls.append(name)

        return run

    monkeypatch.setattr(row_probe.time, "perf_counter", perf_counter)
    assert row_probe.share_of_seconds([(work("one"), work("other"))]) == 2 / 4
    assert [name for name, _ in groupby(calls)] == ["one", "other"] * row_probe.TURNS


def test_works_are_timed_while_threads_of_the_other_library_sleep(monkeypatch):
    """They wait for their next call at a core's full speed for 20 ms; the recipe must not depend on that."""
    clock, looping = [0.0], [0.0]

    def kernel():
        clock[0] += 2e-3 if clock[0] < looping[0] else 1e-3

    def library():
        clock[0] += 1.5e-3
        looping[0] = clock[0] + 0.02

    monkeypatch.setattr(row_probe, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    library()
    assert row_probe.share_of_seconds([(kernel, library)]) == pytest.approx(1 / 1.5)
