"""What comes before a command's own work: mistakes that need no torch, the first line, help, version, completion."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import aspec
from aspec.cli.front.help import SECONDARY
from aspec.cli.main import app
from aspec.options import DEMO
from tests.test_explain import MACHINE

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "tokenizers")
EARLY = """
import json, sys
from typer.testing import CliRunner
from aspec.cli.main import app
made = []
for args in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, args)
    loaded = [name for name in sys.argv[2:] if name in sys.modules]
    made.append([result.exit_code, result.stdout, result.stderr, loaded])
print(json.dumps(made))
"""


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A recorded trace."""
    path = tmp_path_factory.mktemp("trace") / "run.json"
    assert run("trace", "-o", path, "-p", "x", "-n", "2", "-q").exit_code == 0
    return path


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Folders and files with a mistake each."""
    root = tmp_path_factory.mktemp("bad")
    contents = {"empty": None, "broken": "{", "nameless": "{}", "list": "[]", "deep": "[" * 100_000, "latin": "\xff"}
    for name, content in contents.items():
        (root / name).mkdir()
        if content is not None:
            (root / name / "config.json").write_bytes(content.encode("latin-1"))
    (root / "machine.json").write_text('{"disk_bytes_per_s": "fast"}')
    (root / "model.gguf").touch()
    return root


def test_mistakes_that_need_no_torch_are_told_before_it_is_imported(bad, trace):
    cases = {  # arguments -> exit code and words
        ("generate", "--target", "/no/such", "-p", "x"): (1, "was not found"),
        ("generate", "--target", f"{bad}/model.gguf", "-p", "x"): (1, "expected a GGUF file"),
        ("chat", "--target", f"{bad}/empty"): (1, "has no config.json"),
        ("plan", "--target", f"{bad}/empty"): (1, "has no config.json"),
        ("plan", "--target", f"{bad}/broken"): (1, "expected JSON"),
        ("profile", "--target", f"{bad}/nameless"): (1, "model_type"),
        ("bench", "--target", f"{bad}/list"): (1, "model_type"),
        ("plan", "--target", f"{bad}/deep"): (1, "nested too deeply"),
        ("plan", "--target", f"{bad}/latin"): (1, "expected UTF-8"),
        ("generate", "--target", str(DEMO / "target"), "--draft", "/none", "-p", "x"): (
            1,
            "draft '/none' was not found",
        ),
        ("generate", "-p", "x", "--top-p", "1.5"): (1, "top_p must be"),
        ("generate", "-p", "x", "--min-p", "-1"): (1, "min_p must be"),
        ("generate", "-p", "x", "--logprobs", "99"): (1, "logprobs must be"),
        ("chat", "--presence-penalty", "3"): (1, "presence_penalty must be"),
        ("generate", "-p", "x", "--stop", ""): (1, "stop must be"),
        ("generate", "-p", "x", "--groups", "4", "--batch-size", "2"): (1, "num_groups must be at most"),
        ("plan", "--profile", f"{bad}/machine.json"): (1, "disk_bytes_per_s must be a number"),
        ("trace", "-o", f"{bad}/t.json", "-p", "x", "--simulate", "/none.json"): (1, "cannot be read"),
        ("trace", "/none.json", "--summary"): (1, "cannot be read"),
        ("trace", f"{bad}/machine.json", "--summary"): (1, "traceEvents"),
        ("trace", str(trace), "--summary"): (0, "critical path"),
        ("generate", "-p", "x", "--device-memory", "lots"): (2, "expected a size"),
        ("generate", "-p", "x", "--device-memory", "200"): (2, "200MiB or 200GiB"),
        ("generate", "-p", "x", "--batch-size", "many"): (2, "whole number"),
        ("generate", "-f", "/none.txt"): (2, "cannot read"),
        ("--version",): (0, "aspec 0."),
        ("generate", "--help-all"): (0, "--draft-depth"),
    }
    command = [sys.executable, "-c", EARLY, json.dumps([list(args) for args in cases]), *HEAVY]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert made.returncode == 0, made.stderr
    for (args, (code, words)), (found, out, err, loaded) in zip(cases.items(), json.loads(made.stdout), strict=True):
        assert (found, loaded) == (code, []), (args, out, err)
        assert " ".join(words.split()) in re.sub(r"[\s│]+", " ", out + err), args
        assert "aspec: opening" not in err
        if code == 1:
            assert out == ""
            assert err.startswith("error: ")
            assert err.count("\n") == 1


# -- the first line --------------------------------------------------------------------------------------------


def test_the_first_line_names_the_models_and_comes_before_torch():
    code = """
import sys
from aspec.cli import main as cli
def imported(name):
    print([name for name in ("torch", "transformers") if name in sys.modules], name)
    raise SystemExit(0)
cli.import_module = imported
cli.main()
"""
    command = [sys.executable, "-c", code, "generate", "-p", "x", "--draft", "ngram"]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert made.stdout == "[] aspec.cli.generate\n"
    assert made.stderr == "aspec: opening the embedded demo pair ...\n"


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_the_first_line_is_on_stderr_and_quiet_leaves_it_out(tmp_path, command):
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    own = {"generate": ["-p", "x", "-n", "2"], "plan": ["--profile", tmp_path / "machine.json"]}[command]
    plain, quiet = run(command, "--json", *own), run(command, "--json", "-q", *own)
    assert plain.stderr.splitlines()[0] == "aspec: opening the embedded demo pair ..."
    assert "opening" not in plain.stdout + quiet.output
    for line in plain.stdout.splitlines():
        json.loads(line)


# -- the words of the command line -----------------------------------------------------------------------------


def test_a_prompt_needs_no_option():
    joined = run("generate", "import", "os", "-n", "4", "-q", "--temperature", "0")
    assert joined.exit_code == 0, joined.output
    assert joined.stdout == run("generate", "-p", "import os", "-n", "4", "-q", "--temperature", "0").stdout
    several = run("generate", "one", "-p", "two", "-n", "1", "-q", "--json")
    assert len(several.stdout.splitlines()) == 2


def test_the_version_is_one():
    assert run("--version").stdout == f"aspec {aspec.__version__}\n"
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert re.search(r'^\[tool\.hatch\.version\]\npath = "aspec/__init__\.py"$', project, re.M)


COMMANDS = sorted(typer.main.get_command(app).commands)


def options_of(command):
    """The names of each option."""
    params = typer.main.get_command(app).commands[command].params
    return [names for param in params if (names := [*param.opts, *param.secondary_opts])[0].startswith("-")]


@pytest.mark.parametrize("columns", [120, 80, 50, 20])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_whole_names_and_no_types_at_any_width(monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    short, whole = run(command, "--help").stdout, run(command, "--help-all").stdout
    for names in options_of(command):
        for name in names:
            found = re.compile(rf"(?<![\w-]){name}(?![\w-])")
            assert found.search(whole), name
            assert bool(found.search(short)) is not bool(SECONDARY.intersection(names)), name
    for kind in ("list[", "int", "str", "float", "bool", "Path", "range", "<", "…", "None"):
        assert not re.search(rf"(?<![\w]){re.escape(kind)}(?!\w)", whole), kind
    assert columns < 50 or max(map(len, whole.splitlines())) <= max(columns, 72), "an example of JSON is not broken"


def test_help_folds_what_few_runs_need():
    short, whole = (run("generate", flag).stdout.splitlines() for flag in ("--help", "--help-all"))
    assert len(short) < 90
    assert len(whole) > len(short)
    folded = [names for names in options_of("generate") if SECONDARY.intersection(names)]
    assert f"  --help-all  Show all switches; {len(folded)} more." in short


def test_the_commands_are_listed_with_a_sentence_each(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run("--help").stdout
    assert all(re.search(rf"^  {command} +[A-Z].*", text, re.M) for command in COMMANDS)
    assert "--install-completion" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [("aspec gen", {"generate"}), ("aspec ", set(COMMANDS)), ("aspec plan --prof", {"--profile"})],
)
def test_bash_completes_commands_and_switches(monkeypatch, words, expected):
    number = len(words.split(" ")) - 1
    asked = {"_ASPEC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    made = CliRunner().invoke(app, [], prog_name="aspec", env=asked)
    assert set(made.stdout.split()) == expected
