"""Formats by the settings of a checkpoint: unknown ones are refused by name, and damaged ones in a paragraph."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aspec.errors import UnsupportedModelError, UserError
from aspec.io.checkpoint import DTYPES, MAX_BYTES
from aspec.models.formats.registry import READERS, read_format
from tests.quantised import damaged, refusal, store

GOLDEN = {
    name: own
    for name, own in load_file(Path(__file__).parent / "golden" / "formats.safetensors").items()
    if "expected" not in name
}
FP8 = torch.ones(130, 40).to(torch.float8_e4m3fn)
PER_ROW = {
    "a.weight": FP8,
    "a.weight_scale": torch.rand(130, 1),
    "e.up": FP8[:6].view(2, 3, 40),
    "e.up_scale": torch.rand(2, 1, 40),
}
CHECKPOINTS = {
    "fp8": (
        {
            "quant_method": "fp8",
            "weight_block_size": [32, 16],
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head"],
            "scale_fmt": "ue8m0",
            "fmt": "e4m3",
        },
        {"a.weight": FP8, "a.weight_scale_inv": torch.rand(5, 3), "b.weight": torch.rand(8, 8)},
    ),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, PER_ROW),
    "mxfp4": (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {
            "a_blocks": torch.ones(2, 5, 3, 16, dtype=torch.uint8),
            "a_scales": torch.ones(2, 5, 3, dtype=torch.uint8),
            "a_bias": torch.rand(2, 5).bfloat16(),
            "norm.weight": torch.rand(8).bfloat16(),
        },
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}},
        {name: own for name, own in GOLDEN.items() if name.startswith("nvfp4")} | {"a.input_scale": torch.rand(())},
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "_load_in_8bit": False},
        {name: own for name, own in GOLDEN.items() if not name.startswith("nvfp4")},
    ),
}
"""A whole checkpoint of every method."""

OTHERS = {"gptq", "awq", "compressed-tensors", "aspec"}  # methods with tests of their own


def test_every_method_is_here():
    assert set(CHECKPOINTS) == set(READERS) - OTHERS


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_a_method_is_found_by_its_settings(tmp_path, method):
    settings, tensors = CHECKPOINTS[method]
    for key in ("quantization_config", "compression_config"):
        found = read_format({"model_type": "llama", key: settings}, "config.json")
        assert found is not None
        assert found.weights(store(tmp_path, tensors))


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_a_plain_checkpoint_has_no_method(config):
    assert read_format({"model_type": "llama", **config}, "config.json") is None


@pytest.mark.parametrize("old", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_old_settings_of_bitsandbytes_have_no_method(old):
    assert type(read_format({"quantization_config": old}, "config.json")).__name__ == "BitsAndBytes"


@pytest.mark.parametrize(
    "settings", [{"quant_method": "of_tomorrow"}, {"quant_method": ["fp8"]}, {"bits": 4}, "fp8", ["fp8"], 8], ids=str
)
def test_an_unknown_method_is_refused_by_name(settings):
    with pytest.raises(UnsupportedModelError, match="expected a quant_method among") as error:
        read_format({"quantization_config": settings}, "a/config.json")
    text = str(error.value)
    assert text.startswith("a/config.json: ")
    assert "original model" in text
    assert "\n" not in text
    if settings == {"quant_method": "of_tomorrow"}:
        assert "found of_tomorrow" in text


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_an_unknown_field_is_refused_by_name(method):
    settings = CHECKPOINTS[method][0] | {"rotation": "hadamard"}
    with pytest.raises(UnsupportedModelError, match="quantization_config has rotation = hadamard") as error:
        read_format({"quantization_config": settings}, "config.json")
    assert "quant_method" in str(error.value), "the known ones are named"


VALUES = [
    ("fp8", "weight_block_size", [128]),
    ("fp8", "weight_block_size", [128, 0]),
    ("fp8", "weight_block_size", [128, 128.0]),
    ("fp8", "activation_scheme", "block"),
    ("fp8", "scale_fmt", "ue4m3"),
    ("fp8", "fmt", "e3m4"),
    ("fp8", "expert_dtype", "fp6"),
    ("fp8", "dequantize", 1),
    ("fp8", "modules_to_not_convert", "lm_head"),
    ("mxfp4", "modules_to_not_convert", [1]),
    ("modelopt", "quant_algo", "W4A16_AWQ"),
    ("modelopt", "group_size", 64),
    ("bitsandbytes", "bnb_4bit_quant_type", "af4"),
    ("bitsandbytes", "load_in_4bit", "yes"),
]


@pytest.mark.parametrize(("method", "field", "value"), VALUES, ids=str)
def test_an_unknown_value_is_refused_by_name(method, field, value):
    settings = CHECKPOINTS[method][0] | {field: value}
    with pytest.raises(UnsupportedModelError, match=f"as {field}, found ") as error:
        read_format({"quantization_config": settings}, "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_damaged_settings_and_headers_are_refused_or_decoded(tmp_path, method):
    """Whatever is accepted is decoded within its memory, to a weight of the promised shape."""
    settings, tensors = CHECKPOINTS[method]
    refs = store(tmp_path, tensors)
    outcomes: Counter[str] = Counter()

    def hurt(random, own, found):
        damage(random, own if random.random() < 0.2 else None, found)

    for _, own, found in damaged(method, settings, refs, hurt):
        try:
            chosen = read_format({"quantization_config": own}, "config.json")
            weights = chosen.weights(found) if chosen is not None else []
        except UserError as error:
            outcomes[refusal(error)] += 1
            continue
        outcomes["accepted"] += 1
        for weight in weights:
            decode_anything(weight)
    assert set(outcomes) == {"refused", "accepted"}
    assert min(outcomes.values()) > 50, outcomes


def damage(random, settings, refs):
    """One fault: a setting if there are settings, otherwise a tensor's name, dtype or shape."""
    if settings is not None:
        key = random.choice([*settings, "other"])
        settings[key] = random.choice(
            (None, 3, -1, 0.5, True, "x" * 1000, [], [0, 0], [7, 5], {"a": 1}, 1 << 70, "fp4")
        )
        return
    name = random.choice(list(refs))
    ref, kind = refs.pop(name), random.randrange(4)
    if kind == 1:
        other = random.choice((name + "x", name[:-1], "b" + name, *refs))
        refs[other] = replace(ref, name=other)
    elif kind == 2:
        dtype = random.choice(list(DTYPES.values()))
        refs[name] = replace(ref, dtype=dtype, nbytes=math.prod(ref.shape) * dtype.itemsize)
    elif kind == 3:
        shape = list(ref.shape) or [1]
        at = random.randrange(len(shape))
        change = random.randrange(4)
        if change == 0:
            shape[at] = random.choice((0, 1, 3, shape[at] + 1, shape[at] - 1, 2 * shape[at], 1 << 40, MAX_BYTES))
        elif change == 1:
            shape.insert(at, random.choice((1, 2)))
        elif change == 2:
            del shape[at]
        else:
            random.shuffle(shape)
        shape = [max(0, own) for own in shape]
        if math.prod(shape) * ref.dtype.itemsize <= MAX_BYTES:
            refs[name] = replace(ref, shape=tuple(shape), nbytes=math.prod(shape) * ref.dtype.itemsize)


def decode_anything(weight):
    """Decode a weight of any contents."""
    if weight.nbytes + 4 * math.prod(weight.shape) + weight.workspace_bytes > 1 << 23:
        return
    stored = [torch.ones(ref.nbytes, dtype=torch.uint8).view(ref.dtype).view(ref.shape) for ref in weight.refs]
    for dtype in (torch.float32, torch.bfloat16):
        weight.decode(
            stored, torch.empty(weight.shape, dtype=dtype), torch.ones(weight.workspace_bytes, dtype=torch.uint8)
        )


PUBLISHED = [
    {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },  # DeepSeek-V3
    {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_per_tensor": False,
        "act_per_tensor": False,
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },  # Qwen3.5
    {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },  # MiniMax-M2
    {
        "activation_scheme": "static",
        "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": None,
    },  # Ministral 3
    {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"},  # AutoFP8
    {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["model.layers.0.mlp"], "quant_method": "fbgemm_fp8"},
    {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },  # gpt-oss
    {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}},
        "ignore": ["lm_head"],
        "quant_algo": "NVFP4",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quant_method": "modelopt",
    },
    {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    },
]


@pytest.mark.parametrize("settings", PUBLISHED, ids=lambda own: own["quant_method"])
def test_settings_of_published_models_are_known(settings):
    assert read_format({"quantization_config": settings}, "config.json") is not None
