"""The throughput benchmark: what its rates count, its command line, how it meets a limit, and one run of everything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bench_batch, contest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "aspec" / "demo"
MODELS = [str(DEMO / "target"), "--draft", str(DEMO / "draft")]


def test_decoding_begins_when_every_row_has_its_first_token():
    early = [(2.0, [1]), (3.0, [2, 3]), (5.0, [4])]
    late = [(3.0, [5, 6]), (4.0, [7]), (7.0, [8])]
    record = bench_batch.rates_of(1.0, [early, late], prompt_tokens=20)
    assert record["tokens"] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (record["prefill_s"], record["prefill_tokens_per_s"]) == (2.0, 10.0)
    assert record["decode_tokens_per_s"] == 3 / 4
    assert record["whole_tokens_per_s"] == 8 / 6


def test_transformers_sends_the_prompts_first_and_then_a_token_for_each_row():
    torch = pytest.importorskip("torch")
    streamer = bench_batch.RowStreamer(2)
    streamer.put(torch.tensor([[0, 1, 2], [3, 4, 5]]))
    streamer.put(torch.tensor([6, 7]))
    streamer.put(torch.tensor([8, 9]))
    assert [[tokens for _, tokens in row] for row in streamer.arrivals] == [[[6], [8]], [[7], [9]]]


def test_prompts_are_many_lengths_and_all_different():
    prompts = bench_batch.make_prompts(str(DEMO / "target"), 64)
    assert len({tuple(prompt) for prompt in prompts}) == 64
    assert len({len(prompt) for prompt in prompts}) > 30
    assert all(bench_batch.SHORTEST <= len(prompt) <= 64 for prompt in prompts)
    assert bench_batch.make_prompts(str(DEMO / "target"), 8) == prompts[:8]


def test_rows_of_aspec_take_engine_options():
    more = ["--engine", "two", "speculation=chain", "num_draft_tokens=2", "--set", "exact=false", "threads=1"]
    options = bench_batch.parse_options([*MODELS, *more, "--only", "two", "aspec, off", "accelerate"])
    rows = {name: options.contenders[name].engine for name in options.only}
    assert rows == {
        "two": {"exact": False, "threads": 1, "speculation": "chain", "num_draft_tokens": 2},
        "aspec, off": {"exact": False, "threads": 1, "speculation": "off", "max_batch": 64},
        "accelerate": None,
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--set", "nonsense=1"], "'nonsense=1' is no KEY=VALUE"),
        (["--engine", "two", "threads"], "'threads' is no KEY=VALUE"),
        (["--only", "vllm"], "['vllm']"),
        (["--peer-tokens", "1"], "fewer than 2 tokens"),
    ],
)
def test_refuses_what_it_does_not_know(wrong, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_batch.parse_options([*MODELS, *wrong])
    assert said in capsys.readouterr().err


def test_memory_is_what_the_weights_and_the_plan_need():
    given = bench_batch.parse_options([*MODELS, "--rows", "2", "--weight-memory", "10MiB"])
    two = bench_batch.choose_sizes(given, max_context=80)
    given.rows = 8
    eight = bench_batch.choose_sizes(given, max_context=80)
    assert two.device_memory > 10 << 20
    kv = 6 * 81 * 8 * 2 * 4 * 32 * 2  # rows, tokens, layers, keys and values, heads, their size, bytes: the target's
    assert eight.device_memory - two.device_memory > kv
    assert two.memory_limit - two.device_memory == given.process_memory
    assert two.memory_limit - two.offload_memory > bench_batch.PEER_BYTES


def outcome(fits: int):
    """A stand-in for a child that the limit kills with more rows than ``fits``."""

    def run(script, job, *_):
        died = {"failure": "killed", "limit_kills": 1} if len(job.prompts) > fits else {"seconds": 1.0}
        return {"contender": job.contender, **died}

    return run


@pytest.mark.parametrize(("engine", "tried"), [(None, [8, 4, 2]), ({}, [8])], ids=["transformers", "aspec"])
def test_a_batch_that_the_limit_kills_is_halved_until_it_lives(monkeypatch, engine, tried):
    monkeypatch.setattr(contest, "run_child", outcome(fits=3))
    options = bench_batch.parse_options(MODELS)
    name = "accelerate" if engine is None else "aspec"
    job = bench_batch.Job(contender=name, target="", draft="", prompts=[[1]] * 8, tokens=4, engine=engine)
    rows: dict[str, int] = {}
    records = list(bench_batch.run_fitting(options, job, 1, rows))
    assert [record["rows"] for record in records] == tried
    assert [record["tried"] for record in records] == [True] * (len(tried) - 1) + [False]
    if engine is None:
        again = list(bench_batch.run_fitting(options, job, 1, rows))
        assert [record["rows"] for record in again] == [2]


def test_a_child_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "DROP_CACHES", tmp_path / "no" / "such")  # spare the machine's cache
    script = tmp_path / "slow.py"
    script.write_text("import time\ntime.sleep(60)\n")
    record = contest.run_child(str(script), contest.Task(contender="slow", target=str(tmp_path)), None, timeout_s=0.5)
    assert record == {"contender": "slow", "failure": "not done after 0.5 s"}


@pytest.mark.slow
def test_every_contender_runs_and_gives_the_same_tokens(tmp_path):
    pytest.importorskip("accelerate")
    file = tmp_path / "batch.json"
    sizes = ["--rows", "3", "--tokens", "4", "--peer-tokens", "3", "--rounds", "1", "--no-limit"]
    sizes += ["--weight-memory", "10MiB", "--offload-memory", "10MB", "--check-rows", "2", "--check-tokens", "3"]
    more = ["--engine", "two", "speculation=chain", "num_draft_tokens=2", "--json", str(file)]
    subprocess.run([sys.executable, "tools/bench_batch.py", *MODELS, *sizes, *more], check=True, cwd=ROOT, timeout=600)
    found = json.loads(file.read_text())
    names = [*bench_batch.CONTENDERS, "two"]
    assert found["same_tokens"] == dict.fromkeys(names, True)
    assert list(found["summary"]) == names
    assert all(row["runs"] == 1 and row["decode_tokens_per_s"]["median"] > 0 for row in found["summary"].values())
    timed = {record["contender"]: record for record in found["runs"] if record["stage"] == "round 0"}
    assert [len(row) for row in timed["two"]["tokens"]] == [4, 4, 4]
    assert [len(row) for row in timed["accelerate"]["tokens"]] == [3, 3, 3]
    assert timed["aspec"]["streamed_bytes_per_pass"] > 0
