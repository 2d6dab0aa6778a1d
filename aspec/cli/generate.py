"""What ``aspec generate`` does: generate text for prompts to stdout, and a summary to stderr."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aspec.api import Result, collect, seeded
from aspec.cli.flags import RunFlags
from aspec.cli.verify import Generation, Verdict, conclude, verify
from aspec.engine.design import design
from aspec.engine.engine import Engine, describe_plan
from aspec.errors import PromptError
from aspec.generation.defaults import sampling_params
from aspec.generation.params import SamplingParams
from aspec.generation.stats import RequestStats
from aspec.generation.tokenizer import Tokenizer
from aspec.io.memory import peak_rss_bytes
from aspec.models.model import generation_defaults
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.observe.recorder import Recorder
from aspec.observe.timeline import bottleneck, decode_stretch, hidden_share, uses_of
from aspec.plan import Plan, Workload
from aspec.planning.fit import fit
from aspec.planning.resolve import Resolved, resolve, revise
from aspec.tasks.executor import Observer
from aspec.units import format_rate

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


def prepare(flags: RunFlags, prompts: Sequence[str], console: Console) -> GenerateJob:
    """Find models and encode prompts, which may block for long (a download). Raises AspecError.

    It runs before the loop starts, so Ctrl-C works as usual.
    """
    resolved = resolve(flags.options())
    tokenizer = Tokenizer.load(resolved.target)
    tokens = [_encode(tokenizer, text, flags) for text in prompts]
    params = sampling_params(generation_defaults(resolved.target), flags.sampling())
    return GenerateJob(flags, _fit(resolved, tokens, params), tokens, params, console)


async def generate_to_console(job: GenerateJob, verified: bool) -> None:
    """Serve every prompt; with ``verified`` decode again without speculation and compare.

    Raises AspecError for unusable input, for a failure of the machine, and for a token that speculation changed; in
    this case the text is already printed.
    """
    console = job.console
    recorder = Recorder(RECENT_SPANS)
    outcome = await run_job(job, [recorder], probe=job.flags.as_json)
    entries = [as_object(result, outcome) for result in outcome.results]
    for result in outcome.results:
        console.note(summarise(result, outcome.link_rate))
    console.note(summarise_lanes(recorder))
    verdicts: list[Verdict] = []
    try:
        if verified:
            verdicts = await _verify(job, outcome)
            entries = [{**e, "verified": verdict.as_dict()} for e, verdict in zip(entries, verdicts, strict=True)]
    finally:  # print the generated text, also after an error
        if job.flags.as_json:
            console.write("".join(json.dumps(entry) + "\n" for entry in entries))
    if verified:
        console.note(conclude(verdicts, exact=job.resolved.exact))


async def run_job(job: GenerateJob, observers: Sequence[Observer] = (), *, probe: bool = False) -> Outcome:
    """Open an engine, serve every prompt, close the engine; ``observers`` see the spans.

    ``probe``: measure the raw link rate before and after the prompts. Raises AspecError.
    """
    monitor, console = Monitor(), job.console
    if job.params.max_new_tokens == 0:
        return _serve_nothing(job, (await asyncio.to_thread(design, job.resolved)).plan)
    with watch(monitor, console, dashboard=not job.flags.no_dashboard):
        async with Engine(
            revise(job.resolved, progress=monitor.progress), [monitor, *observers], [monitor.issued]
        ) as engine:
            monitor.opened(engine.plan, len(job.prompts) * job.params.max_new_tokens)
            console.note(describe_plan(engine.plan))
            before = await engine.probe_link_rate(PROBE_S) if probe else None
            results = await _serve(engine, job, monitor)
            after = await engine.probe_link_rate(PROBE_S) if probe else None
            return Outcome(results, engine.plan, (before, after), engine.device_peak_bytes)


def _encode(tokenizer: Tokenizer, text: str, flags: RunFlags) -> list[int]:
    if not text:
        raise PromptError("the prompt is empty: expected some text; give --prompt, --file or standard input.")
    if flags.raw or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    system = [{"role": "system", "content": flags.system}] if flags.system else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}])


def _fit(resolved: Resolved, prompts: list[list[int]], params: SamplingParams) -> Resolved:
    """Set the context and the workload of these prompts. Raises PromptError for one that is empty or too long."""
    lengths, new = [len(tokens) for tokens in prompts], params.max_new_tokens
    if not min(lengths):
        raise PromptError("a prompt has no tokens: expected some text that the tokenizer knows; change the prompt.")
    mean = max(1, round(sum(lengths) / len(lengths)))
    work = Workload(len(prompts), mean, max(2, new), sampled=params.temperature > 0.0)
    return fit(resolved, work, max(lengths), new)


async def _verify(job: GenerateJob, outcome: Outcome) -> list[Verdict]:
    params = seeded(job.params, len(job.prompts))
    tokens = (result.token_ids for result in outcome.results)
    generations = [Generation(*fields) for fields in zip(job.prompts, params, tokens, strict=True)]
    return await verify(job.resolved, outcome.plan, generations, job.console)


async def _serve(engine: Engine, job: GenerateJob, monitor: Monitor) -> list[Result]:
    """Serve all prompts in shared passes. Print a single text as it comes, several texts one after the other."""
    alone, as_json = len(job.prompts) == 1, job.flags.as_json

    def hear(text: str) -> None:
        monitor.heard(text)
        if alone and not as_json:
            job.console.write(text)

    results: list[Result] = []
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(collect(engine, prompt, params, hear))
            for prompt, params in zip(job.prompts, seeded(job.params, len(job.prompts)), strict=True)
        ]
        for index, task in enumerate(tasks):
            result = await task
            results.append(result)
            if not as_json:
                job.console.write("\n" if alone else f"[{index}] {result.text}\n")
    return results


def _serve_nothing(job: GenerateJob, plan: Plan) -> Outcome:
    """The outcome if no token is asked for: empty texts; no weight is read."""
    stats = [RequestStats(len(prompt), 0.0).close(plan, 0.0) for prompt in job.prompts]
    if not job.flags.as_json:
        job.console.write("\n" if len(stats) == 1 else "".join(f"[{index}] \n" for index in range(len(stats))))
    return Outcome([Result("", (), "length", own) for own in stats], plan, (None, None))


def as_object(result: Result, outcome: Outcome) -> dict[str, Any]:
    """The JSON object of one prompt; link rates are in bytes per second."""
    stats = result.stats.as_dict(outcome.link_rate, peak_rss_bytes())
    before, after = outcome.link_rates
    more = {"logprobs": [asdict(logprob) for logprob in result.logprobs]} if result.logprobs else {}
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


def summarise(result: Result, rate: float | None) -> str:
    """One line: speed, tokens per pass, and the rate of the weight stream. ``rate``: raw link, bytes per second."""
    stats = result.stats
    words = [f"{stats.completion_tokens} tokens ({result.finish_reason})", f"prefill {stats.prefill_s:.2f} s"]
    if stats.tokens_per_s is not None:
        words.append(f"{stats.tokens_per_s:.2f} tokens/s")
    if stats.tokens_per_pass is not None:
        words.append(f"{stats.tokens_per_pass:.2f} tokens per pass")
    if stats.acceptance_rate is not None:
        words.append(f"{stats.acceptance_rate:.0%} of proposals accepted")
    if stats.stream_bytes_per_s is not None:
        words.append(f"stream {format_rate(stats.stream_bytes_per_s)}")
    if rate:
        words.append(f"raw {format_rate(rate)}")
    return ", ".join(words)


def summarise_lanes(recorder: Recorder) -> str:
    """One line on decoding: its bottleneck, and the share of compute that the weight stream hides."""
    timeline = recorder.timeline()
    stretch = decode_stretch(timeline)
    words = [bottleneck(uses_of(timeline, *stretch))]
    hidden = hidden_share(timeline.work(*stretch))
    if hidden is not None:
        words.append(f"{100 * hidden:.0f} % of target and draft compute hidden under the stream")
    return ", ".join(words)
