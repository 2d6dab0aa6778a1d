"""MXFP4 and NVFP4 weights equal those of transformers, compressed-tensors and ModelOpt in every bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from aspec.errors import CheckpointError, UnsupportedModelError
from aspec.models.formats import grouped, mxfp4, nvfp4
from tests.quantised import DTYPES, assert_allocates_nothing, assert_same_bits, decode, store

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GOLDEN = load_file(Path(__file__).parent / "golden" / "formats.safetensors")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def any_bytes(*shape, below=256):
    return torch.randint(0, below, shape, dtype=torch.uint8)


def read_mxfp4(tensors, folder, **settings):
    return mxfp4.read({"quant_method": "mxfp4", **settings}, "config.json").weights(store(folder, tensors))


def read_modelopt(tensors, folder, **settings):
    return nvfp4.read({"quant_method": "modelopt", **settings}, "config.json").weights(store(folder, tensors))


def plain(codes, scales, group):
    """The definition: the low code of a byte first, and a scale for each group."""
    values = torch.stack([VALUES[(codes & 15).long()], VALUES[(codes >> 4).long()]], -1).flatten(-2)
    return (values.unflatten(-1, (-1, group)) * scales.float().unsqueeze(-1)).flatten(-2)


def experts(count, outputs, inputs, below=255):
    return {
        "experts.gate_up_proj_blocks": any_bytes(count, outputs, inputs // 32, 16),
        "experts.gate_up_proj_scales": any_bytes(count, outputs, inputs // 32, below=below),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_of_gpt_oss_equal_those_of_transformers(tmp_path, dtype):
    """All scales but the last, which stands for no number in the format's specification."""
    tensors = experts(2, 96, 128)
    tensors["experts.down_proj_blocks"] = any_bytes(2, 40, 3, 16)
    tensors["experts.down_proj_scales"] = torch.arange(240, dtype=torch.uint8).view(2, 40, 3)
    tensors["experts.gate_up_proj_bias"] = torch.rand(2, 96).bfloat16()
    found = read_mxfp4(tensors, tmp_path, modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    assert [weight.name for weight in found] == ["experts.down_proj", "experts.gate_up_proj"]
    assert [weight.shape for weight in found] == [(2, 96, 40), (2, 128, 96)]
    for weight in found:
        stored = [tensors[ref.name] for ref in weight.refs]
        assert_same_bits(decode(weight, tensors, dtype), convert_moe_packed_tensors(*stored, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_weights_equal_those_of_compressed_tensors(tmp_path, name, dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    nv = name.startswith("nv")
    tensors = {"weight_packed": any_bytes(64, 128), "weight_scale": any_bytes(64, 16 if nv else 8, below=255)}
    if nv:
        tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = torch.tensor([1234.567])
    group = {"strategy": "tensor_group", "group_size": 16} if nv else {"strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="float", symmetric=True, **group), format=name
    )
    expected = BaseCompressor.get_value_from_registry(name).decompress(dict(tensors), scheme)["weight"]
    refs = list(store(tmp_path, tensors).items())
    refs = [dict(refs)[key] for key in tensors]
    weight = nvfp4.packed("weight", *refs) if nv else mxfp4.packed("weight", *refs, rounded=torch.bfloat16)
    assert weight.dtype == expected.dtype
    assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_equal_those_of_modelopt(tmp_path, dtype):
    tensors = {name: own for name, own in GOLDEN.items() if name.startswith("nvfp4.weight")}
    (weight,) = read_modelopt(tensors, tmp_path, quant_algo="NVFP4", ignore=["lm_head"], group_size=16)
    expected = GOLDEN[f"nvfp4.expected.{str(dtype).removeprefix('torch.')}"]
    found = decode(weight, tensors, dtype)
    assert_same_bits(found + 0.0, expected + 0.0)  # ModelOpt has no zero with a sign
    assert found.abs().max() > 1


def test_modelopt_has_several_methods_in_one_checkpoint(tmp_path):
    tensors = {
        "a.weight": any_bytes(24, 32),
        "a.weight_scale": torch.rand(24, 4).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(0.01),
        "a.input_scale": torch.tensor(0.5),
        "b.weight": torch.randn(24, 64).to(torch.float8_e4m3fn),
        "b.weight_scale": torch.tensor(0.25),
        "b.input_scale": torch.tensor(0.5),
        "c.weight": torch.randn(24, 64).to(torch.float8_e4m3fn),
        "c.weight_scale": any_bytes(24, 2, below=140),
        "d.weight": torch.randn(24, 64).to(torch.float8_e4m3fn),
        "d.weight_scale": torch.rand(24),
        "k_proj.k_scale": torch.tensor(1.0),
        "lm_head.weight": torch.randn(24, 64).bfloat16(),
    }
    settings = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": {}}
    found = {weight.name: weight for weight in read_modelopt(tensors, tmp_path, **settings)}
    fp8 = {name: tensors[f"{name}.weight"].float() for name in "bcd"}
    expected = {
        "a.weight": plain(tensors["a.weight"], tensors["a.weight_scale"].float() * 0.01, 16),
        "b.weight": fp8["b"] * 0.25,
        "c.weight": fp8["c"] * (tensors["c.weight_scale"].float() - 127).exp2().repeat_interleave(32, 1),
        "d.weight": fp8["d"] * tensors["d.weight_scale"][:, None],
    }
    assert set(found) == set(expected)
    for name, own in expected.items():
        assert_same_bits(decode(found[name], tensors, torch.float32), own)


def test_every_expert_may_have_its_own_whole_scale(tmp_path):
    tensors = {
        "experts.up": any_bytes(3, 8, 16),
        "experts.up_scale": torch.rand(3, 8, 2).to(torch.float8_e4m3fn),
        "experts.up_scale_2": torch.rand(3),
    }
    (weight,) = read_modelopt(tensors, tmp_path, quant_algo="NVFP4")
    scales = tensors["experts.up_scale"].float() * tensors["experts.up_scale_2"][:, None, None]
    assert_same_bits(decode(weight, tensors, torch.float32), plain(tensors["experts.up"], scales, 16))


def test_any_tiles_give_the_same_bits(tmp_path, monkeypatch):
    for tile in (32, 1 << 9):
        monkeypatch.setattr(grouped, "TILE", tile)
        monkeypatch.setattr(grouped, "ROWS", 3)
        for _ in range(8):
            outputs, groups = (int(own) for own in torch.randint(1, 12, (2,)))
            tensors = experts(2, outputs, groups * 32, below=140)
            blocks, scales = tensors.values()
            expected = plain(blocks, (scales.float() - 127).exp2().unsqueeze(-1), 32).flatten(-2).mT
            (weight,) = read_mxfp4(tensors, tmp_path)
            for dtype in (torch.float32, torch.bfloat16):
                assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype).contiguous())


def test_decoding_allocates_nothing(tmp_path):
    tensors = experts(2, 128, 256) | {"w": any_bytes(256, 128), "s": any_bytes(256, 16), "f": torch.rand(1)}
    tensors["s"] = tensors["s"].view(torch.float8_e4m3fn)
    refs = store(tmp_path, tensors)
    found = [*read_mxfp4(experts(2, 128, 256), tmp_path), nvfp4.packed("w", refs["w"], refs["s"], refs["f"])]
    for weight in found:
        for dtype in (torch.bfloat16, torch.float32):
            assert_allocates_nothing(weight, tensors, dtype)


FP8 = torch.zeros(8, 2).to(torch.float8_e4m3fn)
FAULTS = [
    ("blocks of another size", {"x_blocks": any_bytes(2, 8, 3, 8), "x_scales": any_bytes(2, 8, 3)}, r"\[2, 8, 3, 16\]"),
    ("flat blocks", {"x_blocks": any_bytes(16), "x_scales": any_bytes(1)}, "at least 3 dimensions"),
    ("truncated scales", {"x_blocks": any_bytes(2, 8, 3, 16), "x_scales": any_bytes(2, 8, 2)}, r"\[2, 8, 3\] .*found"),
    (
        "floating scales",
        {"x_blocks": any_bytes(2, 8, 3, 16), "x_scales": torch.rand(2, 8, 3)},
        "or uint8, found float32",
    ),
    ("no scales", {"x_blocks": any_bytes(2, 8, 3, 16)}, "x_scales beside it"),
    ("no blocks", {"x_scales": any_bytes(2, 8, 3)}, "x_blocks beside it"),
    ("nothing packed", {"x": any_bytes(8, 8)}, r"expected tensors named \*_blocks"),
]


@pytest.mark.parametrize(("tensors", "words"), [pytest.param(*own[1:], id=own[0]) for own in FAULTS])
def test_faults_of_mxfp4_are_named(tmp_path, tensors, words):
    with pytest.raises(CheckpointError, match=words) as error:
        read_mxfp4(tensors, tmp_path)
    assert "\n" not in str(error.value)


FACTOR = torch.tensor(1.0)
FAULTS = [
    ("no whole scale", {"a.weight": any_bytes(8, 16), "a.weight_scale": FP8}, "a.weight_scale_2 beside it"),
    ("no scale", {"b.weight": FP8}, "b.weight_scale beside it"),
    (
        "a group that does not divide",
        {"a.weight": any_bytes(8, 12), "a.weight_scale": FP8, "a.weight_scale_2": FACTOR},
        "a multiple of 16 codes",
    ),
    (
        "truncated scales",
        {"a.weight": any_bytes(8, 24), "a.weight_scale": FP8, "a.weight_scale_2": FACTOR},
        r"\[8, 3\] .*found \[8, 2\]",
    ),
    (
        "two whole scales",
        {"a.weight": any_bytes(8, 16), "a.weight_scale": FP8, "a.weight_scale_2": torch.ones(2)},
        "one float32",
    ),
    ("a plain weight", {"a.weight": torch.ones(8, 8), "a.weight_scale": FP8}, "uint8 or float8_e4m3fn"),
]


@pytest.mark.parametrize(("tensors", "words"), [pytest.param(*own[1:], id=own[0]) for own in FAULTS])
def test_faults_of_nvfp4_are_named(tmp_path, tensors, words):
    with pytest.raises(CheckpointError, match=words) as error:
        read_modelopt(tensors, tmp_path, quant_algo="NVFP4")
    assert "\n" not in str(error.value)


def test_algorithms_that_change_activations_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"NVFP4_AWQ"):
        read_modelopt({"x": any_bytes(8)}, tmp_path, quant_algo="NVFP4_AWQ")
    tensors = {"a.weight": any_bytes(8, 16), "a.weight_scale": FP8, "a.pre_quant_scale": torch.ones(32)}
    with pytest.raises(UnsupportedModelError, match=r"a.pre_quant_scale changes the inputs"):
        read_modelopt(tensors, tmp_path, quant_algo="NVFP4")
