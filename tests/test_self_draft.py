"""``--draft self:4bit``: a copy of the target in 4 bits that proposes; made once, and the text never depends on it."""

import pytest
import torch

import aspec
from aspec.errors import UserError
from aspec.options import SELF_DRAFT, EngineOptions, cache_folder
from aspec.plan import Speculation
from aspec.planning.footprint import read_models, request_for
from aspec.planning.resolve import resolve
from aspec.preparing import self_draft as module
from aspec.preparing.prepare import design, prepare
from tests import tiny

PROMPTS = [[5, 9, 33, 7], [120, 64, 3]]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A target whose text varies."""
    folder = tmp_path_factory.mktemp("target") / "target"
    return tiny.build(folder, "qwen3", dtype=torch.bfloat16, seed=1, varied=True, shards=1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def generated(target, **options):
    sizes = dict(threads=1, max_context=64, prefill_tokens=16, device_memory=24 << 20, max_batch=2)
    with aspec.LLM(target=target, exact=True, resident_memory=0, **sizes, **options) as llm:
        made = llm.generate(PROMPTS, max_new_tokens=24, temperature=0.0, ignore_eos=True)
        return [(list(one.token_ids), one.stats.accepted) for one in made]


@pytest.mark.parametrize("shape", ["chain", pytest.param("tree", marks=pytest.mark.slow)])
def test_the_text_is_the_same_and_proposals_are_accepted(target, shape):
    plain = [tokens for tokens, _ in generated(target, speculation="off")]
    found = generated(target, draft=SELF_DRAFT, speculation=shape, num_draft_tokens=4)
    assert [tokens for tokens, _ in found] == plain
    assert sum(accepted for _, accepted in found) > 10


def test_the_copy_is_made_once_and_again_for_another_target(target, tmp_path, monkeypatch):
    stages = []
    options = EngineOptions(target=target, draft=SELF_DRAFT, progress=lambda stage, *_: stages.append(stage))
    first = resolve(options).draft
    assert "draft" in stages
    with monkeypatch.context() as patched:
        patched.setattr(module, "prepare", None)
        assert resolve(options).draft == first
    prepare(design(target), tmp_path / "other")
    assert module.self_draft(tmp_path / "other", lambda *_: None) != first


def test_chains_are_its_form_unless_trees_are_asked_for(target):
    def request(**options):
        options = EngineOptions(target=target, draft=SELF_DRAFT, device_memory=24 << 20, **options)
        return request_for(read_models(resolve(options, weights=False), outlined=True))

    assert request().speculation is Speculation.CHAIN
    assert request(max_batch=4, num_draft_tokens=6).speculation is Speculation.CHAIN
    assert request(speculation="tree").speculation is Speculation.TREE


def test_a_plan_makes_no_copy_and_counts_its_bytes(target):
    options = EngineOptions(target=target, draft=SELF_DRAFT, device_memory=24 << 20)
    outlined = read_models(resolve(options, weights=False), outlined=True)
    assert not list(cache_folder().rglob("*.safetensors"))
    made = read_models(resolve(options))
    for models in (outlined, made):
        assert models.draft.packed.keys() == {0, 1, 2, 3}
    assert sum(part.nbytes for part in outlined.draft_parts) == sum(part.nbytes for part in made.draft_parts)


def test_what_cannot_be_copied_is_refused(target, tmp_path):
    prepare(design(target, 4), tmp_path / "packed")
    with pytest.raises(UserError, match=r"self:4bit makes a copy .* is quantised already \(prepared, 4 bits"):
        resolve(EngineOptions(target=tmp_path / "packed", draft=SELF_DRAFT))
    with pytest.raises(UserError, match=r"'self:3bit' is not known: expected self:4bit"):
        EngineOptions(target=target, draft="self:3bit")
