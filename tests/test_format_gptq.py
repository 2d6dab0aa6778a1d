"""GPTQ and AWQ weights equal those of GPTQModel in every bit, within their memory, and faults are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aspec.errors import CheckpointError, UnsupportedModelError
from aspec.models.formats import gptq as gptq_format
from aspec.models.formats.integers import scaled
from aspec.models.formats.registry import read_format
from tests.packed_words import awq, awq_weight, gptq, gptq_weight
from tests.quantised import DTYPES, assert_allocates_nothing, assert_same_bits, decode, store

GOLDEN = load_file(Path(__file__).parent / "golden" / "gptq.safetensors")
CASES = sorted({name.rpartition(".")[0] for name in GOLDEN})
FORMATS = {1: "gptq", 2: "gptq_v2"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def read(folder, tensors, method="gptq", bits=4, group_size=32, **others):
    settings = {"quant_method": method, "bits": bits, "group_size": group_size, **others}
    found = read_format({"quantization_config": settings}, "config.json")
    return found.weights(store(folder, tensors))


def refused(folder, tensors, match, error=CheckpointError, **settings):
    with pytest.raises(error, match=match) as caught:
        read(folder, tensors, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_the_library(tmp_path, case, dtype):
    tensors = {name: own for name, own in GOLDEN.items() if name.startswith(f"{case}.") and "expected" not in name}
    method, *rest = case.split(".")
    settings = {"group_size": int(rest[-1])}
    if method == "gptq":
        settings |= {"bits": int(rest[0]), "checkpoint_format": FORMATS[int(rest[1])], "desc_act": rest[1] == "1"}
    (weight,) = read(tmp_path, tensors, method, **settings)
    expected = GOLDEN[f"{case}.expected"]
    assert (weight.name, weight.dtype) == (f"{case}.weight", expected.dtype)
    assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


@pytest.mark.parametrize("case", CASES)
def test_the_definition_in_these_tests_is_the_library(case):
    method, *rest = case.split(".")
    found = gptq_weight(GOLDEN, int(rest[0]), int(rest[1]), case) if method == "gptq" else awq_weight(GOLDEN, case)
    assert_same_bits(found, GOLDEN[f"{case}.expected"])


SHAPES = [(32, 64, 32), (96, 1056, 96), (264, 640, 128), (1000, 2048, 1024), (64, 1536, -1)]
"""Rows, columns and groups: one tile, several with smaller last ones, groups wider than a tile, one group."""


@pytest.mark.parametrize("tile", [1 << 14, scaled.TILE])
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, "awq"])
def test_weights_of_several_tiles(tmp_path, monkeypatch, bits, rows, columns, size, tile):
    monkeypatch.setattr(scaled, "TILE", tile)
    rows = -(-rows // 32) * 32 if bits == 3 else rows
    for reordered in (False, True)[: 1 if bits == "awq" else 2]:
        if bits == "awq":
            tensors = awq(rows, columns, size)
            (weight,) = read(tmp_path, tensors, "awq", group_size=size)
            expected = awq_weight(tensors)
        else:
            tensors = gptq(bits, rows, columns, size, reordered=reordered)
            (weight,) = read(tmp_path, tensors, bits=bits, group_size=size, desc_act=reordered)
            expected = gptq_weight(tensors, bits, 1)
        assert weight.shape == (rows, columns)
        assert weight.nbytes == sum(own.nbytes for own in tensors.values())
        assert_same_bits(decode(weight, tensors, torch.bfloat16), expected.bfloat16())


def test_groups_may_be_in_any_order_of_any_size_and_count_from_the_end(tmp_path):
    tensors = gptq(4, 32, 96, 48) | {"m.g_idx": torch.randint(-2, 2, (96,), dtype=torch.int32)}
    (weight,) = read(tmp_path, tensors, group_size=64, desc_act=True)  # 64 and a rest of 32
    assert_same_bits(decode(weight, tensors, torch.float16), gptq_weight(tensors, 4, 1))


def test_without_an_index_groups_are_adjacent_inputs(tmp_path):
    tensors = gptq(4, 32, 96, 32)
    index = tensors.pop("m.g_idx")
    (weight,) = read(tmp_path, tensors)
    assert_same_bits(decode(weight, tensors, torch.float16), gptq_weight(tensors | {"m.g_idx": index}, 4, 1))
    refused(tmp_path, tensors, "m: expected a tensor g_idx beside qweight, qzeros, scales, found none", desc_act=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, "awq"])
def test_decoding_allocates_nothing(tmp_path, bits, dtype):
    for reordered in (False, True):
        if bits == "awq":
            tensors, settings = awq(256, 2048, 128), {"method": "awq"}
        else:
            tensors, settings = gptq(bits, 256, 2048, 128, reordered=reordered), {"bits": bits}
        (weight,) = read(tmp_path, tensors, group_size=128, **settings)
        assert_allocates_nothing(weight, tensors, dtype)


def test_rules_for_single_modules(tmp_path):
    """The first pattern that matches the start of a name decides; a head may be quantised, and biases are plain."""
    names = ("model.layers.0.up", "model.layers.0.down", "model.layers.1.up", "lm_head")
    bits, sizes = (8, 2, 4, 3), (64, 32, 32, -1)
    tensors = {"model.layers.2.up.weight": torch.randn(8, 8).half(), "lm_head.bias": torch.randn(32).half()}
    for name, own, size in zip(names, bits, sizes, strict=True):
        tensors |= gptq(own, 32, 64, size, module=name, reordered=own == 8)
    dynamic = {
        r"+:model\.layers\.0\.(?:up|gate)": {"bits": 8, "group_size": 64, "desc_act": True},
        r"model\.layers\.0\.": {"bits": 2, "sym": False},
        r"-:model\.layers\.2\.": {},
        "+:lm_head": {"bits": 3, "group_size": -1},
        ".*up": {"bits": 4},
        ".*": {"bits": 3},
    }
    found = {weight.name: weight for weight in read(tmp_path, tensors, dynamic=dynamic, lm_head=True)}
    assert set(found) == {f"{name}.weight" for name in names}
    for name, own in zip(names, bits, strict=True):
        assert f"{own} bits" in found[f"{name}.weight"].method
        expected = gptq_weight(tensors, own, 1, name)
        assert_same_bits(decode(found[f"{name}.weight"], tensors, torch.float32), expected.float())
    refused(tmp_path, tensors, "0.up: expected no tensor qweight, as dynamic excl", dynamic={"-:.*0.up": {}, **dynamic})


def test_experts_are_weights_of_their_own(tmp_path):
    names = [f"layers.0.mlp.experts.{expert}.{end}" for expert in range(3) for end in ("up_proj", "down_proj")]
    tensors = {name: own for module in names for name, own in gptq(4, 32, 64, 32, module=module).items()}
    found = read(tmp_path, tensors)
    assert {weight.name for weight in found} == {f"{name}.weight" for name in names}


FAULTS = [
    ({"m.scales": None}, "m: expected a tensor scales beside g_idx, qweight, qzeros, found none"),
    ({"m.qzeros": None}, "expected a tensor qzeros beside"),
    ({"m.qweight": None}, "expected a tensor qweight beside"),
    ({"m.scales": torch.ones(2, 32)[:1]}, r"tensor m.scales: expected .*float32 \[2, 32\], found float32 \[1, 32\]"),
    ({"m.scales": torch.ones(2, 32).long()}, "expected float16 or bfloat16 or float32 .*, found int64"),
    ({"m.qzeros": torch.ones(2, 8, dtype=torch.int32)}, r"expected int32 \[2, 4\], found int32 \[2, 8\]"),
    ({"m.qweight": torch.ones(8, 32)}, r"expected int32 \[any, any\], found float32"),
    ({"m.qweight": torch.ones(8, 33, dtype=torch.int32)}, r"expected inputs and outputs in multiples of 8"),
    ({"m.qweight": torch.ones(0, 32, dtype=torch.int32)}, r"expected inputs and outputs in multiples of 8"),
    ({"m.qweight": torch.ones(32, dtype=torch.int32)}, r"found int32 \[32\]"),
    ({"m.g_idx": torch.zeros(63, dtype=torch.int32)}, r"expected int32 \[64\], found int32 \[63\]"),
    ({"m.g_idx": torch.zeros(64).long()}, "found int64"),
]


@pytest.mark.parametrize(("change", "match"), FAULTS, ids=lambda own: None if isinstance(own, dict) else own[:40])
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, match):
    tensors = {name: own for name, own in (gptq(4, 32, 64, 32) | change).items() if own is not None}
    refused(tmp_path, tensors, match)


@pytest.mark.parametrize("group", [-3, 2, 1 << 30])
def test_a_group_out_of_range_is_found_when_it_is_decoded(tmp_path, group):
    tensors = gptq(4, 32, 64, 32)
    tensors["m.g_idx"][7] = group
    (weight,) = read(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="m: expected groups from 0 to 1 in its tensor g_idx, found"):
        decode(weight, tensors, torch.bfloat16)


@pytest.fixture
def on_a_device(monkeypatch):
    """Values cannot be looked at."""
    for module in (scaled, gptq_format):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)


@pytest.mark.parametrize("group", [-3, 2, 1 << 30])
def test_on_a_device_a_group_out_of_range_makes_a_weight_of_no_numbers(tmp_path, on_a_device, group):
    tensors = gptq(4, 32, 64, 32, reordered=True)
    (weight,) = read(tmp_path, tensors)
    expected = gptq_weight(tensors, 4, 1)
    assert_same_bits(decode(weight, tensors, torch.bfloat16), expected.bfloat16())
    tensors["m.g_idx"][7] = group
    assert decode(weight, tensors, torch.bfloat16).isnan().all()


SETTINGS = [
    ("gptq", {"bits": 5}, "as bits, found 5"),
    ("gptq", {"bits": None}, "as bits, found None"),
    ("gptq", {"group_size": 0}, "as group_size, found 0"),
    ("gptq", {"group_size": "128"}, "as group_size, found 128"),
    ("gptq", {"checkpoint_format": "marlin"}, "one of gptq, gptq_v2 as checkpoint_format, found marlin"),
    ("gptq", {"format": "gptq_p"}, "as format, found gptq_p"),
    ("gptq", {"format": "gptq", "checkpoint_format": "gptq_v2"}, "the same as format"),
    ("gptq", {"pack_dtype": "int16"}, "as pack_dtype, found int16"),
    ("gptq", {"desc_act": "yes"}, "as desc_act, found yes"),
    ("gptq", {"rotation": "hadamard"}, "found rotation = hadamard"),
    ("gptq", {"adapter": {"rank": 8}}, "found adapter = "),
    ("gptq", {"activation": "w4a8"}, "found activation = w4a8"),
    ("gptq", {"dynamic": ["up"]}, "an object as dynamic"),
    ("gptq", {"dynamic": {"up": 4}}, "an object as up"),
    ("gptq", {"dynamic": {"up": {"bits": 7}}}, "GPTQ, dynamic, up: expected 2, 3, 4 or 8 as bits, found 7"),
    ("gptq", {"dynamic": {"up": {"format": "exl3"}}}, "found format = exl3"),
    ("gptq", {"dynamic": {"(a+)+b": {}}}, "no repeated group, found"),
    ("gptq", {"dynamic": {"(a": {}}}, "a regular expression"),
    ("awq", {"version": "gemv"}, "gemm as version, found gemv"),
    ("awq", {"version": "exllama"}, "gemm as version, found exllama"),
    ("awq", {"format": "ipex"}, "gemm as format, found ipex"),
    ("awq", {"backend": "llm-awq"}, "as backend, found llm-awq"),
    ("awq", {"bits": 3}, "as bits, found 3"),
    ("awq", {"bits": None, "w_bit": 8}, "as w_bit, found 8"),
    ("awq", {"zero_point": 8}, "as zero_point, found 8"),
    ("awq", {"group_size": None, "q_group_size": 0}, "as q_group_size, found 0"),
    ("awq", {"modules_to_not_convert": "lm_head"}, "as modules_to_not_convert, found lm_head"),
    ("awq", {"rotation": "hadamard"}, "found rotation = hadamard"),
]


@pytest.mark.parametrize(("method", "settings", "match"), SETTINGS, ids=str)
def test_settings_that_aspec_cannot_follow_are_refused_by_name(tmp_path, method, settings, match):
    tensors = gptq(4, 32, 64, 32) if method == "gptq" else awq(32, 64, 32)
    refused(tmp_path, tensors, match, UnsupportedModelError, method=method, **settings)


def test_awq_leaves_some_modules_plain(tmp_path):
    """By transformers' rules: an end of a name, or a pattern of its start up to a dot."""
    names = ("model.layers.0.mlp.gate_proj", "model.layers.11.mlp.up_proj")
    tensors = {name: own for module in names for name, own in awq(32, 64, 32, module=module).items()}
    tensors["model.layers.0.mlp.gate.weight"] = torch.randn(4, 64).half()
    for plain in (["gate"], ["model.layers.1"], ["layers"], None):
        found = read(tmp_path, tensors, "awq", modules_to_not_convert=plain)
        assert [weight.name for weight in found] == [f"{name}.weight" for name in names]
    for plain in (["gate_proj"], ["model.layers.0"], ["model.layers.*.mlp"], ["visual", "model"]):
        refused(tmp_path, tensors, "expected no tensor qweight, as mod", method="awq", modules_to_not_convert=plain)


def test_awq_has_groups_that_fit_and_no_scales_of_activations(tmp_path):
    tensors = awq(32, 64, 32)
    refused(tmp_path, tensors, r"in groups of 48, found qweight \[64, 4\]", method="awq", group_size=48)
    refused(tmp_path, tensors, r"tensor m.qzeros: expected int32 \[1, 4\]", method="awq", group_size=64)
    refused(tmp_path, {"m.qzeros": tensors["m.qzeros"]}, "expected a tensor qweight beside qzeros", method="awq")
    refused(tmp_path, {"m.weight": torch.ones(8, 8)}, "expected tensors named", method="awq")
    scaled_act = tensors | {"h.0.mlp.act.scales": torch.ones(64).half()}
    refused(tmp_path, scaled_act, "tensor h.0.mlp.act.scales scales activations", UnsupportedModelError, method="awq")
