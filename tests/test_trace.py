"""``aspec trace`` and ``aspec bench``: what they write, print and refuse; a trace agrees with its own run."""

import json
import os
import signal

import pytest
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.observe.timeline import decode_stretch
from aspec.observe.trace_reading import read_trace
from aspec.planning import simulation
from aspec.profiling.hardware import read_machine
from tests import tiny
from tests.fork_server import Command
from tests.trace_rules import check_trace, load

FEW = ["--device-memory", "2250KiB", "--speculation", "tree", "--threads", "1", "-p", "hello", "-n", "24"]
SMALL = [*FEW, "--ignore-eos"]
STREAMED = ["--draft-budget", "4", "--device-memory", "1850KiB"]
TASKS = {"layer_s": 1e-3, "draft_s": 5e-4, "acceptance": 0.7}
PROFILE = {"disk_bytes_per_s": 1e9, "tasks": TASKS}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("trace") / "target", "llama")
    return ["--target", str(target), "--draft", str(tiny.noisy_copy(target, target.parent / "draft", 0.1))]


def run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(PROFILE))
    return path


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_a_recorded_run_agrees_with_its_own_statistics(pair, tmp_path, name):
    result = run("trace", "-o", tmp_path / name, *pair, *SMALL, *STREAMED, "--json")
    assert result.exit_code == 0, result.output
    stats = json.loads(result.stdout)["stats"]
    check_trace(load(tmp_path / name))
    timeline = read_trace(tmp_path / name)["aspec"]
    start, stop = decode_stretch(timeline)
    assert len(timeline.rounds) - 1 == stats["passes"]
    assert sum(r.tokens for r in timeline.rounds) == 24
    assert sum(r.accepted for r in timeline.rounds) == pytest.approx(
        stats["acceptance_rate"] * sum(r.proposed for r in timeline.rounds)
    )
    assert stop - start == pytest.approx(stats["decode_s"], rel=0.01)
    reads = timeline.lane("disk")
    landed = sum(s.nbytes for s in reads if start < s.stop_s <= stop)
    one = 2 * max(s.nbytes for s in reads) / stats["decode_s"]  # at each end a read may land while its round is counted
    assert landed / stats["decode_s"] == pytest.approx(stats["stream_bytes_per_s"], abs=one)
    assert timeline.facts["bytes_per_pass"] > 0
    assert timeline.facts["started_ns"] > 1.7e18


def test_a_trace_is_read_back_in_words(pair, tmp_path):
    path = tmp_path / "run.json.gz"
    assert run("trace", "-o", path, *pair, *SMALL, "-q").exit_code == 0
    text = run("trace", path, "--summary").stdout
    for word in ("tokens/s", "tokens per pass", "disk", "target", "overlap:", "critical path:", "-bound"):
        assert word in text, text
    data = json.loads(run("trace", path, "--summary", "--json").stdout)["aspec"]
    assert data["tokens"] == 24
    assert 0 <= data["hidden"] <= 1
    assert set(data["lanes"]) == {"disk", "target", "draft", "cpu"}


def test_a_simulated_run_reads_no_weight(pair, tmp_path, profile):
    for copy_rate in (None, 20e9):
        profile.write_text(json.dumps({**PROFILE, "h2d_bytes_per_s": copy_rate}))
        out = tmp_path / "sim.json"
        result = run("trace", "-o", out, "--simulate", profile, *pair, *SMALL, "--summary")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("aspec simulated:")
        check_trace(load(out))
        timeline = read_trace(out)["aspec simulated"]
        assert ("h2d" in timeline.lanes) == (copy_rate is not None)
        assert sum(r.tokens for r in timeline.rounds) == 24


def test_the_same_simulation_gives_the_same_bytes(pair, tmp_path, profile):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        assert run("trace", "-o", file, "--simulate", profile, *pair, *SMALL, "-q").exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_real_and_simulated_side_by_side(pair, tmp_path, profile):
    for extra in ([], ["--simulate", profile]):
        out = tmp_path / "both.json"
        result = run("trace", "-o", out, "--compare", *extra, *pair, *SMALL)
        assert result.exit_code == 0, result.output
        assert "simulated" in result.stderr
        check_trace(load(out))
        assert list(read_trace(out)) == ["aspec", "aspec simulated"]


def test_the_last_spans_are_kept_where_a_trace_is_capped(pair, tmp_path):
    out = tmp_path / "run.json"
    assert run("trace", "-o", out, "--max-spans", 50, *pair, *SMALL, "-q").exit_code == 0
    check_trace(load(out))
    assert len(read_trace(out)["aspec"].slices) == 50


def test_a_run_that_is_stopped_leaves_its_trace(pair, tmp_path):
    out = tmp_path / "run.json"
    slow = [*pair, *SMALL, "-n", "200", "--num-draft-tokens", "0", "--link-rate", "5MB/s"]
    process = Command(["trace", "-o", out, *slow])
    assert os.read(process.stdout.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert b"its recorded part is in" in errors
    check_trace(load(out))
    assert read_trace(out)["aspec"].rounds


@pytest.mark.parametrize(
    "args",
    [[], ["FILE"], ["FILE", "--summary", "-o", "x.json"], ["-o", "x.json", "--max-spans", "0"]],
    ids=["no file", "no summary", "both", "no spans"],
)
def test_usage_errors_exit_with_2(tmp_path, args):
    assert run("trace", *(str(tmp_path / a) if a.endswith(("FILE", "json")) else a for a in args)).exit_code == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("{", "is not a machine profile: expected JSON"),
        ("[]", "JSON object"),
        ('{"disk": 1}', "unknown field 'disk'"),
        ('{"layer_s": 1}', "unknown field 'layer_s' (of tasks)"),
        ('{"tasks": {"layer": 1}}', "unknown field 'tasks.layer'"),
        ('{"tasks": {"layer_s": "fast"}}', "tasks.layer_s must be a number"),
        ('{"tasks": {"layer_s": -1}}', "tasks.layer_s must be a number from 0 up"),
        ('{"tasks": {"acceptance": 2}}', "tasks.acceptance must be a number from 0 to 1"),
        ('{"h2d_bytes_per_s": 1e10}', "needs a device"),
        ('{"disk_bytes_per_s": 0}', "above 0"),
    ],
)
def test_a_bad_profile_is_one_paragraph(pair, tmp_path, content, expected):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    result = run("trace", "-o", tmp_path / "x.json", "--simulate", path, *pair, *SMALL)
    assert result.exit_code == 1
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_a_file_that_cannot_be_written_is_refused_before_the_run(pair, tmp_path):
    result = run("trace", "-o", tmp_path / "none" / "x.json", *pair, *SMALL)
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert result.stdout == ""
    result = run("trace", tmp_path / "none.json", "--summary")
    assert result.exit_code == 1
    assert "cannot be read" in result.stderr


@pytest.fixture(autouse=True, scope="module")
def fitted_roughly():
    """What ``bench`` remembers of a pair is not asked for here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "FIT_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def benched(pair):
    """One object, on standard output."""
    return run("bench", *pair, *FEW, "--rounds", 1, "--json", "-q").stdout


def test_bench_prints_one_table_and_one_object(pair, benched):
    result = run("bench", *pair, *FEW, "--rounds", 2)
    assert result.exit_code == 0, result.output
    found = ("disk", "memory copy", "matrix products", "one draft step", "exact, with 1 thread", "tokens/s")
    for row in (*found, "fraction of the ceiling"):
        assert row in result.stdout
    data = json.loads(benched)
    assert data["ceilings"]["matmul_flop_per_s"] > 0
    run_, hardware = data["runs"][0], data["hardware"]
    assert run_["tokens"] == 24
    assert run_["bytes_per_token"] == pytest.approx(data["plan"]["bytes_per_pass"] / run_["tokens_per_pass"])
    assert run_["ceiling_fraction"] == pytest.approx(run_["tokens_per_s"] / run_["ceiling_tokens_per_s"])
    assert hardware["disk_bytes_per_s"] > 0
    assert hardware["tasks"]["layer_s"] > 0
    assert min(data["ratios"]["exact"].values()) > 0
    assert data["ratios"]["threads"] == 1


def test_one_machine_file_serves_every_command(pair, benched, tmp_path, monkeypatch):
    """What ``bench`` and ``profile`` write, and what a person writes, is taken by ``trace`` and ``plan`` alike."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {name: tmp_path / f"{name}.json" for name in ("bench", "profile", "printed", "rates")}
    files["bench"].write_text(benched)
    made = run("profile", *pair, "--device", "cpu", "--threads", 1, "-o", files["profile"], "--json", "-q")
    assert made.exit_code == 0, made.output
    files["printed"].write_text(made.stdout)
    card = {"flop_per_s": {"float32": 1e12}, "memory_bytes_per_s": 1e11}
    files["rates"].write_text(json.dumps({"disk_bytes_per_s": 1e9, "h2d_bytes_per_s": 1e10, "device": card}))
    for name, file in files.items():
        result = run("trace", "-o", tmp_path / "x.json", "--simulate", file, *pair, *SMALL, "-q")
        assert result.exit_code == 0, (name, result.output)
        check_trace(load(tmp_path / "x.json"))
        planned = run("plan", *pair, "--profile", file, "--new-tokens", 8, "--batch-size", 1, "--groups", 1, "--json")
        assert planned.exit_code == 0, (name, planned.output)
        again = tmp_path / "again.json"
        again.write_text(planned.stdout)
        assert read_machine(again) == read_machine(file), "what a plan prints of its machine is that machine"
    assert read_machine(files["printed"]) == read_machine(files["profile"])
    lanes = json.loads(run("trace", tmp_path / "x.json", "--summary", "--json").stdout)["aspec simulated"]["lanes"]
    assert "h2d" in lanes, "the machine of rates has a link"


def test_faster_rates_make_a_faster_simulation(pair, tmp_path):
    """Without ``tasks`` the models' shapes are priced, as a plan prices them."""
    spans = []
    for memory_rate in (1e7, 1e10):
        file = tmp_path / "machine.json"
        file.write_text(json.dumps({"cpu": {"memory_bytes_per_s": memory_rate}}))
        assert run("trace", "-o", tmp_path / "x.json", "--simulate", file, *pair, *SMALL, "-q").exit_code == 0
        timeline = read_trace(tmp_path / "x.json")["aspec simulated"]
        spans.append(timeline.stop_s - timeline.start_s)
    assert spans[1] < spans[0] / 2


@pytest.mark.parametrize(
    ("machine", "missing"),
    [
        (PROFILE, "cpu.flop_per_s and cpu.memory_bytes_per_s"),
        (PROFILE | {"h2d_bytes_per_s": 1e10}, "device.flop_per_s"),
    ],
)
def test_a_plan_names_the_rates_that_a_file_of_tasks_lacks(pair, tmp_path, machine, missing):
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(machine))
    result = run("plan", *pair, "--profile", file, "--quiet")
    assert result.exit_code == 1
    assert missing in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_teaches():
    for command, words in {
        "trace": ("--simulate", "--compare", "--summary", "perfetto"),
        "bench": ("--rounds", "limit"),
    }.items():
        text = run(command, "--help").stdout
        assert all(word in text for word in words), text
