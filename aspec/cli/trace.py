"""What ``aspec trace`` does: record a run, simulate it, or write both into one trace."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from aspec import __version__
from aspec.cli.command_flags import TraceFlags
from aspec.cli.front.trace_summary import print_summaries
from aspec.cli.generate import GenerateJob, as_object, prepare, run_job
from aspec.cli.generate import summarise as summarise_results
from aspec.cli.interrupts import run
from aspec.engine.design import design
from aspec.errors import InternalError, UserError
from aspec.observe.chrome_trace import write_trace
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
    """Run on this machine, in virtual time, or both, and write the trace. Raises AspecError."""
    output = flags.output
    if output is None:
        raise InternalError("recording a trace needs an output file")
    machine = read_machine(flags.simulate) if flags.simulate else None
    _check_writable(output)
    job = prepare(flags, prompts, console, weights=machine is None or flags.compare)
    timelines: dict[str, Timeline] = {}
    if machine is not None and not flags.compare:
        plan = design(job.resolved).plan
    else:
        plan, timelines[REAL] = _record(job, flags.max_spans, output)
    if machine is not None:
        timelines[SIMULATED] = _simulate(job, plan, _task_costs(job, plan, machine), flags.max_spans)
    elif flags.compare:
        timelines[SIMULATED] = _simulate(job, plan, measured_profile(timelines[REAL]), flags.max_spans)
    write_trace(output, timelines)
    _note_written(output, timelines, console)
    if flags.summary:
        print_summaries(timelines, flags.as_json)


def _record(job: GenerateJob, max_spans: int, output: Path) -> tuple[Plan, Timeline]:
    """Run, and return the plan and the timeline. If the run fails, the spans so far are still written."""
    recorder = Recorder(max_spans)
    epoch_ns = time.time_ns() - time.perf_counter_ns()
    try:
        outcome = run(partial(run_job, job, [recorder]))
    except BaseException:
        if len(recorder):
            write_trace(output, {REAL: recorder.timeline(_facts(job, None))})
            job.console.note(f"the run did not finish; its recorded part is in {output}")
        raise
    for result in outcome.results:
        if job.flags.as_json:
            job.console.write(json.dumps(as_object(result, outcome, job.tokenizer)) + "\n")
    job.console.note(summarise_results(outcome))
    timeline = recorder.timeline(_facts(job, outcome.plan))
    started_ns = epoch_ns + round(timeline.start_s * 1e9)  # wall-clock time, to align other traces
    return outcome.plan, replace(timeline, facts={**timeline.facts, "started_ns": started_ns})


def _task_costs(job: GenerateJob, plan: Plan, machine: Hardware) -> SimCosts:
    """The costs of tasks on a machine: from its file, otherwise from the shapes of the models."""
    if machine.tasks is not None:
        return tasks_profile(machine, machine.tasks)
    models = read_models(elsewhere(job.resolved, machine))
    sampled = job.params.temperature > 0.0
    return pricing(models, CostBasis(machine, AcceptanceStats()), exact=plan.request.exact, sampled=sampled)(plan)


def _simulate(job: GenerateJob, plan: Plan, costs: SimCosts, max_spans: int) -> Timeline:
    recorder = Recorder(max_spans)
    new = job.params.max_new_tokens
    simulate(plan, costs, [(len(prompt), new) for prompt in job.prompts], [recorder])
    return recorder.timeline(_facts(job, plan))


def _facts(job: GenerateJob, plan: Plan | None) -> dict[str, str | int | float]:
    """The facts of a trace: version, models, plan. ``plan`` is None if the run did not finish."""
    options = job.resolved.options
    models = {"target": str(options.target or "demo"), "draft": str(options.draft or "none")}
    facts: dict[str, str | int | float] = {"version": __version__, **models}
    if plan is not None:
        facts |= {"slots": plan.num_slots, "bytes_per_pass": plan.streamed_bytes, "held_bytes": plan.held_bytes}
    return facts


def _check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before a run that may take long. Raises UserError."""
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path}: the trace cannot be written: {error.strerror}.") from error


def _note_written(output: Path, timelines: Mapping[str, Timeline], console: Console) -> None:
    tasks = sum(len(timeline.slices) for timeline in timelines.values())
    size = format_bytes(output.stat().st_size)
    console.note(f"{output}: {tasks} tasks, {size}; open it at https://ui.perfetto.dev")
    if len(timelines) == 2:
        real_s, simulated_s = (_pass_s(summarise(timelines[name])) for name in (REAL, SIMULATED))
        if real_s and simulated_s:
            error_percent = 100 * (simulated_s / real_s - 1)
            console.note(f"a pass took {real_s:.4f} s, simulated {simulated_s:.4f} s ({error_percent:+.1f} %)")


def _pass_s(summary: Summary) -> float:
    """Seconds per decoding pass, because the number of passes depends on random acceptance; 0 without a pass."""
    return summary.decode_s / (summary.rounds - 1) if summary.rounds > 1 else 0.0
