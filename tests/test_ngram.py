"""Prompt lookup: what followed the last tokens before, against a search through the whole text."""

import math
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aspec.options import EngineOptions
from aspec.planning.footprint import read_models, request_for
from aspec.planning.resolve import resolve
from aspec.speculation.ngram_index import WINDOW, NgramIndex, index_bytes, merge_into
from aspec.speculation.tree import Tree


def search(text, longest, shortest, window, recent, num_tokens):
    """Continuations of the longest suffix match in the last ``window`` tokens, newest first, and its length."""
    first = max(0, len(text) - window)
    for n in range(min(longest, len(text)), shortest - 1, -1):
        found = []
        for end in range(len(text) - 1, first + n - 1, -1):
            if text[end - n : end] == text[len(text) - n :]:
                longer = list(text)
                while len(longer) < end + num_tokens:
                    longer.append(longer[len(longer) - (len(text) - end)])
                found.append(tuple(longer[end : end + num_tokens]))
        if found:
            return found[:recent], n
    return [], 0


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), max_size=80),
    cut=st.integers(0, 80),
    window=st.sampled_from([5, 9, 30, 1000]),
    sizes=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    recent=st.sampled_from([1, 3, 1000]),
    num_tokens=st.integers(1, 6),
    most=st.integers(0, 5),
)
def test_proposals_equal_a_search_through_the_text(text, cut, window, sizes, recent, num_tokens, most):
    index = NgramIndex(*sizes, window, recent)
    index.extend(text[:cut])
    index.propose(num_tokens, most)
    index.extend(text[cut:])
    found, n = search(text, *sizes, window, recent, num_tokens)
    proposed = index.propose(num_tokens, most)
    assert [tokens for tokens, _ in proposed] == list(dict.fromkeys(found))[:most]
    for tokens, confidences in proposed:
        for place, confidence in enumerate(confidences):
            above = sum(other[:place] == tokens[:place] for other in found)
            agree = sum(other[: place + 1] == tokens[: place + 1] for other in found)
            matched = n + place
            assert confidence == pytest.approx(agree / (above + 1) * matched / (matched + 1))
            assert 0 < confidence < 1


def test_by_hand():
    index, short = NgramIndex(), NgramIndex(longest=3)
    for each in (index, short):
        each.extend([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3])
    assert [tokens for tokens, _ in index.propose(2, 8)] == [(5, 9)], "only there were 4 tokens the same"
    assert [tokens for tokens, _ in short.propose(2, 8)] == [(5, 9), (4, 9)], "most recent first"
    index.extend([4])
    assert [tokens for tokens, _ in index.propose(3, 8)] == [(9, 1, 2)]
    assert index.propose(0, 8) == []
    index.extend([77])
    assert index.propose(3, 8) == [], "a token never seen before"


def test_a_period_goes_on_beyond_the_end():
    index = NgramIndex()
    index.extend([7, 8, 7, 8, 7, 8])
    assert index.propose(5, 1)[0][0] == (7, 8, 7, 8, 7)


def test_nothing_comes_from_too_little_text():
    index = NgramIndex()
    assert index.propose(4, 4) == []
    for token in (1, 1):
        index.extend([token])
        assert index.propose(4, 4) == []
    index.extend([1])
    assert index.propose(2, 4)[0][0] == (1, 1)


def test_more_evidence_gives_more_confidence():
    def confidence(text):
        index = NgramIndex()
        index.extend(text)
        return index.propose(1, 1)[0][1][0]

    once = confidence([1, 2, 5, 0, 1, 2])
    often = confidence([1, 2, 5, 9, 1, 2, 5, 8, 1, 2, 5, 0, 1, 2])
    split = confidence([1, 2, 6, 9, 1, 2, 7, 8, 1, 2, 5, 0, 1, 2])
    longer = confidence([3, 4, 1, 2, 5, 0, 3, 4, 1, 2])
    assert split < once < often
    assert once < longer


def test_memory_is_bounded_by_the_window():
    index, source = NgramIndex(window=100), random.Random(0)
    for _ in range(30):
        index.extend(source.randrange(50) for _ in range(100))
        assert all(len(latest) <= 100 for latest in index._latest.values())
    assert index.length == 3000
    assert len(index._tokens) == 100
    assert all(len(links) == 100 for links in index._previous.values())


@pytest.mark.parametrize("wrong", [(2, 3, 99, 1), (4, 0, 99, 1), (4, 2, 4, 1), (4, 2, 99, 0)])
def test_sizes_that_contradict_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        NgramIndex(*wrong)


def test_continuations_merge_into_a_tree_and_share_prefixes():
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 9, 1, 2, 3, 4, 8, 1, 2])
    tree = Tree(max_depth=3)
    for tokens, confidences in index.propose(3, 4):
        merge_into(tree, tokens, [math.log(confidence) for confidence in confidences])
    tree.prune(8)
    tree.validate()
    proposal = tree.proposal()
    assert proposal.tokens == (3, 4, 8, 9)
    assert proposal.parents == (-1, 0, 1, 1)
    assert proposal.draft_score == (None,) * 4
    assert proposal.follow([3, 4, 8, 1, 1]) == ([0, 1, 2], [3, 4, 8, 1])


@pytest.mark.parametrize("num_tokens", [0, 20, 2000, 2 * WINDOW])
def test_an_index_takes_memory_for_the_text_it_holds_and_no_more_than_the_plan_counts(num_tokens):
    source = random.Random(num_tokens)
    tokens = [source.randrange(1000, 150_000) for _ in range(num_tokens)]
    tracemalloc.start()
    index = NgramIndex()
    index.extend(tokens)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes <= 2000 + index_bytes(num_tokens)


@pytest.mark.parametrize(("speculation", "counted"), [("tree", True), ("chain", False), ("off", False)])
def test_a_plan_counts_the_indexes_where_they_are_used(speculation, counted):
    options = EngineOptions(speculation=speculation, max_batch=3, max_context=100)
    models = read_models(resolve(options))
    needs = models.footprint(request_for(models))
    assert needs.fixed.get("n-gram index", 0) == (3 * index_bytes(100) if counted else 0)
