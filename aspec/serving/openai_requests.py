"""How requests are read from OpenAI's form: the bodies of chat and text completions, read strictly.

An unknown or unsupported field is an error that names the field; no field is ignored. A field that is null counts as
absent. vLLM's extensions (top_k, min_p, repetition_penalty, ignore_eos, min_tokens, bad_words) and some fields of
transformers (``AS_GIVEN``) are supported. Standard library only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from aspec.errors import PromptError
from aspec.generation.params import MAX_LOGPROBS, SamplingParams
from aspec.io.json_file import NotJson
from aspec.io.json_file import parse_json as parse_any_json

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ROLES = ("system", "developer", "user", "assistant")
MAX_TOKENS = ("max_tokens", "max_completion_tokens")  # the old and the new name
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
    "min_new_tokens",
)  # fields that have the same name in SamplingParams
KNOWN = frozenset((*AS_GIVEN, *MAX_TOKENS, "min_tokens", "model", "n", "stream", "logprobs"))


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the prompt, and the sampling fields that it gives."""

    url: str  # CHAT or COMPLETION
    prompt: str | tuple[int, ...] | tuple[Mapping[str, str], ...]  # a text, token ids, or messages
    sampling: Mapping[str, Any]  # the given fields of SamplingParams
    model: str | None = None  # as the request names it

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
        raise PromptError(str(error)) from error


def parse_request(url: str, body: object) -> Request:
    """Parse a request's body. Raises a PromptError that names the field."""
    if url not in (CHAT, COMPLETION):
        _refuse("url", f"{CHAT} or {COMPLETION}", url)
    if not isinstance(body, dict):
        _refuse("body", "an object", body)
    source = "messages" if url == CHAT else "prompt"
    own = {source, "top_logprobs"} if url == CHAT else {source}
    for name in body:
        if name not in KNOWN | own:
            raise PromptError(f"{name} is not supported in the body of a request to {url}: remove it")
    given = {name: value for name, value in body.items() if value is not None}
    if source not in given:
        raise PromptError(f"{source} is missing: {url} needs it")
    _check(given, "model", "a text", lambda value: isinstance(value, str))
    _check(given, "n", "1: one choice per request", lambda value: value == 1 and not isinstance(value, bool))
    _check(given, "stream", "false: the answer is not streamed", lambda value: value is False)
    prompt = _messages(given[source]) if url == CHAT else _prompt(given[source])
    sampling = {name: given[name] for name in AS_GIVEN if name in given}
    if "min_tokens" in given:  # vLLM's name
        sampling["min_new_tokens"] = given["min_tokens"]
    sampling |= _max_tokens(given) | (_chat_logprobs(given) if url == CHAT else _completion_logprobs(given))
    if "stop" in sampling:
        sampling["stop"] = _stop(sampling["stop"])
    try:
        SamplingParams(**sampling)
    except PromptError as error:
        raise PromptError(str(error).partition(". Change it")[0]) from error  # the remedy would name the wrong default
    except OverflowError as error:
        raise PromptError("a number of the body is too large for a floating-point value") from error
    return Request(url, prompt, sampling, given.get("model"))


# -- fields ----------------------------------------------------------------------------------------------------


def _messages(value: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        _refuse("messages", "a list of messages, at least one", value)
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(value))


def _message(name: str, value: object) -> Mapping[str, str]:
    if not isinstance(value, dict):
        _refuse(name, "an object with role and content", value)
    for key in value:
        if key not in ("role", "content", "name"):
            raise PromptError(f"{name}.{key} is not supported: remove it")
    role, speaker = value.get("role"), value.get("name")
    if role not in ROLES:
        _refuse(f"{name}.role", f"one of {', '.join(ROLES)}", role)
    content = _content(f"{name}.content", value.get("content"))
    if speaker is None:
        return {"role": role, "content": content}
    if not isinstance(speaker, str):
        _refuse(f"{name}.name", "a text", speaker)
    return {"role": role, "content": content, "name": speaker}


def _content(name: str, value: object) -> str:
    """A text; parts of type text are joined as its lines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        _refuse(name, "a text, or a list of parts of type text", value)
    for index, part in enumerate(value):
        fine = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not fine or not isinstance(part["text"], str):
            _refuse(f"{name}[{index}]", 'a part {"type": "text", "text": "..."}; other parts are not supported', part)
    return "\n".join(part["text"] for part in value)


def _prompt(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value or not all(_is_whole(token) and token >= 0 for token in value):
        _refuse("prompt", "a text or a list of token ids, not empty; one prompt per request", value)
    return tuple(value)


def _max_tokens(given: Mapping[str, Any]) -> dict[str, int]:
    values = {name: given[name] for name in MAX_TOKENS if name in given}
    for name, value in values.items():
        if not _is_whole(value) or value < 0:
            _refuse(name, "a whole number, at least 0", value)
    if len(set(values.values())) > 1:
        raise PromptError("max_tokens and max_completion_tokens differ: give one of them")
    return {"max_new_tokens": next(iter(values.values()))} if values else {}


def _chat_logprobs(given: Mapping[str, Any]) -> dict[str, int]:
    wanted, top = given.get("logprobs", False), given.get("top_logprobs")
    if not isinstance(wanted, bool):
        _refuse("logprobs", "true or false", wanted)
    if top is None:
        return {"logprobs": 0} if wanted else {}
    if not _is_whole(top) or not 0 <= top <= MAX_LOGPROBS:
        _refuse("top_logprobs", f"a whole number from 0 to {MAX_LOGPROBS}", top)
    if not wanted:
        raise PromptError("top_logprobs needs logprobs: true")
    return {"logprobs": top}


def _completion_logprobs(given: Mapping[str, Any]) -> dict[str, int]:
    wanted = given.get("logprobs")
    if wanted is None:
        return {}
    if not _is_whole(wanted) or not 0 <= wanted <= MAX_LOGPROBS:
        _refuse("logprobs", f"a whole number from 0 to {MAX_LOGPROBS}", wanted)
    return {"logprobs": wanted}


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        _refuse("stop", "a text or a list of texts, none of them empty", value)
    return tuple(texts)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(given: Mapping[str, Any], name: str, expected: str, fine: Callable[[Any], bool]) -> None:
    if name in given and not fine(given[name]):
        _refuse(name, expected, given[name])


def _refuse(name: str, expected: str, found: object) -> NoReturn:
    text = json.dumps(found)
    raise PromptError(f"{name} must be {expected}; found {text if len(text) <= 60 else text[:56] + ' ...'}")
