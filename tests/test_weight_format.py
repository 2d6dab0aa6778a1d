"""Weights that aspec does not read are refused by the name of their format, and no model type is blamed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from aspec.errors import CheckpointError, UserError
from aspec.io import hub
from aspec.io.checkpoint import Checkpoint
from aspec.io.weight_format import quantisation
from aspec.models.formats.registry import READERS
from aspec.models.model import Model
from tests import tiny

READ = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ, 4 bits"),
    ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "AWQ, 4 bits"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
    ({"quant_method": "mxfp4", "modules_to_not_convert": []}, "MXFP4"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes, 8 bits"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
]
REFUSED = [
    ({"quant_method": "exl2", "bits": 4.65}, "EXL2"),
    ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "AQLM"),
    ({"quant_method": "hqq"}, "HQQ"),
    ({"quant_method": "torchao"}, "torchao"),
    ({"quant_method": "compressed_tensors"}, "compressed-tensors"),
    ({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, "NVFP4"),
    ({"group_size": 64, "bits": 4}, "MLX, 4 bits"),
    ({"quant_method": "of_tomorrow"}, "'of_tomorrow'"),
    ({"bits": 10**400, "quant_method": ["x"] * 1000}, "['x'"),
    ("yes", "an unknown format"),
]
KEYS = ["quantization_config", "compression_config", "quantization"]


@pytest.mark.parametrize(("stored", "name"), READ, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_a_method_has_a_name_for_people(stored, name, key):
    assert quantisation({"model_type": "llama", key: stored}) == name


@pytest.mark.parametrize(("stored", "name"), REFUSED, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_a_method_that_is_not_read_is_refused_by_its_name(tmp_path, stored, name, key):
    config = {"model_type": "llama", key: stored}
    assert name in quantisation(config)
    if not isinstance(stored, dict) or stored.get("bits", 0) < 10**100:  # longer numbers are refused as JSON
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError) as error:
            Model(tmp_path)
        text = str(error.value)
        assert name in text
        assert "llama" not in text.replace(str(tmp_path), "")
        assert ", ".join(READERS) in text, "what aspec reads instead"
        assert "original model" in text
        assert len(text) < 700


@pytest.mark.parametrize("nothing", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_plain_checkpoint_has_no_format(nothing):
    assert quantisation({"model_type": "llama", **nothing}) is None


@pytest.mark.parametrize("name", ["x.ggml", "pytorch_model.bin", "model.onnx", "weights.npz"])
def test_a_file_is_refused_by_its_format(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    kind = {"ggml": "GGML", "bin": "PyTorch", "onnx": "ONNX", "npz": "MLX"}[name.lower().rpartition(".")[2]]
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=f"in {kind}.* format") as error:
            hub.resolve(str(given), what="target")
        assert "original model" in str(error.value)


def test_another_format_beside_a_configuration_is_named_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "a.ggml").write_bytes(b"ggml")
    with pytest.raises(CheckpointError, match=r"GGML .*\(a\.ggml\)"):
        hub.resolve(str(tmp_path), what="draft")


def test_what_lies_beside_safetensors_is_no_reason(tmp_path):
    for name in ("a.gguf", "pytorch_model.bin", "training_args.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_configuration_beside_bin_files_is_enough_for_a_plan(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert hub.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin in PyTorch's \.bin format"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("end", "name"), [("qweight", "GPTQ or AWQ"), ("weight_packed", "compressed-tensors"), ("absmax", "bitsandbytes")]
)
def test_quantised_tensors_without_a_word_in_config_json_are_named(tmp_path, end, name):
    folder = tiny.build(tmp_path / "m", "llama", shards=1)
    tensors = {f"model.layers.{layer}.mlp.up_proj.{end}": torch.zeros(8, 8, dtype=torch.int32) for layer in range(4)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=name) as error:
        Model(folder)
    assert "no quantization_config" in str(error.value)
    assert "config.json" in str(error.value)
