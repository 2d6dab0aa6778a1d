"""What a forecast is made from: every input moves it, in its direction, and only those plans that it concerns."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
from typer.testing import CliRunner

from aspec.cli import batch
from aspec.cli import generate as generation
from aspec.cli.flags.commands import BatchFlags, GenerateFlags
from aspec.cli.main import app
from aspec.observe.console import Console
from aspec.options import EngineOptions
from aspec.plan import Speculation, Workload
from aspec.planning.footprint import read_models, request_for
from aspec.planning.resolve import resolve, revise
from aspec.planning.sim_backend import SimBackend, SimCosts
from aspec.planning.simulation import fitted_spread, simulate
from aspec.planning.workload import CostBasis, forecast_for, measured_basis
from aspec.profiling.hardware import AttentionRates, Hardware, Processor
from aspec.profiling.profile_cache import AcceptanceStats, remember_acceptance
from aspec.serving.batch_input import BatchFile
from aspec.serving.openai_requests import COMPLETION
from aspec.tasks.task import CPU
from tests.simulate import make_plan

ATTENTION = AttentionRates(call_s=5e-5, row_s=2e-5, kv_byte_s=5e-10, score_s=2e-9, width_s=2e-11, own_score_s=1e-7)
PROCESSOR = Processor(
    flop_per_s={"bfloat16": 4e11},
    memory_bytes_per_s=1e10,
    exact_layer_s=8e-4,
    element_s=1e-9,
    mask_pair_s=1e-9,
    greedy_s=1e-9,
    sampled_s=6e-9,
    offer_s=5e-9,
    sampled_offer_s=1e-8,
    weight_s={"bfloat16": ((1, 1e-10), (64, 2e-10), (256, 4e-10))},
    exact_weight_s={"bfloat16": ((64, 4e-10), (128, 8e-10), (256, 1.6e-9))},
    attention=ATTENTION,
    exact_attention=ATTENTION,
)
HOST = Hardware(name="host", disk_bytes_per_s=1e9, cpu=PROCESSOR, read_contention=1.1)
CARD = replace(HOST, name="card", h2d_bytes_per_s=25e9, d2h_bytes_per_s=20e9, device=replace(PROCESSOR, layer_s=1e-4))
WORK = Workload(4, 60, 24)
MIB = 1 << 20
SHAPE = dict(num_layers=8, num_rows=4, capacity=128, prefill_tokens=512, nbytes=1000)  # compute binds
PLANS = {
    "off": dict(max_draft_tokens=0),
    "chain": dict(max_draft_tokens=4, fixed_draft_tokens=4),
    "tree": dict(max_draft_tokens=16, fixed_draft_tokens=16, speculation=Speculation.TREE),
    "streaming": dict(max_draft_tokens=0, nbytes=4 * MIB),
    "attention on the CPU": dict(
        max_draft_tokens=0, attention_resource=CPU, micro_batches=2, crossing=((9000, 4000),) * 8
    ),
}
PLANS["tree, attention on the CPU"] = PLANS["tree"] | PLANS["attention on the CPU"] | PLANS["tree"]


@cache
def demo():
    return read_models(resolve(EngineOptions(device="cpu")), outlined=True)


def forecast(kind, hardware=HOST, known=None, work=WORK, exact=True):
    """Tokens per second of one of the plans."""
    request = replace(request_for(demo()), exact=exact)
    forecaster = forecast_for(demo(), request, CostBasis(hardware, known or AcceptanceStats()), work)
    plan = make_plan(**SHAPE | PLANS[kind])
    if hardware.device is not None:
        plan = replace(plan, num_staging=2, draft_resource="draft")
    return forecaster(plan).tokens_per_s


@cache
def usual_forecast(kind):
    return forecast(kind)


def dearer(hardware, **changes):
    return replace(hardware, cpu=replace(hardware.cpu, **changes))


def slower_device(**changes):
    return replace(CARD, device=replace(CARD.device, **changes))


def attention(**changes):
    return replace(ATTENTION, **changes)


DEAR_BLOCKS = {"bfloat16": ((64, 8e-10), (128, 1.6e-9), (256, 3.2e-9))}
SLOWER = {  # what is changed: the kinds of plans that it slows, and the machine
    "products": (("off", "chain", "tree"), dearer(HOST, exact_weight_s=DEAR_BLOCKS)),
    "layer": (("off", "chain", "tree"), dearer(HOST, exact_layer_s=5e-3)),
    "elements": (("off", "chain", "tree"), dearer(HOST, element_s=1e-7)),
    "masks": (("off", "chain", "tree"), dearer(HOST, mask_pair_s=1e-5)),
    "frame": (("off", "chain", "tree"), dearer(HOST, frame_s=5e-3)),
    "any task": (("off", "chain", "tree"), dearer(HOST, task_s=1e-3)),
    "accepting": (("off", "chain", "tree"), dearer(HOST, accept_row_s=5e-3)),
    "keys": (("off", "chain", "tree"), dearer(HOST, exact_attention=attention(kv_byte_s=5e-8))),
    "draws": (("off", "chain", "tree"), dearer(HOST, greedy_s=1e-6)),
    "own paths": (("tree",), dearer(HOST, exact_attention=attention(own_score_s=1e-5))),
    "gathers": (("tree",), dearer(HOST, gather_s=5e-3)),
    "nodes": (("tree",), dearer(HOST, node_s=5e-3)),
    "offers": (("tree",), dearer(HOST, offer_s=1e-6)),
    "rows of trees": (("tree",), dearer(HOST, tree_row_s=5e-2)),
    "noise": ((), dearer(HOST, sampled_s=1e-6, sampled_offer_s=1e-6)),
    "disk": (("streaming",), replace(HOST, disk_bytes_per_s=2e8)),
}


@pytest.mark.parametrize("name", SLOWER)
@pytest.mark.parametrize("kind", ["off", "chain", "tree", "streaming"])
def test_what_takes_longer_slows_the_plans_that_do_it(name, kind):
    slowed, machine = SLOWER[name]
    before, after = usual_forecast(kind), forecast(kind, machine)
    if kind in slowed:
        assert after < 0.97 * before
    elif kind != "streaming":  # which is bound by its stream, or computes what the others do
        assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("kind", ["attention on the CPU", "tree, attention on the CPU"])
def test_attention_on_the_cpu_is_priced_by_the_cpu(kind):
    slow = attention(score_s=1e-7, kv_byte_s=1e-7, call_s=1e-2)
    before = forecast(kind, CARD)
    assert forecast(kind, dearer(CARD, exact_attention=slow)) < 0.9 * before
    assert forecast(kind, slower_device(exact_attention=slow)) >= before * (0.9 if "tree" in kind else 1.0)
    assert forecast("off", dearer(CARD, exact_attention=slow)) == forecast("off", CARD)
    assert forecast("off", slower_device(exact_attention=slow)) < 0.9 * forecast("off", CARD)


def test_what_attention_on_the_cpu_needs_crosses_the_link():
    kind = "attention on the CPU"
    for link in ({"d2h_bytes_per_s": 1e6}, {"h2d_bytes_per_s": 1e6}):
        assert forecast(kind, replace(CARD, **link)) < 0.9 * forecast(kind, CARD)
    assert forecast("off", replace(CARD, d2h_bytes_per_s=1e6)) == forecast("off", CARD)


def test_trees_whose_kv_is_on_the_host_are_gathered_there():
    kind = "tree, attention on the CPU"
    assert forecast(kind, dearer(CARD, gather_s=1e-2)) < 0.9 * forecast(kind, CARD)
    assert forecast("tree", dearer(CARD, gather_s=1e-2)) == forecast("tree", CARD)


@pytest.mark.parametrize("kind", ["off", "chain", "tree"])
def test_draws_with_noise_cost_what_noise_costs(kind):
    sampled = replace(WORK, sampled=True)
    machine = dearer(HOST, sampled_s=1e-6, sampled_offer_s=2e-6)
    assert forecast(kind, work=sampled) < forecast(kind)
    assert forecast(kind, machine, work=sampled) < 0.9 * forecast(kind, work=sampled)
    assert forecast(kind, machine) == forecast(kind)


@pytest.mark.parametrize("kind", ["off", "chain", "tree"])
def test_exact_steps_cost_what_blocks_cost(kind):
    assert forecast(kind, exact=True) < 0.9 * forecast(kind, exact=False)


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_proposals_that_are_accepted_make_plans_faster(kind):
    rates = [forecast(kind, known=AcceptanceStats(acceptance, 0.3)) for acceptance in (0.3, 0.6, 0.9)]
    assert rates[0] < rates[1] < rates[2]
    assert forecast("off", known=AcceptanceStats(0.3)) == forecast("off", known=AcceptanceStats(0.9))


def test_second_choices_are_worth_something_to_trees_alone():
    for kind in ("chain", "tree"):
        few, many = (forecast(kind, known=AcceptanceStats(0.6, spread)) for spread in (0.05, 0.5))
        assert few < 0.97 * many if kind == "tree" else few == many


def test_reads_slow_what_computes_beside_them():
    busy = replace(HOST, disk_bytes_per_s=3e9)  # reads hardly rest
    assert forecast("streaming", replace(busy, read_contention=3.0)) < 0.97 * forecast("streaming", busy)


def test_a_bound_lets_attention_of_its_own_lane_run_beside_the_rest():
    request = replace(request_for(demo()), exact=True)
    dear = dearer(CARD, exact_attention=attention(call_s=1e-3))
    forecaster = forecast_for(demo(), request, CostBasis(dear, AcceptanceStats()), WORK)
    plan = make_plan(**SHAPE | PLANS["attention on the CPU"], num_staging=2, draft_resource="draft")
    assert forecaster.least_s(plan) <= forecaster(plan).job_s


@pytest.mark.parametrize("sampled", [False, True])
def test_what_is_known_of_sampled_text_is_read_for_sampled_work(sampled, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("aspec.planning.workload.machine_profile", lambda *_, **__: HOST)
    models = demo()
    pair = models.resolved.target, models.resolved.draft
    remember_acceptance(*pair, 0.9, proposals=100, sampled=False)
    remember_acceptance(*pair, 0.4, proposals=100, sampled=True)
    asked = replace(models, resolved=revise(models.resolved, workload=replace(WORK, sampled=sampled)))
    assert measured_basis(asked).known.acceptance == (0.4 if sampled else 0.9)


# -- what a request says ---------------------------------------------------------------------------------------

NAMES = ("num_draft_tokens", "draft_depth", "max_batch", "num_groups")
OPEN = dict.fromkeys(NAMES, -1) | {"device": "cpu"}  # as the command line reads its defaults
GREEDY_BODY = {"prompt": "a", "max_tokens": 4, "temperature": 0}
SAYS_SO = {"do_sample": True}


@pytest.mark.parametrize(
    ("temperature", "defaults", "sampled"),
    [(None, {}, False), (0.7, {}, True), (0.0, SAYS_SO, False), (None, SAYS_SO, True)],
)
def test_prompts_say_whether_they_are_sampled(temperature, defaults, sampled, monkeypatch):
    monkeypatch.setattr("aspec.cli.generate.generation_defaults", lambda _: defaults)
    job = generation.prepare(GenerateFlags(temperature=temperature, **OPEN), ["a"] * 9, Console(quiet=True))
    assert job.resolved.options.workload.sampled == sampled


@pytest.mark.parametrize("bodies", [[{}], [{}, {"temperature": 0.5}]])
def test_one_sampled_row_makes_a_file_sampled(bodies, tmp_path):
    rows = [
        {"custom_id": str(i), "method": "POST", "url": COMPLETION, "body": GREEDY_BODY | body}
        for i, body in enumerate(bodies)
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = BatchFlags(input=source, output=tmp_path / "out.jsonl", **OPEN)
    with BatchFile(source) as file:
        job = batch.prepare(flags, file, Console(quiet=True))
    assert job.resolved.options.workload.sampled == (len(bodies) > 1)


def test_a_plan_is_made_for_the_temperature_that_is_named(tmp_path):
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps(dearer(HOST, sampled_s=1e-6).as_object()))
    made = {}
    for temperature in ("0", "0.7"):
        words = ["plan", "--profile", str(machine), "--temperature", temperature, "--json"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        made[temperature] = json.loads(result.stdout)
    greedy, sampled = made["0"], made["0.7"]
    assert (greedy["work"]["sampled"], sampled["work"]["sampled"]) == (False, True)
    assert sampled["plans"][0]["forecast"]["tokens_per_s"] < greedy["plans"][0]["forecast"]["tokens_per_s"]


# -- what runs teach -------------------------------------------------------------------------------------------


def test_a_spread_is_found_again_from_the_tokens_per_pass_of_trees():
    plan = make_plan(**SHAPE | PLANS["tree"] | {"max_draft_tokens": 24, "fixed_draft_tokens": 24, "capacity": 512})
    profile, outcomes = SimCosts(acceptance=0.7, spread=0.4), []
    simulate(plan, profile, [(2, 300)] * 4, [lambda span: outcomes.extend(span.outcomes)])
    per_pass = sum(outcome.num_new for outcome in outcomes[4:]) / len(outcomes[4:])
    assert fitted_spread(plan, replace(profile, spread=0.1), per_pass) == pytest.approx(0.4, abs=0.05)


def test_a_simulated_draft_is_right_about_how_sure_it_is():
    """As often as it says over many positions, and at those where it says so; the mean is the acceptance."""
    machine = SimBackend(SimCosts(acceptance=0.7, seed=5))
    said = [(math.exp(machine._log_scores(1, n)[0]), machine._rank(1, n) == 0) for n in range(20_000)]
    assert sum(chance for chance, _ in said) / len(said) == pytest.approx(0.7, abs=0.01)
    assert sum(hit for _, hit in said) / len(said) == pytest.approx(0.7, abs=0.01)
    for low in (0.2, 0.4, 0.6, 0.8):
        own = [(chance, hit) for chance, hit in said if low <= chance < low + 0.2]
        assert sum(hit for _, hit in own) == pytest.approx(sum(chance for chance, _ in own), rel=0.1)
    for sure in (0.0, 1.0):
        assert SimBackend(SimCosts(acceptance=sure))._log_scores(1, 1)[0] == (0.0 if sure else -math.inf)
