"""What ``aspec bench`` does: measure this machine's ceilings and some runs of the engine, and print one table.

Each run is compared with the raw link rate that was probed just before and after it, because the rate of a shared disk
changes over time.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from aspec.api import Result, collect, seeded
from aspec.cli.flags.commands import BenchFlags
from aspec.cli.generate import PROBE_S, GenerateJob, prepare
from aspec.cli.interrupts import run
from aspec.engine.engine import Engine, describe_plan
from aspec.io.host_info import HostInfo, host_info
from aspec.io.memory import peak_rss_bytes
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.observe.recorder import Recorder
from aspec.observe.summary import Summary, summarise
from aspec.observe.timeline import DRAFT
from aspec.plan import Plan
from aspec.planning.resolve import revise
from aspec.planning.simulation import fitted_acceptance, fitted_spread, measured_profile, task_seconds
from aspec.profiling.ceilings import Ceilings, measure_ceilings
from aspec.profiling.cost_tables import SimCosts
from aspec.profiling.hardware import Hardware, Processor
from aspec.profiling.layer_ratios import LayerRatios, measure_layer_ratios
from aspec.profiling.profile_cache import known_acceptance, remember_acceptance
from aspec.threads import Threads, num_cores
from aspec.units import format_bytes

PROMPT = "class Reader:\n    def __init__(self, path):\n        self.path = path\n"
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One measured generation of all prompts."""

    summary: Summary
    link_bytes_per_s: float | None  # raw, the mean of the probes before and after the run
    prefill_s: float  # median over the prompts
    bytes_per_pass: int

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes that streamed per decoded token; None without a decoding pass."""
        per_pass = self.summary.tokens_per_pass
        return self.bytes_per_pass / per_pass if per_pass else None

    @property
    def ceiling_tokens_per_s(self) -> float | None:
        """Tokens per pass times raw link rate over bytes per pass; None if no weights stream."""
        per_pass, rate = self.summary.tokens_per_pass, self.link_bytes_per_s
        return per_pass * rate / self.bytes_per_pass if per_pass and rate and self.bytes_per_pass else None

    @property
    def ceiling_fraction(self) -> float | None:
        """The run's speed as a share of its ceiling."""
        ceiling, speed = self.ceiling_tokens_per_s, self.summary.tokens_per_s
        return speed / ceiling if ceiling and speed else None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All measurements."""

    machine: HostInfo
    ceilings: Ceilings
    plan: Plan
    runs: tuple[Run, ...]
    hardware: Hardware  # this machine, with the tasks of the last run
    peak_rss_bytes: int
    device_peak_bytes: int | None  # as its allocator counts; None for a CPU
    ratios: LayerRatios | None = None  # None on a device


def bench_to_console(flags: BenchFlags, console: Console) -> None:
    """Measure and print. Raises AspecError."""
    prompts = flags.prompts() if flags.prompt or flags.file else [PROMPT]
    job = prepare(flags, prompts, console)
    job = replace(job, params=replace(job.params, ignore_eos=True))
    report = run(partial(_measure, job, flags.rounds))
    if job.resolved.kind is None:  # the engine has freed its memory
        report = replace(report, ratios=_layer_ratios(job, report.plan))
    if flags.as_json:
        print(json.dumps(as_object(report)))
    else:
        for line in table(report):
            print(line)


async def _measure(job: GenerateJob, rounds: int) -> BenchReport:
    monitor, recorder = Monitor(job.console.stops), Recorder()
    resolved = revise(
        job.resolved, progress=monitor.progress, reuse_prefix=False
    )  # so that every run prefills its prompts
    with watch(monitor, job.console, dashboard=not job.flags.no_dashboard):
        async with Engine(resolved, [monitor, recorder], [monitor.issued]) as engine:
            job.console.note(describe_plan(engine.plan))
            monitor.opened(engine.plan, len(job.prompts) * (WARM_UP_TOKENS + rounds * job.params.max_new_tokens))
            draft_step_s = await _warm_up(engine, job, recorder)
            before = await engine.probe_link_rate(PROBE_S)
            ceilings = await asyncio.to_thread(measure_ceilings, before, draft_step_s, engine.dtype)
            runs = []
            for index in range(rounds):
                recorder.clear()
                before = await engine.probe_link_rate(PROBE_S)
                results = await _generate(engine, job, monitor)
                after = await engine.probe_link_rate(PROBE_S)
                runs.append(_as_run(recorder, results, [rate for rate in (before, after) if rate], engine.plan))
                speed = runs[-1].summary.tokens_per_s or 0.0
                job.console.note(f"run {index + 1} of {rounds}: {speed:.2f} tokens/s")
            measured = measured_profile(recorder.timeline())
            hardware = _hardware(ceilings, measured, engine.dtype)
            await asyncio.to_thread(_remember, job, engine.plan, measured, runs)
            peaks = peak_rss_bytes(), engine.device_peak_bytes
            return BenchReport(host_info(), ceilings, engine.plan, tuple(runs), hardware, *peaks)


def _layer_ratios(job: GenerateJob, plan: Plan) -> LayerRatios:
    resolved, threads = job.resolved, plan.request.threads or Threads()
    how = partial(measure_layer_ratios, exact=plan.request.exact, threads=threads.decode, cores=num_cores())
    return how(resolved.target, resolved.dtype)


def _hardware(ceilings: Ceilings, measured: SimCosts, dtype: torch.dtype) -> Hardware:
    """This machine's figures: ceilings of the CPU, and rates and task costs that a run measured."""
    host = host_info()
    name = "float32" if dtype == torch.float32 else "bfloat16"
    return Hardware(
        name=host.cpu,
        disk_bytes_per_s=ceilings.disk_bytes_per_s or measured.disk_bytes_per_s,
        h2d_bytes_per_s=measured.copy_bytes_per_s,
        d2h_bytes_per_s=measured.d2h_bytes_per_s,
        threads=host.threads,
        cpu=Processor(
            flop_per_s={name: ceilings.matmul_flop_per_s},
            memory_bytes_per_s=ceilings.memory_bytes_per_s,
            copy_bytes_per_s=ceilings.copy_bytes_per_s,
        ),
        tasks=task_seconds(measured),
    )


def _remember(job: GenerateJob, plan: Plan, measured: SimCosts, runs: Sequence[Run]) -> None:
    """Store the measured acceptance of the pair for later plans.

    A run with trees determines the spread (the value of further choices) if the acceptance of the first choice is
    known; every other run determines the acceptance.
    """
    target, draft = job.resolved.trained, job.resolved.draft
    per_pass = [run.summary.tokens_per_pass for run in runs if run.summary.tokens_per_pass]
    if draft is None or not plan.max_draft_tokens or not per_pass:
        return
    sampled = job.params.temperature > 0.0
    known = known_acceptance(target, draft, sampled=sampled)
    acceptance, spread = known.acceptance, known.spread
    profile = replace(measured, acceptance=acceptance, spread=spread)
    if plan.proposes_trees and known.proposals:
        spread = fitted_spread(plan, profile, median(per_pass))
    else:
        acceptance = fitted_acceptance(plan, profile, median(per_pass))
    rounds = sum(run.summary.rounds for run in runs)
    remember_acceptance(target, draft, acceptance, spread, proposals=rounds, sampled=sampled)


async def _warm_up(engine: Engine, job: GenerateJob, recorder: Recorder) -> float | None:
    """Generate a few tokens; returns the median seconds of a draft step, None without a draft."""
    await collect(engine, job.prompts[0], replace(job.params, max_new_tokens=WARM_UP_TOKENS))
    steps = [s.stop_s - s.start_s for s in recorder.timeline().lane(DRAFT) if s.name != "draft_prefill"]
    return median(steps) if steps else None


async def _generate(engine: Engine, job: GenerateJob, monitor: Monitor) -> list[Result]:
    """Serve all prompts at once."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(collect(engine, prompt, params, partial(monitor.heard, row=row)))
            for row, (prompt, params) in enumerate(zip(job.prompts, seeded(job.params, len(job.prompts)), strict=True))
        ]
    return [task.result() for task in tasks]


def _as_run(recorder: Recorder, results: Sequence[Result], rates: Sequence[float], plan: Plan) -> Run:
    summary = summarise(recorder.timeline({"bytes_per_pass": plan.streamed_bytes}))
    prefill_s = median(result.stats.prefill_s for result in results)
    return Run(summary, sum(rates) / len(rates) if rates else None, prefill_s, plan.streamed_bytes)


# -- the table -----------------------------------------------------------------------------------------------


def table(report: BenchReport) -> Iterator[str]:
    """The lines of the table: the median over the runs, then least and most."""
    machine, ceilings = report.machine, report.ceilings
    yield f"{machine.cpu}, {machine.cores} cores, {machine.threads} compute threads, torch {machine.torch}"
    yield describe_plan(report.plan)
    yield ""
    yield "ceilings of this machine"
    yield from _rows(
        (
            "links, raw" if report.plan.num_staging else "disk, direct reads of these weights",
            _scaled(ceilings.disk_bytes_per_s, 1e9, "GB/s"),
        ),
        ("memory copy", _scaled(ceilings.copy_bytes_per_s, 1e9, "GB/s")),
        ("memory read, matrix x vector", _scaled(ceilings.memory_bytes_per_s, 1e9, "GB/s")),
        ("matrix products, 64 rows", _scaled(ceilings.matmul_flop_per_s, 1e9, "GFLOP/s")),
        ("one draft step", _scaled(ceilings.draft_step_s, 1e-3, "ms")),
    )
    if report.ratios is not None:
        yield ""
        yield "the same layers in another way, seconds as a multiple: 1 row, tree of 32, prompt of 256"
        yield from _rows(*_ratio_rows(report.ratios))
    yield ""
    yield f"the run, median of {len(report.runs)} (least .. most)"
    yield from _rows(
        ("tokens/s, decoding", _spread([run.summary.tokens_per_s for run in report.runs], 1, "")),
        ("tokens per pass", _spread([run.summary.tokens_per_pass for run in report.runs], 1, "")),
        ("bytes per token", _spread([run.bytes_per_token for run in report.runs], 1e6, "MB")),
        ("ceiling, tokens/s", _spread([run.ceiling_tokens_per_s for run in report.runs], 1, "")),
        ("fraction of the ceiling", _spread([run.ceiling_fraction for run in report.runs], 1, "")),
        ("compute hidden under the stream", _spread([run.summary.hidden for run in report.runs], 0.01, "%")),
        ("time to the first token", _spread([run.prefill_s for run in report.runs], 1, "s")),
        ("peak memory of the process", format_bytes(report.peak_rss_bytes)),
        *(
            []
            if report.device_peak_bytes is None
            else [("peak memory of the device", format_bytes(report.device_peak_bytes))]
        ),
        ("bottleneck", report.runs[-1].summary.bottleneck),
    )


def _ratio_rows(ratios: LayerRatios) -> Iterator[tuple[str, str]]:
    yield f"exact, with {Threads.all(ratios.threads)}", ", ".join(f"{x:.2f}" for x in ratios.exact.values())
    if ratios.cores:
        words = f"{Threads.all(ratios.num_cores)} instead of one"
        yield words, ", ".join(f"{x:.2f}" for x in ratios.cores.values())


def _rows(*rows: tuple[str, str]) -> Iterator[str]:
    for label, value in rows:
        yield f"  {label:38} {value}"


def _scaled(value: float | None, unit: float, name: str) -> str:
    return "-" if value is None else f"{value / unit:.2f} {name}".rstrip()


def _spread(values: Sequence[float | None], unit: float, name: str) -> str:
    known = [value / unit for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ({min(known):.2f} .. {max(known):.2f})" if len(known) > 1 else ""
    return f"{median(known):.2f} {name}".rstrip() + spread


def as_object(report: BenchReport) -> dict[str, Any]:
    """The JSON object, in bytes, seconds and tokens. ``hardware`` is the content of a machine file."""
    return {
        "machine": asdict(report.machine),
        "ceilings": asdict(report.ceilings),
        "plan": {"bytes_per_pass": report.plan.streamed_bytes, "held_bytes": report.plan.held_bytes},
        "runs": [
            {
                **run.summary.as_dict(),
                "prefill_s": run.prefill_s,
                "bytes_per_token": run.bytes_per_token,
                "link_bytes_per_s": run.link_bytes_per_s,
                "ceiling_tokens_per_s": run.ceiling_tokens_per_s,
                "ceiling_fraction": run.ceiling_fraction,
            }
            for run in report.runs
        ],
        "peak_rss_bytes": report.peak_rss_bytes,
        "device_peak_bytes": report.device_peak_bytes,
        "ratios": None if report.ratios is None else asdict(report.ratios),
        "hardware": report.hardware.as_object(),
    }
