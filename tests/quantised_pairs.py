"""A quantised target with the tokens of transformers' model of the same weights, and the runs that must find them."""

import functools

import pytest
import torch

import aspec
from tests import tiny
from tests.quantised_models import build
from tests.test_equality import LENGTHS, OFF, Pair, check

SIZES = dict(kv_lora_rank=32, q_lora_rank=32)  # whole groups of 32
CHAIN, TREE = ("chain", 4), ("tree", 5)
RUNS = [(OFF, 1, "none"), (CHAIN, 3, "some"), (TREE, 2, "none"), (TREE, 1, "all")]
"""Without and with drafts, at three budgets."""

EXACT_RUNS = [(OFF, 0, 3), (OFF, None, 1), (CHAIN, 0, 1), (TREE, None, 3), (TREE, 0, 2)]
"""A draft's form, resident memory, rows."""


class Quantised(Pair):
    """A quantised target, a draft that is like it, and what transformers' model with the same weights generates."""

    def __init__(self, name, target, draft, model):
        self.family, self.target, self.draft = name, target, draft
        generator = torch.Generator().manual_seed(5)
        self.prompts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in LENGTHS]
        self.cached = True
        self.wanted = [self._generate(model, prompt) for prompt in self.prompts]
        assert len({token for tokens in self.wanted for token in tokens}) >= 8, "the text varies"

    @classmethod
    def of(cls, folder, family, method):
        """A checkpoint of tests.quantised_models."""
        sizes = SIZES if family == "deepseek_v3" else None
        source = tiny.build(folder / "source", family, seed=1, varied=True, shards=1, sizes=sizes)
        target, plain = build(folder, source, method)
        draft = tiny.noisy_copy(plain, folder / "draft", 0.035)
        return cls(f"{family} {method}", target, draft, tiny.reference(plain))

    @classmethod
    def builder(cls, folders):
        """Builds a case of a family and a method once, in folders of its own."""

        def build_case(family, method):
            if method.startswith("ct "):
                pytest.importorskip("compressed_tensors")
            return cls.of(folders.mktemp(family), family, method)

        return functools.cache(build_case)

    def resident_memory(self, resident):
        """``some``: room for about half of the layers."""
        if resident != "some":
            return super().resident_memory(resident)
        return sum(part.resident_bytes for part in self.plan.parts) * 6 // 10

    def check_runs(self):
        """The wanted tokens in every run; some proposals are accepted, and some are not."""
        proposed = accepted = 0
        for run in RUNS:
            for stats in check(self, *run):
                proposed, accepted = proposed + stats.proposed, accepted + stats.accepted
        assert 0 < accepted < proposed

    def check_exact(self, dtype, **more):
        """The same tokens in every exact run."""
        found = [self._exact(dtype, *how, **more) for how in EXACT_RUNS]
        assert all(tokens == found[0][: len(tokens)] for tokens in found)

    def _exact(self, dtype, shape, resident, batch, **more):
        options = dict(
            **more, speculation=shape[0], num_draft_tokens=shape[1], draft=self.draft, resident_memory=resident
        )
        sizes = dict(threads=1, max_context=80, prefill_tokens=16, device_memory=24 << 20, max_batch=batch)
        with aspec.LLM(target=self.target, dtype=dtype, exact=True, **sizes, **options) as llm:
            made = llm.generate(self.prompts[:batch], max_new_tokens=24, temperature=0.0, ignore_eos=True)
            return [list(one.token_ids) for one in made]
