"""Expansion keeps the function: same logits and greedy tokens, in many shards, the same bytes for the same seed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.options import DEMO
from tools import expand
from tools.routers import expert_shares, residual_writers, write_text

PROMPT = torch.tensor([[3, 17, 40, 8, 91, 22]])
LARGER = ["--hidden", "128", "--intermediate", "150", "--layers", "7", "--heads", "8", "--kv-heads", "4"]
SPARSE = [*LARGER, "--intermediate", "160", "--experts", "4"]
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


@pytest.mark.parametrize("layers", ["3", "4", "9"], ids=["same depth", "one split", "idle layers"])
def test_experts_compute_the_same_function(source, tmp_path, layers):
    arguments = [*SPARSE, "--layers", layers, *EXACT]
    expand.main([str(source), str(tmp_path / "large"), *arguments])
    old_logits, old_tokens = logits_and_tokens(source)
    new_logits, new_tokens = logits_and_tokens(tmp_path / "large")
    assert new_tokens.tolist() == old_tokens.tolist()
    torch.testing.assert_close(new_logits, old_logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_experts_differ_and_so_do_the_routes(source, tmp_path):
    expand.main([str(source), str(tmp_path / "large"), *SPARSE, "--routing", "uniform"])
    model = load(tmp_path / "large")
    config = model.config
    assert (config.model_type, config.num_experts_per_tok, config.sliding_window) == ("mixtral", 2, None)
    up_and_gate, down = (model.model.layers[0].mlp.experts.get_parameter(n) for n in ("gate_up_proj", "down_proj"))
    assert len({tensor.numpy().tobytes() for fused in (up_and_gate, down) for tensor in fused}) == 2 * 4
    _, tokens = logits_and_tokens(tmp_path / "large")
    for scores in model(tokens, output_router_logits=True).router_logits:
        best = scores.softmax(-1).topk(2)
        assert len({tuple(sorted(pair)) for pair in best.indices.tolist()}) > 2
        assert best.indices.unique().tolist() == [0, 1, 2, 3]
        assert (best.values / best.values.sum(-1, keepdim=True)).std(0).min() > 0.01


def test_experts_have_the_names_that_mixtral_was_published_with(source, tmp_path):
    expand.main([str(source), str(tmp_path / "ours"), *SPARSE])
    load(tmp_path / "ours").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    with (
        safe_open(tmp_path / "ours" / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        assert "model.layers.6.block_sparse_moe.experts.3.w2.weight" in set(ours.keys())
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in set(ours.keys()))


@pytest.mark.parametrize("routing", ["uniform", "zipf:1.0"])
@torch.inference_mode()
def test_experts_are_chosen_as_often_as_the_routing_says(source, tmp_path, routing):
    arguments = [*LARGER, "--intermediate", "48", "--experts", "16", "--top-k", "4", "--routing", routing]
    expand.main([str(source), str(tmp_path / "large"), *arguments])
    model = load(tmp_path / "large")
    text = write_text(load(source), torch.Generator().manual_seed(5))
    for scores in model(text, output_router_logits=True).router_logits:
        chosen = torch.bincount(scores.topk(4).indices.flatten(), minlength=16) / text.numel()
        expected = expert_shares(routing, 16, 4)
        assert (chosen.sort(descending=True).values - expected).abs().mean() < 0.05


def test_shares_follow_zipf_up_to_every_token():
    assert expert_shares("uniform", 8, 2).tolist() == [0.25] * 8
    shares = expert_shares("zipf:1", 4, 2)
    assert shares.tolist() == pytest.approx([0.96, 0.48, 0.32, 0.24])
    steep = expert_shares("zipf:2", 4, 2)
    assert steep[0] == 1.0
    assert steep[1] / steep[2] == pytest.approx(9 / 4)
    assert steep.sum() == pytest.approx(2.0)


def test_routers_see_what_wrote_last():
    split_and_idle = [(0, True, False), (0, False, True), (1, True, True), (1, False, False)]
    assert residual_writers(split_and_idle) == [(0, "attention"), (0, "attention"), (1, "attention"), (1, "mlp")]
    assert residual_writers([(0, False, False)]) == [(0, "embedding")]


async def test_aspec_streams_experts_to_the_tokens_of_the_demo_target(tmp_path):
    expand.main([str(DEMO / "target"), str(tmp_path / "large"), "--experts", "4", "--layers", "10"])
    models = {"draft": DEMO / "draft", "dtype": "float32", "speculation": "chain", "num_draft_tokens": 8}
    models |= {"max_batch": 1, "max_context": 128, "threads": 1, "experts": "whole"}
    last = []
    for target, budget in ((tmp_path / "large", 96 << 20), (DEMO / "target", 1 << 30)):
        async with open_engine(target=target, device_memory=budget, **models) as engine:
            assert bool(engine.plan.streamed) == (target != DEMO / "target")
            prompt = engine.tokenizer.encode("def main(argv):")
            pieces = [piece async for piece in engine.stream(prompt, SamplingParams(24, ignore_eos=True))]
        last.append(([token for piece in pieces for token in piece.token_ids], pieces[-1].stats.passes))
    with torch.inference_mode():
        greedy = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.0}
        expected = load(DEMO / "target").generate(torch.tensor([prompt]), **greedy)
    assert last[0][0] == expected[0, len(prompt) :].tolist()
    assert last[0] == last[1]  # the draft is accepted as it is for the demo target
    assert last[0][1] < 8


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


@pytest.mark.parametrize("nbytes", [200e6, 500e6, 2e9, 8e9, 140e9])
def test_chosen_shape_of_experts_has_the_asked_size(nbytes):
    source = expand.Shape(256, 704, 8, 8, 4, 32, 4096, experts=8, top_k=2)
    shape = expand.choose_shape(source, int(nbytes / 2))
    expand.check_shape(replace(source, experts=0, top_k=0), shape)
    assert shape.num_params() * 2 == pytest.approx(nbytes, rel=0.03)
    assert 20 < shape.hidden / shape.layers < 100


def test_written_experts_have_the_asked_size(source, tmp_path):
    expand.main([str(source), str(tmp_path / "large"), "--size", "1MB", "--experts", "4"])
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    shape = expand.Shape.of_config(config)
    assert shape == replace(shape, experts=4, top_k=2)
    written = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert written == pytest.approx(2 * shape.num_params(), rel=0.03)
    assert written == pytest.approx(1e6, rel=0.1)


def test_refuses_what_it_cannot_expand(source, tmp_path):
    tied = write_source(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        expand.main([str(tied), str(tmp_path / "large")])
    with pytest.raises(ValueError, match="hidden must be a multiple of the source's 32"):
        expand.main([str(source), str(tmp_path / "large"), "--hidden", "80"])
    with pytest.raises(ValueError, match="layers must not shrink"):
        expand.main([str(source), str(tmp_path / "large"), "--layers", "2"])
    with pytest.raises(ValueError, match="experts must be 0 or at least the 2 of a token"):
        expand.main([str(source), str(tmp_path / "large"), "--experts", "1"])
    with pytest.raises(ValueError, match="routing is uniform or zipf:EXPONENT, asked for zipf"):
        expand.main([str(source), str(tmp_path / "large"), "--experts", "16", "--routing", "zipf"])
    with pytest.raises(ValueError, match="whole 16s"):
        expand.main([str(source), str(tmp_path / "large"), *LARGER, "--experts", "4"])
    with pytest.raises(ValueError, match="not empty"):
        expand.main([str(source), str(source)])
    assert not (tmp_path / "large").exists()
