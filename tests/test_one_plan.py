"""One planner, one answer: the plan that `aspec plan` shows is the plan that runs, for the same options and work."""

import json

import pytest
import torch
from typer.testing import CliRunner

from aspec.backends import registry as devices
from aspec.backends.registry import Kind
from aspec.cli import batch
from aspec.cli import generate as generation
from aspec.cli.flags.commands import BatchFlags, ChatFlags, GenerateFlags
from aspec.cli.flags.groups import AUTO
from aspec.cli.flags.planning import PlanFlags
from aspec.cli.main import app
from aspec.cli.plan import explain
from aspec.engine.design import design
from aspec.observe.console import Console
from aspec.planning import resolve as resolving
from aspec.planning import workload as planning
from aspec.planning.resolve import resolve
from aspec.serving.batch_input import BatchFile
from aspec.serving.openai_requests import COMPLETION
from tests import tiny
from tests.test_inputs import CARD, HOST

KIB, MIB = 1 << 10, 1 << 20
OPEN = {"max_batch": AUTO, "num_groups": AUTO, "num_draft_tokens": AUTO, "draft_depth": AUTO}
CASES = {
    "all fits": (1, 40, 24, {"device_memory": 64 * MIB}),
    "a draft, all fits": (1, 40, 24, {"device_memory": 64 * MIB, "draft": "model"}),
    "half streams": (1, 40, 24, {"device_memory": 1600 * KIB}),
    "half streams, a draft": (1, 40, 24, {"device_memory": 4 * MIB, "draft": "model"}),
    "half streams, a lookup": (1, 40, 24, {"device_memory": 2 * MIB, "draft": "ngram"}),
    "no more than the least": (1, 40, 24, {"device_memory": 2620 * KIB, "draft": "model", "speculation": "tree"}),
    "not exact": (3, 20, 24, {"device_memory": 4 * MIB, "draft": "model", "exact": False}),
    "a context": (1, 10, 12, {"device_memory": 4 * MIB, "max_context": 200}),
    "rows and groups are given": (6, 10, 12, {"draft": "model", "max_batch": 4, "num_groups": 2}),
    "eight prompts": (8, 10, 12, {"device_memory": 4 * MIB, "draft": "model"}),
    "twelve prompts": (12, 10, 12, {"device_memory": 4 * MIB, "draft": "model"}),
    "chains of a given length": (2, 10, 12, {"draft": "model", "speculation": "chain", "num_draft_tokens": 3}),
    "sampled": (2, 10, 12, {"device_memory": 4 * MIB, "draft": "model", "temperature": 0.7}),
    "whatever is free": (1, 10, 12, {"draft": "model"}),
    "a device": (2, 10, 12, {"device_memory": 4 * MIB, "draft": "model", "device": "cuda"}),
}


SIZES = {"hidden_size": 128, "num_hidden_layers": 8, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    target = tiny.build(folder / "target", "llama", sizes=SIZES)
    return target, tiny.noisy_copy(tiny.build(folder / "small", "llama"), folder / "draft", 0.1)


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch):
    """The same figures for every command: neither the measured machine nor its free memory changes in between."""
    kind = Kind(torch.device("cpu"), lambda: True, lambda: 8 * MIB, lambda: pytest.fail("opened"), lambda: "a card")
    monkeypatch.setitem(devices.KINDS, "cuda", kind)
    monkeypatch.setattr(resolving, "available_bytes", lambda: 1 << 30)
    monkeypatch.setattr(planning, "machine_profile", lambda *_, kind, **__: HOST if kind is None else CARD)


def given(pair, case):
    """The flags that plan, generate and batch share, with the models of the pair."""
    prompts, tokens, new, flags = CASES[case]
    draft = pair[1] if flags.get("draft") == "model" else flags.get("draft")
    return (
        prompts,
        tokens,
        new,
        OPEN | {"temperature": 0.0, "device": "cpu"} | flags | {"target": pair[0], "draft": draft},
    )


def shown(pair, case, **more):
    prompts, tokens, new, flags = given(pair, case)
    flags = PlanFlags(num_prompts=prompts, prompt_tokens=tokens, new_tokens=new, **flags | more)
    return explain(flags).search.best.plan


@pytest.mark.parametrize("case", CASES)
def test_generate_runs_the_plan_that_is_shown(pair, case):
    prompts, tokens, new, flags = given(pair, case)
    flags = GenerateFlags(max_new_tokens=new, **flags)
    job = generation.prepare(flags, ["a" * tokens] * prompts, Console(quiet=True))
    assert design(job.resolved).plan == shown(pair, case)


@pytest.mark.parametrize("case", ["half streams, a draft", "eight prompts", "rows and groups are given"])
def test_batch_runs_the_plan_that_is_shown(pair, case, tmp_path):
    prompts, tokens, new, flags = given(pair, case)
    body = {"prompt": "a" * tokens}
    rows = [{"custom_id": str(i), "method": "POST", "url": COMPLETION, "body": body} for i in range(prompts)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = BatchFlags(input=source, output=tmp_path / "out.jsonl", max_new_tokens=new, **flags)
    with BatchFile(source) as file:
        job = batch.prepare(flags, file, Console(quiet=True))
        assert design(job.resolved).plan == shown(pair, case, exact=True)  # also where plan and generate would not be


def test_a_chat_runs_the_plan_of_its_usual_turns(pair):
    flags = {"target": pair[0], "device": "cpu", "device_memory": 32 * MIB, "temperature": 0.0, **OPEN}
    turns = PlanFlags(prompt_tokens=256, new_tokens=256, max_context=4096, **flags)
    chat = ChatFlags(**{name: value for name, value in flags.items() if name not in ("max_batch", "num_groups")})
    ran = design(resolve(chat.options())).plan
    assert ran == explain(turns).search.best.plan
    assert ran.num_rows == 1
    assert ran.streamed


def test_the_json_of_generate_holds_the_plan_that_ran(pair):
    flags = ["--target", str(pair[0]), "--device-memory", "1600KiB", "--device", "cpu", "--temperature", "0", "--json"]
    ran = CliRunner().invoke(app, ["generate", *flags, "-p", "a" * 40, "-n", "24", "--threads", "1"])
    foretold = CliRunner().invoke(app, ["plan", *flags, "--prompt-tokens", "40", "--new-tokens", "24"])
    assert ran.exit_code == foretold.exit_code == 0, ran.output + foretold.output
    foretold = json.loads(foretold.stdout)["plans"][0]
    del foretold["forecast"]
    assert json.loads(ran.stdout)["plan"] == foretold
    assert foretold["bytes_by_tier"]["disk"] > 0
