"""The README's table of families is what ``tools/families.py`` found; a few types are run again here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import families, family_configs

ROOT = Path(__file__).parent.parent
RESULTS = families.read(families.RESULTS)
QUICK = ["gpt2:pad", "musicgen"]
MORE = [
    "biogpt",
    "gemma4_unified_text",
    "granitemoehybrid:attention",
    "mistral4",
    "llama4",
    "qwen3_vl",
    "gemma4",
    "mpt",
]


def test_the_readme_has_the_table_that_was_found():
    assert families.table(RESULTS) in (ROOT / "README.md").read_text()


def test_every_type_has_a_result_and_no_token_differs():
    assert not family_configs.all_types().keys() - RESULTS.keys()
    assert not [row for row in RESULTS.values() if row["verdict"] not in families.VERDICTS]
    assert not [row for row in RESULTS.values() if row["verdict"] in ("differs", "failed")]


def test_a_refusal_is_one_reason_of_its_own():
    for row in RESULTS.values():
        if row["verdict"] == "refused":
            assert 0 < len(row["reason"]) < 500, row
            assert not re.search(r"exchange more than|Traceback|/tmp", row["reason"]), row


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_type_runs_as_the_results_say(name, tmp_path):
    found, reason = families.outcome(name, tmp_path)
    assert found == RESULTS[name]["verdict"], reason
    assert found != "refused" or reason == RESULTS[name]["reason"]


def test_results_are_kept_as_they_come(tmp_path):
    rows = {name: dict(zip(families.COLUMNS, (name, "text", "equal", "off"), strict=True)) for name in ("b", "a")}
    families.write(tmp_path / "found.tsv", rows)
    assert families.read(tmp_path / "found.tsv") == rows
    assert families.read(tmp_path / "none.tsv") == {}


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_stopped(tmp_path):
    path = tmp_path / "found.tsv"
    command = [sys.executable, "tools/families.py", "--results", str(path), "--jobs", "2"]
    first = subprocess.run([*command, "mpt", "bart"], capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stderr
    assert set(families.read(path)) == {"mpt", "bart"}
    assert first.stdout.splitlines()[-1] == "2 refused"
    again = subprocess.run([*command, "--seconds", "0"], capture_output=True, text=True, cwd=ROOT)
    assert set(families.read(path)) >= {"mpt", "bart"}
    assert "mpt" not in again.stdout
