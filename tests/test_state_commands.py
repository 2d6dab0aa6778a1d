"""Recurrent families in the commands: verified runs, groups of rows and talks of two turns, with masked drafts.

One family of a kind of recurrent layer; the layers of every family are checked in test_state.py, and engines with other
families of these kinds in test_same_tokens.py.
"""

import json

import pytest
from typer.testing import CliRunner

from aspec.cli.main import app
from tests.test_chat import TEMPLATE
from tests.test_equality import Pair

pytestmark = pytest.mark.slow

FAMILIES = ["granite_h", "jamba", "kimi_linear", "lfm2", "minimax", "qwen3_next"]
DRAFTS = (["--speculation", "chain"], ["--speculation", "tree"], ["--speculation", "tree", "--groups", 2])


def run(name, *args, stdin=""):
    made = CliRunner().invoke(app, [name, *map(str, args)], input=stdin)
    assert made.exit_code == 0, made.stderr
    return made.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_changes_no_text(family, tmp_path):
    pair = Pair(tmp_path, family, cached=False)
    pair.find_draft()
    (pair.target / "chat_template.jinja").write_text(TEMPLATE)
    small = ["--device-memory", "16MiB", "--threads", 1, "--max-context", 128, "--ignore-eos"]
    common = ["--target", pair.target, *small, "--exact", "-q"]
    prompts = ["-p", "hello", "-p", "oh no, no", "-n", 16, "--raw", "--json"]
    lines = "hello\nand now?\n"
    for temperature, shapes in ((0, DRAFTS[:1]), (0.8, DRAFTS[1:])):
        draws = ["--temperature", temperature]
        plain = [json.loads(line)["token_ids"] for line in run("generate", *common, *prompts, *draws).splitlines()]
        talk = run("chat", *common, "-n", 12, *draws, stdin=lines)
        for shape in shapes:
            own = [*common, "--draft", pair.draft, *shape, *draws]
            found = [json.loads(line) for line in run("generate", *own, *prompts, "--verify").splitlines()]
            assert [one["token_ids"] for one in found] == plain
            assert all(one["verified"]["equal"] for one in found)
            if "--groups" not in shape:
                assert run("chat", *own, "-n", 12, stdin=lines) == talk
