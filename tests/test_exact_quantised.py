"""Exactness over five methods: plain decoding, chains and trees give the same bits and the same tokens."""

import pytest
import torch

from tests.quantised_pairs import Quantised
from tests.test_exact import DTYPES, Engine, _recipes, _threads, check  # noqa: F401 - fixtures

CASES = [("llama", "gptq 4 bits act-order"), ("llama", "nf4 double"), ("mixtral", "fp8 ragged"), ("gpt_oss", "mxfp4")]
CASES += [("qwen3_moe", "ct int4 zeros")]
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
EVERY = [
    pytest.param(*case, dtype, marks=() if case == CASES[0] and dtype == torch.bfloat16 else pytest.mark.slow)
    for case in CASES
    for dtype in DTYPES
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Quantised.builder(tmp_path_factory)


@pytest.mark.parametrize(("family", "method", "dtype"), EVERY)
def test_steps_equal_decoding(pair, family, method, dtype):
    """Chunks of ragged rows and random trees have the logits of decoding their paths token by token, bit for bit."""
    torch.set_num_threads(1)
    check(Engine(pair(family, method).target, dtype), range(2))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "dtype"), EVERY)
def test_tokens_depend_on_no_draft_and_no_plan(pair, family, method, dtype):
    pair(family, method).check_exact(NAMES[dtype])
