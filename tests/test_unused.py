"""Stored tensors that a model does not use: told once, with names and count; an error where config.json contradicts."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.engine.engine import open_engine
from aspec.errors import CheckpointError
from aspec.models.model import Model
from aspec.models.weights.unused import summary
from tests import tiny


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a checkpoint of one shard once."""
    root, built = tmp_path_factory.mktemp("unused"), {}
    transformers.logging.disable_progress_bar()

    def get(family, **config):
        key = (family, *config.items())
        if key not in built:
            name = f"{family}{len(built)}"
            tiny.FAMILIES[name] = lambda: type(tiny.FAMILIES[family]())(**{**tiny.COMMON, **config})
            try:
                built[key] = tiny.build(root / name, name, shards=1)
            finally:
                del tiny.FAMILIES[name]
        return built[key]

    return get


def changed(source, into, edit=lambda tensors: None, **config):
    """A copy with other tensors, and other values in config.json."""
    shutil.copytree(source, into, dirs_exist_ok=True)
    tensors = load_file(into / "model.safetensors")
    edit(tensors)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return tiny.edit_config(into, **config)


@pytest.mark.parametrize(
    ("family", "stored", "names"),
    [
        (
            "llama",
            {"attention_bias": True},
            r"16 stored tensors have .*model\.layers\.\*\.self_attn\.k_proj\.bias \(4\)",
        ),
        ("llama", {"mlp_bias": True}, r"mlp\.down_proj\.bias \(4\)"),
        ("llama", {"mlp_bias": True, "attention_bias": True}, "attention_bias is false and mlp_bias is false"),
        ("qwen3", {"attention_bias": True}, "attention_bias is false"),
        ("starcoder2", {"use_bias": True}, "use_bias is false"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is false"),
    ],
)
def test_a_switch_that_contradicts_what_is_stored_is_named(build, tmp_path, family, stored, names):
    folder = build(family, **stored)
    assert not Model(folder).remarks
    with pytest.raises(CheckpointError, match=names) as error:
        Model(changed(folder, tmp_path, **dict.fromkeys(stored, False)))
    assert "Correct config.json" in str(error.value)


def test_biases_of_zero_contradict_nothing(build, tmp_path):
    def clear(tensors):
        for name in tensors:
            if name.endswith(".bias"):
                tensors[name] = torch.zeros_like(tensors[name])

    folder = changed(build("llama", attention_bias=True), tmp_path, clear, attention_bias=False)
    (remark,) = Model(folder).remarks
    assert "16 stored tensors have no use in this model" in remark


EXTRA = {
    "model.extra.weight": torch.ones(8),
    **{f"model.layers.{i}.mlp.gate.weight": torch.ones(4) for i in range(4, 7)},
}


@pytest.mark.parametrize("quiet", [False, True])
async def test_an_engine_warns_once_of_a_model_and_of_its_draft(build, tmp_path, quiet):
    target = changed(build("llama"), tmp_path / "target", lambda tensors: None if quiet else tensors.update(EXTRA))
    draft = changed(build("llama"), tmp_path / "draft", lambda tensors: None if quiet else tensors.update(EXTRA))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with open_engine(target=target, draft=draft, device_memory=24 << 20, threads=1):
            pass
    told = [str(warning.message) for warning in caught if "no use" in str(warning.message)]
    assert len(told) == (0 if quiet else 2)
    for text, folder in zip(told, (target, draft), strict=False):
        assert text.startswith(f"{folder}: 4 stored tensors have no use")
        assert text.endswith("model.layers.*.mlp.gate.weight (3), model.extra.weight")


def test_a_plan_tells_it_too(build, tmp_path):
    folder = changed(build("llama"), tmp_path, lambda tensors: tensors.update(EXTRA))
    result = CliRunner().invoke(app, ["plan", "--json", "--target", str(folder), "--profile", _machine(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "4 stored tensors have no use in this model" in result.stderr
    assert len(json.loads(result.stdout)["remarks"]) == 1


def _machine(folder):
    rates = {"disk_bytes_per_s": 1e9, "device": {"flop_per_s": {"float32": 1e12}, "memory_bytes_per_s": 1e10}}
    (folder / "machine.json").write_text(json.dumps(rates | {"device_memory": "1GiB"}))
    return str(folder / "machine.json")


def test_what_the_family_ignores_is_not_told(build, tmp_path):
    class Ignoring(transformers.LlamaForCausalLM):
        _keys_to_ignore_on_load_unexpected = (r"model\.extra",)

    before = transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected
    transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected = Ignoring._keys_to_ignore_on_load_unexpected
    try:
        folder = changed(build("llama"), tmp_path, lambda tensors: tensors.update(EXTRA))
        (remark,) = Model(folder).remarks
    finally:
        transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected = before
    assert "model.extra" not in remark
    assert "3 stored tensors" in remark


def test_a_summary_stays_short():
    names = [f"a{'b' * 1000}{kind}.{i}" for kind in "abcdefghij" for i in range(1000)]
    text = summary(names)
    assert len(text) < 800
    assert "(1000)" in text
    assert text.endswith("...")
