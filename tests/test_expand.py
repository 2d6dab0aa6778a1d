"""Expansion keeps the function: same logits and greedy tokens, in many shards, the same bytes for the same seed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tools import expand

PROMPT = torch.tensor([[3, 17, 40, 8, 91, 22]])
LARGER = ["--hidden", "128", "--intermediate", "150", "--layers", "7", "--heads", "8", "--kv-heads", "4"]
EXACT = ["--dtype", "fp32", "--noise", "0"]


def write_source(folder: Path, dtype=torch.float32, **changes) -> Path:
    """A random Llama whose greedy text varies; norms are not all ones."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = LlamaConfig(
        **sizes | dict(num_key_value_heads=2, vocab_size=96, bos_token_id=None, eos_token_id=0) | changes
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() == 2 else 0.1
            parameter.copy_(torch.randn_like(parameter) * spread + (parameter.dim() == 1))
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_and_tokens(folder: Path):
    model = load(folder)
    tokens = model.generate(PROMPT, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    return model(tokens).logits, tokens


@pytest.mark.parametrize("head_dim", ["8", "32"], ids=["same head size", "head size x4"])
@pytest.mark.parametrize("layers", ["3", "4", "9"], ids=["same depth", "one split", "idle layers"])
def test_same_function(source, tmp_path, head_dim, layers):
    arguments = [*LARGER, "--head-dim", head_dim, "--layers", layers, *EXACT]
    expand.main([str(source), str(tmp_path / "large"), *arguments])
    old_logits, old_tokens = logits_and_tokens(source)
    new_logits, new_tokens = logits_and_tokens(tmp_path / "large")
    assert new_tokens.tolist() == old_tokens.tolist()
    assert len(set(old_tokens[0].tolist())) > 8
    torch.testing.assert_close(new_logits, old_logits, rtol=1e-4, atol=1e-4)


def test_factor_of_three_keeps_bf16_weights_exact(tmp_path):
    source = write_source(tmp_path / "small", dtype=torch.bfloat16)
    shape = ["--hidden", "96", "--intermediate", "100", "--heads", "12", "--layers", "5", "--noise", "0"]
    expand.main([str(source), str(tmp_path / "large"), *shape])
    old_logits, _ = logits_and_tokens(source)
    new_logits, _ = logits_and_tokens(tmp_path / "large")
    torch.testing.assert_close(new_logits, old_logits, rtol=1e-4, atol=1e-4)


def test_shards_are_many_small_and_indexed(source, tmp_path):
    expand.main([str(source), str(tmp_path / "large"), *LARGER, "--shard-size", "200KB"])
    index = json.loads((tmp_path / "large" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "large").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert all((tmp_path / "large" / name).stat().st_size < 210_000 for name in files)
    assert load(tmp_path / "large").config.hidden_size == 128
    assert (tmp_path / "large" / "tokenizer.json").read_text() == "{}"


def test_bytes_depend_on_the_seed_only(source, tmp_path):
    def written(name: str, seed: str) -> dict[str, bytes]:
        expand.main([str(source), str(tmp_path / name), *LARGER, "--shard-size", "300KB", "--seed", seed])
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = written("first", "1")
    assert written("again", "1") == first
    assert written("other", "2") != first


def test_size_of_one_block_does_not_matter_without_noise(source, tmp_path, monkeypatch):
    expand.main([str(source), str(tmp_path / "whole"), *LARGER, *EXACT])
    monkeypatch.setattr(expand, "BLOCK_ELEMENTS", 1000)
    expand.main([str(source), str(tmp_path / "parts"), *LARGER, *EXACT])
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("nbytes", [100e6, 500e6, 2e9, 8e9, 140e9])
def test_chosen_shape_has_the_asked_size(nbytes):
    source = expand.Shape(256, 704, 8, 8, 4, 32, 4096)
    shape = expand.choose_shape(source, int(nbytes / 2))
    expand.check_shape(source, shape)
    assert shape.num_params() * 2 == pytest.approx(nbytes, rel=0.03)
    assert 30 < shape.hidden / shape.layers < 220


def test_refuses_what_it_cannot_expand(source, tmp_path):
    tied = write_source(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        expand.main([str(tied), str(tmp_path / "large")])
    with pytest.raises(ValueError, match="hidden must be a multiple of the source's 32"):
        expand.main([str(source), str(tmp_path / "large"), "--hidden", "80"])
    with pytest.raises(ValueError, match="layers must not shrink"):
        expand.main([str(source), str(tmp_path / "large"), "--layers", "2"])
    with pytest.raises(ValueError, match="not empty"):
        expand.main([str(source), str(source)])
    assert not (tmp_path / "large").exists()
