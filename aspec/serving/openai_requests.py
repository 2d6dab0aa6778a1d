"""How requests are read from OpenAI's form: the bodies of chat and text completions, read strictly.

``request_fields`` has a row for every field; no field is ignored in silence. A field that is null counts as absent. A
whole number may be written as 64 or 64.0: JSON has one kind of numbers. Standard library only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from aspec.errors import PromptError
from aspec.generation.params import MAX_LOGPROBS, SamplingParams
from aspec.io.json_file import NotJson
from aspec.io.json_file import parse_json as parse_any_json
from aspec.serving.answer_form import Tools, read_calls, read_grammar, read_tools, refuse
from aspec.serving.refusals import RequestError, one_error
from aspec.serving.request_fields import CHAT, COMPLETION, given_fields, plain

T = TypeVar("T")

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOKENS = ("max_tokens", "max_completion_tokens")  # the old and the new name
MIN_TOKENS = ("min_tokens", "min_new_tokens")  # vLLM's name, and that of transformers
MOST_CHOICES = 128  # of a request, as in OpenAI's interface
AS_GIVEN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "logit_bias",
    "typical_p",
    "no_repeat_ngram_size",
    "bad_words",
    "bad_words_ids",
    "suppress_tokens",
)  # fields that have the same name in SamplingParams
WHOLE = frozenset(
    ("top_k", "no_repeat_ngram_size", "seed", "n", "best_of", "logprobs", "top_logprobs", *MAX_TOKENS, *MIN_TOKENS)
)
MESSAGE_FIELDS = ("role", "content", "name", "reasoning_content", "reasoning", "tool_calls", "tool_call_id")
NO_EFFECT = {"tool_calls": [], "annotations": [], "refusal": ""}  # in a message, as OpenAI's own answers have them


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the prompt, and the sampling fields that it gives."""

    url: str  # CHAT or COMPLETION
    prompt: str | tuple[int, ...] | tuple[Mapping[str, Any], ...]  # a text, token ids, or messages
    sampling: Mapping[str, Any]  # the given fields of SamplingParams
    model: str | None = None  # as the request names it
    num_choices: int = 1  # answers to generate
    template: Mapping[str, Any] | None = None  # variables for the chat template, tools included
    tools: Tools | None = None  # that the answer may call

    @property
    def is_chat(self) -> bool:
        """Whether the request is a chat completion."""
        return self.url == CHAT

    @property
    def max_new_tokens(self) -> int | None:
        """The requested number of new tokens; None if the request does not say."""
        return self.sampling.get("max_new_tokens")

    def params(self, defaults: SamplingParams, seed: int) -> SamplingParams:
        """The sampling parameters: the request's fields over the defaults; ``seed`` if the request gives none."""
        own = {"max_length": None} if "max_new_tokens" in self.sampling else {}  # its own limit has precedence
        return replace(defaults, **{"seed": seed, **own, **self.sampling})


def parse_json(text: bytes) -> Any:
    """Parse a JSON value. Raises PromptError for invalid JSON, a repeated name in an object, NaN and Infinity."""
    try:
        return parse_any_json(text, unique=True)
    except NotJson as error:
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError):  # a request is one line, so a line number says nothing
            raise RequestError(
                f"expected JSON ({cause.msg} at character {cause.pos + 1})", code="invalid_json"
            ) from error
        raise RequestError(str(error), code="invalid_json") from error


def parse_request(url: str, body: object) -> Request:
    """Parse a request's body. Raises a RequestError that names every field that cannot be served."""
    if url not in (CHAT, COMPLETION):
        refuse("url", f"{CHAT} or {COMPLETION}", url)
    if not isinstance(body, dict):
        refuse("body", "an object", body)
    given, problems = given_fields(url, body)
    given = {name: _as_whole(value) if name in WHOLE else value for name, value in given.items()}

    def attempt(read: Callable[[Mapping[str, Any]], T]) -> T | None:
        try:
            return read(given)
        except RequestError as error:
            problems.append(error)
            return None

    prompt = attempt(_messages if url == CHAT else _prompt)
    model, num_choices = attempt(_model), attempt(_num_choices)
    template = attempt(_template)
    grammar, tools = attempt(read_grammar), attempt(read_tools)
    if grammar is not None and tools is not None:
        problems.append(RequestError("tools and a form of the answer exclude each other: give one of them", "tools"))
    most, least = attempt(_max_tokens), attempt(_min_tokens)
    logprobs = attempt(_chat_logprobs if url == CHAT else _completion_logprobs)
    sampling = {name: value for name in AS_GIVEN if (value := attempt(_sampling(name))) is not None}
    if problems:
        raise one_error(problems)
    assert prompt is not None
    assert num_choices is not None
    sampling |= (most or {}) | (least or {}) | (logprobs or {}) | ({} if grammar is None else {"grammar": grammar})
    if tools is not None:
        template = {**(template or {}), "tools": list(tools.tools)}
    return Request(url, prompt, sampling, model, num_choices, template, tools)


# -- fields ----------------------------------------------------------------------------------------------------


def _model(given: Mapping[str, Any]) -> str | None:
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        refuse("model", "a text", model)
    return model


def _num_choices(given: Mapping[str, Any]) -> int:
    count = given.get("n", 1)
    if not _is_whole(count) or not 1 <= count <= MOST_CHOICES:
        refuse("n", f"a whole number from 1 to {MOST_CHOICES}", count)
    best_of = given.get("best_of", count)
    if not _is_whole(best_of) or best_of != count:
        refuse("best_of", f"n = {count}: every answer is returned", best_of)
    return int(count)


def _template(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The variables of the chat template; ``reasoning_effort`` is one of them, as in vLLM."""
    variables = given.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        refuse("chat_template_kwargs", "an object of the chat template's variables", variables)
    if "tools" in variables:
        raise RequestError("chat_template_kwargs.tools is not supported: give tools", "chat_template_kwargs")
    effort = given.get("reasoning_effort")
    if effort is None:
        return dict(variables) or None
    if not isinstance(effort, str) or not effort:
        refuse("reasoning_effort", "a text", effort)
    return {"reasoning_effort": effort, **variables}


def _sampling(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """A reader of one field of SamplingParams; it returns None if the request does not give the field."""

    def read(given: Mapping[str, Any]) -> Any:
        value = given.get(name)
        if value is None:
            return None
        if name == "stop":
            value = _stop(value)
        elif name == "top_k" and value == -1:
            value = 0  # vLLM's word for off
        alone: dict[str, Any] = {name: value}
        try:
            SamplingParams(**alone)
        except PromptError as error:  # the remedy would name the wrong default
            raise RequestError(str(error).partition(". Change it")[0], name) from error
        except OverflowError as error:
            raise RequestError(f"{name} is too large for a floating-point value", name) from error
        return value

    return read


def _messages(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    value = _source(given, "messages", CHAT)
    if not isinstance(value, list) or not value:
        refuse("messages", "a list of messages, at least one", value)
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(value))


def _source(given: Mapping[str, Any], name: str, url: str) -> Any:
    if name not in given:
        raise RequestError(f"{name} is missing: {url} needs it", name, "missing_required_parameter")
    return given[name]


def _message(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        refuse(name, "an object with role and content", value)
    message = {key: one for key, one in value.items() if one is not None and NO_EFFECT.get(key) != one}
    for key in message:
        if key not in MESSAGE_FIELDS:
            raise RequestError(f"{name}.{plain(key)} is not supported: remove it", f"{name}.{plain(key)}")
    if message.get("role") not in ROLES:
        refuse(f"{name}.role", f"one of {', '.join(ROLES)}", value.get("role"))
    for key in message.keys() - {"role", "content", "tool_calls"}:
        if not isinstance(message[key], str):
            refuse(f"{name}.{key}", "a text", message[key])
    if "tool_calls" in message:
        if message["role"] != "assistant":
            raise RequestError(
                f"{name}.tool_calls belongs to messages of the assistant: remove it", f"{name}.tool_calls"
            )
        message["tool_calls"] = read_calls(f"{name}.tool_calls", message["tool_calls"])
        message.setdefault("content", "")
    if "tool_call_id" in message and message["role"] != "tool":
        raise RequestError(f"{name}.tool_call_id belongs to messages of a tool: remove it", f"{name}.tool_call_id")
    return {**message, "content": _content(f"{name}.content", message.get("content"))}


def _content(name: str, value: object) -> str | list[dict[str, str]]:
    """A text, or a list of parts of type text, as the request holds it: the chat template decides."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        refuse(name, "a text, or a list of parts of type text", value)
    for index, part in enumerate(value):
        if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind != "text":
            raise RequestError(
                f"{name}[{index}] is a part of type {kind}: only text is supported, no images and no sounds"
            )
        fine = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not fine or not isinstance(part["text"], str):
            refuse(f"{name}[{index}]", 'a part {"type": "text", "text": "..."}', part)
    return value


def _prompt(given: Mapping[str, Any]) -> str | tuple[int, ...]:
    value = _source(given, "prompt", COMPLETION)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a list of one prompt
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value or not all(_is_whole(token) and token >= 0 for token in value):
        refuse("prompt", "a text or a list of token ids, not empty; one prompt per request", value)
    return tuple(value)


def _max_tokens(given: Mapping[str, Any]) -> dict[str, int]:
    return _count_of_tokens(given, MAX_TOKENS, "max_new_tokens")


def _min_tokens(given: Mapping[str, Any]) -> dict[str, int]:
    return _count_of_tokens(given, MIN_TOKENS, "min_new_tokens")


def _count_of_tokens(given: Mapping[str, Any], names: tuple[str, str], meant: str) -> dict[str, int]:
    """The field ``meant`` of SamplingParams, which requests give by one of two names."""
    values = {name: given[name] for name in names if name in given}
    for name, value in values.items():
        if not _is_whole(value) or value < 0:
            refuse(name, "a whole number, at least 0", value)
    if len(set(values.values())) > 1:
        raise RequestError(f"{' and '.join(names)} differ: give one of them", names[0])
    return {meant: next(iter(values.values()))} if values else {}


def _chat_logprobs(given: Mapping[str, Any]) -> dict[str, int]:
    wanted, top = given.get("logprobs", False), given.get("top_logprobs")
    if not isinstance(wanted, bool):
        refuse("logprobs", "true or false", wanted)
    if top is None or (_is_whole(top) and top == 0 and not wanted):
        return {"logprobs": 0} if wanted else {}
    if not _is_whole(top) or not 0 <= top <= MAX_LOGPROBS:
        refuse("top_logprobs", f"a whole number from 0 to {MAX_LOGPROBS}", top)
    if not wanted:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    return {"logprobs": top}


def _completion_logprobs(given: Mapping[str, Any]) -> dict[str, int]:
    wanted = given.get("logprobs")
    if wanted is None or wanted is False:
        return {}
    if not _is_whole(wanted) or not 0 <= wanted <= MAX_LOGPROBS:
        refuse("logprobs", f"a whole number from 0 to {MAX_LOGPROBS}", wanted)
    return {"logprobs": wanted}


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        refuse("stop", "a text or a list of texts, none of them empty", value)
    return tuple(texts)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_whole(value: Any) -> Any:
    """A number without a fraction as an int; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
