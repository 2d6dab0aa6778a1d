"""What ``aspec generate`` does: prompts to tokens, streams to stdout, a summary to stderr."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aspec.api import Result, collect, seeded
from aspec.assembly import folders
from aspec.engine import Engine, describe_plan
from aspec.errors import PromptError
from aspec.io.memory import peak_rss_bytes
from aspec.model import generation_defaults
from aspec.options import EngineOptions
from aspec.params import SamplingParams
from aspec.progress import Console, write_text
from aspec.text import Tokenizer

MAX_AUTO_BATCH = 16
PROBE_S = 0.5
TAKEN_FROM_CHECKPOINT = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate for, and how to print it."""

    prompts: list[str]
    raw: bool
    system: str | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A request whose models are found and whose prompts are token ids."""

    request: Request
    options: EngineOptions
    prompts: list[list[int]]
    params: SamplingParams
    console: Console


def prepare(request: Request, options: EngineOptions, sampling: Mapping[str, Any], console: Console) -> Job:
    """Everything that may block for long (a download) or refuse, before the loop starts and Ctrl-C is its business."""
    target, draft = folders(options)
    if options.target is not None:
        options = replace(options, target=target, draft=draft)
    tokenizer = Tokenizer.load(target)
    prompts = [_encode(tokenizer, text, request) for text in request.prompts]
    params = sampling_params(generation_defaults(target), sampling)
    return Job(request, _fit(options, prompts, params, console), prompts, params, console)


async def generate_to_console(job: Job) -> None:
    """Serve every prompt. Raises AspecError where the input cannot be used or the machine fails."""
    as_json, console = job.request.as_json, job.console
    async with Engine(job.options) as engine:
        console.note(describe_plan(engine.plan))
        before = await asyncio.to_thread(engine.probe_link_rate, PROBE_S) if as_json else None
        results = await _serve(engine, job)
        after = await asyncio.to_thread(engine.probe_link_rate, PROBE_S) if as_json else None
        rates = [rate for rate in (before, after) if rate]
        for result in results:
            if as_json:
                write_text(json.dumps(as_object(result, before, after)) + "\n")
            console.note(summarise(result, max(rates, default=None)))


def sampling_params(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """Flags first, then generation_config.json, then greedy."""
    values = dict(given)
    sampled = bool(defaults.get("do_sample"))
    for name in TAKEN_FROM_CHECKPOINT:
        if values[name] is None:
            values[name] = defaults.get(name) if sampled else None
    if values["temperature"] is None and sampled:
        values["temperature"] = 1.0
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def _encode(tokenizer: Tokenizer, text: str, request: Request) -> list[int]:
    if not text:
        raise PromptError("the prompt is empty: expected some text; give --prompt, --file or standard input.")
    if request.raw or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    system = [{"role": "system", "content": request.system}] if request.system else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}])


def _fit(options: EngineOptions, prompts: list[list[int]], params: SamplingParams, console: Console) -> EngineOptions:
    """Rows and context that these prompts need, and no more."""
    longest = max(len(tokens) for tokens in prompts)
    return replace(
        options,
        max_batch=options.max_batch or min(len(prompts), MAX_AUTO_BATCH),
        max_context=options.max_context or max(2, longest + params.max_new_tokens),
        progress=console.progress,
    )


async def _serve(engine: Engine, job: Job) -> list[Result]:
    """All prompts share passes; a single prompt's text streams, several are printed whole, in order."""
    alone, as_json = len(job.prompts) == 1, job.request.as_json
    heard = write_text if alone and not as_json else None
    results: list[Result] = []
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(collect(engine, prompt, params, heard))
            for prompt, params in zip(job.prompts, seeded(job.params, len(job.prompts)), strict=True)
        ]
        for index, task in enumerate(tasks):
            result = await task
            results.append(result)
            if not as_json:
                write_text("\n" if alone else f"[{index}] {result.text}\n")
    return results


def as_object(result: Result, before: float | None, after: float | None) -> dict[str, Any]:
    """The JSON object of one prompt; raw link rates in bytes per second."""
    rate = max((r for r in (before, after) if r), default=None)
    stats = result.stats.as_dict(rate, peak_rss_bytes())
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": {"prompt_tokens": result.stats.prompt_tokens, "completion_tokens": result.stats.completion_tokens},
        "stats": {**stats, "link_bytes_per_s_before": before, "link_bytes_per_s_after": after},
    }


def summarise(result: Result, rate: float | None) -> str:
    """One line: speed, tokens per pass, and how the weight stream did."""
    stats = result.stats
    words = [f"{stats.completion_tokens} tokens ({result.finish_reason})", f"prefill {stats.prefill_s:.2f} s"]
    if stats.tokens_per_s is not None:
        words.append(f"{stats.tokens_per_s:.2f} tokens/s")
    if stats.tokens_per_pass is not None:
        words.append(f"{stats.tokens_per_pass:.2f} tokens per pass")
    if stats.acceptance_rate is not None:
        words.append(f"{stats.acceptance_rate:.0%} of proposals accepted")
    if stats.stream_bytes_per_s is not None:
        words.append(f"stream {stats.stream_bytes_per_s / 1e9:.2f} GB/s")
    if rate:
        words.append(f"raw {rate / 1e9:.2f} GB/s")
    return ", ".join(words)
