"""What options come to: folders, draft method, device, dtype, budgets; and what of it other options change."""

import pytest
import torch

from aspec.errors import UserError
from aspec.options import DEMO, SELF_DRAFT, EngineOptions
from aspec.plan import Speculation
from aspec.planning.resolve import (
    COPY_DRAFT,
    DEMO_BUDGET_BYTES,
    FREE_NGRAM_DRAFT,
    MODEL_DRAFT,
    NGRAM_DRAFT,
    NO_DRAFT,
    draft_method,
    resolve,
    revise,
)

PAIR = {"target": DEMO / "target", "draft": DEMO / "draft", "device": "cpu"}


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, MODEL_DRAFT),  # the demo's own
        ({"draft": "ngram"}, NGRAM_DRAFT),
        ({"target": "x"}, FREE_NGRAM_DRAFT),
        ({"target": "x", "speculation": "off"}, NO_DRAFT),
        ({"target": "x", "num_draft_tokens": 0}, NO_DRAFT),
        ({"target": "x", "num_draft_tokens": 8}, NGRAM_DRAFT),
        ({"target": "x", "speculation": "chain"}, NGRAM_DRAFT),
        ({"target": "x", "draft": "y"}, MODEL_DRAFT),
        ({"target": "x", "draft": SELF_DRAFT}, COPY_DRAFT),
        ({"draft": SELF_DRAFT, "speculation": "tree"}, COPY_DRAFT),
        ({"draft": SELF_DRAFT, "speculation": "off"}, NO_DRAFT),
        ({"target": "x", "draft": "ngram"}, NGRAM_DRAFT),
        ({"target": "x", "draft": "ngram", "speculation": "off"}, NO_DRAFT),
        ({"target": "x", "draft": "y", "num_draft_tokens": 0}, NO_DRAFT),
    ],
)
def test_the_draft_method_follows_from_the_options(options, method):
    assert draft_method(EngineOptions(**options)) is method


def test_a_lookup_proposes_trees_only():
    assert NGRAM_DRAFT.shapes == FREE_NGRAM_DRAFT.shapes == (Speculation.TREE,)
    assert not NO_DRAFT.shapes
    assert [method.has_model for method in (NO_DRAFT, NGRAM_DRAFT, MODEL_DRAFT)] == [False, False, True]


def test_what_is_left_open_is_answered():
    demo = resolve(EngineOptions(device="cpu"))
    assert (demo.target, demo.draft, demo.kind) == (DEMO / "target", DEMO / "draft", None)
    assert demo.budget_bytes == DEMO_BUDGET_BYTES
    assert demo.exact, "on a CPU it was proved"
    own = resolve(EngineOptions(**PAIR, dtype="bf16", exact=False, device_memory=5 << 20))
    assert (own.dtype, own.exact, own.budget_bytes, own.host_bytes) == (torch.bfloat16, False, 5 << 20, None)
    assert resolve(own) is own
    assert resolve(EngineOptions(**PAIR)).budget_bytes > DEMO_BUDGET_BYTES


def test_other_options_keep_the_models_and_change_the_rest(monkeypatch):
    before = resolve(EngineOptions(**PAIR))
    monkeypatch.setattr("aspec.io.hub.resolve", None)  # nothing may ask
    after = revise(before, speculation="off", device_memory=5 << 20, max_batch=2)
    assert (after.target, after.draft, after.method) == (before.target, None, NO_DRAFT)
    assert (after.budget_bytes, after.options.max_batch) == (5 << 20, 2)
    assert revise(before, max_batch=2).draft == before.draft


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft": "x/y"}, "--draft was given without --target"),
        ({"dtype": "int3"}, "--dtype 'int3' is not known"),
        ({"target": "./nothing"}, "target './nothing' was not found"),
    ],
)
def test_what_cannot_be_answered_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        resolve(EngineOptions(device="cpu", **options))
