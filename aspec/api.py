"""The synchronous API: one prompt or several in, results out."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

from aspec.engine.admission import Prompt
from aspec.engine.engine import Engine, open_engine
from aspec.errors import first_error
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import TokenLogprob, derive_seed
from aspec.generation.stats import RequestStats

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Result:
    """One finished generation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" | "length"
    stats: RequestStats
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, if requested


@overload
def generate(prompts: str, params: SamplingParams | None = None, **options: Any) -> Result: ...
@overload
def generate(prompts: Sequence[Prompt], params: SamplingParams | None = None, **options: Any) -> list[Result]: ...
def generate(
    prompts: str | Sequence[Prompt], params: SamplingParams | None = None, **options: Any
) -> Result | list[Result]:
    """Generate for one prompt (returns a Result) or for a list of prompts, which share passes (returns a list).

    Keywords are the fields of ``SamplingParams`` and ``EngineOptions``. With several prompts the seed of each one
    derives from the given seed and the prompt's index. Raises UserError for input that cannot be used.
    """
    given = {name: options.pop(name) for name in SamplingParams.__slots__ if name in options}
    params = replace(params or SamplingParams(), **given)
    wanted: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(wanted) == 1:
        options.setdefault("max_batch", 1)

    async def main() -> list[Result]:
        async with open_engine(**options) as engine:
            return await generate_all(engine, wanted, params)

    results = run(main)
    return results[0] if isinstance(prompts, str) else results


async def generate_all(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> list[Result]:
    """Generate for all prompts at once, each with its own seed."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(collect(engine, prompt, own))
            for prompt, own in zip(prompts, seeded(params, len(prompts)), strict=True)
        ]
    return [task.result() for task in tasks]


def seeded(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The parameters of each prompt: one prompt keeps the seed; several derive theirs from the seed and their index."""
    if count == 1:
        return [params]
    return [replace(params, seed=derive_seed(params.seed, index)) for index in range(count)]


async def collect(
    engine: Engine, prompt: Prompt, params: SamplingParams, on_text: Callable[[str], None] | None = None
) -> Result:
    """Read one stream to its end; ``on_text`` receives the text as it arrives."""
    texts: list[str] = []
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    async with aclosing(engine.stream(prompt, params)) as stream:
        async for piece in stream:
            texts.append(piece.text)
            tokens.extend(piece.token_ids)
            logprobs.extend(piece.logprobs)
            if on_text is not None:
                on_text(piece.text)
            if piece.finish_reason is not None and piece.stats is not None:
                return Result("".join(texts), tuple(tokens), piece.finish_reason, piece.stats, tuple(logprobs))
    raise AssertionError("a stream ended without a finish reason")


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function on uvloop where it is available; raise the first of several errors."""

    async def body() -> T:
        return await main()

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(body())
    except BaseExceptionGroup as group:
        raise first_error(group) from None


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The constructor of the event loop: uvloop's, and asyncio's on Windows."""
    if sys.platform == "win32":
        return asyncio.new_event_loop
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
