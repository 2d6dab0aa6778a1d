"""Text of models with towers for images: the language model runs, and no tower is read or held."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from aspec.errors import CheckpointError
from aspec.generation.text.tokenizer import Tokenizer
from aspec.models.formats.settings import is_of_activations
from aspec.models.hf_compat import auto_class
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.skeleton import find_layers, load_config
from aspec.units import format_bytes
from tests import tiny
from tests.quantised_models import build as quantise
from tests.test_explain import MACHINE, as_object, plan
from tools import families, family_configs

TOWERS = ("vision", "visual", "projector", "image_newline", "connector")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Builds a checkpoint of a type once; towers have as many layers as the language model."""
    root, built = tmp_path_factory.mktemp("towers"), {}

    def get(name):
        if name not in built:
            built[name] = root / name
            config = family_configs.tiny_config(name)
            for sub in (getattr(config, one) for one in config.sub_configs):
                if sub is not config.get_text_config() and hasattr(sub, "num_hidden_layers"):
                    sub.num_hidden_layers = config.get_text_config().num_hidden_layers
            families.build(auto_class(config), config, built[name])
        return built[name]

    return get


def is_of_a_tower(name):
    return any(word in name for word in TOWERS)


def logits_of(auto, folder, tokens):
    """What transformers computes [T, V]."""
    model = auto.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def streamed_logits(streamed, tokens):
    """What aspec computes [T, V], layer by layer."""
    cache = KVCache(streamed.model.kv_shapes(), 1, 64, streamed.model.dtype)
    (logits,) = streamed.run((torch.tensor([tokens]), cache.step([0], [0], [len(tokens)])))
    return logits[0]


def tokens_of(count=21):
    return torch.randint(3, 200, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def assert_equal(auto, folder, streamed, tokens):
    wanted = logits_of(auto, folder, tokens)
    assert len({int(row.argmax()) for row in wanted}) > 5, "logits vary over positions"
    assert torch.allclose(streamed_logits(streamed, tokens), wanted, atol=1e-4)


@pytest.mark.compat
@pytest.mark.parametrize("name", ["gemma3", "llava", "idefics3", "qwen2_vl"])
def test_text_equals_transformers_and_no_byte_of_a_tower_is_read_or_held(folder, name):
    streamed = tiny.Streamed(model := Model(folder(name)))
    assert_equal(transformers.AutoModelForImageTextToText, folder(name), streamed, tokens_of())
    stored = {key: tensor.nbytes for key, tensor in load_file(folder(name) / "model.safetensors").items()}
    towers = sum(nbytes for key, nbytes in stored.items() if is_of_a_tower(key))
    assert model.unread_bytes == towers > 0
    assert model.remarks == (), "which is no surprise"
    assert sum(part.nbytes for part in streamed.parts) == sum(stored.values()) - towers
    assert not [target.target for part in streamed.parts for target in part.targets() if is_of_a_tower(target.target)]
    held = [own for key, own in model._frame.named_parameters() if is_of_a_tower(key)]
    assert held
    assert not any(own.numel() for own in held)
    assert model.remarks == ()


def test_towers_may_be_missing(folder, tmp_path):
    shutil.copytree(folder("llava"), tmp_path, dirs_exist_ok=True)
    kept = {k: t for k, t in load_file(tmp_path / "model.safetensors").items() if not is_of_a_tower(k)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    streamed = tiny.Streamed(model := Model(tmp_path))
    assert model.unread_bytes == 0
    assert torch.equal(
        streamed_logits(streamed, tokens_of()), streamed_logits(tiny.Streamed(Model(folder("llava"))), tokens_of())
    )


def test_the_layers_are_those_of_the_language_model(folder):
    model = Model(folder("gemma3"))
    name, layers = find_layers(model._frame)
    same = [
        key for key, own in model._frame.named_modules() if isinstance(own, nn.ModuleList) and len(own) == len(layers)
    ]
    assert len(same) == 2, "the tower has as many layers"
    assert (name, is_of_a_tower(name)) == ("model.language_model.layers", False)


def test_a_whole_that_cannot_run_on_text_runs_as_its_class_of_text(folder):
    """Llama 4: the weights are those of the whole, under its names."""
    streamed = tiny.Streamed(model := Model(folder("llama4")))
    assert_equal(transformers.AutoModelForCausalLM, folder("llama4"), streamed, tokens_of())
    stored = load_file(folder("llama4") / "model.safetensors")
    towers = sum(tensor.nbytes for key, tensor in stored.items() if is_of_a_tower(key))
    assert model.unread_bytes == towers > 0
    assert model.remarks == (), "which is no surprise"


@pytest.mark.parametrize("method", ["gptq 4 bits", "fp8 ragged"])
def test_quantised_weights_of_a_language_model_and_of_its_tower(folder, tmp_path, method):
    packed, plain = quantise(tmp_path, folder("gemma3"), method)
    streamed = tiny.Streamed(model := Model(packed, dtype=torch.float32))
    assert model.methods
    assert_equal(transformers.AutoModelForImageTextToText, plain, streamed, tokens_of())
    stored = load_file(packed / "model.safetensors")
    towers = sum(tensor.nbytes for key, tensor in stored.items() if is_of_a_tower(key))
    scales = sum(tensor.nbytes for key, tensor in stored.items() if is_of_activations(key))
    assert towers <= model.unread_bytes <= towers + scales
    assert not [target.target for part in streamed.parts for target in part.targets() if is_of_a_tower(target.target)]


@pytest.mark.parametrize("weights", [True, False])
def test_a_plan_says_how_many_bytes_are_not_read(folder, tmp_path, weights):
    shutil.copytree(folder("gemma3"), tmp_path, dirs_exist_ok=True)
    towers = Model(tmp_path).unread_bytes
    if not weights:
        (tmp_path / "model.safetensors").unlink()
    (machine := tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    found = as_object(plan("--target", tmp_path, "--profile", machine, "--json"))
    assert found["unread_bytes"] == towers > 0
    said = plan("--target", tmp_path, "--profile", machine).stdout
    assert f"not read: {format_bytes(towers)}, which text does not use" in said


def test_a_plan_of_text_alone_leaves_nothing_out(tmp_path):
    target = tiny.build(tmp_path / "target", "llama")
    (machine := tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    assert as_object(plan("--target", target, "--profile", machine, "--json"))["unread_bytes"] == 0
    assert "not read" not in plan("--target", target, "--profile", machine).stdout


def test_tied_names_are_read_although_text_uses_one_of_them(folder):
    streamed = tiny.Streamed(model := Model(folder("bert")))  # its head's bias has two names, and one is stored
    wanted = logits_of(transformers.AutoModelForCausalLM, folder("bert"), tokens_of())
    assert torch.allclose(streamed_logits(streamed, tokens_of()), wanted, atol=1e-4)
    assert model.unread_bytes == 0


def test_a_switch_of_the_language_model_that_contradicts_the_weights(tmp_path):
    config = family_configs.tiny_config("gemma3")
    config.text_config.attention_bias = True
    families.build(auto_class(config), config, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    tiny.edit_config(tmp_path, text_config=raw["text_config"] | {"attention_bias": False})
    with pytest.raises(CheckpointError, match=r"attention_bias is false, but 16 stored tensors have a use"):
        Model(tmp_path)


def test_the_chat_template_of_a_processor(tmp_path):
    tiny.save_tokenizer(tmp_path)
    assert not Tokenizer.load(tmp_path).has_chat_template
    template = "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.spell(tokenizer.encode_chat([{"role": "user", "content": "Hi"}])) == "<Hi>"
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"chat_template.json: expected a JSON object"):
        Tokenizer.load(tmp_path)


# -- types of other names ------------------------------------------------------------------------------------------


def test_a_type_that_transformers_knows_by_another_name(tmp_path):
    """Kimi K2 is a DeepSeek V3; its own code, which auto_map names, is not needed."""
    known = tiny.build(tmp_path / "known", "deepseek_v3")
    other = tmp_path / "other"
    shutil.copytree(known, other)
    tiny.edit_config(other, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    tokens = tokens_of()
    found, wanted = (streamed_logits(tiny.Streamed(Model(path)), tokens) for path in (other, known))
    assert torch.equal(found, wanted)
    assert Tokenizer.load(other).encode("abc") == Tokenizer.load(known).encode("abc")
    for path in other.glob("*.safetensors*"):
        path.unlink()
    (machine := tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    assert as_object(plan("--target", other, "--profile", machine, "--json"))["plans"]


def test_a_language_model_that_only_the_other_mapping_has(folder):
    assert load_config(folder("mistral4")).get_text_config().model_type == "mistral4"
    streamed = tiny.Streamed(model := Model(folder("mistral4")))
    assert_equal(transformers.AutoModelForImageTextToText, folder("mistral4"), streamed, tokens_of())
    assert model.unread_bytes == 0
