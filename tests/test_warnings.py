"""No generation uses what transformers or torch will take away; and where a library warns, how a command shows it."""

import functools
import json
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import aspec.models.probing.layers
from aspec.cli.main import app
from aspec.errors import InternalError
from aspec.models.probing.layers import examine
from aspec.models.skeleton import load_config
from aspec.options import DEMO

pytestmark = pytest.mark.compat
GOING = (FutureWarning, DeprecationWarning)
LIBRARIES = r"(aspec|tests|torch|transformers)(\.|$)"  # a library may blame the caller
KINDS = {
    "plain": ["--speculation", "off"],
    "chain": ["--speculation", "chain", "--draft-budget", "3"],
    "tree": ["--speculation", "tree", "--draft-budget", "5"],
    "split attention": ["--attention", "cpu"],
}
SMALL = ["-n", "6", "--threads", "1"]
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture
def strict():
    """Warnings of what will be taken away are errors."""
    with warnings.catch_warnings():
        for category in GOING:
            warnings.filterwarnings("error", category=category, module=LIBRARIES)
        yield


@pytest.fixture
def chatty(tmp_path):
    """The demo's target with a chat template."""
    folder = tmp_path / "target"
    folder.mkdir()
    for file in (DEMO / "target").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return ["--target", str(folder), "--draft", str(DEMO / "draft")]


def succeed(*args, stdin=None):
    """What a command wrote, which is no warning."""
    made = CliRunner().invoke(app, [*args, *SMALL], input=stdin)
    assert made.exit_code == 0, made.output
    assert "warning:" not in made.stderr
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_is_without_a_warning(strict, kind):
    assert succeed("generate", "-p", "import os\n", *KINDS[kind]).stdout


def test_a_chat_is_without_a_warning(strict, chatty):
    assert succeed("chat", *chatty, stdin="import os\nimport sys\n").stdout


def test_a_batch_is_without_a_warning(strict, chatty, tmp_path):
    bodies = {
        "/v1/completions": {"prompt": "import os\n"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "import os"}]},
    }
    rows = [{"custom_id": url, "method": "POST", "url": url, "body": body} for url, body in bodies.items()]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    succeed("batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *chatty)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {answer["custom_id"]: answer["response"]["status_code"] for answer in answers} == dict.fromkeys(bodies, 200)


WARNS = """
import logging, warnings
from aspec.cli import main as cli
from aspec.generation.text import tokenizer as text

def decode(self, tokens, own=text.Tokenizer.decode):
    warnings.warn("a name\\n  is going", FutureWarning, stacklevel=1)
    logging.getLogger("transformers.cache_utils").warning("another %s is going", "name")
    return own(self, tokens)

text.Tokenizer.decode = decode
cli.main()
"""


def test_a_warning_in_the_midst_of_an_answer_is_shown_once_after_it():
    command = [sys.executable, "-W", "always::FutureWarning", "-c", WARNS, "generate", "-p", "import os\n"]
    made = subprocess.run([*command, *SMALL], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert made.returncode == 0, made.stdout
    *before, first, second = made.stdout.splitlines()
    assert [first, second] == ["warning: FutureWarning: a name is going", "warning: another name is going"]
    assert "going" not in "".join(before)
    assert any(line.strip() for line in before), "the answer"


@pytest.fixture
def deprecated(monkeypatch):
    """Every call of the model's forward warns."""
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def warned(*args, **kwargs):
        warnings.warn("a name is going", FutureWarning, stacklevel=1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", warned)


def test_a_chat_shows_a_warning_after_the_first_answer(deprecated, chatty):
    made = CliRunner().invoke(app, ["chat", *chatty, *SMALL, "-n", "30"], input="import os\nimport sys\n")
    assert made.exit_code == 0, made.output
    first, second = made.output.split("warning: FutureWarning: a name is going\n")
    assert first.splitlines()[-1].strip()
    assert second.strip()


def test_a_warning_that_is_an_error_is_not_an_unsupported_family(strict, deprecated):
    made = CliRunner().invoke(app, ["generate", "-q", "-p", "import os\n", *SMALL])
    assert made.exit_code == 1
    assert "turned into an error" in made.stderr
    assert "FutureWarning: a name is going" in made.stderr
    assert "not supported" not in made.stderr
    with pytest.raises(FutureWarning, match="a name is going"):
        examine(load_config(DEMO / "target"), torch.float32)


def test_a_fault_of_the_probe_is_not_an_unsupported_family(monkeypatch):
    monkeypatch.setattr(aspec.models.probing.layers, "rule_of", lambda value: value.no_such_name)
    with pytest.raises(InternalError, match=r"the probe of llama has failed: AttributeError.*no_such_name"):
        examine(load_config(DEMO / "target"), torch.float32)
