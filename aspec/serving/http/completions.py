"""``POST /v1/chat/completions`` and ``POST /v1/completions``: a body in, an answer out, whole or as it comes."""

import asyncio
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aspec.engine.engine import Engine
from aspec.generation.sampler import TokenLogprob, derive_seed
from aspec.generation.stats import Piece
from aspec.serving.http.choices import Choices, Wanted
from aspec.serving.http.chunks import Chunks
from aspec.serving.http.delivery import delivery_of, parse_requests
from aspec.serving.http.errors import HttpError, as_http
from aspec.serving.http.limits import Receive, read_object
from aspec.serving.http.service import Service
from aspec.serving.http.writing import EventWriter, Send, WholeWriter, unless_left
from aspec.serving.openai_requests import Request
from aspec.serving.openai_responses import Generated, Label, answer_body, usage_of

SEED_BITS = 62  # of a seed that no request gives


@dataclass(slots=True)
class Made:
    """One answer so far; mutable, because pieces arrive."""

    num_prompt: int
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "length"
    num_cached: int = 0

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.texts.append(piece.text)
        self.tokens += piece.token_ids
        self.logprobs += piece.logprobs
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


async def prepare(service: Service, engine: Engine, requests: Sequence[Request], model: str) -> Job:
    """Encode the prompts. Raises PromptError for one that cannot be served."""
    wanted: list[Wanted] = []
    for request in requests:
        seed = request.sampling.get("seed", secrets.randbits(SEED_BITS))
        first = await service.wanted(engine, request, seed)
        seeds = [seed, *(derive_seed(seed, index) for index in range(1, request.num_choices))]
        wanted += [Wanted(first.tokens, replace(first.params, seed=one)) for one in seeds]
    return Job(service, engine, requests, wanted, Label(uuid.uuid4().hex, int(time.time()), model))


async def answer_whole(job: Job, writer: WholeWriter) -> None:
    """Generate all answers and send them in one object."""
    limits, made = job.service.limits, [Made(len(one.tokens)) for one in job.wanted]
    try:
        with job.service.running(job.wanted):
            async with Choices(job.engine, job.wanted) as choices:
                while not choices.done:
                    found = await choices.next(max(0.0, limits.comment_s - writer.silence_s))
                    if found is not None:
                        made[found[0]].add(found[1])
                    if writer.silence_s >= limits.comment_s:
                        await writer.wait()
        job.said(made)
        generated = [one.generated() for one in made]
        await writer.answer(answer_body(job.request, generated, job.label, job.engine.tokenizer))
    except asyncio.CancelledError:
        if not job.service.cut:
            raise
        await writer.fail(cut_short())
    except Exception as error:
        await writer.fail(as_http(error))


async def answer_streamed(job: Job, writer: EventWriter, *, include_usage: bool) -> None:
    """Generate all answers and send each piece as it comes; an error is the last event."""
    chunks = Chunks.of(job.request, job.label, job.engine.tokenizer, include_usage=include_usage)
    limits, made = job.service.limits, [Made(len(one.tokens)) for one in job.wanted]
    await writer.begin()
    try:
        with job.service.running(job.wanted):
            async with Choices(job.engine, job.wanted) as choices:
                for index in range(len(made)):
                    for chunk in chunks.first(index):
                        await writer.event(chunk)
                while not choices.done:
                    found = await choices.next(max(0.0, limits.comment_s - writer.silence_s))
                    if found is not None:
                        made[found[0]].add(found[1])
                        for chunk in chunks.of_piece(*found):
                            await writer.event(chunk)
                    if writer.silence_s >= limits.comment_s:
                        await writer.comment(choices.progress())
        job.said(made)
        if include_usage:
            generated = [one.generated() for one in made]
            await writer.event(chunks.usage(usage_of(generated, job.request.num_choices)))
        await writer.done()
    except asyncio.CancelledError:
        if not job.service.cut:
            raise
        await writer.event(cut_short().body)
    except Exception as error:
        await writer.event(as_http(error).body)
    await writer.end()


def cut_short() -> HttpError:
    """The error of an answer that a stopping server has not finished."""
    return HttpError(503, "the server has stopped before the answer was complete", code="stopping")


class Completions:
    """An ASGI application for one of the two forms."""

    def __init__(self, service: Service, url: str) -> None:
        self._service, self._url = service, url

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request. Raises HttpError, PromptError and Left before the response has begun."""
        service = self._service
        delivery, rest = delivery_of(await read_object(receive, service.limits))
        requests = parse_requests(self._url, rest, service.limits.prompts)
        model = service.names.check(requests[0].model)
        with service.promised(sum(request.num_choices for request in requests)) as engine:
            job = await prepare(service, engine, requests, model)
            if delivery.stream:
                work = answer_streamed(job, EventWriter(send), include_usage=delivery.include_usage)
            else:
                work = answer_whole(job, WholeWriter(send))
            await unless_left(receive, work)
