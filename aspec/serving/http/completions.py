"""``POST /v1/chat/completions`` and ``POST /v1/completions``: a body in, an answer out, whole or as it comes."""

from collections.abc import Sequence
from typing import Any

from aspec.generation.stats import Piece
from aspec.serving.http.forms.chunks import Chunks
from aspec.serving.http.forms.delivery import Delivery, delivery_of, parse_requests
from aspec.serving.http.forms.echo import Echo
from aspec.serving.http.job import Job, generate, or_error, prepare
from aspec.serving.http.limits import Receive, read_object
from aspec.serving.http.service import Service
from aspec.serving.http.writing import EventWriter, Send, WholeWriter, unless_left
from aspec.serving.openai_responses import answer_body, usage_of


class Completions:
    """An ASGI application for one of the two forms."""

    def __init__(self, service: Service, url: str) -> None:
        self._service, self._url = service, url

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request. Raises HttpError, PromptError and Left before the response has begun."""
        service = self._service
        delivery, rest = delivery_of(await read_object(receive, service.limits), self._url)
        requests = parse_requests(self._url, rest, service.limits.prompts)
        model = service.names.check(requests[0].model)
        with service.promised(sum(request.num_choices for request in requests)) as engine:
            job = await prepare(service, engine, requests, model, echo=delivery.echo)
            echoes = _echoes(job) if delivery.echo else []
            writer = EventWriter(send) if delivery.stream else WholeWriter(send)
            if isinstance(writer, EventWriter):
                await writer.begin()
                work = _stream(job, writer, echoes, delivery)
            else:
                work = _answer(job, writer, echoes)
            await unless_left(receive, or_error(service, writer, work))


def _echoes(job: Job) -> list[Echo]:
    """The echo of every answer."""
    owners = [request for request in job.requests for _ in range(request.num_choices)]
    return [Echo.of(own, one.tokens, job.engine.tokenizer) for own, one in zip(owners, job.wanted, strict=True)]


async def _answer(job: Job, writer: WholeWriter, echoes: Sequence[Echo]) -> None:
    """Generate all answers and send them in one object."""
    made = await generate(job, writer)
    body = answer_body(job.request, [one.generated() for one in made], job.label, job.engine.tokenizer)
    for index, echo in enumerate(echoes):
        body["choices"][index] = echo.before(body["choices"][index], made[index].prompt_logprobs)
    await writer.answer(body)


async def _stream(job: Job, writer: EventWriter, echoes: Sequence[Echo], delivery: Delivery) -> None:
    """Generate all answers and send each piece as it comes."""
    chunks = Chunks(
        job.request, job.label, job.engine.tokenizer, delivery.include_usage, delivery.include_drafted, echoes
    )

    async def tell(index: int, piece: Piece) -> None:
        for chunk in chunks.of_piece(index, piece):
            await writer.event(chunk)

    for index in range(len(job.wanted)):
        for chunk in chunks.first(index):
            await writer.event(chunk)
    generated = [one.generated() for one in await generate(job, writer, tell)]
    if delivery.include_usage:
        await writer.event(chunks.usage(usage_of(generated, job.request.num_choices)))
    await writer.done()
    await writer.end()
