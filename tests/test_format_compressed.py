"""compressed-tensors weights equal those of the library in every bit, and its rules choose a module's scheme."""

from itertools import product

import pytest
import torch
from torch import nn

from aspec.errors import CheckpointError, UnsupportedModelError
from aspec.models.formats import gptq
from aspec.models.formats.compressed_settings import Schemes
from aspec.models.formats.integers.fields import Fields
from aspec.models.formats.packed import Kind, PlainWeight
from aspec.models.formats.registry import read_format
from tests.packed_words import packed, values_of
from tests.quantised import DTYPES, assert_allocates_nothing, assert_same_bits, decode, store
from tests.quantised_models import compress

compressors = pytest.importorskip("compressed_tensors.compressors", reason="the library is not installed")
quantization = pytest.importorskip("compressed_tensors.quantization")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def settings_of(format="pack-quantized", targets=("Linear",), ignore=(), **weights):
    group = {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "quantization_status": "compressed",
        "global_compression_ratio": 1.9,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


def read(folder, tensors, settings):
    return read_format({"quantization_config": settings}, "config.json").weights(store(folder, tensors))


def refused(folder, tensors, settings, match, error=CheckpointError):
    with pytest.raises(error, match=match) as caught:
        read(folder, tensors, settings)
    assert "\n" not in str(caught.value)


def made(format, rows, columns, dtype=torch.bfloat16, module="m", **arguments):
    """The stored tensors of a module that the library compressed, and the weight that it makes of them."""
    return compress(format, torch.randn(rows, columns), dtype, module, **arguments)


GROUPS = ({"strategy": "group", "group_size": 32}, {"strategy": "channel"}, {"strategy": "tensor"})
PACKED = [
    {"format": "pack-quantized", "num_bits": bits, "symmetric": symmetric, **group}
    for bits, symmetric, group in product((2, 3, 4, 5, 8), (True, False), GROUPS)
]
PLAIN = [
    {"format": format, "num_bits": 8, "symmetric": symmetric, **group}
    for format, symmetric, group in product(("int-quantized", "naive-quantized"), (True, False), GROUPS)
]
FLOATS = [
    {"format": format, "num_bits": 8, "type": "float", **group}
    for format, group in product(("float-quantized", "naive-quantized"), GROUPS)
]


@pytest.mark.parametrize("scales", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*PACKED, *PLAIN, *FLOATS], ids=lambda case: "-".join(map(str, case.values())))
def test_weights_equal_those_of_the_library(tmp_path, case, scales):
    tensors, expected = made(rows=72, columns=96, dtype=scales, **case)
    (weight,) = read(tmp_path, tensors, settings_of(**case))
    assert (weight.name, weight.shape, weight.dtype) == ("m.weight", (72, 96), expected.dtype)
    assert "compressed-tensors" in weight.method
    for dtype in DTYPES:
        assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


def as_stored(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", [*PACKED, *PLAIN, *FLOATS], ids=lambda case: "-".join(map(str, case.values())))
def test_an_outline_is_what_the_library_stores(case):
    tensors, _ = made(rows=72, columns=96, **case)
    tensors.pop("m.weight_shape", None)  # is not read
    reader = read_format({"quantization_config": settings_of(**case)}, "config.json")
    outline = reader.outline(PlainWeight("m.weight", (72, 96), torch.bfloat16, Kind.LINEAR))
    assert as_stored(outline) == as_stored(tensors)


BLOCKS = {"strategy": "block", "block_structure": [32, 16], "num_bits": 8, "type": "float"}
OF_FOUR_BITS = [
    ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
]


def test_blocks_of_floats_equal_those_of_the_library(tmp_path):
    args = quantization.QuantizationArgs(**BLOCKS)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format="float-quantized")
    stored = {
        "weight": torch.randn(70, 64).to(torch.float8_e4m3fn),
        "weight_scale": torch.rand(3, 4).bfloat16(),
    }
    kind = compressors.BaseCompressor.get_value_from_registry("float-quantized")
    expected = kind.decompress(dict(stored), scheme)["weight"]
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    (weight,) = read(tmp_path, tensors, settings_of("float-quantized", **BLOCKS))
    for dtype in DTYPES:
        assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


@pytest.mark.parametrize(("format", "arguments"), OF_FOUR_BITS, ids=lambda own: own if isinstance(own, str) else "")
def test_floats_of_four_bits_equal_those_of_the_library(tmp_path, format, arguments):
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments), format=format
    )
    stored = {"weight_packed": torch.randint(0, 256, (24, 48), dtype=torch.uint8)}
    if format.startswith("mx"):
        stored["weight_scale"] = torch.randint(120, 130, (24, 3), dtype=torch.uint8)
    else:
        stored["weight_scale"] = (torch.rand(24, 6) * 400).to(torch.float8_e4m3fn)
        stored["weight_global_scale"] = torch.tensor([377.0])
    kind = compressors.BaseCompressor.get_value_from_registry(format)
    expected = kind.decompress(dict(stored), scheme)["weight"]
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    (weight,) = read(tmp_path, tensors, settings_of(format, **arguments))
    for dtype in DTYPES:
        assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


def test_floats_with_powers_of_two_equal_those_of_the_library(tmp_path):
    arguments = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments), format="mxfp8-quantized"
    )
    stored = {
        "weight": torch.randn(24, 96).to(torch.float8_e4m3fn),
        "weight_scale": torch.randint(118, 130, (24, 3), dtype=torch.uint8),
    }
    kind = compressors.BaseCompressor.get_value_from_registry("mxfp8-quantized")
    expected = kind.decompress(dict(stored), scheme)["weight"]
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    (weight,) = read(tmp_path, tensors, settings_of("mxfp8-quantized", **arguments | {"scale_dtype": "torch.uint8"}))
    for dtype in DTYPES:
        assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))


FOUR = {"num_bits": 4, "strategy": "group", "group_size": 32}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["any", "adjacent", "unset"])
def test_columns_may_choose_their_groups(tmp_path, monkeypatch, symmetric, order):
    """As versions of the library up to 0.19 did: by ``weight_g_idx``, unless it has a -1."""
    tensors, expected = made("pack-quantized", 72, 96, symmetric=symmetric, **FOUR)
    adjacent = torch.arange(96, dtype=torch.int32) // 32
    index = {"any": adjacent[torch.randperm(96)], "adjacent": adjacent, "unset": torch.full_like(adjacent, -1)}[order]
    tensors["m.weight_g_idx"] = index
    if order == "any":
        numbers = values_of(tensors["m.weight_packed"], 4, 96)
        zeros = torch.full((72, 3), 8)
        if not symmetric:
            zeros = values_of(tensors["m.weight_zero_point"].t(), 4, 72).t()
        expected = (numbers - zeros[:, index.long()]).bfloat16() * tensors["m.weight_scale"][:, index.long()]
    (weight,) = read(tmp_path, tensors, settings_of(symmetric=symmetric, actorder="group", **FOUR))
    for dtype in DTYPES:
        assert_same_bits(decode(weight, tensors, dtype), expected.to(dtype))
    for group in (3, -2):
        index[5] = group
        with pytest.raises(CheckpointError, match="m: expected groups from 0 to 2 in its tensor weight_g_idx, found"):
            decode(weight, tensors, torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(gptq, "on_host", lambda tensor: False)  # as on a device
            assert decode(weight, tensors, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("case", [PACKED[13], PACKED[15], PACKED[27], PLAIN[4], FLOATS[1]], ids=str)
def test_decoding_allocates_nothing(tmp_path, case):
    tensors, _ = made(rows=256, columns=2048, **case)
    (weight,) = read(tmp_path, tensors, settings_of(**case))
    for dtype in DTYPES:
        assert_allocates_nothing(weight, tensors, dtype)


class Head(nn.Linear):
    """A class of its own, whose base is named."""


class Model(nn.Module):
    """Modules with the names that checkpoints have."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(4, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "self_attn": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "o_proj")}),
                    "mlp": nn.ModuleDict(
                        {
                            "gate": nn.Linear(8, 8),
                            "experts": nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(8, 8)}) for _ in range(3)),
                        }
                    ),
                }
            )
            for _ in range(2)
        )
        self.lm_head, self.score = Head(8, 4), nn.Linear(8, 2)


GROUPS_OF_TARGETS = [
    ({"a": ["Linear"]}, ["lm_head"]),
    ({"a": ["Linear"], "b": ["re:.*mlp.*"], "c": ["layers.1.self_attn.q_proj"]}, []),
    ({"a": ["re:.*"], "b": ["Embedding"], "c": ["re:.*experts.*"]}, ["re:.*gate$"]),
    ({"a": ["re:.*self_attn.*", "re:layers.0.*"], "b": ["re:.*experts"], "c": ["Linear"]}, ["re:lm_.*", "layers.1"]),
    ({"a": ["Linear"], "b": ["Embedding"], "c": ["Module"]}, []),
    ({"a": ["re:.*proj"], "b": ["Linear", "re:.*proj"]}, ["Embedding"]),
    ({"a": ["re:attn"], "b": ["layers.0.self_attn.k_proj"], "c": ["lm_head"]}, ["Linear"]),
    ({"a": ["re:.*score", "re:.*head"], "b": ["score", "lm_head"]}, []),
    ({"a": ["re:layers\\.\\d+\\.(self_attn|mlp)\\..*"], "b": ["layers.0.mlp.gate", "embed_tokens"]}, []),
]


@pytest.mark.parametrize(("groups", "ignore"), GROUPS_OF_TARGETS, ids=str)
def test_a_module_has_the_scheme_that_the_library_gives_it(groups, ignore):
    model, bits = Model(), dict(zip("abc", (2, 4, 8), strict=True))
    schemes = {
        name: {"targets": targets, "weights": {"num_bits": bits[name], "strategy": "channel"}}
        for name, targets in groups.items()
    }
    config = quantization.QuantizationConfig(config_groups=schemes, ignore=ignore)
    quantization.apply_quantization_config(model, config, show_progress=False)
    own = Schemes(Fields({"config_groups": schemes, "ignore": ignore}, "config.json", "compressed-tensors"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            expected = getattr(module, "quantization_scheme", None)
            found = own.of(name)
            assert (found and found.bits) == (expected and expected.weights.num_bits), name


def test_modules_have_schemes_of_their_own(tmp_path):
    """As Kimi's mixed checkpoints: experts in packed integers, attention in floats, the head in int8, norms plain."""
    cases = {
        "layers.1.mlp.experts.0.up_proj": {"format": "pack-quantized", **FOUR},
        "layers.1.mlp.experts.1.up_proj": {"format": "pack-quantized", **FOUR},
        "layers.1.self_attn.q_proj": {"format": "float-quantized", "num_bits": 8, "type": "float", **GROUPS[1]},
        "lm_head": {"format": "int-quantized", "num_bits": 8, "symmetric": False, **GROUPS[1]},
        "model.embed_tokens": {"format": "naive-quantized", "num_bits": 8, **GROUPS[1]},
    }
    targets = ["re:.*experts", "re:.*self_attn", "lm_head", "Embedding"]
    settings = settings_of("mixed-precision", ignore=["re:.*gate$"], **FOUR)
    chosen = [cases[name] for name in cases if "experts.1" not in name]
    settings["config_groups"] = {
        f"group_{number}": {"targets": [target], "weights": {k: v for k, v in case.items() if k != "format"}}
        for number, (target, case) in enumerate(zip(targets, chosen, strict=True))
    }
    settings["config_groups"]["group_1"]["format"] = "float-quantized"
    tensors, expected = {"norm.weight": torch.randn(8), "layers.1.mlp.gate.weight": torch.randn(8, 8)}, {}
    for name, case in cases.items():
        stored, expected[f"{name}.weight"] = made(rows=24, columns=32, module=name, **case)
        tensors |= stored
    found = read(tmp_path, tensors, settings)
    assert {weight.name for weight in found} == set(expected)
    for weight in found:
        assert_same_bits(decode(weight, tensors, torch.bfloat16), expected[weight.name])
    settings["ignore"].append("lm_head")
    refused(tmp_path, tensors, settings, "lm_head: expected a plain weight, as no group of the settings names")


def test_activations_keep_their_precision_and_the_user_is_told(tmp_path):
    case = {"format": "int-quantized", "num_bits": 8, **GROUPS[1]}
    tensors, expected = made(rows=24, columns=32, **case)
    settings = settings_of(**case)
    assert read_format({"quantization_config": settings}, "config.json").remarks == ()
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    found = read_format({"quantization_config": settings}, "config.json")
    (remark,) = found.remarks
    assert "input_activations and kv_cache_scheme. Only weights are decoded" in remark
    extra = {"m.input_scale": torch.ones(1), "a.k_scale": torch.ones(1)}
    (weight,) = found.weights(store(tmp_path, tensors | extra))
    assert_same_bits(decode(weight, tensors, torch.bfloat16), expected)


def test_zero_points_of_a_symmetric_scheme_are_subtracted(tmp_path):
    """Old files have them, all zero; the library subtracts them, whatever they are."""
    case = {"format": "int-quantized", "num_bits": 8, **GROUPS[1]}
    tensors, expected = made(rows=24, columns=32, **case, symmetric=False)
    (weight,) = read(tmp_path, tensors, settings_of(**case))
    assert_same_bits(decode(weight, tensors, torch.bfloat16), expected)


WHOLE, TYPES = torch.int32, CheckpointError
FAULTS = [
    ({"weight_scale": None}, "m: expected a tensor weight_scale beside weight_packed, weight_shape, weight_zero_"),
    ({"weight_packed": None}, "m: expected a tensor weight_packed beside weight_scale"),
    ({"weight_zero_point": None}, "m: expected a tensor weight_zero_point beside"),
    ({"weight_packed": torch.ones(72, 12)}, r"expected int32 \[any, any\], found float32 \[72, 12\]"),
    ({"weight_packed": torch.ones(72, 11, dtype=WHOLE)}, "expected inputs in multiples of 8 that fill weight_packed"),
    ({"weight_packed": torch.ones(72, 0, dtype=WHOLE)}, "expected inputs in multiples of 8 that fill weight_packed"),
    ({"weight_scale": torch.ones(72, 0)}, "expected inputs in multiples of 8 that fill weight_packed"),
    ({"weight_scale": torch.ones(72, 4)}, "expected inputs in multiples of 8 that fill weight_packed"),
    ({"weight_scale": torch.ones(71, 3)}, r"expected float16 or .* \[72, any\], found float32 \[71, 3\]"),
    ({"weight_scale": torch.ones(72, 3).to(torch.int8)}, r"expected float16 or .* \[72, any\], found int8"),
    ({"weight_zero_point": torch.ones(72, 3, dtype=WHOLE)}, r"expected int32 \[9, 3\], found int32 \[72, 3\]"),
    ({"weight_g_idx": torch.zeros(95, dtype=WHOLE)}, r"expected int32 \[96\], found int32 \[95\]"),
]


@pytest.mark.parametrize(("change", "match"), FAULTS, ids=lambda own: None if isinstance(own, dict) else own[:40])
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, match):
    tensors, _ = made("pack-quantized", 72, 96, symmetric=False, **FOUR)
    changed = tensors | {f"m.{end}": tensor for end, tensor in change.items()}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    refused(tmp_path, tensors, settings_of(symmetric=False, **FOUR), match)


def test_plain_numbers_that_do_not_fit_are_refused(tmp_path):
    case = {"format": "int-quantized", "num_bits": 8, **GROUPS[0]}
    tensors, _ = made(rows=24, columns=96, **case)
    unrounded = tensors | {"m.weight": torch.ones(24, 96)}
    refused(tmp_path, unrounded, settings_of(**case), r"tensor m.weight: expected int8 .*, found float32")
    refused(tmp_path, {"m.weight": tensors["m.weight"]}, settings_of(**case), "expected a tensor weight_scale beside")
    refused(tmp_path, tensors, settings_of(**case | {"group_size": 36}), "expected inputs in groups of 36, found")
    refused(tmp_path, tensors, settings_of(**case | {"group_size": 48}), r"\[24, 2\], found bfloat16 \[24, 3\]")
    refused(tmp_path, tensors, settings_of(**case | {"symmetric": False}), "expected a tensor weight_zero_point")
    refused(tmp_path, {"m.weight": torch.ones(8, 8)}, settings_of(**case), "expected tensors named")
    named = settings_of(**case, targets=["m", "n"])
    refused(tmp_path, tensors | {"n.weight": torch.ones(8, 8)}, named, "n: expected scales, as the settings name the")
    (weight,) = read(tmp_path, tensors | {"n.weight": torch.ones(8, 8)}, named | {"ignore": ["n"]})
    assert weight.name == "m.weight"
    tensors, _ = made("pack-quantized", 12, 96, symmetric=False, **FOUR)
    refused(
        tmp_path, tensors, settings_of(symmetric=False, **FOUR), "outputs in mult.* found 12", UnsupportedModelError
    )


SETTINGS = [
    (
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config: expected one of dense as format, found sp",
    ),
    ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "found transform_config = "),
    ({"moe_sparsity_config": {"method": "prune"}}, "found moe_sparsity_config = "),
    ({"quantisation": 3}, "found quantisation = 3"),
    ({"config_groups": ["W8A8"]}, "an object as config_groups"),
    ({"config_groups": {"W8A8": ["Linear"]}}, "an object as W8A8"),
    ({"ignore": "lm_head"}, "as ignore, found lm_head"),
    ({"ignore": ["re:(a+)+b"]}, r"no repeated group, found \(a\+\)\+b"),
    ({"format": "marlin-24"}, "m: its weight is stored as marlin-24, int4, groups of 32, which is not supported"),
    ({"format": "mxfp6-pack-quantized"}, "m: its weight is stored as mxfp6-pack-quantized, int4"),
    ({"format": None}, "m: its weight is stored as a layout without a name, int4"),
]
ARGUMENTS = [
    ({"num_bits": 9}, "m: its weight is stored as pack-quantized, int9, groups of 32"),
    ({"num_bits": "4"}, "as num_bits, found 4"),
    ({"type": "posit"}, "one of int, float as type, found posit"),
    ({"type": "float"}, "m: its weight is stored as pack-quantized, float4"),
    ({"strategy": "token"}, "as strategy, found token"),
    ({"strategy": "channel"}, "null with strategy channel as group_size, found 32"),
    ({"strategy": "block", "group_size": None, "block_structure": [8]}, "two whole numbers from 1 on as block_str"),
    ({"group_size": None}, "a size with strategy group as group_size, found None"),
    ({"symmetric": "no"}, "as symmetric, found no"),
    ({"dynamic": True}, "as dynamic, found True"),
    ({"dynamic": "local"}, "as dynamic, found local"),
    ({"actorder": "random"}, "as actorder, found random"),
    ({"actorder": "group"}, "expected a tensor weight_g_idx beside"),
    ({"rotation": 3}, "weights: expected fields that aspec knows, found rotation = 3"),
]


@pytest.mark.parametrize("change", [*SETTINGS, *ARGUMENTS], ids=str)
def test_settings_that_aspec_cannot_follow_are_refused_by_name(tmp_path, change):
    tensors, _ = made("pack-quantized", 24, 96, **FOUR)
    (values, match), settings = change, settings_of(**FOUR)
    if change in SETTINGS:
        settings |= values
    else:
        settings["config_groups"]["group_0"]["weights"] |= values
    refused(tmp_path, tensors, settings, match, (UnsupportedModelError, CheckpointError))


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_values_as_the_library_packs_them(bits):
    values = torch.randint(0, 1 << bits, (5, 96))
    offset = 1 << bits - 1
    words = compressors.pack_quantized.helpers.pack_to_int32((values - offset).to(torch.int8), bits)
    assert torch.equal(words, packed(values, bits))
    assert torch.equal(values_of(words, bits, 96), values)
