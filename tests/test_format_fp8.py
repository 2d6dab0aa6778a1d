"""FP8 weights equal those of transformers and compressed-tensors in every bit, also where blocks are ragged."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from aspec.errors import CheckpointError
from aspec.models.formats import fp8, grouped
from aspec.models.formats.settings import is_of_activations
from tests.quantised import DTYPES, allocations, assert_allocates_nothing, assert_same_bits, decode, store

ALL_CODES = torch.arange(256, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def codes(*shape, dtype=torch.float8_e4m3fn, numbers=True):
    """All 256 codes, in any order; without those that aren't numbers."""
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    if numbers:
        bits[(bits & 0x7F) >= (0x7F if dtype == torch.float8_e4m3fn else 0x7C)] = 1
    return bits.view(dtype)


def powers(*shape):
    return torch.randint(100, 140, shape, dtype=torch.uint8)


def read(tensors, folder, **settings):
    return fp8.read({"quant_method": "fp8", **settings}, "config.json").weights(store(folder, tensors))


def expanded(scale, block, shape):
    rows = scale.float().repeat_interleave(block[0], -2)[..., : shape[-2], :]
    return rows.repeat_interleave(block[1], -1)[..., : shape[-1]]


SCALES = {
    "blocks": ((256, 384), (128, 128), torch.rand(2, 3)),
    "blocks, bfloat16": ((256, 384), (128, 128), torch.rand(2, 3).bfloat16()),
    "small blocks": ((96, 160), (2, 8), torch.rand(48, 20)),
    "blocks, powers of two": ((96, 160), (32, 32), powers(3, 5).view(torch.float8_e8m0fnu)),
    "groups, powers of two as bytes": ((64, 96), (1, 32), powers(64, 3)),
    "blocks, the smallest powers": ((64, 256), (64, 128), torch.tensor([[0, 1]], dtype=torch.uint8)),
    "groups, the smallest powers": ((2, 64), (1, 32), torch.tensor([[0, 1], [2, 254]], dtype=torch.uint8)),
    "one scale": ((64, 96), None, torch.tensor(0.37)),
    "one scale in a list": ((64, 96), None, torch.tensor([0.37])),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "all codes"])
@pytest.mark.parametrize("kind", SCALES)
def test_weights_equal_those_of_transformers(tmp_path, kind, numbers, dtype):
    shape, block, scale = SCALES[kind]
    tensors = {"a.weight": codes(*shape, numbers=numbers), "a.weight_scale_inv": scale}
    (weight,) = read(tensors, tmp_path, weight_block_size=list(block) if block else None)
    expected = Fp8Dequantize(None)._dequantize_one(
        tensors["a.weight"], scale.reshape(()) if block is None else scale, dtype
    )
    assert_same_bits(decode(weight, tensors, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "grid"), [((576, 256), (5, 2)), ((200, 300), (2, 3)), ((7, 130), (1, 2)), ((1, 1), (1, 1))]
)
def test_blocks_are_the_settings_where_the_last_one_is_ragged(tmp_path, shape, grid, dtype):
    """transformers derives blocks from the grid: it refuses the first shape, and is wrong with others."""
    tensors = {"a.weight": codes(*shape), "a.weight_scale_inv": torch.rand(grid)}
    (weight,) = read(tensors, tmp_path, weight_block_size=[128, 128])
    expected = tensors["a.weight"].float() * expanded(tensors["a.weight_scale_inv"], (128, 128), shape)
    assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


def test_blocks_of_128_are_the_default(tmp_path):
    tensors = {"a.weight": codes(130, 128), "a.weight_scale_inv": torch.rand(2, 1)}
    (weight,) = read(tensors, tmp_path)
    assert weight.decode.grid == (2, 1)
    assert weight.decode.rows == 128


def test_any_tiles_give_the_same_bits(tmp_path, monkeypatch):
    """Blocks larger and smaller than a tile, rows longer than one, and ragged ends of all kinds."""
    for tile in (1, 40, 1 << 10):
        monkeypatch.setattr(fp8, "TILE", tile)
        for _ in range(40):
            height, width, rows, columns = (int(own) for own in torch.randint(1, 40, (4,)))
            grid = (-(-height // rows), -(-width // columns))
            tensors = {"a.weight": codes(2, height, width), "a.weight_scale_inv": torch.rand(2, *grid)}
            (weight,) = read(tensors, tmp_path, weight_block_size=[rows, columns])
            scale = expanded(tensors["a.weight_scale_inv"], (rows, columns), (height, width))
            for dtype in (torch.float32, torch.bfloat16):
                expected = (tensors["a.weight"].float() * scale).to(dtype)
                assert_same_bits(decode(weight, tensors, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_e5m2(tmp_path, dtype):
    tensors = {"a.weight": ALL_CODES.view(1, 256).view(torch.float8_e5m2), "a.weight_scale_inv": torch.rand(())}
    (weight,) = read(tensors, tmp_path, weight_block_size=None)
    expected = tensors["a.weight"].float() * tensors["a.weight_scale_inv"]
    assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


@pytest.mark.parametrize("tile", [1 << 6, 1 << 16])
def test_any_groups_of_a_row(tmp_path, monkeypatch, tile):
    """MXFP8: also groups of a size that divides no tile."""
    monkeypatch.setattr(grouped, "TILE", tile)
    for columns in (1, 12, 32, 64):
        tensors = {"a.weight": codes(3, 20, 3 * columns), "a.weight_scale_inv": powers(3, 20, 3)}
        (weight,) = read(tensors, tmp_path, weight_block_size=[1, columns])
        assert isinstance(weight.decode, grouped.Grouped)
        scale = expanded((tensors["a.weight_scale_inv"].float() - 127).exp2(), (1, columns), (20, 3 * columns))
        for dtype in DTYPES:
            assert_same_bits(decode(weight, tensors, dtype), (tensors["a.weight"].float() * scale).to(dtype))


def test_names_of_scales(tmp_path):
    """Every name that transformers' quantiser renames, fused experts, and embeddings with one scale."""
    tensors = {
        "model.embed_tokens.weight": codes(8, 16),
        "model.embed_tokens.weight_scale": torch.rand(1),
        "a.weight": codes(128, 128),
        "a.scale": torch.rand(1, 1),
        "b.weight": codes(128, 128),
        "b.qscale_weight": torch.rand(()),
        "experts.gate_up_proj": codes(3, 256, 128),
        "experts.gate_up_proj_scale_inv": torch.rand(3, 2, 1),
        "experts.down_proj": codes(3, 128, 128),
        "experts.down_proj_scale_inv": torch.rand(3),
        "norm.weight": torch.rand(16).bfloat16(),
        "norm.scale": torch.rand(16),
    }
    settings = {
        "activation_scheme": "static",
        "modules_to_not_convert": ["lm_head"],
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
    }
    found = {weight.name: weight for weight in read(tensors, tmp_path, **settings)}
    names = ("model.embed_tokens.weight", "a.weight", "b.weight", "experts.gate_up_proj", "experts.down_proj")
    assert set(found) == set(names)
    for name in names:
        scale = next(own for end, own in tensors.items() if end.startswith(name.removesuffix("weight")) and end != name)
        factor = (
            expanded(scale, (128, 128), tensors[name].shape) if name.endswith("up_proj") else scale.reshape(-1, 1, 1)
        )
        expected = (tensors[name].float() * factor).view(tensors[name].shape)
        assert_same_bits(decode(found[name], tensors, torch.float32), expected)


@pytest.mark.parametrize("name", ["a.input_scale", "a.activation_scale", "k_proj.k_scale", "attn.v_scale"])
def test_scales_of_activations_are_known(name):
    assert is_of_activations(name)
    assert not is_of_activations("a.weight_scale")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bit_experts_beside_eight_bit_layers(tmp_path, dtype):
    tensors = {
        "experts.0.w1.weight": torch.randint(-128, 128, (64, 64), dtype=torch.int8),
        "experts.0.w1.scale": powers(64, 4).view(torch.float8_e8m0fnu),
        "a.weight": codes(128, 128),
        "a.scale": powers(1, 1).view(torch.float8_e8m0fnu),
    }
    settings = {"weight_block_size": [128, 128], "expert_dtype": "fp4", "scale_fmt": "ue8m0"}
    found = {weight.name: weight for weight in read(tensors, tmp_path, **settings)}
    for name, weight in found.items():
        scale = tensors[name.removesuffix("weight") + "scale"]
        expected = Fp8Dequantize(None)._dequantize_one(tensors[name], scale, dtype)
        assert_same_bits(decode(weight, tensors, dtype), expected)
    assert len(found) == 2


def test_fbgemm(tmp_path):
    """A scale for each output; Llama 4's experts have the outputs last, and two orders of their scales."""
    tensors = {
        "q_proj.weight": codes(24, 40),
        "q_proj.weight_scale": torch.rand(24, 1),
        "experts.gate_up_proj": codes(2, 24, 40),
        "experts.gate_up_proj_scale": torch.rand(2, 1, 40),
        "experts.down_proj": codes(2, 20, 24),
        "experts.down_proj_scale": torch.rand(2, 24, 1),
    }
    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    found = {w.name: w for w in fp8.read_fbgemm(settings, "config.json").weights(store(tmp_path, tensors))}
    scales = {
        "q_proj.weight": tensors["q_proj.weight_scale"],
        "experts.gate_up_proj": tensors["experts.gate_up_proj_scale"],
        "experts.down_proj": tensors["experts.down_proj_scale"].mT,
    }
    assert set(found) == set(scales)
    for name, scale in scales.items():
        expected = (tensors[name].float() * scale).bfloat16()
        assert_same_bits(decode(found[name], tensors, torch.bfloat16), expected)


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("strategy", "shape", "block"), [("tensor", (1,), None), ("channel", (64, 1), None), ("block", (2, 3), (32, 64))]
)
def test_weights_equal_those_of_compressed_tensors(tmp_path, strategy, shape, block, scale_dtype):
    """Which multiplies in the dtype of the scales, and rounds to it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = {"block_structure": list(block)} if block else {}
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, **args)
    tensors = {"weight": codes(64, 160), "weight_scale": torch.rand(shape).to(scale_dtype)}
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    expected = compressor.decompress(dict(tensors), QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    refs = store(tmp_path, tensors)
    weight = fp8.packed("weight", refs["weight"], refs["weight_scale"], block, "FP8", scale_dtype)
    assert weight.dtype == expected.dtype
    for dtype in DTYPES:
        assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


@pytest.mark.parametrize("block", [(128, 128), (1, 32), None], ids=str)
def test_decoding_allocates_nothing(tmp_path, block):
    scale = torch.rand(()) if block is None else torch.rand(512 // block[0], 512 // block[1])
    tensors = {"weight": codes(512, 512), "weight_scale": scale}
    refs = store(tmp_path, tensors)
    weight = fp8.packed("weight", refs["weight"], refs["weight_scale"], block, "FP8", torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        assert_allocates_nothing(weight, tensors, dtype)


def test_the_count_of_allocations_counts():
    one, other, wide = torch.ones(1 << 10), torch.ones(1 << 10), torch.ones(1 << 10, dtype=torch.float64)
    assert allocations(lambda: one + other) == [4 << 10]
    assert allocations(lambda: torch.add(one, other, out=one)) == []
    assert 8 << 10 in allocations(lambda: torch.mul(one, wide, out=one)), "inside of operations too"


FAULTS = {
    "no scale": ({"a.weight": (8, 8)}, {}, "a.weight_scale_inv"),
    "no weight": (
        {"b.weight": (8, 8)},
        {"a.weight_scale_inv": (1, 1), "b.weight_scale_inv": (1, 1)},
        "expected a.weight",
    ),
    "another grid": ({"a.weight": (256, 256)}, {"a.weight_scale_inv": (2, 1)}, r"\[2, 2\].*found \[2, 1\]"),
    "truncated scales": ({"a.weight": (576, 256)}, {"a.weight_scale_inv": (4, 2)}, r"\[5, 2\].*found \[4, 2\]"),
    "a grid on its side": ({"a.weight": (256, 384)}, {"a.weight_scale_inv": (3, 2)}, r"\[2, 3\]"),
    "a flat grid": ({"a.weight": (256, 384)}, {"a.weight_scale_inv": (6,)}, r"\[2, 3\]"),
    "a vector": ({"a.weight": (256,)}, {"a.weight_scale_inv": (2,)}, "a matrix"),
    "nothing": ({"a.weight": (0, 8)}, {"a.weight_scale_inv": (0, 1)}, "a matrix"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path, fault):
    weights, scales, words = FAULTS[fault]
    tensors = {name: codes(*shape) for name, shape in weights.items()}
    tensors |= {name: torch.rand(shape) for name, shape in scales.items()}
    with pytest.raises(CheckpointError, match=words) as error:
        read(tensors, tmp_path, weight_block_size=[128, 128])
    assert "\n" not in str(error.value)


def test_wrong_dtypes_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"scales of float32, .*found int32"):
        read({"a.weight": codes(8, 8), "a.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"a.weight: expected float8_e4m3fn, found bfloat16"):
        read({"a.weight": torch.rand(8, 8).bfloat16(), "a.weight_scale_inv": torch.ones(1, 1)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"a.weight: expected float8_e4m3fn, found float32"):
        read({"a.weight": torch.rand(8, 8), "a.weight_scale": torch.ones(())}, tmp_path)
    with pytest.raises(CheckpointError, match=r"tensors of float8_e4m3fn with scales, found none"):
        read({"a.weight": torch.rand(8, 8).bfloat16()}, tmp_path)
