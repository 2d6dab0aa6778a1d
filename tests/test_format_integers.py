"""Packed integers: unpacking, settings of published models, and damaged settings and headers."""

import math
from collections import Counter

import pytest
import torch

from aspec.errors import UserError
from aspec.models.formats.integers.packed_ints import AwqUnpacker, ColumnUnpacker, Room, Unpacker
from aspec.models.formats.registry import read_format
from tests.packed_words import any_words, awq, gptq, packed, values_of
from tests.quantised import damaged, refusal, store
from tests.test_format_registry import damage


def room():
    return Room(torch.randint(0, 256, (1 << 16,), dtype=torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [8, 32, 104])
def test_values_are_unpacked_along_rows_and_along_columns(bits, columns):
    values = torch.randint(0, 1 << bits, (24, columns))
    words = packed(values, bits)
    assert torch.equal(values_of(words, bits, columns), values)
    for kind, stored in ((Unpacker, words), (ColumnUnpacker, words.t().contiguous())):
        unpacker = kind(room(), bits, 24, columns)
        for _ in range(2):
            unpacker(stored)
            assert torch.equal(unpacker.values, values)


def test_a_row_of_words_may_hold_more_than_is_wanted():
    words = any_words(4, 40)
    unpacker = Unpacker(room(), 4, 4, 32)
    unpacker(words[:, 3:])
    assert torch.equal(unpacker.values, values_of(words[:, 3:], 4, 32))


def test_rows_of_awq_are_in_its_order():
    values = torch.randint(0, 16, (16, 12))
    order = [8 * word + row for word in range(2) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    unpacker = AwqUnpacker(room(), 4, 16, 12)
    unpacker(packed(values[order].t(), 4))
    assert torch.equal(unpacker.values, values)


def test_counting_takes_what_is_taken():
    counted, real = Room(), room()
    for kind, bits in ((Unpacker, 3), (ColumnUnpacker, 4), (AwqUnpacker, 4)):
        for own in (counted, real):
            kind(own, bits, 16, 40)
        assert counted.counted == (1 << 16) - real.left.numel()


FOUR = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
EIGHT = {"targets": ["re:.*head"], "format": "int-quantized", "weights": {"num_bits": 8, "strategy": "channel"}}
SCALES = torch.full((16, 2), 0.01).bfloat16()
CHECKPOINTS = {
    "gptq": (
        {"bits": 4, "group_size": 32, "desc_act": True, "dynamic": {"+:n": {"bits": 3}}, "checkpoint_format": "gptq"},
        gptq(4, 32, 64, 32) | gptq(3, 32, 64, 32, module="n") | {"m.bias": torch.zeros(32), "o.weight": SCALES},
    ),
    "awq": (
        {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["gate"]},
        awq(32, 64, 32) | awq(8, 64, 32, module="n") | {"gate.weight": SCALES},
    ),
    "compressed-tensors": (
        {
            "format": "pack-quantized",
            "config_groups": {"group_0": FOUR, "group_1": EIGHT},
            "ignore": ["re:.*gate"],
            "quantization_status": "compressed",
        },
        {
            "m.weight_packed": any_words(16, 8),
            "m.weight_scale": SCALES,
            "m.weight_shape": torch.tensor([16, 64]),
            "n.weight_packed": any_words(16, 8),
            "n.weight_scale": SCALES,
            "head.weight": torch.ones(16, 64, dtype=torch.int8),
            "head.weight_scale": SCALES[:, :1],
            "gate.weight": SCALES,
        },
    ),
}
FLOATS = {
    "a": {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    "b": {
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 32]},
    },
    "c": {
        "format": "nvfp4-pack-quantized",
        "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    },
    "d": {
        "format": "mxfp4-pack-quantized",
        "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    },
    "e": {"weights": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32, "actorder": "group"}},
}
FLOAT8 = torch.ones(16, 64).to(torch.float8_e4m3fn)
CHECKPOINTS["compressed-tensors, floats and zero points"] = (
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{name}": {"targets": [name], **group} for name, group in FLOATS.items()},
    },
    {
        "a.weight": FLOAT8,
        "a.weight_scale": SCALES[:, :1],
        "b.weight": FLOAT8,
        "b.weight_scale": SCALES[:2],
        "c.weight_packed": torch.ones(16, 32, dtype=torch.uint8),
        "c.weight_scale": FLOAT8[:, :4],
        "c.weight_global_scale": torch.ones(1),
        "d.weight_packed": torch.ones(16, 32, dtype=torch.uint8),
        "d.weight_scale": torch.ones(16, 2, dtype=torch.uint8),
        "e.weight_packed": any_words(16, 8),
        "e.weight_scale": SCALES,
        "e.weight_zero_point": any_words(2, 2),
        "e.weight_g_idx": torch.zeros(64, dtype=torch.int32),
    },
)
INNER = ("config_groups", *(f"group_{name}" for name in (0, 1, *FLOATS)), "weights", "dynamic", "+:n")


def settings_in(settings, random):
    """The settings, or settings inside them."""
    for key in INNER:
        if isinstance(settings.get(key), dict) and random.random() < 0.7:
            return settings_in(settings[key], random)
    return settings


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_damaged_settings_and_headers_are_refused_or_decoded(tmp_path, method):
    """Whatever is accepted is decoded within its memory, or its contents are refused."""
    settings, tensors = CHECKPOINTS[method]
    refs = store(tmp_path, tensors)
    outcomes: Counter[str] = Counter()

    def hurt(random, own, found):
        damage(random, settings_in(own, random) if random.random() < 0.4 else None, found)

    for random, own, found in damaged(method, {"quant_method": method} | settings, refs, hurt):
        try:
            chosen = read_format({"quantization_config": own}, "config.json")
            for weight in chosen.weights(found) if chosen is not None else []:
                decode_anything(weight, random)
            outcomes["accepted"] += 1
        except UserError as error:
            outcomes[refusal(error)] += 1
    assert set(outcomes) == {"refused", "accepted"}
    assert min(outcomes.values()) > 30, outcomes


def decode_anything(weight, random):
    if weight.nbytes + 4 * math.prod(weight.shape) + weight.workspace_bytes > 1 << 23:
        return
    byte = random.choice((0, 0, 1))  # g_idx of ones is out of range
    stored = [torch.full((ref.nbytes,), byte, dtype=torch.uint8).view(ref.dtype).view(ref.shape) for ref in weight.refs]
    workspace = torch.ones(weight.workspace_bytes, dtype=torch.uint8)
    weight.decode(stored, torch.empty(weight.shape, dtype=torch.bfloat16), workspace)


PUBLISHED = [
    {
        "batch_size": 1,
        "bits": 4,
        "block_name_to_quantize": None,
        "cache_block_outputs": True,
        "damp_percent": 0.1,
        "dataset": None,
        "desc_act": False,
        "exllama_config": {"version": 1},
        "group_size": 128,
        "max_input_length": None,
        "model_seqlen": None,
        "module_name_preceding_first_block": None,
        "modules_in_block_to_quantize": None,
        "pad_token_id": None,
        "quant_method": "gptq",
        "sym": True,
        "tokenizer": None,
        "true_sequential": True,
        "use_cuda_fp16": False,
        "use_exllama": True,
    },  # Qwen2.5-*-Instruct-GPTQ-Int4
    {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": True,
        "group_size": 128,
        "model_file_base_name": "model",
        "model_name_or_path": None,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "damp_percent": 0.1,
        "is_marlin_format": False,
    },  # AutoGPTQ
    {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": {r"-:.*shared_expert_gate.*": {}, r"+:.*\.18\..*gate.*": {"bits": 8, "group_size": 64}},
        "group_size": 128,
        "hyb_act": True,
        "lm_head": False,
        "meta": {"damp_percent": 0.05, "quantizer": ["gptqmodel:4.0.0"], "mse": 0.0, "act_group_aware": True},
        "method": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": True,
    },  # GPTQModel
    {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },  # AutoAWQ
    {"q_group_size": 128, "quant_method": "awq", "version": "GEMM", "w_bit": 4, "zero_point": True},
    {
        "backend": "autoawq",
        "bits": 4,
        "do_fuse": False,
        "exllama_config": None,
        "fuse_max_seq_len": None,
        "group_size": 64,
        "modules_to_fuse": None,
        "modules_to_not_convert": ["visual"],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },  # transformers 4
    {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": 32,
                    "num_bits": 4,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },  # Kimi-K2-Thinking
    {
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"},
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
            }
        },
        "format": "float-quantized",
        "global_compression_ratio": 1.24,
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "frozen",
        "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "sparsity_structure": "unstructured"},
    },  # *-FP8-dynamic of early versions
]


@pytest.mark.parametrize("settings", PUBLISHED, ids=lambda own: own["quant_method"])
def test_settings_of_published_models_are_known(settings):
    assert read_format({"quantization_config": settings}, "config.json") is not None
