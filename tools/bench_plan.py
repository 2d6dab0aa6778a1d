"""The planner against reality: forecasts of many plans beside runs of the same plans, and where the chosen one stands.

    python tools/bench_plan.py BIG --draft aspec/demo/draft --link-rate 1.0GB/s --new-tokens 40

Every plan serves the same prompts. Two pilots tell what is accepted of chains and of trees. The machine is measured
anew before every run and after the last one, in a cache of this tool's own; a plan is forecast on the profile before
its run and on the one behind it, and judged by their mean: where the two are far apart, the machine has drifted. The
decode rate of the run is taken from its spans as that of the forecast is.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import bench_batch

from aspec.engine.design import decide
from aspec.engine.engine import Engine, open_engine
from aspec.generation.params import SamplingParams
from aspec.options import EngineOptions
from aspec.plan import Plan, Workload
from aspec.planning.footprint import read_models
from aspec.planning.forecast import ThroughputMeter
from aspec.planning.resolve import resolve
from aspec.planning.search import Forecast
from aspec.planning.simulation import fitted_acceptance, fitted_spread
from aspec.planning.workload import best_plans, forecast_for, measured_basis
from aspec.profiling.profile_cache import known_acceptance, machine_profile, remember_acceptance
from aspec.profiling.threads import thread_counts
from aspec.units import parse_bytes, parse_rate

PLANS: tuple[dict[str, Any], ...] = (
    {"max_batch": 64, "speculation": "off"},
    {"max_batch": 64, "speculation": "chain"},
    {"max_batch": 64, "speculation": "chain", "num_groups": 2},
    {"max_batch": 64, "speculation": "chain", "num_draft_tokens": 1},
    {"max_batch": 32, "speculation": "off"},
    {"max_batch": 32, "speculation": "chain"},
    {"max_batch": 16, "speculation": "chain", "num_groups": 2},
    {"max_batch": 16, "speculation": "chain"},
    {"max_batch": 8, "speculation": "chain"},
    {"max_batch": 4, "speculation": "off"},
    {"max_batch": 8, "speculation": "tree"},
    {"max_batch": 4, "speculation": "tree"},
    {"max_batch": 4, "speculation": "tree", "num_draft_tokens": 32},
    {"max_batch": 1, "speculation": "tree"},
    {"max_batch": 64, "speculation": "off", "attention": "cpu"},
    {"max_batch": 32, "speculation": "chain", "attention": "cpu"},
    {"max_batch": 4, "speculation": "tree", "attention": "cpu"},
)
CHAIN_PILOT = {"max_batch": 16, "speculation": "chain", "num_draft_tokens": 6, "num_groups": 1}
TREE_PILOT = {"max_batch": 8, "speculation": "tree", "num_draft_tokens": 32}
ALLOWED = 0.15  # that a forecast may be off


@dataclass(frozen=True, slots=True)
class Outcome:
    """A plan, what was foretold on the machine as it was before and after, what came."""

    shape: str
    forecasts: tuple[Forecast, ...]
    tokens_per_s: float
    tokens_per_pass: float
    prefill_s: float

    @property
    def foretold(self) -> float:
        """Tokens per second, the mean of the forecasts."""
        return mean(forecast.tokens_per_s for forecast in self.forecasts)

    @property
    def off(self) -> float:
        """How far that was from the run."""
        return self.foretold / self.tokens_per_s - 1.0

    @property
    def within(self) -> bool:
        """Whether that will do."""
        return abs(self.off) <= ALLOWED


@dataclass(frozen=True, slots=True)
class Job:
    """What every plan is to do."""

    prompts: list[list[int]]
    new_tokens: int
    temperature: float

    def workload(self, rows: int) -> Workload:
        """Of the first so many prompts."""
        prompt_tokens = round(mean(len(prompt) for prompt in self.prompts[:rows]))
        return Workload(rows, prompt_tokens, self.new_tokens, sampled=self.temperature > 0.0)


async def run_plan(options: EngineOptions, job: Job) -> tuple[ThroughputMeter, Plan]:
    """Serve as many prompts as the plan has rows."""
    rows = options.max_batch or len(job.prompts)
    tally = ThroughputMeter(rows, job.new_tokens)
    async with open_engine(observers=[tally], **as_keywords(options)) as engine:
        await asyncio.gather(*(drain(engine, job, index) for index in range(rows)))
        return tally, engine.plan


async def drain(engine: Engine, job: Job, index: int) -> None:
    params = SamplingParams(max_new_tokens=job.new_tokens, temperature=job.temperature, ignore_eos=True, seed=index)
    async for _ in engine.stream(job.prompts[index], params):
        pass


def as_keywords(options: EngineOptions) -> dict[str, Any]:
    """The fields by name; ``asdict`` would turn the workload into a dict."""
    return {name: getattr(options, name) for name in options.__slots__}


def measure_machine(options: EngineOptions) -> None:
    """Anew, into the cache, from which plans are then made."""
    models = read_models(resolve(options))
    kind = models.resolved.kind
    for number in thread_counts(options.threads, on_device=kind is not None):
        how: dict[str, Any] = {"kind": kind, "link_rate": options.link_rate, "refresh": True}
        machine_profile(models.resolved.target, models.target.dtype, number, **how)


def foretell(options: EngineOptions, plan: Plan, work: Workload) -> Forecast:
    """On the machine as the cache knows it."""
    models = read_models(resolve(replace(options, workload=work)))
    return forecast_for(models, plan.request, measured_basis(models), work)(plan)


def learn_acceptance(options: EngineOptions, job: Job) -> None:
    """Two pilots: what acceptance explains the tokens per pass of chains, then what spread those of trees."""
    pair = resolve(options)
    assert pair.draft is not None
    for pilot in (replace(options, **CHAIN_PILOT), replace(options, **TREE_PILOT)):
        tally, plan = asyncio.run(run_plan(pilot, job))
        work = job.workload(plan.num_rows)
        models = read_models(resolve(replace(pilot, workload=work)))
        basis = measured_basis(models)
        profile = forecast_for(models, plan.request, basis, work).profile_of(plan)
        known = basis.known.acceptance, basis.known.spread
        if plan.proposes_trees:
            known = known[0], fitted_spread(plan, profile, tally.tokens_per_pass)
        else:
            known = fitted_acceptance(plan, profile, tally.tokens_per_pass), known[1]
        remember_acceptance(pair.target, pair.draft, *known, proposals=1e9, sampled=work.sampled)
        print(f"pilot, {plan.shape}: {tally.tokens_per_pass:.2f} tokens per pass", flush=True)
    known_now = known_acceptance(pair.target, pair.draft, sampled=job.temperature > 0.0)
    print(f"acceptance {known_now.acceptance:.3f}, spread {known_now.spread:.3f}", flush=True)


def measure(options: EngineOptions, job: Job) -> Outcome:
    """The plan between two forecasts, each on the machine as it is then."""
    work = options.workload or job.workload(options.max_batch or len(job.prompts))
    _, plan = decide(read_models(resolve(options)))
    before = foretell(options, plan, work)
    tally, ran = asyncio.run(run_plan(options, job))
    assert ran == plan, "the plan that ran is the one that was forecast"
    measure_machine(options)
    forecasts = before, foretell(options, plan, work)
    outcome = Outcome(plan.shape, forecasts, tally.tokens_per_s, tally.tokens_per_pass, tally.prefill_s)
    print(line(outcome), flush=True)
    return outcome


def line(outcome: Outcome) -> str:
    before, after = outcome.forecasts
    return (
        f"{outcome.shape:62} {before.tokens_per_s:8.2f} {after.tokens_per_s:8.2f} {outcome.tokens_per_s:8.2f}"
        f" {100 * outcome.off:+7.1f} %  {before.tokens_per_pass:6.2f} {outcome.tokens_per_pass:6.2f}"
        f" {before.prefill_s:7.1f} {outcome.prefill_s:7.1f}  {before.bottleneck}"
    )


def verdict(outcomes: Sequence[Outcome]) -> str:
    """How many forecasts were good enough, and which were not."""
    bad = [f"{outcome.shape} ({100 * outcome.off:+.0f} %)" for outcome in outcomes if not outcome.within]
    said = f"{len(outcomes) - len(bad)} of {len(outcomes)} forecasts within {100 * ALLOWED:.0f} %"
    return said + (f"; not {', '.join(bad)}" if bad else "")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--link-rate", type=parse_rate, default=None, help="such as 1.0GB/s")
    parser.add_argument("--device-memory", type=parse_bytes, default=981_000_000)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of plans, from 0; -1: the one that aspec chooses")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    job = Job(bench_batch.make_prompts(options.target, options.prompts), options.new_tokens, options.temperature)
    engine = EngineOptions(
        target=options.target,
        draft=options.draft,
        link_rate=options.link_rate,
        device_memory=options.device_memory,
        threads=options.threads,
        max_context=max(map(len, job.prompts)) + options.new_tokens,
    )
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        measure_machine(engine)
        learn_acceptance(engine, job)
        measure_machine(engine)
        outcomes = run_all(engine, job, range(-1, len(PLANS)) if options.only is None else options.only)
    print(verdict(outcomes))
    if options.json is not None:
        found = [{**asdict(outcome), "off": outcome.off} for outcome in outcomes]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(outcome.within for outcome in outcomes) else 1


def run_all(engine: EngineOptions, job: Job, numbers: Sequence[int]) -> list[Outcome]:
    """What aspec chooses by itself, and plans that are given."""
    free = replace(engine, workload=job.workload(len(job.prompts)))
    models = read_models(resolve(free))
    chosen = best_plans(models).best
    print(f"chosen: {chosen.plan.shape}, {chosen.forecast.tokens_per_s:.2f} tokens/s, {chosen.forecast.job_s:.1f} s")
    print(f"{'plan':62} {'forecast, again':>17} {'measured':>8} {'off':>9}  {'per pass':>13} {'prefill s':>15}")
    return [measure(free if n < 0 else replace(engine, **PLANS[n]), job) for n in numbers]


if __name__ == "__main__":
    sys.exit(main())
