"""The frame without its forward: its bits, and the forward where code, arguments or results are others."""

import pytest
import torch

from tests import tiny
from tests.test_exact import Engine, _threads, check  # noqa: F401 - a fixture


def engine_of(tmp_path, family, dtype=torch.bfloat16):
    """What its forward makes around layers is there; from now on its frame may be quick."""
    engine = opened(tmp_path, family, dtype)
    frame = engine.model._framed
    quick, frame._quick = frame._quick, None
    _ = engine.decoded  # by what it has now
    frame._quick = quick
    return engine


def opened(tmp_path, family, dtype=torch.bfloat16):
    torch.set_num_threads(1)
    return Engine(tiny.build(tmp_path / family, family), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
def test_the_bits_are_those_of_the_forward(family, dtype, tmp_path):
    engine = engine_of(tmp_path, family, dtype)
    check(engine, range(1))
    quick = engine.model._framed._quick
    assert quick._named is not None
    assert quick._same_head


def test_the_forward_runs_once(tmp_path, monkeypatch):
    engine = engine_of(tmp_path, "qwen3")
    engine.decode(engine.make_cache(1), 0, 5)
    monkeypatch.setattr(type(engine.model._framed), "_run", None)
    assert torch.equal(engine.decode(engine.decoded[0], 7, engine.tokens[7]), engine.logits[7])


@pytest.mark.parametrize("family", ["gemma2", "granite", "phi", "mixtral", "gpt_oss"])
def test_other_models_keep_their_forward(family, tmp_path):
    assert opened(tmp_path, family).model._framed._quick is None


@pytest.mark.parametrize("part", ["_embed", "_angles", "_norm"])
def test_other_bits_keep_the_forward(part, tmp_path):
    """The first results are compared."""
    engine = engine_of(tmp_path, "llama")
    quick = engine.model._framed._quick
    own = getattr(quick, part)

    def wrong(*given, **named):
        made = own(*given, **named)
        return tuple(2 * one for one in made) if isinstance(made, tuple) else 2 * made

    setattr(quick, part, wrong)
    check(engine, range(1))
    assert quick._same_head is False if part == "_norm" else quick._refused


def test_an_argument_that_is_not_known_keeps_the_forward(tmp_path, monkeypatch):
    engine = engine_of(tmp_path, "llama")
    quick, frame = engine.model._framed._quick, engine.model._framed
    learn = quick.learn

    def more(calls, *given):
        learn([{**call, "more": torch.zeros(1)} for call in calls], *given)

    monkeypatch.setattr(frame, "_quick", quick)
    monkeypatch.setattr(quick, "learn", more)
    check(engine, range(1))
    assert quick._refused
    assert quick._named is None
