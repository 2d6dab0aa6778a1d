"""The embedded pair as a newcomer meets it: what it writes by itself, and what its README says of it."""

import json

import pytest

import aspec
from aspec.options import DEMO
from tools.train_demo import SAMPLING, repeated_4grams

PROMPT = "def main(argv):"  # of the project's README


def test_repeated_4_grams_are_counted_from_their_second_time():
    assert repeated_4grams([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repeated_4grams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_4grams([1] * 8) == pytest.approx(4 / 5)


def test_it_writes_without_repeating_itself_at_more_than_two_tokens_a_pass():
    with aspec.LLM() as llm:
        results = llm.generate([PROMPT] * 4, ignore_eos=True)
    assert len({result.token_ids for result in results}) == 4, "sampled, each with a seed of its own"
    assert [len(result.token_ids) for result in results] == [128] * 4
    assert sum(repeated_4grams(result.token_ids) for result in results) / 4 <= 0.15
    assert sum(result.stats.tokens_per_pass for result in results) / 4 > 2


def test_its_readme_says_how_it_samples():
    said = (DEMO / "README.md").read_text()
    for folder in (DEMO / "target", DEMO / "draft"):
        stored = json.loads((folder / "generation_config.json").read_text())
        assert {name: stored[name] for name in SAMPLING} == SAMPLING
    assert f"temperature {SAMPLING['temperature']}" in said
    assert f"top-k {SAMPLING['top_k']}" in said
