"""The planner against reality: forecasts of many plans beside runs of the same plans, and where the chosen one stands.

    python tools/bench_plan.py BIG --draft aspec/demo/draft --link-rate 1.0GB/s

Every plan serves the same prompts. Its forecast comes first, from this machine's profile and the acceptance that a
pilot run on these prompts shows; then it runs for real, and the decode rate is taken the same way from its spans.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bench_batch

from aspec.cache import AcceptanceStats
from aspec.design import decide
from aspec.engine import Engine, open_engine
from aspec.forecast import Tally
from aspec.needs import read_models, request_for
from aspec.options import EngineOptions
from aspec.params import SamplingParams
from aspec.plan import Plan, Workload
from aspec.planning import CostBasis, forecast_for, measured_basis, plan_workload
from aspec.resolve import resolve
from aspec.search import Forecast
from aspec.simulation import fitted_acceptance
from aspec.units import parse_bytes, parse_rate

PLANS: tuple[dict[str, Any], ...] = (
    {"max_batch": 64, "speculation": "off"},
    {"max_batch": 64, "speculation": "chain"},
    {"max_batch": 64, "speculation": "chain", "num_groups": 2},
    {"max_batch": 32, "speculation": "off"},
    {"max_batch": 32, "speculation": "chain"},
    {"max_batch": 16, "speculation": "chain", "num_groups": 2},
    {"max_batch": 16, "speculation": "chain"},
    {"max_batch": 8, "speculation": "chain"},
    {"max_batch": 4, "speculation": "off"},
    {"max_batch": 4, "speculation": "tree"},
    {"max_batch": 64, "speculation": "chain", "num_draft_tokens": 1},
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A plan, what was foretold, what came."""

    shape: str
    forecast: Forecast
    tokens_per_s: float
    tokens_per_pass: float
    prefill_s: float

    @property
    def off(self) -> float:
        """How far the forecast was from the run."""
        return self.forecast.tokens_per_s / self.tokens_per_s - 1.0


async def run_plan(options: EngineOptions, prompts: list[list[int]], new_tokens: int) -> tuple[Tally, Plan]:
    """Serve as many prompts as the plan has rows."""
    rows = options.max_batch or len(prompts)
    tally = Tally(rows, new_tokens)
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    async with open_engine(observers=[tally], **asdict_shallow(options)) as engine:
        await asyncio.gather(*(drain(engine, prompt, params) for prompt in prompts[:rows]))
        return tally, engine.plan


async def drain(engine: Engine, prompt: list[int], params: SamplingParams) -> None:
    async for _ in engine.stream(prompt, params):
        pass


def asdict_shallow(options: EngineOptions) -> dict[str, Any]:
    """The fields as keywords; ``asdict`` would turn the workload into a dict."""
    return {name: getattr(options, name) for name in options.__slots__}


def learn_acceptance(options: EngineOptions, basis: CostBasis, prompts: list[list[int]], new_tokens: int) -> CostBasis:
    """The pilot: what acceptance explains its tokens per pass."""
    pilot = replace(options, max_batch=8, speculation="chain", num_draft_tokens=6, num_groups=1, workload=None)
    tally, plan = asyncio.run(run_plan(pilot, prompts, new_tokens))
    models = read_models(resolve(pilot))
    forecaster = forecast_for(models, request_for(models), basis, Workload(8, 40, new_tokens))
    acceptance = fitted_acceptance(plan, forecaster.profile, tally.tokens_per_pass)
    print(
        f"pilot: {tally.tokens_per_pass:.2f} tokens per pass with chains of 6, acceptance {acceptance:.3f}", flush=True
    )
    return replace(basis, known=AcceptanceStats(acceptance, basis.known.spread, 1.0))


def measure(options: EngineOptions, basis: CostBasis, prompts: list[list[int]], new_tokens: int) -> Outcome:
    """The forecast of a plan, then the plan."""
    models = read_models(resolve(options))
    rows = options.max_batch or len(prompts)
    mean = round(sum(map(len, prompts[:rows])) / rows)
    plan = decide(models)
    forecast = forecast_for(models, request_for(models), basis, Workload(rows, mean, new_tokens))(plan)
    tally, ran = asyncio.run(run_plan(options, prompts, new_tokens))
    assert ran == plan, "the plan that ran is the one that was forecast"
    outcome = Outcome(plan.shape, forecast, tally.tokens_per_s, tally.tokens_per_pass, tally.prefill_s)
    print(line(outcome), flush=True)
    return outcome


def line(outcome: Outcome) -> str:
    forecast = outcome.forecast
    return (
        f"{outcome.shape:56} {forecast.tokens_per_s:8.2f} {outcome.tokens_per_s:8.2f} {100 * outcome.off:+7.1f} %"
        f" {forecast.tokens_per_pass:6.2f} {outcome.tokens_per_pass:6.2f}"
        f" {forecast.prefill_s:7.1f} {outcome.prefill_s:7.1f}  {forecast.bottleneck}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--link-rate", type=parse_rate, default=None, help="such as 1.0GB/s")
    parser.add_argument("--device-memory", type=parse_bytes, default=981_000_000)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of plans, from 0")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    prompts = bench_batch.make_prompts(options.target, options.prompts)
    engine = EngineOptions(
        target=options.target,
        draft=options.draft,
        link_rate=options.link_rate,
        device_memory=options.device_memory,
        threads=options.threads,
        max_context=max(map(len, prompts)) + options.new_tokens,
    )
    basis = measured_basis(read_models(resolve(engine)))
    basis = learn_acceptance(engine, basis, prompts, options.new_tokens)
    mean = round(sum(map(len, prompts)) / len(prompts))
    work = replace(engine, workload=Workload(len(prompts), mean, options.new_tokens))
    models = read_models(resolve(work))
    chosen = plan_workload(models, request_for(models), basis).best
    print(
        f"chosen: {chosen.plan.shape}, {chosen.forecast.tokens_per_s:.2f} tokens/s, job {chosen.forecast.job_s:.1f} s"
    )
    print(f"{'plan':56} {'forecast':>8} {'measured':>8} {'off':>9} {'per pass':>13} {'prefill s':>15}")
    numbers = range(len(PLANS)) if options.only is None else options.only
    wanted = [work, *(replace(engine, **PLANS[n]) for n in numbers)]  # first what aspec chooses by itself
    outcomes = [measure(one, basis, prompts, options.new_tokens) for one in wanted]
    within = sum(abs(outcome.off) <= 0.15 for outcome in outcomes)
    print(f"{within} of {len(outcomes)} forecasts within 15 %")
    if options.json is not None:
        found = [{**asdict(outcome), "off": outcome.off} for outcome in outcomes]
        options.json.write_text(json.dumps({"chosen": chosen.plan.shape, "outcomes": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
