"""Prompts against the context: what does not fit is refused before a weight is read, what is cut off is told."""

import json
import warnings

import pytest
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.engine.design import design
from aspec.engine.engine import open_engine
from aspec.errors import PromptError, UserError
from aspec.generation.params import SamplingParams
from aspec.options import EngineOptions
from aspec.plan import MOST_WORK, Workload
from aspec.planning.fit import fit
from aspec.planning.resolve import resolve
from tests import tiny

CONTEXT = 256  # of the model
MIB = 1 << 20


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("fit") / "target", "llama")


def fitted(target, longest, new, prompts=1, **options):
    resolved = resolve(EngineOptions(target=target, device="cpu", **options))
    return fit(resolved, Workload(prompts, longest, max(2, new)), longest, new).options


@pytest.mark.parametrize(
    ("longest", "new", "asked", "context"),
    [
        (10, 5, None, 15),
        (1, 0, None, 2),
        (255, 1, None, 256),
        (256, 0, None, 256),
        (10, 5, 100, 100),
        (99, 1, 100, 100),
    ],
)
def test_the_context_is_what_the_prompts_need_or_what_is_given(target, longest, new, asked, context):
    with warnings.catch_warnings(action="error"):
        assert fitted(target, longest, new, max_context=asked).max_context == context


@pytest.mark.parametrize(
    ("longest", "new", "asked", "words"),
    [
        (
            10,
            100_000,
            None,
            "100000 new tokens were asked for; after the longest prompt, of 10 tokens, the context of 256",
        ),
        (250, 7, None, "has room for 6"),
        (10, 50, 40, "the context of 40 has room for 30"),
    ],
)
def test_what_is_cut_off_is_one_warning(target, longest, new, asked, words):
    with pytest.warns(RuntimeWarning, match=words) as told:
        assert fitted(target, longest, new, max_context=asked).max_context <= CONTEXT
    assert len(told) == 1


@pytest.mark.parametrize(
    ("longest", "new", "asked"), [(256, 1, None), (10**12, 1, None), (100, 1, 100), (257, 0, None)]
)
def test_a_prompt_that_does_not_fit_is_refused(target, longest, new, asked):
    with pytest.raises(
        PromptError, match=rf"the prompt has {longest} tokens; the context holds .*\(the model allows 256\)"
    ):
        fitted(target, longest, new, max_context=asked)


def test_more_groups_than_prompts_are_refused(target):
    with pytest.raises(UserError, match="2 groups need at least as many prompts, found 1"):
        design(resolve(EngineOptions(target=target, device="cpu", num_groups=2, workload=Workload(1, 10, 10))))


@pytest.mark.parametrize(("family", "words", "capacity"), [("llama", "may be poor", 1000), ("gpt2", "rows end", None)])
def test_a_context_beyond_the_models_is_told(tmp_path, family, words, capacity):
    """Rotary positions go on, a table of positions ends."""
    target = tiny.build(tmp_path / "target", family)
    with pytest.warns(RuntimeWarning, match=rf"--max-context 1000 exceeds .*{words}") as told:
        plan = design(
            resolve(EngineOptions(target=target, device="cpu", device_memory=64 * MIB, max_context=1000))
        ).plan
    assert plan.capacity == (capacity or plan.capacity)
    assert plan.capacity <= 1000
    assert len(told) == 1


# -- at the command line --------------------------------------------------------------------------------------


def generate(target, *args, prompt="a"):
    command = ["generate", "--target", str(target), "--device", "cpu", "--threads", "1", "--device-memory", "64MiB"]
    return CliRunner().invoke(app, [*command, "-p", prompt, "--temperature", "0", *args])


@pytest.mark.parametrize("prompt", ["a" * 256, "a" * 100_000, ""])
def test_a_prompt_is_checked_before_a_weight_is_read(target, prompt, monkeypatch):
    monkeypatch.setattr("aspec.cli.generate.Engine", lambda *_: pytest.fail("an engine opened"))
    result = generate(target, "-n", "8", prompt=prompt)
    assert result.exit_code == 1, result.output
    assert "error: the prompt " in result.stderr


@pytest.mark.parametrize("length", [1, 256])
def test_no_tokens_asked_for_are_an_empty_text(target, length, monkeypatch):
    monkeypatch.setattr("aspec.cli.generate.Engine", lambda *_: pytest.fail("an engine opened"))
    plain = generate(target, "-n", "0", prompt="a" * length)
    assert (plain.exit_code, plain.stdout) == (0, "\n"), plain.output
    as_json = generate(target, "-n", "0", "--json", prompt="a" * length)
    found = json.loads(as_json.stdout)
    assert (found["text"], found["token_ids"], found["finish_reason"]) == ("", [], "length")
    assert found["usage"] == {"prompt_tokens": length, "completion_tokens": 0}


async def test_no_tokens_asked_of_an_engine_are_an_empty_text(target):
    async with open_engine(target=target, device="cpu", threads=1, max_context=16, device_memory=64 * MIB) as engine:
        [piece] = [piece async for piece in engine.stream([5] * 16, SamplingParams(max_new_tokens=0))]
        assert (piece.text, piece.finish_reason) == ("", "length")
        with pytest.raises(PromptError, match="the prompt has 17 tokens"):
            [_ async for _ in engine.stream([5] * 17, SamplingParams(max_new_tokens=0))]


@pytest.mark.parametrize("args", [("-n", "100000"), ("--max-context", "1000"), ("--device-memory", "999GiB")], ids=str)
def test_what_a_command_cuts_off_is_told_once(target, args):
    result = generate(target, "-n", "2", "--stop", "a", *args)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("warning:") == 1, result.stderr
    assert args[1].removesuffix("GiB") in result.stderr.split("warning:")[1]


# -- absurd work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prompts", 10**9), None),
        (("--prompts", 10**12, "--prompt-tokens", 200), None),
        (("--prompts", 10**400), "num_prompts of a workload must be between 1 and 1000000000000"),
        (("--prompt-tokens", 10**12), "the prompt has 1000000000000 tokens; the context holds 256"),
        (("--new-tokens", 10**12), "1000000000000 new tokens were asked for"),
        (("--new-tokens", 10**30), "new_tokens of a workload must be between 2 and"),
        (("--max-context", 10**18), "--max-context 1000000000000000000 exceeds the 256 tokens"),
        (("--batch-size", 10**15, "--prompts", 10**9), "Give --device-memory at least"),
        (("--prompts", 100, "--groups", 100), "Give --device-memory at least"),
        (("--draft", "ngram", "--draft-budget", 10**12), "Give --device-memory at least"),
    ],
    ids=str,
)
def test_absurd_work_is_planned_or_refused_at_once(target, args, words):
    command = ["plan", "--target", str(target), "--device", "cpu", "--device-memory", "24MiB", "--temperature", "0"]
    result = CliRunner().invoke(app, [*command, *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert words is None or words in result.stderr
    assert (result.exit_code == 0) == (words is None or "asked for" in words), result.output
    assert len(result.stderr) < 3000


def test_work_beyond_the_context_is_planned_as_what_fits(target):
    """A row of a batch that asks for very many tokens makes neither the search long nor the forecast large."""
    work = Workload(20, 10, MOST_WORK)
    resolved = resolve(
        EngineOptions(target=target, device="cpu", device_memory=24 * MIB, workload=work, max_context=64)
    )
    sane = resolve(
        EngineOptions(
            target=target, device="cpu", device_memory=24 * MIB, workload=Workload(20, 10, 54), max_context=64
        )
    )
    assert design(resolved).plan == design(sane).plan
