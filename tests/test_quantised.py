"""Whole quantised checkpoints: the tokens are transformers' on the decoded weights, whatever the draft and the plan."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

import aspec
from aspec.errors import CheckpointError, NumericError
from aspec.models.formats import gptq
from aspec.models.formats.integers import scaled
from aspec.models.model import Model
from tests import tiny
from tests.quantised_models import METHODS, build
from tests.quantised_pairs import Quantised

EXPERTS = [
    ("gpt_oss", "mxfp4"),
    ("gpt_oss", "mxfp4 left out"),
    ("llama4_text", "fbgemm"),
    ("llama4_text", "fp8 ragged"),
]
"""Fused ones."""

WITH_EXPERTS = ("gptq 4 bits act-order", "gptq 3 bits", "awq", "fp8 ragged", "fp8 e8m0", "fp8 tensor", "fbgemm")
WITH_EXPERTS += ("nvfp4", "nf4 double", "fp4", "bitsandbytes int8")
WITH_EXPERTS += ("ct int4", "ct int4 zeros", "ct int8", "ct fp8", "ct mxfp4", "ct nvfp4")
CASES = [("llama", method) for method in METHODS if not method.startswith("mxfp4")] + EXPERTS
CASES += zip(itertools.cycle(("mixtral", "qwen3_moe", "deepseek_v3")), WITH_EXPERTS)
CASES += [("qwen3_next", "fp8 ragged")]
QUICK = [
    ("llama", "gptq 4 bits act-order"),
    ("mixtral", "fp8 ragged"),
    ("gpt_oss", "mxfp4"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Quantised.builder(tmp_path_factory)


@pytest.mark.parametrize(
    ("family", "method"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_greedy_equals_transformers_on_the_decoded_weights(made, family, method):
    made(family, method).check_runs()


def test_groups_out_of_range_end_a_run_in_a_paragraph(tmp_path, monkeypatch):
    """On a device, where a look at values would wait, the weight has no numbers, and the first logits end the text."""
    folder, _ = build(tmp_path, tiny.build(tmp_path / "source", "llama", shards=1), "gptq 4 bits act-order")
    path, module = folder / "model.safetensors", "model.layers.2.mlp.up_proj"
    tensors = load_file(path)
    tensors[f"{module}.g_idx"][3] = 99
    save_file(tensors, path)
    how = dict(target=folder, speculation="off", threads=1, max_context=64, device_memory=24 << 20, max_new_tokens=4)
    for resident in (0, None):
        with pytest.raises(CheckpointError, match="up_proj: expected groups from 0 to 1 in its tensor g_idx") as error:
            aspec.generate([5, 6, 7], resident_memory=resident, **how)
        assert "\n" not in str(error.value)
    for file in (scaled, gptq):
        monkeypatch.setattr(file, "on_host", lambda tensor: False)
    with pytest.raises(NumericError, match="verify the checkpoint's files") as error:
        aspec.generate([5, 6, 7], resident_memory=0, **how)
    assert "\n" not in str(error.value)


def test_tensors_without_a_use_give_no_warning_and_a_tensor_that_may_change_weights_does(tmp_path):
    source = tiny.build(tmp_path / "source", "llama", shards=1)
    folder, _ = build(tmp_path, source, "fp8 ragged")
    assert Model(folder).remarks == (), "scales of activations"
    path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    tensors[f"{name}.weight_shape"] = torch.tensor([96, 64])
    tensors[f"{name}.k_scale"] = torch.ones(())
    save_file(tensors, path)
    assert Model(folder).remarks == ()
    tensors[f"{name}.rotation"] = torch.ones(2)
    tensors["model.layers.0.self_attn.rotary.weight_shape"] = torch.ones(2)
    save_file(tensors, path)
    (text,) = Model(folder).remarks
    assert "2 stored tensors" in text
    assert "up_proj.rotation" in text
