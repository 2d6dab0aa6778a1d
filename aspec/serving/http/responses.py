"""``POST /v1/responses`` and what was answered there: conversations that continue by an id, while the process lives."""

from collections import OrderedDict
from typing import Any

from aspec.generation.stats import Piece
from aspec.serving.http.errors import HttpError
from aspec.serving.http.forms.delivery import delivery_of
from aspec.serving.http.forms.response_form import Messages, ResponseForm, parse_response_request, text_part
from aspec.serving.http.job import Job, generate, or_error, prepare
from aspec.serving.http.limits import Receive, read_object
from aspec.serving.http.service import Service
from aspec.serving.http.writing import EventWriter, Send, WholeWriter, unless_left
from aspec.serving.request_fields import RESPONSES

MOST_STORED = 512  # responses; the oldest are forgotten first
MOST_CHARACTERS = 16 << 20  # of their conversations


class StoredResponses:
    """Responses that may be asked for again and continued; mutable, because they come and go."""

    def __init__(self) -> None:
        self.talks: dict[str, Messages] = {}  # by id
        self._bodies: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._characters = 0

    def add(self, body: dict[str, Any], talk: Messages) -> None:
        """Store a response and its conversation."""
        self.talks[body["id"]], self._bodies[body["id"]] = talk, body
        self._characters += _size(talk)
        while len(self._bodies) > 1 and (len(self._bodies) > MOST_STORED or self._characters > MOST_CHARACTERS):
            self.remove(next(iter(self._bodies)))

    def get(self, name: str) -> dict[str, Any]:
        """A response. Raises HttpError if it is not there."""
        if name not in self._bodies:
            raise HttpError(404, "there is no such response here", code="not_found", param="response_id")
        return self._bodies[name]

    def remove(self, name: str) -> None:
        """Forget a response. Raises HttpError if it is not there."""
        self.get(name)
        del self._bodies[name]
        self._characters -= _size(self.talks.pop(name))


def _size(talk: Messages) -> int:
    return sum(len(str(message["content"])) for message in talk)


class Responses:
    """An ASGI application that makes responses."""

    def __init__(self, service: Service, stored: StoredResponses) -> None:
        self._service, self._stored = service, stored

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request. Raises HttpError, PromptError and Left before the response has begun."""
        service = self._service
        delivery, rest = delivery_of(await read_object(receive, service.limits), RESPONSES)
        asked = parse_response_request(rest, self._stored.talks)
        model = service.names.check(asked.request.model)
        with service.promised(1) as engine:
            job = await prepare(service, engine, [asked.request], model)
            params = job.wanted[0].params
            form = ResponseForm(asked, job.label.id, job.label.created, model, params.temperature, params.top_p)
            writer = ResponseEvents(send, form) if delivery.stream else WholeWriter(send)
            if isinstance(writer, ResponseEvents):
                await writer.begin()
                work = self._stream(job, writer, form)
            else:
                work = self._answer(job, writer, form)
            await unless_left(receive, or_error(service, writer, work))

    async def _answer(self, job: Job, writer: WholeWriter, form: ResponseForm) -> None:
        [made] = await generate(job, writer)
        body = self._store(form, made.generated().text, form.complete(made.generated()))
        await writer.answer(body)

    async def _stream(self, job: Job, writer: "ResponseEvents", form: ResponseForm) -> None:
        async def tell(_: int, piece: Piece) -> None:
            if piece.text:
                await writer.part("response.output_text.delta", delta=piece.text, logprobs=[])

        for kind in ("response.created", "response.in_progress"):
            await writer.tell(kind, response=form.begun())
        await writer.tell("response.output_item.added", output_index=0, item=form.message(None))
        await writer.part("response.content_part.added", part=text_part(""))
        made = (await generate(job, writer, tell))[0].generated()
        await writer.part("response.output_text.done", text=made.text, logprobs=[])
        await writer.part("response.content_part.done", part=text_part(made.text))
        await writer.tell("response.output_item.done", output_index=0, item=form.message(made))
        body = self._store(form, made.text, form.complete(made))
        await writer.tell(f"response.{body['status']}", response=body)
        await writer.end()

    def _store(self, form: ResponseForm, text: str, body: dict[str, Any]) -> dict[str, Any]:
        if form.asked.store:
            self._stored.add(body, form.talk(text))
        return body


class ResponseEvents(EventWriter):
    """The numbered events of a streamed response; mutable, because they are counted."""

    def __init__(self, send: Send, form: ResponseForm) -> None:
        super().__init__(send)
        self._form, self._number = form, 0

    async def tell(self, kind: str, **fields: Any) -> None:
        """Send an event."""
        await self.event({"type": kind, "sequence_number": self._number, **fields}, kind)
        self._number += 1

    async def part(self, kind: str, **fields: Any) -> None:
        """Send an event about the only part of the answer."""
        await self.tell(kind, item_id=f"msg_{self._form.id}", output_index=0, content_index=0, **fields)

    async def fail(self, error: HttpError) -> None:
        """Send an error as the last event."""
        refusal = error.refusal
        await self.tell("error", code=refusal.code, message=refusal.message, param=refusal.param, **error.body)
        await self.end()
