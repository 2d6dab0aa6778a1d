"""How an engine serves many requests: a bounded window of requests at a time, one answer per request."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from aspec.api import Result, collect
from aspec.engine.engine import Engine
from aspec.errors import NumericError, PromptError, first_error
from aspec.generation.grammar.compiler import check_grammar
from aspec.generation.grammar.tool_grammar import calls_only, text_or_calls
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import derive_seed
from aspec.generation.text.tokenizer import Tokenizer
from aspec.serving.openai_requests import Request
from aspec.serving.refusals import ContextExceeded, Refused, RequestError

WINDOW = 2  # requests in the engine per row of its plan; 2, so that the next request begins as soon as one ends


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is ready for the engine: encoded, with its sampling parameters."""

    id: str
    request: Request
    tokens: list[int]
    params: SamplingParams
    refused: PromptError | None = None  # an error that came while the request was prepared


Outcome = Sequence[Result] | Refused
"""The choices of a request, or its error."""

Answered = Callable[[PreparedRequest, Outcome], Awaitable[None]]
"""Called with every outcome; a worker takes its next request when this returns."""


async def serve(engine: Engine, requests: Iterable[PreparedRequest], answered: Answered, drain: asyncio.Event) -> None:
    """Serve requests, a bounded window at a time; answers come in any order. A thread advances ``requests``.

    After ``drain`` is set no new request begins; requests that have generated a token finish, the others get no answer.
    """
    remaining, turn = iter(requests), asyncio.Lock()
    drained = asyncio.ensure_future(drain.wait())

    async def work() -> None:
        while True:
            async with turn:
                one = None if drain.is_set() else await asyncio.to_thread(next, remaining, None)
            outcome = None if one is None else await answer(engine, one, drained)
            if one is None or outcome is None:
                return
            await answered(one, outcome)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(WINDOW * engine.plan.num_rows):
                group.create_task(work())
    finally:
        drained.cancel()


async def answer(engine: Engine, one: PreparedRequest, leave: asyncio.Future[Any]) -> Outcome | None:
    """The answer to a request, or its error; None if it had generated no token when ``leave`` was done."""
    if one.refused is not None:
        return one.refused
    begun = asyncio.Event()
    results: asyncio.Future[list[Result]] | None = None
    try:
        check_room(len(one.tokens), one.request.max_new_tokens, engine.max_context)
        results = asyncio.ensure_future(_choices(engine, one, begun))
        await asyncio.wait([results, leave], return_when=asyncio.FIRST_COMPLETED)
        return await results if results.done() or begun.is_set() else None
    except (PromptError, NumericError) as error:
        return error
    finally:
        if results is not None and not results.done():
            results.cancel()
            with suppress(asyncio.CancelledError):
                await results


async def _choices(engine: Engine, one: PreparedRequest, begun: asyncio.Event) -> list[Result]:
    """All choices of a request, at once; ``begun`` is set at the first token. Raises the first error."""
    seeds = [one.params.seed, *(derive_seed(one.params.seed, index) for index in range(1, one.request.num_choices))]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(collect(engine, one.tokens, replace(one.params, seed=seed), lambda _: begun.set()))
                for seed in seeds
            ]
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    return [task.result() for task in tasks]


def check_room(num_prompt: int, wanted: int | None, context: int) -> None:
    """Raises ContextExceeded if a prompt and the tokens it asks for, or one if it does not say, need more tokens."""
    needed = num_prompt + (1 if wanted is None else max(1, wanted))
    if needed <= context:
        return
    raise ContextExceeded(
        f"the row needs {num_prompt} prompt tokens and {'at least 1' if wanted is None else wanted} to generate; the "
        f"context holds {context} tokens. Shorten the prompt, lower max_tokens or raise --max-context",
        "prompt" if num_prompt >= context else "max_tokens",
    )


def params_of(tokenizer: Tokenizer, request: Request, defaults: SamplingParams, seed: int) -> SamplingParams:
    """The sampling parameters of a request, with the grammar of its answer; ``seed`` if the request gives none.

    May block for some milliseconds. Raises RequestError if the grammar or the tools cannot be served.
    """
    params, asked = request.params(defaults, seed), request.tools
    try:
        if asked is not None:
            form, named = (
                tokenizer.tool_format(),
                [one for one in asked.tools if one["function"]["name"] == asked.choice],
            )
            make = text_or_calls if asked.choice == "auto" else calls_only
            params = replace(params, grammar=make(named or asked.tools, form, several=asked.parallel and not named))
        if params.grammar is not None:
            check_grammar(params.grammar)
    except PromptError as error:
        raise RequestError(str(error), "response_format" if asked is None else "tools") from error
    return params


def encode(tokenizer: Tokenizer, request: Request) -> list[int]:
    """The prompt of a request as token ids. Raises PromptError when it cannot be encoded."""
    if request.is_chat:
        messages = [message for message in request.prompt if isinstance(message, dict)]
        return tokenizer.encode_chat(messages, variables=request.template)
    if isinstance(request.prompt, str):
        return tokenizer.encode(request.prompt)
    return [token for token in request.prompt if isinstance(token, int)]
