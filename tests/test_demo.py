"""The embedded pair as a newcomer meets it: what it writes by itself, and what its README says of it."""

import json

import pytest

import aspec
from aspec.options import DEMO
from tools.train_demo import SAMPLING, repeated_4grams

PROMPT = "def parse(line):"  # of the project's README


def test_repeated_4_grams_are_counted_from_their_second_time():
    assert repeated_4grams([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repeated_4grams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_4grams([1] * 8) == pytest.approx(4 / 5)


def test_it_writes_without_repeating_itself_at_more_than_two_tokens_a_pass():
    """The README's prompt with the seed of the command line, and prompts that nobody chose for it.

    Trees of one size: as it comes, the prices of the machine choose how many tokens a pass should have.
    """
    heldout = json.loads((DEMO / "heldout.json").read_text())
    with aspec.LLM(threads=1, speculation="tree", num_draft_tokens=16) as llm:
        results = [llm.generate(PROMPT, seed=0, ignore_eos=True), *llm.generate(heldout[:3], seed=0, ignore_eos=True)]
    assert [len(result.token_ids) for result in results] == [128] * 4
    repeats = [repeated_4grams(result.token_ids) for result in results]
    assert repeats[0] <= 0.15
    assert sum(repeats) / len(repeats) <= 0.15
    assert results[0].stats.tokens_per_pass > 2
    assert sum(result.stats.tokens_per_pass for result in results) / len(results) > 2


def test_its_readme_says_how_it_samples():
    said = (DEMO / "README.md").read_text()
    for folder in (DEMO / "target", DEMO / "draft"):
        stored = json.loads((folder / "generation_config.json").read_text())
        assert {name: stored[name] for name in SAMPLING} == SAMPLING
    assert f"temperature {SAMPLING['temperature']}" in said
    assert f"top-k {SAMPLING['top_k']}" in said
