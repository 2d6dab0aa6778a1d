"""Products on packed weights of 4 bits: the form that torch takes, from every format, the same bits for all rows."""

import contextlib
import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import aspec
from aspec.errors import CheckpointError, InternalError, UnsupportedModelError
from aspec.io.host_info import cpu_features
from aspec.models.compiled.products import torch_int4_product
from aspec.models.exact import int4_panels, int4_probe, products
from aspec.models.exact.int4_panels import panel_product
from aspec.models.exact.int4_probe import NEVER, int4_kind, panels_kind, probe_int4, probe_panels
from aspec.models.exact.modes import ExactStep
from aspec.models.formats.int4 import kernel
from aspec.models.formats.int4.form import Int4, Int4Decode, in_blocks, pack_codes
from aspec.models.formats.int4.kernel import proved_block
from aspec.models.formats.registry import read_format
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.profiling.decode_profiler import measure_decoding, measure_int4, measured_weights
from aspec.profiling.hardware import Hardware, Processor
from aspec.profiling.model_shape import shape_of
from aspec.profiling.roofline import model_cost
from tests import packed_words, tiny
from tests.gguf_files import builds_tokenizers
from tests.quantised import allocations, decode, store, stored
from tests.quantised_models import build
from tests.quantised_pairs import Quantised
from tests.test_exact import Engine, _recipes, _threads, check  # noqa: F401 - fixtures

needs_product = pytest.mark.skipif(proved_block() is None, reason="torch's int4 product needs AVX2")
STEPS = [(*case, threads) for case in (("prepared", None), ("gptq 4 bits v2", True)) for threads in (1, 2)]
BLOCK = 64  # of weights made here, whatever the processor
PROOF = "import torch; from aspec.models.formats.int4.kernel import proved_block; print(proved_block())"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Quantised.builder(tmp_path_factory)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Builds a llama in a format, and the plain one with the weights that it decodes to."""
    source = functools.cache(lambda name: tiny.build(tmp_path_factory.mktemp("source") / name, name, shards=1))

    def build_case(method, name="llama"):
        return build(tmp_path_factory.mktemp("made"), source(name), method)

    return functools.cache(build_case)


def repack(weight, tensors):
    """A weight in the form of products, decoded to fp32."""
    factor = weight.factor
    sizes = factor.sizes(weight.shape, BLOCK)
    codes, scales = torch.empty(sizes.codes, dtype=torch.uint8), torch.empty(sizes.scales, dtype=torch.bfloat16)
    workspace, own = torch.empty(factor.workspace_bytes, dtype=torch.uint8), stored(weight, tensors)
    factor.write(own, BLOCK, codes, scales, workspace)
    assert max(allocations(lambda: factor.write(own, BLOCK, codes, scales, workspace)), default=0) <= 64
    made, how = torch.empty(weight.shape), Int4Decode(sizes)
    how((codes, scales), made, torch.empty(how.workspace_bytes, dtype=torch.uint8))
    return made


WORDS = {
    "gptq": lambda: packed_words.gptq(4, 192, 1024, 64),
    "gptq bf16": lambda: packed_words.gptq(4, 64, 96, 32, torch.bfloat16),
    "awq": lambda: packed_words.awq(192, 1024, 128),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_repacked_weight_is_the_decoded_one_but_for_its_rounded_scales(tmp_path, case):
    tensors = WORDS[case]()
    size = {"gptq": 64, "gptq bf16": 32, "awq": 128}[case]
    settings = {"quant_method": case.split()[0], "bits": 4, "group_size": size}
    (weight,) = read_format({"quantization_config": settings}, "config.json").weights(store(tmp_path, tensors))
    exact, found = decode(weight, tensors, torch.float32), repack(weight, tensors)
    most = exact.view(weight.shape[0], -1, size).abs().amax(-1).clamp_min(1e-6)
    apart = (found - exact).view(weight.shape[0], -1, size).abs().amax(-1) / most
    assert apart.nan_to_num().max() < 16 * 2**-8


@builds_tokenizers
def test_blocks_of_gguf_are_repacked_in_the_order_of_transformers(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf-py is not installed")
    from tests.gguf_models import tiny_model, write_model

    for kind, name in ((gguf.GGMLQuantizationType.Q4_0, "0"), (gguf.GGMLQuantizationType.Q4_1, "1")):
        folder = tmp_path / name
        folder.mkdir()
        path = write_model(folder / "m.gguf", "llama", tiny_model("llama", hidden_size=128), kind)
        from aspec.models.formats.gguf.folder import folder_of

        model = Model(folder_of(path), dtype=torch.bfloat16)
        for weight in model.packed[0]:
            own = [torch.from_file(ref.file, size=ref.offset + ref.nbytes, dtype=torch.uint8) for ref in weight.refs]
            tensors = {
                ref.name: file[ref.offset :].clone().view(ref.dtype).view(ref.shape)
                for ref, file in zip(weight.refs, own, strict=True)
            }
            if weight.factor is not None and weight.factor.sizes(weight.shape, BLOCK):
                exact, found = decode(weight, tensors, torch.float32), repack(weight, tensors)
                assert (found - exact).abs().max() <= 2**-7 * exact.abs().max(), weight.name


@pytest.mark.parametrize(("capability", "block"), [("avx512", "64"), ("avx2", "32"), ("default", "None")])
@pytest.mark.slow
def test_the_block_is_that_of_the_instruction_set(capability, block):
    needed = {"avx512": "avx512f", "avx2": "avx2", "default": ""}[capability]
    if needed not in cpu_features():
        pytest.skip(f"this processor has no {capability}: torch would end with an illegal instruction")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(aspec.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROOF], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == block or proved_block() != BLOCK


@needs_product
def test_a_product_that_disagrees_is_not_used(monkeypatch):
    honest = kernel.int4_product

    def other_rows(rows, *rest):
        made = honest(rows, *rest)
        return made if rows.shape[0] > 1 else torch.nextafter(made, made + 1)

    for lie in (other_rows, lambda rows, *rest: honest(rows, *rest) * 1.1):
        monkeypatch.setattr(kernel, "int4_product", lie)
        assert proved_block.__wrapped__() is None


@needs_product
def test_every_number_of_rows_has_the_same_bits_and_a_kernel_that_lies_is_seen(monkeypatch):
    kind = int4_kind(Int4(512, 256, 32, proved_block()), torch.get_num_threads())
    assert probe_int4(kind).lowest == 1
    lies = lambda rows, *rest: torch_int4_product(rows, *rest) + (rows.shape[0] < 3)  # noqa: E731
    monkeypatch.setattr(int4_probe, "torch_int4_product", lies)
    monkeypatch.setattr(int4_probe, "compiler", str)
    assert probe_int4(kind).lowest == 3


PANELS = {
    "one": Int4(64, 96, 32, 32),
    "several and a smaller one": Int4(5 * 64, 128, 128, 64),
    "rows too long for the buffer": Int4(128, 1024, 256, 32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", PANELS)
def test_a_panel_holds_the_decoded_weights(monkeypatch, case, dtype):
    monkeypatch.setattr(int4_panels, "PANEL_BYTES", 1 << 16)
    sizes = PANELS[case]
    codes = torch.randint(256, (sizes.rows * sizes.columns // 2 + 24,), dtype=torch.uint8)
    scales, decoded, how = (
        torch.randn(sizes.scales).bfloat16(),
        torch.empty(sizes.rows, sizes.columns),
        Int4Decode(sizes),
    )
    chosen = torch.randint(sizes.columns, (50,))
    rows = torch.eye(sizes.columns, dtype=torch.bfloat16)[chosen]
    for start in (16, 24):  # bytes before the codes: both ways of moving them
        own = codes[start:][: sizes.rows * sizes.columns // 2].view(sizes.codes)
        how((own, scales), decoded, torch.empty(how.workspace_bytes, dtype=torch.uint8))
        for inference in (True, False):  # the same buffer
            with torch.inference_mode(inference):
                made = panel_product(rows, own, scales, sizes, dtype)
            assert torch.equal(made, decoded[:, chosen].t().bfloat16())


@needs_product
def test_many_rows_are_multiplied_in_panels_unless_a_step_is_exact(monkeypatch):
    sizes, bias = Int4(64, 512, 32, proved_block()), torch.randn(64).bfloat16()
    codes = torch.randint(256, sizes.codes, dtype=torch.uint8)
    scales, rows = torch.randn(sizes.scales).bfloat16(), torch.randn(12, 512).bfloat16()
    module = torch.nn.Linear(512, 64, dtype=torch.bfloat16, device="meta")
    linear = products.route(torch.nn.Sequential(module))["0.weight"]
    module.bias = torch.nn.Parameter(bias, requires_grad=False)
    marked = lambda *given: panel_product(*given) + 1  # noqa: E731
    monkeypatch.setattr(products, "panel_product", marked)
    monkeypatch.setattr(products, "_panels", lambda own: (8, torch.float32))
    linear.take(sizes, codes, scales)
    packed = products.exact_int4(rows, codes, scales, sizes) + bias
    panels = marked(rows, codes, scales, sizes, torch.float32) + bias
    assert torch.equal(products.fastest_int4(rows, codes, scales, sizes) + bias, panels)
    with torch.inference_mode():
        for count in (1, 7, 8, 12):
            assert torch.equal(module(rows[None, :count])[0], (packed if count < 8 else panels)[:count])
            with ExactStep():
                assert torch.equal(module(rows[:count]), packed[:count])


@needs_product
def test_panels_are_for_as_many_rows_as_make_them_faster(monkeypatch):
    kind = panels_kind(Int4(64, 256, 32, proved_block()), torch.float32, 1)
    monkeypatch.setattr(int4_probe, "compiler", str)
    for first, expected in ((1, 2), (20, 24), (257, NEVER)):
        turn = iter(range(100))

        def seconds(work, first=first, turn=turn):
            rows = work.__closure__[work.__code__.co_freevars.index("own")].cell_contents
            return 1.0 if next(turn) % 2 == 0 else len(rows) / (first - 0.5)

        monkeypatch.setattr(int4_probe, "least_seconds", seconds)
        found = probe_panels(kind).widening
        assert found.from_rows == expected, first


@needs_product
@pytest.mark.slow
@pytest.mark.parametrize(("method", "asked", "threads"), STEPS)
def test_steps_equal_decoding(pair, method, asked, threads):
    torch.set_num_threads(threads)
    engine = Engine(pair("llama", method).target, torch.bfloat16, packed_products=asked)
    packed = [linear for linear in engine.model._linears if linear.sizes is not None]
    assert len(packed) == 4 * (3 if proved_block() == 64 else 7), "q, o, down, and others of whole blocks"
    assert all(linear.packed for linear in packed)
    check(engine, range(1))


@needs_product
@pytest.mark.slow
@pytest.mark.parametrize("case", [("prepared", "auto"), ("gptq 4 bits v2", "packed")])
def test_tokens_depend_on_no_draft_and_no_plan(pair, case):
    method, products = case
    told = pytest.warns(RuntimeWarning, match="multiplied packed") if products == "packed" else contextlib.nullcontext()
    with told:
        pair("llama", method).check_exact("bfloat16", products=products)


@needs_product
def test_a_tied_head_is_multiplied_packed_beside_the_decoded_embedding(made):
    folder, plain = made("prepared embedding", "llama_tied")
    model, tokens = Model(folder, dtype=torch.bfloat16), torch.arange(3, 12)[None]
    assert shape_of(model).head_int4 == 256 * 64
    logits = []
    for own in (model, Model(plain, dtype=torch.bfloat16)):
        step = KVCache(own.kv_shapes(), 1, 64, own.dtype).step([0], [0], [9])
        logits += tiny.Streamed(own).run((tokens, step))
    packed, expected = logits
    assert 0 < (packed - expected).norm() < 0.02 * expected.norm()


@needs_product
def test_streamed_parts_are_multiplied_where_they_were_read_and_are_unbound(made):
    folder, plain = made("prepared")
    logits, tokens = [], torch.arange(3, 12)[None]
    for path, asked in ((folder, None), (folder, False), (plain, None)):
        model = Model(path, dtype=torch.bfloat16, packed_products=asked)
        streamed = tiny.Streamed(model)
        assert any(part.factors for part in streamed.parts) == (path == folder and asked is None)
        for count in (9, 1, 2, 5):
            step = KVCache(model.kv_shapes(), 1, 64, model.dtype, exact=True).step([0], [0], [count])
            (found,) = streamed.run((tokens[:, :count], step))
            logits += [found[0].float()] if count == 9 else []
            assert torch.equal(found[0].float(), logits[-1][:count])
        with pytest.raises(InternalError, match="not bound"):
            model.layer(0, model.embed(tokens[:, :5], step))
    packed, decoded, expected = logits
    assert torch.equal(decoded, expected)
    assert 0 < (packed - expected).norm() < 0.02 * expected.norm()


@needs_product
def test_packed_products_are_priced_by_rows_and_repacking_by_its_bytes(made):
    """A part that is multiplied where it was read decodes nothing; a repacked one is written in fewer bytes."""
    shapes = {}
    for method, asked in (("prepared", None), ("prepared", False), ("gptq 4 bits v2", True), ("gptq 4 bits v2", None)):
        model = Model(made(method)[0], dtype=torch.bfloat16, packed_products=asked)
        shapes[method, asked] = shape_of(model)
        assert all(0 < measure_decoding(own, torch.bfloat16) < 1 for own in measured_weights(model).values())
    prepared, decoded = shapes["prepared", None].layers[0], shapes["prepared", False].layers[0]
    repacked, gptq = shapes["gptq 4 bits v2", True].layers[0], shapes["gptq 4 bits v2", None].layers[0]
    smaller = proved_block() == 32  # blocks, which the other matrices have, too
    assert (prepared.project_int4, prepared.rest_int4) == (
        64 * (64 + smaller * 2 * 32),
        64 * (64 + 96 + smaller * 2 * 96),
    )
    assert prepared.packed == ()
    assert sum(count for _, count in decoded.packed) == prepared.project_int4 + prepared.rest_int4
    assert 0 < repacked.written_bytes < gptq.written_bytes
    for exact in (False, True):
        table = measure_int4(Int4(128, 64, 32, proved_block()), 1, exact=exact)
        assert [rows for rows, _ in table] == [1, 4, 16, 64, 256]
    machine = Processor(memory_bytes_per_s=2e10, int4_weight_s={"bfloat16": ((1, 1e-10), (64, 64e-10))})
    packed, plain = (
        model_cost(shapes["prepared", asked], Hardware(cpu=machine)).layers[0].project for asked in (None, False)
    )
    saved = 2 * prepared.project_int4 / 2e10
    for rows in (1, 64):
        assert packed.at(rows) == pytest.approx(plain.at(rows) - saved + prepared.project_int4 * rows * 1e-10, rel=0.05)
    dear = replace(machine, exact_int4_weight_s={"bfloat16": ((1, 1e-10), (64, 128e-10))})
    layers = [model_cost(shapes["prepared", None], Hardware(cpu=dear), exact=own).layers[0] for own in (False, True)]
    assert layers[0].project.at(64) == packed.at(64)
    assert layers[1].project.at(64) - packed.at(64) == pytest.approx(prepared.project_int4 * 64e-10)


def test_what_cannot_be_packed_is_refused_in_a_paragraph(made, tmp_path):
    _, source = made("prepared")
    for how in (dict(dtype=torch.bfloat16), dict(dtype=torch.float32)):
        with pytest.raises(UnsupportedModelError, match=r"found none\. Run with --products decoded") as error:
            Model(source, packed_products=True, **how)
        assert "\n" not in str(error.value)
    settings = {"quant_method": "aspec", "bits": 4, "group_size": 32, "block": 64}
    refs = store(tmp_path, {"m.int4_codes": torch.zeros(64, 16, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="expected a tensor int4_scales beside int4_codes"):
        read_format({"quantization_config": settings}, "config.json").weights(refs)
    for key, value in (("group_size", 48), ("block", 16), ("bits", 3), ("other", 1)):
        with pytest.raises(UnsupportedModelError, match=key):
            read_format({"quantization_config": {**settings, key: value}}, "config.json")


def test_codes_are_packed_and_unpacked():
    sizes = Int4(128, 96, 32, 32)
    numbers = torch.randint(16, (128, 96), dtype=torch.uint8)
    codes, made = torch.empty(sizes.codes, dtype=torch.uint8), torch.empty(128, 96)
    pack_codes(numbers.clone(), 32, in_blocks(codes, 32))
    scales = torch.tensor([1.0, 8.0]).expand(sizes.scales).bfloat16()
    how = Int4Decode(sizes)
    how((codes, scales), made, torch.empty(how.workspace_bytes, dtype=torch.uint8))
    assert torch.equal(made, numbers.float())
