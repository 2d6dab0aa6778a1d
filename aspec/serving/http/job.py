"""The answers to one request from its prompts to their last pieces, whatever form they are written in."""

import asyncio
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from aspec.engine.engine import Engine
from aspec.generation.sampler import TokenLogprob, derive_seed
from aspec.generation.stats import Piece
from aspec.serving.http.choices import Choices, Wanted
from aspec.serving.http.errors import HttpError, as_http
from aspec.serving.http.service import Service, cut_short
from aspec.serving.openai_requests import Request
from aspec.serving.openai_responses import Generated, Label

OnPiece = Callable[[int, Piece], Awaitable[None]]
"""Called with the number of an answer and its next piece."""


class Writer(Protocol):
    """A response that is written."""

    @property
    def silence_s(self) -> float:
        """Seconds since the last byte."""
        ...

    async def fill(self, progress: str) -> None:
        """Send a byte that says nothing, or tells the progress."""
        ...

    async def fail(self, error: HttpError) -> None:
        """Send an error, and end the response."""
        ...


SEED_BITS = 62  # of a seed that neither a request nor the user gives


@dataclass(slots=True)
class Made:
    """One answer so far; mutable, because pieces arrive."""

    num_prompt: int
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "length"
    num_cached: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.texts.append(piece.text)
        self.tokens += piece.token_ids
        self.logprobs += piece.logprobs
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt_logprobs
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
        if piece.stats is not None:
            self.num_cached = piece.stats.num_cached_tokens

    def generated(self) -> Generated:
        """The answer as a response states it."""
        text, num_tokens = "".join(self.texts), len(self.tokens)
        logprobs = tuple(self.logprobs)
        return Generated(text, self.num_prompt, num_tokens, self.finish_reason, logprobs, self.num_cached)


@dataclass(frozen=True, slots=True)
class Job:
    """The answers to generate for one HTTP request: ``num_choices`` for each of its prompts, in their order."""

    service: Service
    engine: Engine
    requests: Sequence[Request]
    wanted: Sequence[Wanted]
    label: Label

    @property
    def request(self) -> Request:
        """The first request; the others differ in their prompt alone."""
        return self.requests[0]

    def said(self, made: Sequence[Made]) -> None:
        """Note what a chat has said."""
        if self.request.is_chat:
            for one, wanted in zip(made, self.wanted, strict=True):
                messages = [message for message in self.request.prompt if isinstance(message, dict)]
                self.service.said(messages, "".join(one.texts), [*wanted.tokens, *one.tokens])


async def prepare(
    service: Service, engine: Engine, requests: Sequence[Request], model: str, *, echo: bool = False
) -> Job:
    """Encode the prompts; with ``echo`` they are scored where logprobs are asked for. Raises PromptError."""
    wanted: list[Wanted] = []
    for request in requests:
        own = secrets.randbits(SEED_BITS) if service.seed is None else service.seed
        seed = request.sampling.get("seed", own)
        first = await service.wanted(engine, request, seed)
        engine.check_tokens(first.tokens)  # an echo spells them
        seeds = [seed, *(derive_seed(seed, index) for index in range(1, request.num_choices))]
        scored = echo and first.params.logprobs is not None
        wanted += [Wanted(first.tokens, replace(first.params, seed=one), scored) for one in seeds]
    return Job(service, engine, requests, wanted, Label(uuid.uuid4().hex, int(time.time()), model))


async def generate(job: Job, writer: Writer, on_piece: OnPiece | None = None) -> list[Made]:
    """Generate all answers; the response is never silent for long. Raises the error of any of them."""
    most_s, made = job.service.limits.comment_s, [Made(len(one.tokens)) for one in job.wanted]
    with job.service.running(job.wanted):
        async with Choices(job.engine, job.wanted) as choices:
            while not choices.done:
                found = await choices.next(max(0.0, most_s - writer.silence_s))
                if found is not None:
                    index, piece = found
                    made[index].add(piece)
                    if on_piece is not None:
                        await on_piece(index, piece)
                if writer.silence_s >= most_s:
                    await writer.fill(choices.progress())
    job.said(made)
    return made


async def or_error(service: Service, writer: Writer, work: Awaitable[None]) -> None:
    """Do the work of a response; if it fails, or a stopping server ends it, the response says so."""
    try:
        await work
    except asyncio.CancelledError:
        if not service.cut:
            raise
        await writer.fail(cut_short())
    except Exception as error:
        await writer.fail(as_http(error))
