"""Quantised checkpoints in the commands: what they print is what the decoded weights would, or one paragraph."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aspec.cli.main import app
from tests import tiny
from tests.quantised_models import build

PROMPT = "It was a dark and stormy night; the rain fell in torrents"


def run(*args, stdin=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("plain") / "source", "llama", seed=1, varied=True, shards=1)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, source):
    """Builds a checkpoint in a format."""
    return lambda method: build(tmp_path_factory.mktemp("made"), source, method)


@pytest.fixture(scope="module")
def folders(fresh):
    return fresh("gptq 4 bits act-order")


def text_of(*args):
    done = run("generate", "--prompt", PROMPT, "-n", 16, "--ignore-eos", "--json", "--dtype", "float32", *args)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])["text"]


def damage(change):
    """A checkpoint's damage: changes of its tensors."""

    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return apply


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])


def put(name, make):
    return damage(lambda tensors: tensors.update({name: make(tensors[name]).contiguous()}))


UP = "model.layers.1.mlp.up_proj"
FAULTS = {
    "scales cut": ("gptq 4 bits", put(f"{UP}.scales", lambda own: own[:, :-8]), f"{UP}.scales"),
    "groups that do not divide": (
        "gptq 4 bits",
        lambda folder: tiny.edit_config(
            folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 24}
        ),
        "qzeros: expected int32 [4, 8]",
    ),
    "g_idx out of range": ("gptq 4 bits act-order", put(f"{UP}.g_idx", lambda own: own + 99), "g_idx"),
    "wrong dtype": ("gptq 4 bits", put(f"{UP}.qweight", lambda own: own.long()), f"{UP}.qweight"),
    "no zeros": ("awq", damage(lambda tensors: tensors.pop(f"{UP}.qzeros")), f"{UP}: expected a tensor qzeros"),
    "no scales": ("fp8 ragged", damage(lambda tensors: tensors.pop(f"{UP}.weight_scale_inv")), "weight_scale_inv"),
    "scales of another grid": ("fp8 ragged", put(f"{UP}.weight_scale_inv", lambda own: own[:1]), "weight_scale_inv"),
    "fp8 scales of integers": (
        "nvfp4",
        put(f"{UP}.weight_scale", lambda own: own.view(torch.int8)),
        f"{UP}.weight_scale",
    ),
    "no absmax": ("nf4", damage(lambda tensors: tensors.pop(f"{UP}.weight.absmax")), "absmax"),
    "int8 scales cut": ("bitsandbytes int8", put(f"{UP}.SCB", lambda own: own[:-1]), f"{UP}.SCB"),
    "file cut": ("awq", cut, "model.safetensors"),
    "another method": (
        "awq",
        lambda folder: tiny.edit_config(folder, quantization_config={"quant_method": "exl2"}),
        "EXL2",
    ),
    "no settings": ("nf4", lambda folder: tiny.edit_config(folder, quantization_config=None), "no quantization_config"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_one_paragraph_and_exit_1(fresh, fault):
    method, spoil, name = FAULTS[fault]
    folder, _ = fresh(method)
    spoil(folder)
    done = run("generate", "--target", folder, "--speculation", "off", "--prompt", "abc", "-n", 4)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert name in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "\n\n" not in done.stderr.strip()


def test_a_quantised_draft_and_target_give_the_targets_text(folders, fresh):
    packed, plain = folders
    wanted = text_of("--target", plain, "--speculation", "off")
    draft, _ = fresh("nf4")
    assert text_of("--target", packed, "--draft", draft) == wanted
    assert text_of("--target", plain, "--draft", draft) == wanted


def test_verify_and_batch_take_a_quantised_target(folders, fresh, tmp_path):
    draft, _ = fresh("nf4")
    common = ["--target", folders[0], "--draft", draft, "--device-memory", "64MiB", "--threads", 1]
    done = run("generate", *common, "--prompt", PROMPT, "-n", 8, "--ignore-eos", "--verify", "--json")
    assert done.exit_code == 0, done.output
    assert "verif" in done.stdout
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    (tmp_path / "in.jsonl").write_text(json.dumps({**request, "body": body}) + "\n")
    said = []
    for number, folder in enumerate(folders):
        out = tmp_path / f"{number}.jsonl"
        done = run(
            "batch",
            "--input",
            tmp_path / "in.jsonl",
            "--output",
            out,
            "--target",
            folder,
            "--speculation",
            "off",
            "--dtype",
            "float32",
        )
        assert done.exit_code == 0, done.output
        said.append(json.loads(out.read_text())["response"]["body"]["choices"][0]["text"])
    assert said[0] == said[1] != ""


def adapter(folder, base):
    """A LoRA of two modules."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    generator, tensors = torch.Generator().manual_seed(3), {}
    for layer in (0, 2):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 64, generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(96, 4, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_changes_decoded_weights(folders, tmp_path):
    packed, plain = folders
    own = adapter(tmp_path / "adapter", packed)
    wanted = text_of("--target", plain, "--adapter", own, "--speculation", "off")
    assert wanted != text_of("--target", plain, "--speculation", "off")
    for memory in ([], ["--device-memory", "1152KiB"]):
        assert text_of("--target", packed, "--adapter", own, "--speculation", "off", *memory) == wanted
