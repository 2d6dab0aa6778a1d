"""Whole quantised checkpoints: the tokens are transformers' on the decoded weights, whatever the draft and the plan."""

import functools

import pytest
import torch
from safetensors.torch import load_file, save_file

import aspec
from aspec.models.model import Model
from tests import tiny
from tests.quantised_models import METHODS, build
from tests.test_equality import LENGTHS, OFF, Pair, check

CHAIN, TREE = ("chain", 4), ("tree", 5)
RUNS = [(OFF, 1, "none"), (CHAIN, 3, "some"), (TREE, 2, "none"), (TREE, 1, "all")]
EXPERTS = [
    ("mixtral", "fp8 ragged"),
    ("qwen3_moe", "fp8 e8m0"),
    ("gpt_oss", "mxfp4"),
    ("qwen3_moe", "ct int4"),
    ("mixtral", "gptq 4 bits act-order"),
    ("qwen3_moe", "awq"),
    ("mixtral", "nf4"),
    ("deepseek_v3", "fp8 ragged"),
]
CASES = [("llama", method) for method in METHODS if method != "mxfp4"] + EXPERTS
QUICK = [
    ("llama", "gptq 4 bits act-order"),
    ("llama", "nvfp4"),
    ("llama", "ct int4"),
    ("mixtral", "fp8 ragged"),
    ("gpt_oss", "mxfp4"),
]


class Quantised(Pair):
    """A quantised target; its draft is a noisy copy of the weights that it decodes to."""

    def __init__(self, folder, family, method):
        self.folder, self.family, self.draft = folder, f"{family} {method}", None
        source = tiny.build(folder / "source", family, seed=1, varied=True, shards=1)
        self.target, self.plain = build(folder, source, method)
        generator = torch.Generator().manual_seed(5)
        self.prompts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in LENGTHS]
        self.cached = True
        model = tiny.reference(self.plain)
        self.wanted = [self._generate(model, prompt) for prompt in self.prompts]
        assert len({token for tokens in self.wanted for token in tokens}) >= 8, "the text varies"
        self.draft = tiny.noisy_copy(self.plain, folder / "draft", 0.035)

    def resident_memory(self, resident):
        """``some``: room for about half of the layers, which a layer's decoded weights take most of."""
        if resident != "some":
            return super().resident_memory(resident)
        stored = (self.target / "model.safetensors").stat().st_size
        return stored + sum(part.decoded_bytes for part in self.plan.parts) * 6 // 10


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Builds a case once."""

    def build_case(family, method):
        if method.startswith("ct "):
            pytest.importorskip("compressed_tensors")
        return Quantised(tmp_path_factory.mktemp(family), family, method)

    return functools.cache(build_case)


@pytest.mark.parametrize(
    ("family", "method"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_greedy_equals_transformers_on_the_decoded_weights(made, family, method):
    pair = made(family, method)
    proposed = accepted = 0
    for run in RUNS:
        for stats in check(pair, *run):
            proposed, accepted = proposed + stats.proposed, accepted + stats.accepted
    assert 0 < accepted < proposed


EXACT = [("llama", "gptq 4 bits act-order"), ("llama", "ct int4"), ("mixtral", "fp8 ragged"), ("gpt_oss", "mxfp4")]


@pytest.mark.parametrize(
    ("family", "method"), [pytest.param(*case, marks=() if case == EXACT[0] else pytest.mark.slow) for case in EXACT]
)
def test_exact_tokens_in_bf16_depend_on_no_draft_and_no_plan(made, family, method):
    pair = made(family, method)
    found = [
        run_exact(pair, *how) for how in ((OFF, 0, 3), (OFF, None, 1), (CHAIN, 0, 1), (TREE, None, 3), (TREE, 0, 2))
    ]
    assert all(tokens == found[0][: len(tokens)] for tokens in found)


def run_exact(pair, shape, resident, batch):
    """The tokens of an engine that computes in bf16."""
    options = dict(speculation=shape[0], num_draft_tokens=shape[1], draft=pair.draft, resident_memory=resident)
    with aspec.LLM(
        target=pair.target,
        dtype="bfloat16",
        exact=True,
        threads=1,
        max_context=80,
        prefill_tokens=16,
        device_memory=24 << 20,
        max_batch=batch,
        **options,
    ) as llm:
        made = llm.generate(pair.prompts[:batch], max_new_tokens=24, temperature=0.0, ignore_eos=True)
        return [list(one.token_ids) for one in made]


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
