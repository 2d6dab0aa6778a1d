"""resolve(): local folders, and a fake hub on this machine; every failure is one paragraph with a remedy."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import aspec
from aspec.cli.main import app
from aspec.errors import CheckpointError
from aspec.io.fetching.fetch import Fetches
from aspec.io.fetching.process import explain
from aspec.io.hub import resolve
from aspec.plan import Workload
from aspec.profiling.hardware import Hardware
from tests import fake_hub, tiny
from tests.fake_hub import WANTED, surroundings, url

RESOLVE = """
import json, sys
from aspec.errors import CheckpointError
from aspec.io.fetching.fetch import Fetches
from aspec.io.fetching.process import explain
from aspec.io.hub import resolve
results = {}
weights = sys.argv.pop(1) == "weights"
for name in sys.argv[1:]:
    try:
        results[name] = str(resolve(name, what="target", weights=weights))
    except CheckpointError as error:
        results[name] = [str(error)]
print(json.dumps(results))
"""


@pytest.fixture
def hub():
    with fake_hub.serve() as server:
        yield server


def ask(home: Path, *names: str, weights: bool = True, **environment: str) -> tuple[dict, str]:
    """What resolve says in a process of its own, where the environment counts; and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, "weights" if weights else "headers", *names],
        env=surroundings(home, **environment),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("org/model", what="target") == Path("org/model")
    assert resolve(str(tmp_path / "org"), what="target") == tmp_path / "org"
    assert resolve("~/org", what="target") == tmp_path / "org"


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "nothing-here",
        "org/x@",
        "org/x@a b",
        "org/x@/etc",
        "org/x@main/../../..",
        "org/x@-f",
        "@main",
        "x@main",
        "./org/model",
        "../x/y",
        "/no/such",
        "~/no",
        "a/b/c",
        "a b/c",
        "org/",
        "-x/y",
    ],
)
def test_what_is_neither_path_nor_id_is_refused_without_a_request(name):
    with pytest.raises(CheckpointError, match=r"draft .* was not found: expected .* Check the path\."):
        resolve(name, what="draft")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is a file: expected a folder .* Give the file's folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_snapshot_holds_what_is_needed_and_serves_offline(tmp_path, hub):
    answers, stderr = ask(tmp_path, "org/good", endpoint=url(hub))
    folder = Path(answers["org/good"])
    assert folder.is_relative_to(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == WANTED
    assert stderr.startswith("aspec: fetched 0 B of ")
    fetched = len(hub.seen)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask(tmp_path, "org/good", endpoint=url(hub), **offline)[0] == answers
    assert len(hub.seen) == fetched
    assert ask(tmp_path, "org/good")[0] == answers  # no network: what is cached serves
    (folder / "model-00002-of-00002.safetensors").unlink()
    refusals = ask(tmp_path, "org/good", "org/other", **offline)[0]
    for name, (message,) in refusals.items():
        assert f"target '{name}' is not a local folder, is not (or only in part) in the local hub cache" in message
        assert "Fetch it with a network" in message


def test_every_refusal_is_one_paragraph_with_a_remedy(tmp_path, hub):
    expected = {
        "org/gated": ("is gated", "HF_TOKEN"),
        "org/missing": ("neither a local folder nor a model on the hub", "Check the spelling"),
        "org/private": ("neither a local folder nor a model on the hub", "HF_TOKEN"),
        "org/down": ("hub cannot be reached", "local folder"),
        "org/pickled": ("no weights that can be read", "found config.json"),
        "org/nothing": ("no weights that can be read", "found nothing"),
        "org/a--b": ("could not be fetched", "HFValidationError"),
    }
    answers, _ = ask(tmp_path, *expected, endpoint=url(hub))
    for name, parts in expected.items():
        (message,) = answers[name]
        assert message.startswith(f"target '{name}' ")
        assert all(part in message for part in parts), message
        assert "\n" not in message


def test_a_token_opens_a_private_model(tmp_path, hub):
    answers, _ = ask(tmp_path, "org/private", endpoint=url(hub), HF_TOKEN="hf_secret")
    assert {path.name for path in Path(answers["org/private"]).iterdir()} == set(WANTED)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, hub):
    (tmp_path / "hub").write_text("a file where the cache should be")
    ((message,),) = ask(tmp_path, "org/good", endpoint=url(hub))[0].values()
    assert "org/good" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("ENOSPC", r"does not fit on the disk .* HF_HOME"),
        ("EACCES", r"/cache may not be written\. Set HF_HOME"),
    ],
)
def test_a_disk_that_refuses_is_explained(number, expected):
    assert re.search(expected, explain(OSError(getattr(errno, number), "refused", "/cache")))


# -- once per model --------------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A hub of two models; the names that were asked for, one entry per question."""
    target = tiny.build(tmp_path / "target", "llama")
    (target / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    folders = {"org/big": target, "org/small": tiny.noisy_copy(target, tmp_path / "draft", 0.1)}
    asked = []

    def count(_, wanted, *, weights):
        assert weights
        asked.append(str(wanted))
        return folders[str(wanted)]

    monkeypatch.setattr(Fetches, "fetch", count)
    return asked


async def test_an_engine_asks_the_hub_once_for_each_model(counted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = Workload(2, 4, 4)  # a plan that is searched for needs the folders too
    options = dict(target="org/big", draft="org/small", threads=1, max_context=64, num_groups=1, workload=work)
    monkeypatch.setattr("aspec.planning.workload.machine_profile", lambda *_, **__: Hardware())
    async with aspec.open_engine(**options) as engine:
        assert engine.plan.num_rows
    assert sorted(counted) == ["org/big", "org/small"]


@pytest.mark.parametrize("command", ["generate", "chat", "batch"])
def test_a_command_asks_the_hub_once_for_each_model(counted, tmp_path, monkeypatch, command):
    monkeypatch.setattr("aspec.planning.workload.machine_profile", lambda *_, **__: Hardware())
    body = {"prompt": "hello", "max_tokens": 2}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    own = {
        "generate": ["-p", "hello", "-n", 2],
        "chat": ["-n", 2],
        "batch": ["-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl"],
    }
    models = ["--target", "org/big", "--draft", "org/small", "--threads", 1, "--ignore-eos", "--quiet"]
    result = CliRunner().invoke(app, [command, *map(str, (*own[command], *models))], input="hello\n")
    assert result.exit_code == 0, result.output
    assert sorted(counted) == ["org/big", "org/small"]
