"""`aspec plan` of models of which nothing is there but a config.json, on a machine that is written by hand."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.engine.design import design
from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.options import EngineOptions
from aspec.plan import Workload
from aspec.planning.forecast import Forecaster
from aspec.planning.resolve import resolve
from aspec.planning.simulation import simulate
from aspec.profiling.hardware import hardware_from
from aspec.profiling.model_shape import LayerShape, ModelShape
from aspec.profiling.roofline import prices
from aspec.tasks.op import Op
from tests import tiny
from tests.simulate import make_plan
from tests.test_hardware import CARD

GIB = 1 << 30
MACHINE = {
    "name": "a 24 GB card",
    "disk_bytes_per_s": 5e9,
    "h2d_bytes_per_s": 20e9,
    "device_memory": "24GiB",
    "host_memory": "256GiB",
    "device": {"flop_per_s": {"bfloat16": 1.6e14}, "memory_bytes_per_s": 1e12},
    "cpu": {"flop_per_s": {"bfloat16": 2e12}, "memory_bytes_per_s": 8e10},
}
COMMON = {
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
MIXTRAL_8X22B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_attention_heads": 48,
    "num_hidden_layers": 28,  # of 56: a plan of half the depth takes half the seconds
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 65536,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
THIRD_405B = LLAMA_405B | {"num_hidden_layers": 42}
LAYERS_THIRD, LAYERS_8X22B = 42 * 2 * 3_187_671_040, 28 * (4_831_838_208 + 176_160_768)
"""Bytes of the layers' weights; the second by the experts and the attention of a layer."""


def folder(path, config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(COMMON | config))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("configs")
    known = {"405b": LLAMA_405B, "a third": THIRD_405B, "8x22b": MIXTRAL_8X22B, "7b": MISTRAL_7B}
    return {name: folder(root / name, config) for name, config in known.items()}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine") / "card.json"
    path.write_text(json.dumps(MACHINE))
    return path


def plan(*args):
    return CliRunner().invoke(app, ["plan", *map(str, args)])


def as_object(result):
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def refusal(result, code=1):
    """What a command says that ends with an error: one paragraph, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if not line.startswith("aspec: opening ")]) == 1
    return result.stderr


def check_arithmetic(one, layers_bytes):
    """Every byte of the layers is somewhere, and what is held is within what there is."""
    assert sum(one["bytes_by_tier"].values()) == pytest.approx(layers_bytes, rel=1e-4)  # norms beside the products
    assert sum(one["device_bytes"].values()) <= 24 * GIB
    assert sum(one["host_bytes"].values()) <= 256 * GIB
    assert one["streamed_bytes"] == one["bytes_by_tier"]["host"] + one["bytes_by_tier"]["disk"]
    assert one["host_bytes"]["pinned layers"] >= one["bytes_by_tier"]["host"]
    assert one["device_bytes"]["resident layers"] >= one["bytes_by_tier"]["device"]
    (slots,) = (nbytes for label, nbytes in one["device_bytes"].items() if label.endswith(" slots"))
    assert slots == one["slots"] * one["slot_bytes"]


def stream_seconds(one):
    """Of a pass: all that streams crosses the link, and what comes from the disk comes from there."""
    return max(one["streamed_bytes"] / 20e9, one["bytes_by_tier"]["disk"] / 5e9)


# -- whole models from their configuration -------------------------------------------------------------------


MEASURED = """
import atexit, sys
from aspec.cli.main import main
from aspec.io.memory import peak_rss_bytes
atexit.register(lambda: print(peak_rss_bytes(), file=sys.stderr))
main()
"""


@pytest.mark.slow
def test_a_405b_model_is_planned_in_little_memory(models, machine):
    """A real process, which tells its own peak: the system's count starts from that of whoever started it."""
    command = [sys.executable, "-c", MEASURED, "plan", "--target", models["405b"], "--profile", machine]
    made = subprocess.run([*map(str, command), "--prompts", "64"], capture_output=True, text=True)
    said = made.stdout
    assert made.returncode == 0, made.stderr
    assert int(made.stderr.split()[-1]) < GIB, "0.4 of it, all in all, is what importing takes"
    for words in (
        "from its configuration alone",
        "the plan: 64 rows without speculation",
        "layers stay resident",
        "layers stream from host memory",
        "layers stream from disk",
        "device memory: embeddings, norms and head 7.83 GiB + ",
        "host memory: pinned layers ",
        "bottleneck: disk-bound: ",
        "other plans",
        "at least ",
    ):
        assert words in said, words
    assert re.search(r"predicted: 0\.\d+ tokens/s, 1\.00 tokens of a row per pass, .* to prefill 64, .* in all", said)


def test_three_tiers_hold_a_large_model_and_the_disk_sets_its_speed(models, machine):
    memory = "--host-memory", "85GiB"
    found = as_object(plan("--target", models["a third"], "--profile", machine, *memory, "--prompts", 64, "--json"))
    best = found["plans"][0]
    assert min(best["bytes_by_tier"].values()) > 0
    for one in (*found["plans"], *found["not_run"]):
        check_arithmetic(one, LAYERS_THIRD)
    assert best["forecast"]["tokens_per_s"] == pytest.approx(best["rows"] / stream_seconds(best), rel=0.02)
    assert best["forecast"]["job_s"] == pytest.approx(127 * stream_seconds(best), rel=0.1)
    assert best["forecast"]["prefill_s"] >= stream_seconds(best)
    jobs = [one["forecast"]["job_s"] for one in found["plans"]]
    assert jobs == sorted(jobs)
    assert all(one["least_s"] > 0.98 * jobs[0] for one in found["not_run"])


def test_experts_stream_from_host_memory_and_the_link_sets_their_speed(models, machine):
    found = as_object(
        plan("--target", models["8x22b"], "--experts", "whole", "--profile", machine, "--prompts", 64, "--json")
    )
    best = found["plans"][0]
    check_arithmetic(best, LAYERS_8X22B)
    assert best["bytes_by_tier"]["disk"] == 0
    assert best["bytes_by_tier"]["host"] > 0.8 * LAYERS_8X22B
    assert best["forecast"]["bottleneck"].startswith("link-bound")
    assert best["forecast"]["tokens_per_s"] == pytest.approx(best["rows"] / stream_seconds(best), rel=0.02)


def test_a_draft_beside_it_is_put_to_use_where_rows_are_few(models, machine):
    pair = ("--target", models["8x22b"], "--experts", "whole", "--draft", models["7b"], "--profile", machine, "--json")
    few = as_object(plan(*pair, "--prompts", 8, "--acceptance", 0.7))["plans"][0]
    assert few["speculation"] != "off"
    assert few["device_bytes"]["draft weights"] == pytest.approx(14.5e9, rel=0.01)
    check_arithmetic(few, LAYERS_8X22B)
    made = few["forecast"]["tokens_per_pass"]
    assert 2 < made < 6
    ceiling = few["rows"] * made / stream_seconds(few)
    assert few["forecast"]["tokens_per_s"] == pytest.approx(ceiling, rel=0.05)
    many = as_object(plan(*pair, "--prompts", 64, "--acceptance", 0.1))["plans"][0]
    assert many["speculation"] == "off"
    assert many["device_bytes"].get("draft weights", 0) == 0, "what proposes nothing is not loaded"
    assert many["rows"] == 64


async def test_a_draft_that_proposes_nothing_is_not_loaded(tmp_path, monkeypatch):
    target = tiny.build(tmp_path / "target", "llama")
    draft = tiny.noisy_copy(target, tmp_path / "draft", 0.1)
    plain = design(resolve(EngineOptions(target=target, speculation="off", max_batch=1))).plan
    monkeypatch.setattr("aspec.engine.design.decide", lambda models: (models, plain))
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    spans = []
    async with open_engine(target=target, draft=draft, max_batch=1, threads=1, observers=[spans.append]) as engine:
        tokens = [token async for piece in engine.stream([5, 6, 7], params) for token in piece.token_ids]
    assert len(tokens) == 8
    assert not {Op.DRAFT, Op.DRAFT_PREFILL} & {span.task.op for span in spans}
    assert design(resolve(EngineOptions(target=target, draft=draft, max_batch=1))).models.draft is None


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "expected JSON"),
        ("[1, 2]", "expected a JSON object with some of name"),
        ("{}", "expected a JSON object with some of name"),
        ('{"dsik_bytes_per_s": 1e9}', "unknown field 'dsik_bytes_per_s', expected some of name, disk_bytes_per_s"),
        ('{"device": {"flops": 1}}', "unknown field 'device.flops'"),
        ('{"disk_bytes_per_s": 0}', "disk_bytes_per_s must be above 0"),
        ('{"disk_bytes_per_s": "fast"}', "disk_bytes_per_s must be a number"),
        ('{"h2d_bytes_per_s": 2e10}', "needs a device"),
        ('{"device_memory": "many"}', "device_memory"),
    ],
)
def test_a_bad_profile_is_refused_by_one_paragraph(models, tmp_path, text, words):
    (tmp_path / "machine.json").write_text(text)
    said = refusal(plan("--target", models["7b"], "--profile", tmp_path / "machine.json"))
    assert "machine.json" in said
    assert words in said


@pytest.mark.parametrize(
    "args",
    [
        ("--prompts", 0),
        ("--prompts", "many"),
        ("--prompt-tokens", 0),
        ("--new-tokens", 1),
        ("--acceptance", 1.5),
        ("--host-memory", "lots"),
        ("--nonsense",),
    ],
    ids=str,
)
def test_what_is_no_work_is_a_usage_error(models, machine, args):
    said = refusal(plan("--target", models["7b"], "--profile", machine, *args), 2)
    assert str(args[0]) in said


def test_files_that_are_not_there_are_named(models, machine, tmp_path):
    assert "cannot be read" in refusal(plan("--target", models["7b"], "--profile", tmp_path / "none.json"))
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(plan("--target", tmp_path / "empty", "--profile", machine))
    torn = folder(tmp_path / "torn", MISTRAL_7B)
    (torn / "config.json").write_text('{"model_type": "mis')
    assert "config.json" in refusal(plan("--target", torn, "--profile", machine))
    odd = folder(tmp_path / "odd", MISTRAL_7B | {"model_type": "nobodys"})
    assert "nobodys" in refusal(plan("--target", odd, "--profile", machine))


def test_a_budget_too_small_is_refused_with_the_arithmetic(models, machine):
    big = ("--target", models["8x22b"], "--experts", "whole", "--profile", machine)
    said = refusal(plan(*big, "--device-memory", "4GiB"))
    for words in ("memory budget of 4.00 GiB is too small", "embeddings, norms and head 768 MiB + ", "slots of "):
        assert words in said
    least = int(re.search(r"at least (\d+)MiB", said)[1])
    terms = said.partition("smallest plan holds ")[2].partition(" = ")[0]
    held = 0.0
    for times, size, unit in re.findall(r"(?:(\d+) slots of )?(\d[\d.]*) (GiB|MiB|KiB)", terms):
        held += int(times or 1) * float(size) * {"GiB": 1024, "MiB": 1, "KiB": 1 / 1024}[unit]
    assert held == pytest.approx(least, rel=0.01)
    enough = plan(*big, "--device-memory", f"{least}MiB", "--new-tokens", 8, "--json")
    assert as_object(enough)["plans"][0]["rows"] == 1


def test_host_memory_that_is_small_leaves_more_to_the_disk(models, machine):
    most = as_object(plan("--target", models["8x22b"], "--experts", "whole", "--profile", machine, "--json"))["plans"][
        0
    ]
    least = as_object(
        plan(
            "--target", models["8x22b"], "--experts", "whole", "--profile", machine, "--host-memory", "32GiB", "--json"
        )
    )
    least = least["plans"][0]
    assert sum(least["host_bytes"].values()) <= 32 * GIB
    assert least["bytes_by_tier"]["disk"] > 4 * most["bytes_by_tier"]["disk"]
    assert least["forecast"]["tokens_per_s"] < most["forecast"]["tokens_per_s"] / 2


# -- forecasts -----------------------------------------------------------------------------------------------

LAYER = LayerShape(project_bytes=12 << 20, rest_bytes=76 << 20, wide=18304)
SHAPE = ModelShape(
    (LAYER,) * 4, hidden=2048, vocab=32000, heads=16, kv_heads=4, width=128, value_width=128, head_bytes=131 << 20
)


@pytest.mark.parametrize("prompts", [8, 12, 20])
@pytest.mark.parametrize("disk", [1e9, 1e11])
def test_a_job_takes_what_all_of_it_takes_in_virtual_time(prompts, disk):
    """Bound by the stream or by compute; the last rows may not fill the plan."""
    hardware = hardware_from({"disk_bytes_per_s": disk, "cpu": CARD["cpu"]}, "here")
    profile = prices(SHAPE, None, hardware)
    shape = make_plan(num_rows=8, nbytes=44 << 20, max_draft_tokens=0, prefill_tokens=512, capacity=512)
    forecast = Forecaster(lambda _: profile, Workload(prompts, 32, 150))(shape)
    ends = []
    simulate(shape, profile, [(32, 150)] * prompts, [lambda span: ends.append(span.stop_s)])
    assert forecast.job_s == pytest.approx(max(ends), rel=0.06)


@pytest.mark.parametrize("disk", [1e9, 1e11])
def test_prompts_that_join_as_rows_fall_free_take_their_time(disk):
    """Where compute binds, drafts leave no room for them, though one token per row would."""
    hardware = hardware_from({"disk_bytes_per_s": disk, "cpu": CARD["cpu"]}, "here")
    small = replace(SHAPE, layers=(LayerShape(project_bytes=1 << 20, rest_bytes=3 << 20, wide=2048),) * 2)
    profile = prices(SHAPE, small, hardware, exact=True)
    shape = make_plan(num_rows=32, nbytes=44 << 20, max_draft_tokens=8, fixed_draft_tokens=4, capacity=256)
    forecast = Forecaster(lambda _: profile, Workload(64, 40, 64))(shape)
    ends = []
    simulate(shape, profile, [(40, 64)] * 64, [lambda span: ends.append(span.stop_s)])
    assert forecast.job_s == pytest.approx(max(ends), rel=0.15)


@pytest.mark.parametrize("quiet", [False, True])
def test_the_search_says_how_far_it_is_unless_quiet(models, machine, quiet):
    result = plan("--target", models["7b"], "--profile", machine, "--prompts", 8, *["--quiet"] * quiet)
    assert result.exit_code == 0, result.output
    assert "tried" not in result.stdout
    assert ("1 plan tried" in result.stderr) is not quiet
