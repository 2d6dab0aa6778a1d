"""What ``aspec trace`` does: record a run, simulate one, lay both side by side, read a file back."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from aspec.api import run
from aspec.cli.command_flags import TraceFlags
from aspec.cli.generate import Job, as_object, prepare, run_job
from aspec.cli.generate import summarise as summarise_result
from aspec.engine.design import design
from aspec.errors import InternalError, UserError
from aspec.observe.chrome_trace import read_trace, write_trace
from aspec.observe.console import Console
from aspec.observe.recorder import Recorder
from aspec.observe.summary import Summary, summarise
from aspec.observe.timeline import Timeline
from aspec.plan import Plan
from aspec.planning.footprint import read_models
from aspec.planning.simulation import measured_profile, simulate, tasks_profile
from aspec.planning.workload import CostBasis, elsewhere, pricing
from aspec.profiling.cost_tables import SimCosts
from aspec.profiling.hardware import Hardware, read_machine
from aspec.profiling.profile_cache import AcceptanceStats
from aspec.units import format_bytes

REAL, SIMULATED = "aspec", "aspec simulated"


def record(flags: TraceFlags, prompts: Sequence[str], console: Console) -> None:
    """Run, really or in virtual time or both, and write the trace. Raises AspecError."""
    output = flags.output
    if output is None:
        raise InternalError("a trace to record needs a file to go to")
    machine = read_machine(flags.simulate) if flags.simulate else None
    _check_writable(output)
    job = prepare(flags, prompts, console)
    timelines: dict[str, Timeline] = {}
    if machine is not None and not flags.compare:
        plan = design(job.resolved).plan
    else:
        plan, timelines[REAL] = _record(job, flags.max_spans, output)
    if machine is not None:
        timelines[SIMULATED] = _simulate(job, plan, _profile(job, plan, machine), flags.max_spans)
    elif flags.compare:
        timelines[SIMULATED] = _simulate(job, plan, measured_profile(timelines[REAL]), flags.max_spans)
    write_trace(output, timelines)
    _report(output, timelines, console)
    if flags.summary:
        _print_summaries(timelines, flags.as_json)


def summarise_file(path: Path, as_json: bool) -> None:
    """Print what a trace says. Raises UserError where it is none."""
    _print_summaries(read_trace(path), as_json)


def _record(job: Job, max_spans: int, output: Path) -> tuple[Plan, Timeline]:
    """A run and its timeline; of a run that does not finish, what there is goes to the file all the same."""
    recorder = Recorder(max_spans)
    epoch_ns = time.time_ns() - time.perf_counter_ns()
    try:
        outcome = run(partial(run_job, job, [recorder]))
    except BaseException:
        if len(recorder):
            write_trace(output, {REAL: recorder.timeline(_facts(job, None))})
            job.console.note(f"the run did not finish; what was recorded of it is in {output}")
        raise
    for result in outcome.results:
        if job.flags.as_json:
            job.console.write(json.dumps(as_object(result, outcome)) + "\n")
        job.console.note(summarise_result(result, None))
    timeline = recorder.timeline(_facts(job, outcome.plan))
    started_ns = epoch_ns + round(timeline.start_s * 1e9)  # to lay other traces of the same time beside this one
    return outcome.plan, replace(timeline, facts={**timeline.facts, "started_ns": started_ns})


def _profile(job: Job, plan: Plan, machine: Hardware) -> SimCosts:
    """What tasks cost on a machine: as its file says of them, otherwise by the models' shapes."""
    if machine.tasks is not None:
        return tasks_profile(machine, machine.tasks)
    models = read_models(elsewhere(job.resolved, machine))
    sampled = job.params.temperature > 0.0
    return pricing(models, CostBasis(machine, AcceptanceStats()), exact=models.resolved.exact, sampled=sampled)(plan)


def _simulate(job: Job, plan: Plan, profile: SimCosts, max_spans: int) -> Timeline:
    recorder = Recorder(max_spans)
    new = job.params.max_new_tokens
    simulate(plan, profile, [(len(prompt), new) for prompt in job.prompts], [recorder])
    return recorder.timeline(_facts(job, plan))


def _facts(job: Job, plan: Plan | None) -> dict[str, str | int | float]:
    """What the figures hold for; without a plan the run did not finish."""
    options = job.resolved.options
    models = {"target": str(options.target or "demo"), "draft": str(options.draft or "none")}
    facts: dict[str, str | int | float] = {"version": version("aspec"), **models}
    if plan is not None:
        facts |= {"slots": plan.num_slots, "bytes_per_pass": plan.streamed_bytes, "held_bytes": plan.held_bytes}
    return facts


def _check_writable(path: Path) -> None:
    """A run may take long: refuse a file that cannot be written before it begins. Raises UserError."""
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path}: the trace cannot be written: {error.strerror}.") from error


def _report(output: Path, timelines: Mapping[str, Timeline], console: Console) -> None:
    tasks = sum(len(timeline.slices) for timeline in timelines.values())
    size = format_bytes(output.stat().st_size)
    console.note(f"{output}: {tasks} tasks, {size}; open it at https://ui.perfetto.dev")
    if len(timelines) == 2:
        real_s, simulated_s = (_pass_s(summarise(timelines[name])) for name in (REAL, SIMULATED))
        if real_s and simulated_s:
            off = 100 * (simulated_s / real_s - 1)
            console.note(f"a pass took {real_s:.4f} s, simulated {simulated_s:.4f} s ({off:+.1f} %)")


def _pass_s(summary: Summary) -> float:
    """Seconds of a decoding pass; 0 where there was none. How many there are is the acceptance's luck."""
    return summary.decode_s / (summary.rounds - 1) if summary.rounds > 1 else 0.0


def _print_summaries(timelines: Mapping[str, Timeline], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: summarise(timeline).as_dict() for name, timeline in timelines.items()}))
        return
    for name, timeline in timelines.items():
        print(f"{name}: {timeline.facts.get('target', '')}".rstrip(": "))
        for line in summarise(timeline).lines():
            print(f"  {line}".rstrip())
