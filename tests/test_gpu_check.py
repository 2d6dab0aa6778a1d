"""The check for a rented card: its table of steps, thresholds, and that a step's failure stays its own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aspec.observe.timeline import DRAFT, H2D, TARGET, Round, Slice, Timeline
from tools import bench_batch, contest, gpu_check, gpu_report, gpu_runs, gpu_steps

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "aspec" / "demo"
JOB = gpu_steps.Job(contender="", target=str(DEMO / "target"), draft=str(DEMO / "draft"), budget=1, limit_s=60.0)
DIFFERENT = ("qwen3", "tree")


def figures(stream=30.0, accelerate=1.0) -> dict:
    """Records in which everything is as it should be."""
    run = {"decode_tokens_per_s": stream, "link_share": 0.97, "ceiling_share": 0.95, "draft_hidden": 0.99}
    peers = dict.fromkeys((gpu_runs.ONE, gpu_runs.ASSISTANT, gpu_runs.BATCH), accelerate)
    return {
        "contract": {"passed": 105, "failed": 0, "skipped_without_device": 0},
        "equality": {"compared": gpu_report.NUM_EQUAL, "different": 0},
        "stream": {"runs": {name: run | {"peak_share": 0.9} for name in gpu_runs.SHAPES}},
        "peers": {"most_tokens_per_s": peers},
    }


def verdicts(records, dry=False) -> dict[str, str]:
    return {one["name"]: one["verdict"] for one in gpu_report.judge(records, dry)}


def test_the_steps_are_those_of_the_help_and_fit_the_time():
    assert list(gpu_check.STEPS) == [line.split()[0] for line in gpu_check.__doc__.split("\n\n")[3].splitlines()]
    assert sum(step.limit_s for step in gpu_check.STEPS.values()) > gpu_check.ALL_S
    assert gpu_check.ALL_S < 8 * 60
    assert {name for name, step in gpu_check.STEPS.items() if step.prepared} == {"links", "stream", "peers", "trace"}


def test_all_thresholds_pass_where_all_is_well():
    found = verdicts(figures())
    assert set(found.values()) == {"passed"}
    assert len(found) == 5 + 4 * 3 + 3 + 3  # drafts: not of the run without them


@pytest.mark.parametrize(
    ("found", "verdict"), [(0.95, "passed"), (0.9499, "failed"), (1.2, "passed"), (None, "failed")], ids=str
)
def test_a_share_may_not_be_below_its_bound_nor_missing(found, verdict):
    records = figures()
    records["stream"]["runs"]["tree"]["link_share"] = found
    assert verdicts(records)["tree: stream / pinned link"] == verdict


@pytest.mark.parametrize(("found", "verdict"), [(1.0, "passed"), (1.01, "failed"), (None, "failed")], ids=str)
def test_the_peak_may_not_be_above_the_budget_nor_missing(found, verdict):
    records = figures()
    records["stream"]["runs"]["off"]["peak_share"] = found
    assert verdicts(records)["off: allocator's peak / budget"] == verdict


@pytest.mark.parametrize(("speed", "passed"), [(20.0, True), (19.9, False), (None, False)], ids=str)
def test_one_prompt_is_twenty_times_as_fast_as_accelerate(speed, passed):
    assert (verdicts(figures(stream=speed))["one prompt: aspec / accelerate"] == "passed") == passed


def test_without_the_alternatives_nothing_is_proved():
    records = figures()
    records["peers"] = {"failure": "accelerate is not installed"}
    failed = [name for name, verdict in verdicts(records).items() if verdict == "failed"]
    assert failed == [
        "one prompt: aspec / accelerate",
        "one prompt: aspec / assistant",
        "batch: aspec / accelerate's best",
    ]


def test_a_dry_run_judges_only_what_holds_anywhere():
    records = figures(stream=0.1)
    records["equality"]["different"] = 1
    found = verdicts(records, dry=True)
    assert found["of them with other tokens"] == "failed"
    assert found["tests failed"] == "passed"
    assert {v for name, v in found.items() if " / " in name or "device" in name} == {"not judged"}


def test_only_the_steps_that_ran_are_judged():
    records = figures()
    assert list(verdicts({"contract": records["contract"], "peers": records["peers"]})) == [
        "tests passed",
        "tests failed",
        "tests skipped for want of a device",
    ]


def test_runs_inside_a_step_fail_too_but_a_batch_that_is_halved_does_not():
    runs = {"off": {}, "tree": {"failure": "lost"}, "batch of 64": {"failure": "too large", "tried": True}}
    assert gpu_report.failures({"stream": {"runs": runs}, "links": {"failure": "late"}}) == {
        "links": "late",
        "stream, tree": "lost",
    }


def grows(job):
    yield {"half": 1}
    raise OSError("the device fell over")


def works(job):
    yield {"h2d_pinned_bytes_per_s": 5e9, "told": job.link_bytes_per_s}


def steps(**works_of):
    return [gpu_check.Step(name, 60, work, isolated=False) for name, work in works_of.items()]


def test_a_failing_step_keeps_what_it_found_and_stops_no_other():
    told = []
    records = dict(gpu_check.run_steps(steps(bad=grows, links=works, later=works), JOB, lambda *one: told.append(one)))
    assert records["bad"]["half"] == 1
    assert records["bad"]["failure"].endswith("OSError: the device fell over")
    assert "grows" in records["bad"]["failure"]  # where
    assert (records["links"]["told"], records["later"]["told"]) == (None, 5e9)
    assert [name for name, _ in told] == ["bad", "links", "later"]
    assert all(record["seconds"] >= 0 for record in records.values())


def test_no_step_begins_when_the_time_is_over_or_there_is_no_checkpoint(tmp_path):
    (late,) = steps(late=works)
    assert "not begun" in gpu_check.run_step(late, replace(JOB, limit_s=-1.0))["failure"]
    lacking = gpu_check.run_step(replace(late, prepared=True), replace(JOB, target=str(tmp_path)))
    assert f"--prepare {tmp_path}" in lacking["failure"]


@pytest.mark.parametrize(("end", "failure"), [("sys.exit('lost')", "exit code 1\n"), ("time.sleep(60)", "not done af")])
def test_what_a_child_printed_before_it_ended_badly_is_kept(tmp_path, end, failure):
    script = tmp_path / "step.py"
    script.write_text(f"import sys, time\nprint('{{\"found\": 7}}')\nprint('{{\"cut', flush=True)\n{end}\n")
    job = contest.Task(contender="stream", target=str(tmp_path), cold=False)
    record = contest.run_child(str(script), job, None, timeout_s=3.0)
    assert record["found"] == 7
    assert record["failure"].startswith(failure)


def test_a_step_of_a_child_of_its_own_is_told_its_job_and_its_limit(monkeypatch):
    called = []
    monkeypatch.setattr(contest, "run_child", lambda *given, **more: called.append((given, more)) or {"found": 1})
    step = gpu_check.Step("stream", 60, works)
    assert gpu_check.run_step(step, JOB)["found"] == 1
    assert called == [((gpu_check.__file__, JOB, None), {"timeout_s": 60.0})]


@pytest.mark.parametrize(("work", "status"), [(works, 0), (grows, 1)], ids=["done", "failed"])
def test_the_exit_status_tells_and_the_file_holds_everything(monkeypatch, tmp_path, capsys, work, status):
    monkeypatch.setattr(gpu_check, "STEPS", {step.name: step for step in steps(events=work, links=works)})
    file = tmp_path / "check.json"
    options = gpu_check.parse_options(["--dry-run", "--json", str(file)])
    assert gpu_check.check(options, DEMO / "target", tmp_path) == status
    found = json.loads(file.read_text())
    assert found["passed"] == (status == 0)
    assert list(found["steps"]) == ["events", "links"]
    assert {"cpu", "torch", "transformers", "commit", "file_system"} <= found["machine"].keys()
    assert found["budget_bytes"] == found["weight_bytes"] // 4
    assert list(found["failures"]) == (["events"] if status else [])
    assert ("FAILED: OSError: the device fell over" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "one of DIR"),
        (["x", "--dry-run"], "one of DIR"),
        (["x"], "--json"),
        (["--dry-run", "--only", "rest"], "rest"),
    ],
)
def test_a_wrong_command_line_is_refused(wrong, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.parse_options(wrong)
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_card_it_says_what_to_do():
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu_check.main([str(DEMO / "target"), "--json", "x.json"])


def test_prepare_makes_a_checkpoint_and_says_where_it_lies(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "new" / "big"
    assert gpu_check.main(["--prepare", str(folder), "--size", "20MB"]) == 0
    said = capsys.readouterr().out
    assert f"gpu_check.py {folder} --json" in said
    assert ("tmpfs" in said) == (gpu_check.file_system(folder) != "tmpfs")
    assert 18e6 < replace(JOB, target=str(folder)).weight_bytes < 22e6
    with pytest.raises(SystemExit, match="not empty"):
        gpu_check.main(["--prepare", str(folder), "--size", "20MB"])
    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda place: SimpleNamespace(free=1 << 20))
    with pytest.raises(SystemExit, match=r"1\.00 MiB are free"):
        gpu_check.main(["--prepare", str(tmp_path / "other"), "--size", "20MB"])


# -- what the steps make of what they measure ----------------------------------------------------------------


def test_a_report_of_pytest_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure message='no'/></testcase>"
        "<testcase name='c'><error message='no'/></testcase><testcase name='d'><skipped message='no CUDA device here'/>"
        "</testcase><testcase name='e'><skipped message='elsewhere'/></testcase></testsuite></testsuites>"
    )
    found = gpu_steps.read_report(report)
    counts = {"passed": 1, "failed": 2, "skipped": 2, "skipped_without_device": 1}
    assert found == counts | {"failed_tests": ["b", "c"], "reasons": ["elsewhere", "no CUDA device here"]}


def test_the_reason_for_skipped_tests_is_the_suites_own():
    assert f'reason="{gpu_steps.NO_DEVICE}"' in (ROOT / "tests" / "test_cuda.py").read_text()


def test_what_could_not_be_compared_counts_neither_as_equal_nor_as_different(monkeypatch):
    def pair(folder, family, device):
        if family == "mixtral":
            raise OSError("no room")
        return {"family": family}

    monkeypatch.setattr(gpu_steps, "make_pair", pair)
    monkeypatch.setattr(
        gpu_steps, "compare", lambda job, made, shape: {"equal": (made["family"], shape["speculation"]) != DIFFERENT}
    )
    *_, found = gpu_steps.equality(JOB)
    assert (found["compared"], found["different"]) == (gpu_report.NUM_EQUAL - len(gpu_steps.SHAPES), 1)
    records = {"equality": found | {"seconds": 1.0}}
    assert verdicts(records)["runs held against transformers"] == "failed"
    table = list(gpu_report.lines(records, gpu_report.judge(records, dry=False)))
    assert table[0] == f"equality: {len(gpu_steps.SHAPES)} runs failed in 1.0 s"
    assert "  mixtral, tree: FAILED: OSError: no room" in table
    assert "  qwen3, tree: equal no" in table


def test_percentiles_are_in_microseconds():
    assert gpu_steps.percentiles([i * 1e-6 for i in range(101)]) == pytest.approx({"p50": 50, "p90": 90, "p99": 99})


def test_shares_of_the_link_and_of_the_ceiling_and_what_of_the_drafts_was_hidden():
    """Two passes of 1 s after the prefill; the link carries 400 of 500 bytes a second, half of a draft is under it."""
    slices = [Slice(0, H2D, "copy", 0.0, 1.0, nbytes=500)]
    slices += [Slice(i, H2D, "copy", i + 0.0, i + 0.8, nbytes=400) for i in (1, 2)]
    slices += [Slice(3, DRAFT, "draft", 1.6, 2.0), Slice(4, TARGET, "layer", 2.0, 3.0)]
    rounds = tuple(Round(i, float(i), i + 1.0, 4, 3, 4) for i in range(3))
    timeline = Timeline(tuple(slices), rounds, {"bytes_per_pass": 400})
    found = gpu_runs.against_the_link(timeline, 400, 500.0, 0.1)
    assert found["stream_bytes_per_s"] == pytest.approx(400)
    assert found["link_share"] == pytest.approx(0.8)
    assert found["tokens_per_pass"] == 4
    assert found["ceiling_tokens_per_s"] == pytest.approx(5)
    assert found["ceiling_share"] == pytest.approx(0.8)
    assert found["draft_hidden"] == pytest.approx(0.5)
    assert gpu_runs.against_the_link(timeline, 400, None, 0.1)["link_share"] is None


def test_the_link_is_the_one_next_to_the_device():
    uses = [Slice(i, lane, "load", 0.0, 1.0, nbytes=n) for i, (lane, n) in enumerate((("disk", 10), (H2D, 20)))]
    rounds = (Round(0, 0.0, 0.0, 0, 0, 1), Round(1, 0.0, 1.0, 0, 0, 1))
    assert gpu_runs.against_the_link(Timeline(tuple(uses), rounds), 20, 40.0, 0.1)["link_share"] == 0.5


def test_of_alternatives_the_fastest_counts():
    record = {"most_tokens_per_s": {}, "runs": {}}
    placed = {"facts": {"device_map": {"a": 0, "b": "cpu", "c": "cpu"}}, "tokens": [[1]]}
    gpu_runs.noted(record, "assistant", "default", placed | {"decode_tokens_per_s": 3.0})
    gpu_runs.noted(record, "assistant", "5 tokens", {"decode_tokens_per_s": 2.0})
    gpu_runs.noted(record, "batch", "of 64", {"failure": "too large"})
    assert record["most_tokens_per_s"] == {"assistant": 3.0}
    assert record["runs"]["default"] == {"decode_tokens_per_s": 3.0, "modules_on": {"0": 1, "cpu": 2}}
    assert record["runs"]["of 64"]["failure"] == "too large"


def test_the_engine_of_a_card_gets_host_memory_for_all_weights():
    on_card = replace(JOB, card=1 << 20, budget=1 << 20)
    options = on_card.engine(speculation="off")
    assert (options["device"], options["device_memory"], options["speculation"]) == ("cuda", 1 << 20, "off")
    assert options["host_memory"] > on_card.weight_bytes > 15e6
    assert "host_memory" not in JOB.engine()
    assert JOB.engine()["device"] == "cpu"


@pytest.mark.parametrize("place", ["cpu", 0], ids=["offloaded", "all on the card"])
def test_transformers_on_a_card_is_held_to_its_bytes_and_must_offload(monkeypatch, place):
    import transformers

    asked, held = {}, []
    model = SimpleNamespace(hf_device_map={"a": 0, "b": place}, parameters=list, generation_config=SimpleNamespace())
    auto = SimpleNamespace(from_pretrained=lambda target, **how: asked.update(how) or model)
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", auto)
    monkeypatch.setattr(contest, "hold_card", held.append)
    if place == 0:
        with (
            pytest.raises(SystemExit, match="nothing is offloaded"),
            contest.load_transformers("x", "auto", 8, card=10),
        ):
            pass
    else:
        with contest.load_transformers("x", "auto", 8, card=10) as loaded:
            assert loaded is model
    assert held == [10]
    assert asked["device_map"] == "auto"
    assert asked["max_memory"][0] == 8
    assert asked["max_memory"]["cpu"] > 1 << 40


def test_a_batch_that_a_card_has_no_memory_for_is_halved(monkeypatch):
    def child(script, job, *_):
        died = {"failure": "exit code 1\n    torch.OutOfMemoryError: CUDA out of memory."}
        return {"contender": job.contender} | (died if len(job.prompts) > 2 else {"seconds": 1.0})

    monkeypatch.setattr(contest, "run_child", child)
    job = bench_batch.Job(contender="accelerate", target="", draft="", prompts=[[1]] * 8, tokens=4, card=1)
    options = SimpleNamespace(contenders=bench_batch.CONTENDERS, timeout=1.0)
    assert [found["rows"] for found in bench_batch.run_fitting(options, job, None, {})] == [8, 4, 2]


def test_without_accelerate_the_alternatives_say_so(monkeypatch):
    monkeypatch.setattr(gpu_runs.importlib.util, "find_spec", lambda name: None)
    assert "accelerate is not installed" in gpu_check.run_step(gpu_check.STEPS["peers"], JOB)["failure"]


def test_no_alternative_is_started_when_the_time_is_over(monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(contest, "run_child", lambda *_: pytest.fail("a child was started"))
    assert (
        "what ran before stands" in gpu_check.run_step(gpu_check.STEPS["peers"], replace(JOB, limit_s=1.0))["failure"]
    )


@pytest.mark.slow
def test_coroutine_tests_run_without_the_plugin_for_them():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-k", "event_lane", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    assert "warning" not in done.stdout


@pytest.mark.slow
def test_a_dry_run_goes_through_every_step(tmp_path):
    pytest.importorskip("accelerate")
    file = tmp_path / "check.json"
    command = [sys.executable, "tools/gpu_check.py", "--dry-run", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["passed"]
    assert found["failures"] == {}
    assert list(found["steps"]) == list(gpu_check.STEPS)
    judged = {one["name"]: one["verdict"] for one in found["thresholds"]}
    assert list(judged) == list(verdicts(figures()))
    assert list(judged.values()).count("passed") == 4
    streamed = found["steps"]["stream"]["runs"]
    assert all(run["stream_bytes_per_s"] > 0 and run["link_share"] > 0 for run in streamed.values())
    assert all(run["bytes_per_pass"] > found["weight_bytes"] / 2 for run in streamed.values())
    assert streamed["tree"]["tokens_per_pass"] > streamed["off"]["tokens_per_pass"] == 1
    assert found["steps"]["peers"]["most_tokens_per_s"].keys() == {gpu_runs.ONE, gpu_runs.ASSISTANT, gpu_runs.BATCH}
    waits = found["steps"]["events"]["runs"]["stand-in"]
    assert 0 < waits["thread_p50_us"] < waits["coroutine_p50_us"]
    trace = found["steps"]["trace"]
    assert Path(trace["file"]).stat().st_size == trace["file_bytes"]
    assert trace["summary"]["tokens"] > 0
