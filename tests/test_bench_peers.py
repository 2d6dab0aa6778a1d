"""The benchmark beside the alternatives: its table's arithmetic, and one run of everything on the demo pair."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bench_peers, contest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "aspec" / "demo"


def run(contender: str, stage: str, speed: float | None, **more) -> dict:
    """A record as a child leaves it; without a speed it died."""
    outcome = {"failure": "exit code -9"} if speed is None else {"whole_tokens_per_s": speed}
    return {"contender": contender, "stage": stage, **outcome, **more}


def test_ratios_pair_runs_of_the_same_round():
    records = [run("aspec", "round 0", 4.0), run("aspec", "round 1", 6.0), run("accelerate", "round 0", None)]
    records += [run("accelerate", "round 1", 2.0), run("aspec", "fp32", 100.0)]
    rows = bench_peers.summarise(records)
    assert rows["aspec"]["whole_tokens_per_s"] == {"median": 5.0, "min": 4.0, "max": 6.0}
    assert rows["accelerate"]["ratio"] == {"median": 3.0, "min": 3.0, "max": 3.0}
    assert (rows["accelerate"]["runs"], rows["accelerate"]["failed"]) == (1, 1)


def test_the_better_assistant_counts():
    default, five = bench_peers.ASSISTED
    rows = bench_peers.summarise(
        [run("aspec", "round 0", 6.0), run(default, "round 0", 1.0), run(five, "round 0", 3.0)]
    )
    assert rows[bench_peers.BEST_ASSISTED] == rows[five]
    assert rows[five]["ratio"]["median"] == 2.0


def test_a_contender_that_always_dies_stays_in_the_table():
    rows = bench_peers.summarise([run("accelerate", "round 0", None)])
    assert rows["accelerate"]["whole_tokens_per_s"] is None
    assert bench_peers.table(rows).splitlines()[-1] == "| accelerate | - | - | - | - | - | - | 0, 1 failed |"


def test_decoding_leaves_out_the_prompt_and_the_first_arrival():
    arrivals = bench_peers.Arrivals(seconds=[10.0, 12.0, 13.0, 14.0], tokens=[[1, 2], [3, 4], [5], [6, 7, 8]])
    record = bench_peers.summed([(6.0, arrivals)])
    assert record["tokens"] == [[3, 4, 5, 6, 7, 8]]
    assert record["whole_tokens_per_s"] == 1.0
    assert record["decode_tokens_per_s"] == 2.0
    assert record["decode_tokens_per_pass"] == 2.0


@pytest.mark.parametrize(
    ("tokens", "same"),
    [([[1, 2]], True), ([[1, 3]], False), (None, False)],
    ids=["equal", "different", "died"],
)
def test_tokens_are_compared_with_the_reference_in_memory(tokens, same):
    known = {} if tokens is None else {"tokens": tokens}
    records = [run("aspec", "fp32", 1.0, **known), run("in memory", "fp32", 1.0, tokens=[[1, 2]])]
    assert bench_peers.same_tokens(records) == {"aspec": same, "in memory": True}


def test_a_child_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "DROP_CACHES", tmp_path / "no" / "such")  # spare the machine's cache
    job = bench_peers.Job(
        contender="in memory", target=str(tmp_path / "nothing"), draft=str(tmp_path), prompts=["a"], tokens=1
    )
    record = bench_peers.run_child(job, limit=None)
    assert record["contender"] == "in memory"
    assert record["failure"].startswith("exit code 1\n")


@pytest.mark.slow
def test_every_contender_runs_and_gives_the_same_tokens(tmp_path):
    pytest.importorskip("accelerate")
    file = tmp_path / "peers.json"
    command = [sys.executable, "tools/bench_peers.py", DEMO / "target", "--draft", DEMO / "draft", "--json", file]
    sizes = ["--tokens", "4", "--rounds", "1", "--no-limit", "--device-memory", "14MiB", "--offload-memory", "10MB"]
    subprocess.run([*map(str, command), *sizes], check=True, cwd=ROOT, timeout=600)
    found = json.loads(file.read_text())
    assert found["same_tokens"] == dict.fromkeys(bench_peers.CONTENDERS, True)
    assert found["summary"].keys() == {*bench_peers.CONTENDERS, bench_peers.BEST_ASSISTED}
    assert all(row["runs"] == 1 and row["ratio"]["median"] > 0 for row in found["summary"].values())
    assert {"cpu", "cores", "torch", "transformers", "accelerate", "memory_limit", "commit"} <= found["machine"].keys()
    timed = [record for record in found["runs"] if record["stage"] == "round 0"]
    assert all(len(record["tokens"][0]) == 4 for record in timed)
    assert timed[0]["facts"]["ceiling_fraction"] > 0
