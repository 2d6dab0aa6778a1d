"""How an engine serves many requests: a bounded window of requests at a time, one answer per request."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aspec.api import Result, collect
from aspec.engine.engine import Engine
from aspec.errors import NumericError, PromptError
from aspec.generation.params import SamplingParams
from aspec.generation.tokenizer import Tokenizer
from aspec.serving.openai_requests import Request

WINDOW = 2  # requests in the engine per row of its plan; 2, so that the next request begins as soon as one ends


class ContextExceeded(PromptError):
    """A request needs more tokens than the context holds."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is ready for the engine: encoded, with its sampling parameters."""

    id: str
    request: Request
    tokens: list[int]
    params: SamplingParams


Refused = PromptError | NumericError
"""The error of one request; other requests are not affected."""

Answered = Callable[[PreparedRequest, Result | Refused], Awaitable[None]]
"""Called with every answer or error; a worker takes its next request when this returns."""


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


async def answer(engine: Engine, one: PreparedRequest, leave: asyncio.Future[Any]) -> Result | Refused | None:
    """The answer to a request, or its error; None if it had generated no token when ``leave`` was done."""
    room, wanted = engine.max_context - len(one.tokens), one.request.max_new_tokens
    if room < max(1, wanted or 0):
        return ContextExceeded(
            f"the row needs {len(one.tokens)} prompt tokens and {wanted if wanted is not None else 'at least 1'} to "
            f"generate; the context holds {engine.max_context} tokens. Shorten the prompt, lower max_tokens or raise "
            f"--max-context."
        )
    begun = asyncio.Event()
    result = asyncio.ensure_future(collect(engine, one.tokens, one.params, lambda _: begun.set()))
    try:
        await asyncio.wait([result, leave], return_when=asyncio.FIRST_COMPLETED)
        return await result if result.done() or begun.is_set() else None
    except (PromptError, NumericError) as error:
        return error
    finally:
        if not result.done():
            result.cancel()
            with suppress(asyncio.CancelledError):
                await result


def encode(tokenizer: Tokenizer, request: Request) -> list[int]:
    """The prompt of a request as token ids. Raises PromptError when it cannot be encoded."""
    if request.is_chat:
        return tokenizer.encode_chat([message for message in request.prompt if isinstance(message, dict)])
    if isinstance(request.prompt, str):
        return tokenizer.encode(request.prompt)
    return [token for token in request.prompt if isinstance(token, int)]
