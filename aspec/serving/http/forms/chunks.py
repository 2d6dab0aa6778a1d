"""The objects of a streamed chat or completion: one answer's text in pieces, then why it ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aspec.generation.stats import Piece
from aspec.generation.text.tokenizer import Tokenizer
from aspec.serving.call_reader import CallReader
from aspec.serving.http.forms.echo import Echo
from aspec.serving.openai_requests import Request
from aspec.serving.openai_responses import (
    Label,
    call_object,
    chat_logprobs,
    completion_logprobs,
    reason_with_calls,
)


@dataclass(slots=True)
class Chunks:
    """Makes the chunks of all answers of a request; mutable, because a completion's logprobs count characters."""

    request: Request
    label: Label
    tokenizer: Tokenizer
    include_usage: bool  # then every chunk but the last has a usage of null
    include_drafted: bool = False  # how many leading characters of each text were proposed and accepted
    echoes: Sequence[Echo] = ()  # of all answers, if the prompts are repeated
    _offsets: dict[int, int] = field(default_factory=dict)  # by answer that has begun: characters so far
    _readers: dict[int, CallReader] = field(default_factory=dict)  # by answer that has begun and may call tools

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """What can be said at once: the role, for a chat."""
        if self.request.is_chat:
            yield self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def of_piece(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunks of a piece; none if it says nothing."""
        reason = piece.finish_reason
        if self.echoes and index not in self._offsets:
            yield self._echo(index, piece)
        if self.request.tools is not None:
            reader = self._readers.setdefault(index, CallReader(self.tokenizer.tool_format()))
            yield from self._calls(index, piece, reader)
            reason = reason_with_calls(reason) if reason is not None and reader.num_calls else reason
        elif piece.text or piece.logprobs:
            drafted = {"drafted": piece.num_drafted} if self.include_drafted else {}
            yield self._chunk({**self._said(index, piece), **drafted, "finish_reason": None})
        if reason is not None:
            last: dict[str, Any] = {"delta": {}} if self.request.is_chat else {"text": ""}
            yield self._chunk({"index": index, **last, "logprobs": None, "finish_reason": reason})

    def _calls(self, index: int, piece: Piece, reader: CallReader) -> Iterator[dict[str, Any]]:
        """The chunks of a piece of an answer that may call tools; the first of them has the piece's logprobs."""
        deltas: list[dict[str, Any]] = []
        for said in reader.push(piece.text, final=piece.finish_reason is not None):
            if said.call is None:
                deltas.append({"content": said.text})
            elif said.name is not None:
                begun = call_object(self.label, index, said.call, said.name, said.arguments)
                deltas.append({"tool_calls": [{"index": said.call, **begun}]})
            else:
                more = {"index": said.call, "function": {"arguments": said.arguments}}
                deltas.append({"tool_calls": [more]})
        own = self._said(index, piece)
        for place, delta in enumerate(deltas or [{}] * bool(piece.logprobs)):
            logprobs = own["logprobs"] if place == 0 else None
            yield self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream with usage."""
        return {**self._chunk(None), "usage": usage}

    def _echo(self, index: int, piece: Piece) -> dict[str, Any]:
        echo, logprobs = self.echoes[index], None
        self._offsets[index] = 0
        if self.request.sampling.get("logprobs") is not None:
            logprobs = echo.logprobs(piece.prompt_logprobs)
            self._offsets[index] = sum(map(len, logprobs["tokens"]))
        return self._chunk({"index": index, "text": echo.text, "logprobs": logprobs, "finish_reason": None})

    def _said(self, index: int, piece: Piece) -> dict[str, Any]:
        wanted = self.request.sampling.get("logprobs") is not None
        if self.request.is_chat:
            logprobs = chat_logprobs(piece.logprobs, self.tokenizer) if wanted else None
            return {"index": index, "delta": {"content": piece.text}, "logprobs": logprobs}
        logprobs = None
        if wanted:
            logprobs = completion_logprobs(piece.logprobs, self.tokenizer, self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": piece.text, "logprobs": logprobs}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.request.is_chat else 'cmpl'}-{self.label.id}",
            "object": "chat.completion.chunk" if self.request.is_chat else "text_completion",
            "created": self.label.created,
            "model": self.label.model,
            "choices": [] if choice is None else [choice],
            **({"usage": None} if self.include_usage else {}),
        }
