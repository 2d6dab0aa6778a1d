"""How OpenAI's Responses interface is read and written, as far as it is text: a request becomes a chat.

Source: https://platform.openai.com/docs/api-reference/responses
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aspec.serving.openai_requests import Request, parse_request
from aspec.serving.openai_responses import Generated
from aspec.serving.refusals import RequestError
from aspec.serving.request_fields import CHAT, RESPONSES, as_json, given_fields

TEXT_PARTS = ("input_text", "output_text", "text")
MESSAGE_FIELDS = ("type", "role", "content", "id", "status", "phase")
AS_CHAT = {"model": "model", "temperature": "temperature", "top_p": "top_p", "max_output_tokens": "max_tokens"}
"""The chat's names of the fields that mean the same."""

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a response."""

    request: Request  # as a chat
    instructions: str | None
    talk: Messages  # the conversation so far, without instructions
    previous: str | None  # the id of the response that this one follows
    store: bool
    said: Mapping[str, Any]  # fields that the response repeats


def parse_response_request(body: Mapping[str, Any], earlier: Mapping[str, Messages]) -> Asked:
    """Read a body; ``earlier``: the conversations that may be continued, by id. Raises RequestError."""
    given, problems = given_fields(RESPONSES, body)
    if problems:
        raise problems[0]
    previous, instructions = given.get("previous_response_id"), given.get("instructions")
    if previous is not None and previous not in earlier:
        raise RequestError(
            f"there is no response {as_json(previous)}: this server has forgotten it, or never had it. Send the whole "
            f"conversation as input",
            "previous_response_id",
            "previous_response_not_found",
        )
    if instructions is not None and not isinstance(instructions, str):
        raise RequestError(f"instructions must be a text; found {as_json(instructions)}", "instructions")
    talk = (*earlier.get(previous or "", ()), *_messages(given.get("input")))
    first = [{"role": "system", "content": instructions}] if instructions else []
    chat = {own: given[name] for name, own in AS_CHAT.items() if name in given}
    if (effort := _effort(given.get("reasoning"))) is not None:
        chat["reasoning_effort"] = effort
    request = parse_request(CHAT, {**chat, "messages": [*first, *talk]})
    said = {name: body[name] for name in ("metadata", "user", "max_output_tokens") if body.get(name) is not None}
    return Asked(request, instructions, tuple(talk), previous, body.get("store") is not False, said)


def _effort(reasoning: object) -> object:
    if reasoning is None:
        return None
    if not isinstance(reasoning, dict) or reasoning.keys() - {"effort", "summary"} or reasoning.get("summary"):
        raise RequestError(f"reasoning may have an effort; found {as_json(reasoning)}", "reasoning")
    return reasoning.get("effort")


def _messages(given: object) -> list[dict[str, Any]]:
    if isinstance(given, str) and given:
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError(f"input must be a text or a list of messages; found {as_json(given)}", "input")
    return [_message(f"input[{index}]", item) for index, item in enumerate(given)]


def _message(name: str, item: object) -> dict[str, Any]:
    """A message of the input, as a chat has it."""
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise RequestError(f"{name} must be a message with role and content; found {as_json(item)}", name)
    for key in item.keys() - set(MESSAGE_FIELDS):
        raise RequestError(f"{name}.{as_json(key)} is not supported: remove it", name)
    content = item.get("content")
    if isinstance(content, str):
        return {"role": item.get("role"), "content": content}
    if not isinstance(content, list) or not content:
        raise RequestError(f"{name}.content must be a text or a list of text parts; found {as_json(content)}", name)
    return {"role": item.get("role"), "content": "".join(_text(name, part) for part in content)}


def _text(name: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise RequestError(f"{name}.content holds {as_json(part)}: only text is supported", name)
    return str(part["text"])


# -- the response ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """Writes the objects of one response."""

    asked: Asked
    id: str  # without its prefix
    created: int  # seconds since the epoch
    model: str
    temperature: float
    top_p: float

    def begun(self) -> dict[str, Any]:
        """The response before its answer."""
        return self._body("in_progress", [], None, None)

    def complete(self, made: Generated) -> dict[str, Any]:
        """The response with its answer."""
        cut = made.finish_reason == "length"
        details = {"reason": "max_output_tokens"} if cut else None
        return self._body("incomplete" if cut else "completed", [self.message(made)], _usage(made), details)

    def message(self, made: Generated | None) -> dict[str, Any]:
        """The item of the answer; None: before its text."""
        status = "in_progress" if made is None else "incomplete" if made.finish_reason == "length" else "completed"
        content = [] if made is None else [text_part(made.text)]
        return {"id": f"msg_{self.id}", "type": "message", "status": status, "role": "assistant", "content": content}

    def talk(self, text: str) -> Messages:
        """The conversation with the answer."""
        return (*self.asked.talk, {"role": "assistant", "content": text})

    def _body(
        self, status: str, output: Sequence[Any], usage: Mapping[str, Any] | None, details: Mapping[str, str] | None
    ) -> dict[str, Any]:
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            **({} if status == "in_progress" else {"completed_at": int(time.time())}),
            "status": status,
            "error": None,
            "incomplete_details": details,
            "instructions": self.asked.instructions,
            "max_output_tokens": None,
            "metadata": {},
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": False,
            "previous_response_id": self.asked.previous,
            "reasoning": {"effort": None, "summary": None},
            "store": self.asked.store,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": self.top_p,
            "truncation": "disabled",
            "usage": usage,
            **self.asked.said,
        }


def text_part(text: str) -> dict[str, Any]:
    """A part of the answer's content."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(made: Generated) -> dict[str, Any]:
    return {
        "input_tokens": made.num_prompt,
        "input_tokens_details": {"cached_tokens": made.num_cached or 0},
        "output_tokens": made.num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": made.num_prompt + made.num_tokens,
    }
