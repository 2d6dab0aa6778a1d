"""Kernels that are compiled on this machine: their products, their bits, and what is proven before they are used."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import aspec
from aspec.io.host_info import compiler
from aspec.models.compiled import build as building
from aspec.models.compiled import kernels
from aspec.models.compiled import products as compiled
from aspec.models.compiled.products import (
    compiled_int4_product,
    dense_product,
    integer_int4_product,
    several_products,
)
from aspec.models.exact import compiled_attention, compiled_probe, int4_probe, known_recipes, products
from aspec.models.exact.compiled_probe import compiled_pays
from aspec.models.exact.int4_probe import int4_kind, probe_int4
from aspec.models.exact.modes import ExactStep
from aspec.models.exact.recipe import BLOCKS, COMPILED, IN_INTEGERS
from aspec.models.exact.row_probe import ProductKind
from aspec.models.formats.int4.form import Int4, Int4Decode

pytestmark = pytest.mark.skipif(not compiler(), reason="without llvmlite (pip install 'aspec[fast]') nothing compiles")

THREADS = (1, 2, 3)
COUNTS = (*range(1, 14), 31, 64, 70)


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No recipe of another test, work for every thread, and the threads of before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(products, "_recipes", {})
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def has_bits_of_its_own(product, rows):
    """Whether every row has the same bits in every number of rows, at other places, and with any number of threads."""
    torch.set_num_threads(1)
    whole = product(rows)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for count in COUNTS:
            assert torch.equal(product(rows[:count]), whole[:count]), (threads, count)
            assert torch.equal(product(rows[-count:]), whole[-count:]), (threads, count)
    return whole


# -- weights in bf16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 1 << 10, 128 << 10])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (7, 48), (61, 512), (100, 64)])
def test_a_dense_product_is_one_in_fp32_that_is_rounded_once(outputs, inputs, bias, block, monkeypatch):
    monkeypatch.setattr(compiled, "BLOCK_BYTES", block)
    rows, weight = torch.randn(70, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    added = torch.randn(outputs).bfloat16() if bias else None
    made = has_bits_of_its_own(lambda own: dense_product(own, weight, added), rows)
    expected = rows.double() @ weight.double().t() + (0 if added is None else added.double())
    assert made.dtype == torch.bfloat16
    assert torch.allclose(made.double(), expected, rtol=2**-8, atol=1e-4)


def test_every_number_is_rounded_as_torch_rounds_it():
    """Ties to the even one, subnormal and infinite numbers, and those that are none."""
    bits = torch.randint(-(1 << 31), 1 << 31, (4096,), dtype=torch.int64).to(torch.int32)
    ties = (bits[:512] & ~0xFFFF) | 0x8000
    special = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7F800001, -1, 0, -(1 << 31), 1, 0x7F7FFFFF])
    values = torch.cat([bits, ties, special.to(torch.int32)]).view(torch.float32)
    made = dense_product(torch.zeros(1, 16).bfloat16(), torch.zeros(len(values), 16).bfloat16(), values)
    assert torch.equal(made[0].isnan(), values.isnan())
    known = ~values.isnan()
    assert torch.equal(made[0][known], values.bfloat16()[known])


def test_without_threads_the_bits_are_the_same(monkeypatch):
    rows, weight = torch.randn(5, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    threaded = dense_product(rows, weight)
    monkeypatch.setattr(building.os, "name", "nt")
    monkeypatch.setattr(kernels, "has_threads", building.has_threads.__wrapped__)
    monkeypatch.setattr(kernels, "dense", kernels.dense.__wrapped__)
    assert torch.equal(dense_product(rows, weight), threaded)


LINEAR = ProductKind("linear", torch.bfloat16, 0, 96, 256, False, True, 1)
TRANSPOSED = ProductKind("mm", torch.bfloat16, 0, 96, 256, True, False, 1)


@pytest.fixture
def fast(monkeypatch):
    """Compiled products count as faster than any other."""
    monkeypatch.setattr(compiled_probe, "FASTER", float("inf"))
    monkeypatch.setattr(compiled_probe, "SMALLEST_WEIGHT", 0)


@pytest.mark.parametrize("kind", [LINEAR, TRANSPOSED])
def test_products_are_compiled_where_that_is_faster(kind, fast, monkeypatch):
    assert compiled_pays(kind)
    assert known_recipes.recipe_for(kind) == COMPILED
    monkeypatch.setattr(compiled_probe, "FASTER", 0.0)
    assert not compiled_pays(kind)


OTHERS = {
    "fp32": replace(LINEAR, dtype=torch.float32),
    "stored by input": replace(TRANSPOSED, transposed=False),
    "a batch": replace(TRANSPOSED, op="bmm", batch=2),
    "inputs that are no whole vectors": replace(LINEAR, inner=264),
}


@pytest.mark.parametrize("kind", OTHERS.values(), ids=OTHERS)
def test_other_products_are_not_compiled(kind, fast):
    assert not compiled_pays(kind)


@pytest.mark.parametrize("odd", [1, 2, 5, 32, 64, 256])
def test_a_kernel_that_lies_is_not_used(odd, fast, monkeypatch):
    def lies(rows, *rest):
        made = dense_product(rows, *rest)
        return torch.nextafter(made, made + 1) if len(rows) == odd else made

    monkeypatch.setattr(compiled_probe, "dense_product", lies)
    assert not compiled_pays(LINEAR)


def test_a_kernel_that_is_wrong_for_all_rows_is_not_used(fast, monkeypatch):
    monkeypatch.setattr(compiled_probe, "dense_product", lambda *given: dense_product(*given) * 1.1)
    assert not compiled_pays(LINEAR)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_compiler_that_fails_is_not_used(error, fast, monkeypatch):
    def fails(*_):
        raise error("no such processor")

    monkeypatch.setattr(compiled_probe, "dense_product", fails)
    assert not compiled_pays(LINEAR)


def test_all_steps_use_the_same_product(monkeypatch):
    model = torch.nn.Linear(64, 96).bfloat16().requires_grad_(False)
    (linear,) = products.route(model).values()
    linear.recipe = COMPILED
    monkeypatch.setattr(products, "_recipe", lambda *_: COMPILED)
    rows = torch.randn(2, 3, 64).bfloat16()
    expected = dense_product(rows.view(6, 64), model.weight, model.bias).view(2, 3, 96)
    assert torch.equal(model(rows), expected)
    assert not linear.pack()
    with ExactStep():
        assert torch.equal(model(rows), expected)
    weights = torch.randn(3, 96, 64).bfloat16()
    for step in (ExactStep(), torch.inference_mode()):
        with step:
            made = products.expert_products(rows[0], [1, 2], [weights[1].mT, weights[0].mT])
        assert torch.equal(made[:1], dense_product(rows[0, :1], weights[1]))
        assert torch.equal(made[1:], dense_product(rows[0, 1:], weights[0]))


@pytest.mark.parametrize("counts", [[1], [1, 1, 1, 1], [3, 1, 9, 20], [0, 5, 0, 70]])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 48), (61, 512), (128, 64)])
def test_products_of_several_weights_have_the_bits_of_each(counts, outputs, inputs):
    weights = [torch.randn(outputs, inputs).bfloat16() for _ in counts]
    rows = torch.randn(sum(counts), inputs).bfloat16()
    torch.set_num_threads(1)
    expected = torch.cat([dense_product(*own) for own in zip(torch.split(rows, counts), weights, strict=True)])
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert torch.equal(several_products(rows, counts, weights), expected)


def test_a_weight_with_gaps_is_multiplied_by_torch():
    model = torch.nn.Linear(64, 96, bias=False).bfloat16().requires_grad_(False)
    (linear,) = products.route(model).values()
    linear.recipe = COMPILED
    rows, stored = torch.randn(3, 64).bfloat16(), torch.randn(96, 128).bfloat16()
    model.weight = torch.nn.Parameter(stored[:, ::2], requires_grad=False)
    assert torch.allclose(model(rows), rows @ stored[:, ::2].t(), rtol=2**-6, atol=1e-2)


# -- weights of 4 bits ---------------------------------------------------------------------------------------


integers = pytest.mark.skipif(
    not compiler() or not building.multiplies_integers(), reason="a processor without the instructions"
)
INT4_PRODUCTS = [compiled_int4_product, pytest.param(integer_int4_product, marks=integers)]


@pytest.mark.parametrize("product", INT4_PRODUCTS)
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(("rows", "columns", "group"), [(64, 32, 32), (192, 512, 128), (128, 512, 256)])
def test_an_int4_product_is_that_of_the_decoded_weight(rows, columns, group, block, product):
    sizes = Int4(rows, columns, group, block)
    codes, scales = torch.randint(256, sizes.codes, dtype=torch.uint8), torch.randn(sizes.scales).bfloat16()
    given = torch.randn(70, columns).bfloat16()
    made = has_bits_of_its_own(lambda own: product(own, codes, scales, sizes), given)
    weight, decode = torch.empty(rows, columns), Int4Decode(sizes)
    decode((codes, scales), weight, torch.empty(decode.workspace_bytes, dtype=torch.uint8))
    terms = given.double().abs() @ weight.double().abs().t()
    apart = (made.double() - given.double() @ weight.double().t()).abs()
    assert (apart <= 2**-8 * terms).all()


@integers
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("bytes_at_once", [False, True])
def test_whole_numbers_are_as_close_as_rows_in_bf16(block, bytes_at_once, monkeypatch):
    """The largest sums that 16 bits must hold, zeros, numbers of very different size, and one that is none."""
    if bytes_at_once and not building.multiplies_bytes():
        pytest.skip("a processor without the instruction")
    monkeypatch.setattr(kernels, "multiplies_bytes", lambda: bytes_at_once)
    monkeypatch.setattr(kernels, "integers", kernels.integers.__wrapped__)
    sizes = Int4(128, 128, 32, block)
    scales = torch.stack([torch.rand(4, 128) + 0.5, torch.zeros(4, 128)], -1).bfloat16()
    given = torch.ones(9, 128)
    given[1] = -1.0
    given[2] = 0.0
    given[3, :64] = 1e-35
    given[4] = torch.randn(128) * 10.0 ** torch.arange(-4, 4).repeat_interleave(16)
    given[5, 7], given[6, 99], given[7, 3] = float("nan"), float("inf"), float("-inf")
    given = given.bfloat16()
    for codes in (torch.full(sizes.codes, 255, dtype=torch.uint8), torch.randint(256, sizes.codes, dtype=torch.uint8)):
        made = integer_int4_product(given, codes, scales, sizes).double()
        weight, decode = torch.empty(128, 128), Int4Decode(sizes)
        decode((codes, scales), weight, torch.empty(decode.workspace_bytes, dtype=torch.uint8))
        assert not made[5:8].isfinite().any()
        rows = [0, 1, 2, 3, 4, 8]
        expected = given[rows].double() @ weight.double().t()
        largest = given[rows].double().abs().view(-1, 4, 32).amax(-1).repeat_interleave(32, 1)  # of each block
        apart = 2**-8 * expected.abs() + 2**-14.9 * (largest @ weight.double().abs().t())
        assert ((made[rows] - expected).abs() <= apart + 1e-30).all()
    assert torch.equal(integer_int4_product(given[2:3], codes, scales, sizes), torch.zeros(1, 128).bfloat16())


KIND = int4_kind(Int4(512, 256, 32, 32), 1)


@pytest.fixture
def _plain(monkeypatch):
    """In place of torch's product, which not every processor has: the compiled one."""
    monkeypatch.setattr(int4_probe, "torch_int4_product", compiled_int4_product)


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize(
    ("name", "own"),
    [("compiled_int4_product", COMPILED), pytest.param("integer_int4_product", IN_INTEGERS, marks=integers)],
)
def test_int4_products_are_compiled_where_that_is_faster_and_proven(name, own, monkeypatch):
    honest = getattr(int4_probe, name)
    shares = {name: 0.5}
    kernels = {"compiled_int4_product": COMPILED, "integer_int4_product": IN_INTEGERS}
    by_kernel = {getattr(int4_probe, other): other for other in kernels}
    monkeypatch.setattr(
        int4_probe,
        "share_of_seconds",
        lambda pairs: shares.get(by_kernel.get(pairs[0][0].func, name), 0.7),
    )
    assert probe_int4(KIND) == own
    (other,) = set(kernels.values()) - {own}
    for lie in (lambda rows, *own: honest(rows, *own) + (len(rows) == 3), lambda *own: honest(*own) * 1.1):
        monkeypatch.setattr(int4_probe, name, lie)
        found = probe_int4(KIND)
        assert found == other if building.multiplies_integers() else not found.compiled
    monkeypatch.setattr(int4_probe, name, honest)
    monkeypatch.setattr(int4_probe, "FASTER", 0.0)
    assert probe_int4(KIND) not in (*kernels.values(), BLOCKS)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_kernels_for_other_processors_compute_the_same(lanes, monkeypatch):
    """Vectors of another length, which LLVM takes apart or puts together where this processor has none."""
    monkeypatch.setattr(kernels, "vector_lanes", lambda: lanes)
    for name in ("dense", "int4", "attention"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name).__wrapped__)
    rows, weight = torch.randn(7, 48).bfloat16(), torch.randn(61, 48).bfloat16()
    exact = rows.double() @ weight.double().t()
    assert torch.allclose(dense_product(rows, weight).double(), exact, rtol=2**-8, atol=1e-4)
    for sizes in (Int4(64, 64, 32, 32), Int4(128, 64, 64, 64)):
        codes, scales = torch.randint(256, sizes.codes, dtype=torch.uint8), torch.randn(sizes.scales).bfloat16()
        given, weight, decode = torch.randn(5, 64).bfloat16(), torch.empty(sizes.rows, 64), Int4Decode(sizes)
        decode((codes, scales), weight, torch.empty(decode.workspace_bytes, dtype=torch.uint8))
        made = compiled_int4_product(given, codes, scales, sizes)
        terms = given.double().abs() @ weight.double().abs().t()
        assert ((made.double() - given.double() @ weight.double().t()).abs() <= 2**-8 * terms).all()
    kind = ProductKind(compiled_attention.ATTENTION, torch.bfloat16, 2, 16, 48, False, False, torch.get_num_threads())
    with torch.inference_mode():
        assert compiled_attention._holds(kind)


# -- without the package -------------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["llvmlite"] = None
import aspec.io.host_info as info
info.version = lambda name: (_ for _ in ()).throw(info.PackageNotFoundError(name))
import torch
from aspec.models.exact.known_recipes import recipe_for
from aspec.models.exact.row_probe import ProductKind
print(recipe_for(ProductKind("linear", torch.bfloat16, 0, 256, 256, False, False, 1)).compiled)
"""


def test_without_the_package_products_are_those_of_torch(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(aspec.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
