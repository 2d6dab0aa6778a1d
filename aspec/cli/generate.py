"""What ``aspec generate`` does: generate text for prompts to stdout, and a summary to stderr."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from aspec.api import Result, collect, seeded
from aspec.cli.flags.commands import GenerateFlags
from aspec.cli.flags.groups import RunFlags
from aspec.cli.front.opening import fetching
from aspec.cli.interrupts import run
from aspec.cli.verify import Generation, Verdict, conclude, verify
from aspec.engine.design import design
from aspec.engine.engine import Engine, describe_plan
from aspec.engine.preparation import prepare_prompts
from aspec.generation.defaults import describe, sampling_params
from aspec.generation.grammar.compiler import check_grammar
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import TokenLogprob
from aspec.generation.stats import RequestStats
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.memory import peak_rss_bytes
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.observe.recorder import Recorder
from aspec.observe.snapshot import Snapshot
from aspec.observe.timeline import Stops, Timeline, bottleneck, decode_stretch, hidden_share, uses_of
from aspec.plan import Plan
from aspec.planning.resolve import Resolved, resolve, revise
from aspec.serving.openai_responses import finite
from aspec.tasks.executor import Observer
from aspec.units import format_bytes, format_rate

PROBE_S = 0.5  # seconds of a probe of the link rate
RECENT_SPANS = 100_000  # the last spans, from which the closing line is computed


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """A run that is ready to start: resolved models, prompts as token ids."""

    flags: RunFlags
    resolved: Resolved
    prompts: list[list[int]]
    params: SamplingParams
    console: Console
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a job, one per prompt; its plan; the raw link rates before and after it, in bytes per second."""

    results: list[Result]
    plan: Plan
    link_rates: tuple[float | None, float | None]
    device_peak_bytes: int | None = None  # as its allocator counts; None for a CPU

    @property
    def link_rate(self) -> float | None:
        """The higher of the two probes, in bytes per second; None without weights to stream or without a probe."""
        return max((rate for rate in self.link_rates if rate), default=None)


def generate_on_console(flags: GenerateFlags, prompts: Sequence[str], console: Console) -> None:
    """Serve every prompt. Raises AspecError."""
    run(partial(generate_to_console, prepare(flags, prompts, console), flags.verify))


def prepare(flags: RunFlags, prompts: Sequence[str], console: Console, *, weights: bool = True) -> GenerateJob:
    """Find models and encode prompts, which may block for long (a download). Raises AspecError.

    It runs before the loop starts, so Ctrl-C works as usual. ``weights``: False for a run in virtual time.
    """
    with fetching(console) as fetches:
        resolved = resolve(flags.options(), fetches, weights=weights)
    defaults, given = generation_defaults(resolved.target), flags.sampling()
    params = sampling_params(defaults, given)
    if params.grammar is not None:
        check_grammar(params.grammar)
    ready = prepare_prompts(resolved, prompts, params, raw=flags.raw, system=flags.system)
    if asked_for := describe(defaults, given):
        console.note(asked_for)
    return GenerateJob(flags, ready.resolved, ready.tokens, params, console, ready.tokenizer)


async def generate_to_console(job: GenerateJob, verified: bool) -> None:
    """Serve every prompt; with ``verified`` decode again without speculation and compare.

    Raises AspecError for unusable input, for a failure of the machine, and for a token that speculation changed; in
    this case the text is already printed.
    """
    console = job.console
    recorder = Recorder(RECENT_SPANS)
    outcome = await run_job(job, [recorder], probe=job.flags.as_json)
    entries = [as_object(result, outcome, job.tokenizer) for result in outcome.results]
    console.note(summarise(outcome))
    console.note(summarise_lanes(console.stops.left_out(recorder.timeline())))
    verdicts: list[Verdict] = []
    try:
        if verified:
            verdicts = await _verify(job, outcome)
            entries = [{**e, "verified": verdict.as_dict()} for e, verdict in zip(entries, verdicts, strict=True)]
    finally:  # print the generated text, also after an error
        if job.flags.as_json:
            console.write("".join(json.dumps(entry) + "\n" for entry in entries))
    if verified:
        console.note(conclude(verdicts, exact=outcome.plan.request.exact))


async def run_job(job: GenerateJob, observers: Sequence[Observer] = (), *, probe: bool = False) -> Outcome:
    """Open an engine, serve every prompt, close the engine; ``observers`` see the spans.

    ``probe``: measure the raw link rate before and after the prompts. Raises AspecError.
    """
    console = job.console
    monitor = Monitor(console.stops)
    if job.params.max_new_tokens == 0:
        return _serve_nothing(job, (await asyncio.to_thread(design, job.resolved)).plan)
    with watch(monitor, console, dashboard=not job.flags.no_dashboard):
        async with Engine(
            revise(job.resolved, progress=monitor.progress), [monitor, *observers], [monitor.issued]
        ) as engine:
            num_prompt_tokens = sum(len(prompt) for prompt in job.prompts)
            most_tokens = len(job.prompts) * job.params.max_new_tokens
            monitor.opened(engine.plan, most_tokens, num_prompt_tokens, describe_job(job))
            console.note(describe_plan(engine.plan))
            before = await engine.probe_link_rate(PROBE_S) if probe else None
            try:
                results = await _serve(engine, job, monitor)
            except asyncio.CancelledError:
                console.note(summarise_part(monitor.snapshot(time.perf_counter())))
                raise
            after = await engine.probe_link_rate(PROBE_S) if probe else None
            results = [replace(result, stats=_without_stops(result.stats, console.stops)) for result in results]
            return Outcome(results, engine.plan, (before, after), engine.device_peak_bytes)


def describe_job(job: GenerateJob) -> tuple[str, ...]:
    """What runs, in words: models, sampling, prompts."""
    options, params = job.resolved.options, job.params
    models = "the demo pair" if options.target is None else Path(options.target).name
    models += f" with {Path(options.draft).name}" if options.draft is not None else ""
    words = f"temperature {params.temperature:g}" if params.temperature > 0.0 else "greedy"
    words += f", top-k {params.top_k}" if params.top_k else ""
    words += f", top-p {params.top_p:g}" if params.top_p < 1.0 else ""
    words += f", min-p {params.min_p:g}" if params.min_p else ""
    words += f", seed {params.seed}" if params.temperature > 0.0 else ""
    num_tokens = sum(len(prompt) for prompt in job.prompts)
    prompts = f"{len(job.prompts)} prompts of {num_tokens} tokens in all" if len(job.prompts) > 1 else ""
    return models, prompts or f"prompt of {num_tokens} tokens", words


async def _verify(job: GenerateJob, outcome: Outcome) -> list[Verdict]:
    params = seeded(job.params, len(job.prompts))
    tokens = (result.token_ids for result in outcome.results)
    generations = [Generation(*fields) for fields in zip(job.prompts, params, tokens, strict=True)]
    return await verify(job.resolved, outcome.plan, generations, job.console)


async def _serve(engine: Engine, job: GenerateJob, monitor: Monitor) -> list[Result]:
    """Serve all prompts in shared passes. Print a single text as it comes, several texts one after the other."""
    alone, as_json = len(job.prompts) == 1, job.flags.as_json
    texts = [""] * len(job.prompts)

    def hear(text: str, row: int) -> None:
        monitor.heard(text, row)
        if alone and not as_json:
            job.console.write(text)
        texts[row] += text

    def show(row: int) -> None:
        if not as_json:
            job.console.write("\n" if alone else f"[{row}] {texts[row]}\n")

    results: list[Result] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(collect(engine, prompt, params, partial(hear, row=row)))
                for row, (prompt, params) in enumerate(
                    zip(job.prompts, seeded(job.params, len(job.prompts)), strict=True)
                )
            ]
            for row, task in enumerate(tasks):
                results.append(await task)
                show(row)
    finally:  # what there is of the others, after an error or a signal
        for row in range(len(results), len(texts)):
            if texts[row] and not alone:
                show(row)
    return results


def _serve_nothing(job: GenerateJob, plan: Plan) -> Outcome:
    """The outcome if no token is asked for: empty texts; no weight is read."""
    stats = [RequestStats(len(prompt), 0.0).close(plan, 0.0) for prompt in job.prompts]
    if not job.flags.as_json:
        job.console.write("\n" if len(stats) == 1 else "".join(f"[{index}] \n" for index in range(len(stats))))
    return Outcome([Result("", (), "length", own) for own in stats], plan, (None, None))


def as_object(result: Result, outcome: Outcome, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON object of one prompt; link rates are in bytes per second."""
    stats = result.stats.as_dict(outcome.link_rate, peak_rss_bytes())
    before, after = outcome.link_rates
    logprobs = [_logprobs(one, tokenizer) for one in result.logprobs]
    more = {"logprobs": logprobs} if logprobs else {}
    links = {"link_bytes_per_s_before": before, "link_bytes_per_s_after": after}
    return {
        "text": result.text,
        **more,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": {"prompt_tokens": result.stats.prompt_tokens, "completion_tokens": result.stats.completion_tokens},
        "stats": {**stats, **links, "device_peak_bytes": outcome.device_peak_bytes},
        "plan": outcome.plan.as_dict(),
    }


def _logprobs(one: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """The logprobs at one position; special tokens are written by name."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": tokenizer.spell([token]), "logprob": finite(logprob)}

    return {**entry(one.token, one.logprob), "top": [entry(*pair) for pair in one.top]}


def summarise(outcome: Outcome) -> str:
    """One line on all prompts: tokens, seconds, speed, tokens per pass; ``--json`` has the details of each prompt."""
    stats = [result.stats for result in outcome.results]
    tokens, reasons = sum(one.completion_tokens for one in stats), Counter(r.finish_reason for r in outcome.results)
    alone = len(stats) == 1
    why = next(iter(reasons)) if alone else ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    words = [f"{tokens} tokens ({why})" if alone else f"{len(stats)} prompts: {tokens} tokens ({why})"]
    more = tokens - len(stats)  # than the first token of each prompt
    words.append(f"prefill {max(one.prefill_s for one in stats):.2f} s")
    begun_s = min(one.arrived_s + one.prefill_s for one in stats)
    decode_s = max(one.arrived_s + one.prefill_s + one.decode_s for one in stats) - begun_s
    if decode_s > 0 and more > 0:
        words.append(f"{more / decode_s:.2f} tokens/s" + ("" if alone else " together"))
    passes, proposed = sum(one.passes for one in stats), sum(one.proposed for one in stats)
    if passes and more > 0:
        words.append(f"{more / passes:.2f} tokens {'' if alone else 'of a row '}per pass")
    if proposed:
        words.append(f"{sum(one.accepted for one in stats) / proposed:.0%} of proposals accepted")
    if chosen := sum(one.experts.chosen for one in stats):
        held = max(0, chosen - sum(one.experts_loaded for one in stats))
        words.append(f"{held / chosen:.0%} of the chosen experts in memory")
    if guessed := sum(one.experts.guessed for one in stats):
        wasted = format_bytes(max(0, sum(one.experts.wasted_bytes for one in stats)))
        used = sum(one.experts.used for one in stats)
        words.append(f"{used / guessed:.0%} of the {guessed} experts prefetched were used, {wasted} in vain")
    if outcome.link_rate:
        words.append(f"raw link {format_rate(outcome.link_rate)}")
    return ", ".join(words)


def summarise_part(snapshot: Snapshot) -> str:
    """One line on a run that was stopped."""
    if snapshot.stage != "decode":
        return f"stopped after {snapshot.done} of {snapshot.total} prompt tokens"
    words = f"stopped after {snapshot.tokens} tokens"
    return f"{words}, {snapshot.tokens_per_s:.2f} tokens/s" if snapshot.tokens_per_s else words


def summarise_lanes(timeline: Timeline) -> str:
    """One line on decoding: its bottleneck, and the share of compute that the weight stream hides."""
    stretch = decode_stretch(timeline)
    words = [bottleneck(uses_of(timeline, *stretch))]
    hidden = hidden_share(timeline.work(*stretch))
    if hidden is not None:
        words.append(f"{100 * hidden:.0f} % of target and draft compute ran while weights streamed")
    return ", ".join(words)


def _without_stops(stats: RequestStats, stops: Stops) -> RequestStats:
    """The statistics on a clock that stands still while the process is stopped."""
    first_s = stats.arrived_s + stats.prefill_s
    begun, first, ended = (stops.running_s(at) for at in (stats.arrived_s, first_s, first_s + stats.decode_s))
    return replace(stats, arrived_s=begun, prefill_s=first - begun, decode_s=ended - first)
