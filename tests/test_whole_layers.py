"""Layers in one call of kernels: the bits of their modules, and modules where a layer is another or kernels lie."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from aspec.io.host_info import compiler
from aspec.models.compiled import products as compiled
from aspec.models.exact import compiled_attention, compiled_probe, int4_probe, known_recipes, layer_program, products
from aspec.models.exact.layer_code import Formula, parts_of
from aspec.models.exact.whole_layers import WholeLayers
from aspec.preparing.prepare import design, prepare
from tests import tiny
from tests.test_exact import Engine, check, check_trees

pytestmark = pytest.mark.skipif(not compiler(), reason="without llvmlite (pip install 'aspec[fast]') nothing compiles")

SIZES = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=4, head_dim=16)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch, tmp_path):
    """Kernels for the smallest products, on all threads, on every machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_recipes, "_known", {})
    monkeypatch.setattr(products, "_recipes", {})
    monkeypatch.setattr(compiled_probe, "SMALLEST_WEIGHT", 0)
    for module in (compiled_probe, compiled_attention, int4_probe):
        monkeypatch.setattr(module, "FASTER", math.inf)
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    layer_program.layer_program.cache_clear()  # of programs for as many threads


def proven(engine):
    """What is known of the layers that may run in one call: by layer and kind of step, whether its bits are right."""
    layers = engine.model._whole._layers
    return {(number, kind): bits for number, layer in layers.items() for kind, bits in layer.proven.items()}


def engine_of(folder, threads=1, **how):
    """What its modules decode is there; from now on its layers run in one call."""
    torch.set_num_threads(threads)
    engine = Engine(folder, torch.bfloat16, **how)
    model = engine.model
    model.prove_products()  # norms and gates are kernels then
    whole, model._whole = model._whole, WholeLayers()
    _ = engine.decoded  # by what it has now
    model._whole = whole
    return engine


@pytest.mark.parametrize(
    ("family", "threads"), [("llama", 1), ("llama", 2), ("mistral", 1), ("qwen2", 1), ("qwen3", 2), ("llama_tied", 1)]
)
def test_the_bits_are_those_of_the_modules(family, threads, tmp_path):
    """Decoding, chunks of prompts, trees and several rows at once beside what modules decoded token by token."""
    engine = engine_of(tiny.build(tmp_path, family), threads)
    check(engine, range(2))
    check_trees(engine, 4, num_rows=1, most=40)
    engine.decode(engine.make_cache(1), 0, 5)
    kinds = {(True, False), (True, True)}
    assert proven(engine) == {(layer, kind): True for layer in range(engine.model.num_layers) for kind in kinds}


def test_keys_and_values_are_those_of_the_modules(tmp_path):
    engine = engine_of(tiny.build(tmp_path, "qwen3"))
    cache = engine.make_cache(2)
    for start, tokens in ((0, engine.tokens[:9]), (9, engine.tokens[9:10]), (10, engine.tokens[10:13])):
        engine.run([tokens], cache.step([1], [start], [len(tokens)]))
    for own, other in zip((*cache.keys, *cache.values), engine.storages(), strict=True):
        assert torch.equal(own[1, :, :13], other[0, :, :13])
        assert not own[0].any()


@pytest.mark.parametrize("integers", [False, True])
def test_weights_of_4_bits(integers, tmp_path, monkeypatch):
    """In whole numbers and in fp32, as far as this processor has them."""
    if not integers:
        monkeypatch.setattr(int4_probe, "multiplies_integers", lambda: False)
    elif not int4_probe.multiplies_integers():
        pytest.skip("a processor without the instructions")
    prepare(design(tiny.build(tmp_path / "source", "llama", sizes=SIZES, dtype=torch.bfloat16), 4), tmp_path / "packed")
    engine = engine_of(tmp_path / "packed", packed_products=True)
    check(engine, range(1))
    layer = engine.model._whole._layers[0]
    factors = [linear.operand(1).factor for linear in layer._parts.linears]
    assert all(factor.sizes and factor.integers is integers for factor in factors)
    assert set(proven(engine).values()) == {True}


@pytest.mark.parametrize("family", ["gemma2", "granite", "olmo2", "phi3", "qwen3_moe"])
def test_other_layers_keep_their_modules(family, tmp_path):
    engine = engine_of(tiny.build(tmp_path, family))
    check(engine, range(1))
    assert not engine.model._whole._layers


def test_code_that_differs_in_one_constant_is_other_code(tmp_path):
    model = engine_of(tiny.build(tmp_path, "llama")).model
    layer, own = model.layer_modules[0], type(model.layer_modules[0].self_attn)
    assert parts_of(layer) is not None

    class Other(own):
        def forward(self, *given, **named):
            return super().forward(*given, **named)

    layer.self_attn.__class__ = Other
    assert parts_of(layer) is None


@pytest.mark.parametrize("fault", ["scale", "epsilon", "half a layer"])
def test_a_program_with_other_bits_is_not_used(fault, tmp_path, monkeypatch):
    """The first step of each kind compares, and what the modules stored stays."""
    write = layer_program._Layer.write

    def wrong(layer, strides):
        if fault == "scale":
            layer.shape = replace(layer.shape, scale=0.3)
        if fault == "epsilon":
            layer.shape = replace(layer.shape, formulas=(Formula(0.1, rounded=True, offset=False),) * 2)
        write(layer, strides)
        if fault == "half a layer":
            del layer.program._calls[-5:]

    monkeypatch.setattr(layer_program._Layer, "write", wrong)
    engine = engine_of(tiny.build(tmp_path, "llama"))
    check(engine, range(1))
    assert set(proven(engine).values()) == {False}


def test_rows_that_lie_apart(tmp_path):
    """In any order, with chains of several lengths and a tree: keys and values go where those of each row are."""
    engine = engine_of(tiny.build(tmp_path, "llama"))
    cache = engine.make_cache(4)
    for row in (3, 0, 2):
        engine.run([engine.tokens[:9]], cache.step([row], [0], [9]))
    made = engine.run([engine.tokens[9:11], engine.tokens[9:12]], cache.step([3, 0], [9, 9], [2, 3]))
    assert torch.equal(made[0, :2], engine.logits[9:11])
    assert torch.equal(made[1], engine.logits[9:12])
    fork = [engine.tokens[9], engine.tokens[9], engine.tokens[10]]
    made = engine.run([fork, engine.tokens[11:14]], cache.step([2, 3], [9, 11], [3, 3], [[-1, -1, 1], [-1, 0, 1]]))
    assert torch.equal(made[0, [0, 2]], engine.logits[9:11])
    assert torch.equal(made[1], engine.logits[11:14])
    assert set(proven(engine).values()) == {True}
    assert not cache.keys[0][1].any()


def test_larger_steps_run_by_modules(tmp_path, monkeypatch):
    engine = engine_of(tiny.build(tmp_path, "llama"))
    engine.decode(engine.make_cache(1), 0, 5)
    kind, made = type(engine.model._whole._layers[0]), []
    compute = kind.compute
    monkeypatch.setattr(kind, "compute", lambda layer, step: made.append(compute(layer, step)) or made[-1])
    cache = engine.make_cache(3, capacity=400)
    engine.run([[5] * 300], cache.step([0], [0], [300]))
    assert made == [None] * engine.model.num_layers
    engine.run([[5], [6]], cache.step([0, 2], [300, 0], [1, 1]))
    assert None not in made[engine.model.num_layers :]


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_single_kernels_for_other_processors(lanes, monkeypatch):
    """Sums, wider numbers and turned heads in vectors of another length."""
    from aspec.models.compiled import kernels

    monkeypatch.setattr(kernels, "vector_lanes", lambda: lanes)
    add, widen, rotary = (own.__wrapped__() for own in (kernels.add, kernels.widen, kernels.rotary))
    one, other = torch.randn(2, 5, 48).bfloat16()
    made, wide = torch.empty_like(one), torch.empty(5, 48)
    add(one.data_ptr(), other.data_ptr(), made.data_ptr(), one.numel() // 16, 2)
    widen(one.data_ptr(), wide.data_ptr(), one.numel() // 16, 2)
    assert torch.equal(made, one + other)
    assert torch.equal(wide, one.float())
    query, key, value = (torch.randn(3, heads, 32).bfloat16() for heads in (4, 2, 2))
    cos, sin = torch.randn(2, 3, 32).bfloat16()
    expected = [
        own * cos[:, None] + torch.cat([-own[..., 16:], own[..., :16]], -1) * sin[:, None] for own in (query, key)
    ]
    keys, values = torch.zeros(2, 2, 10, 32).bfloat16()
    places = torch.tensor([[7 * 32, 7 * 32], [0, 0], [32, 32]])
    addresses = [own.data_ptr() for own in (query, key, value, cos, sin, keys, values, places)]
    rotary(*addresses, 3, 4, 2, 32, keys.stride(0), 1)
    assert torch.equal(query, expected[0])
    for token, slot in enumerate((7, 0, 1)):
        assert torch.equal(keys[:, slot], expected[1][token])
        assert torch.equal(values[:, slot], value[token])


def test_a_program_passes_numbers_and_addresses():
    from aspec.models.compiled import kernels
    from aspec.models.compiled.program import MOST_ARGUMENTS, Program

    program = Program(["one", "made", "count"])
    add = partial(program.call, kernels.add())
    add(("one", 0), ("one", 32), ("made", 0), ("count", 0), 1)
    add(("made", 0), ("one", 0), ("made", 0), 1, 1)
    start = program.ready()
    for _ in range(2):
        one, made = torch.randn(32).bfloat16(), torch.zeros(16).bfloat16()
        values = torch.tensor([0, one.data_ptr(), made.data_ptr(), 1])
        start(values.data_ptr())
        assert torch.equal(made, one[:16] + one[16:] + one[:16])
    with pytest.raises(ValueError, match=f"at most {MOST_ARGUMENTS} arguments"):
        program.call(kernels.add(), *[0] * (MOST_ARGUMENTS + 1))
