"""How a client wants its answer: whole or streamed. A batch has no such choice, so these fields are read here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aspec.serving.openai_requests import Request, parse_request
from aspec.serving.refusals import RequestError
from aspec.serving.request_fields import COMPLETION, as_json

OPTIONS = (
    "include_usage",
    "include_drafted",  # aspec's own
    "include_obfuscation",  # padding against eavesdroppers is never added
)
"""The options of a stream."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How an answer is delivered."""

    stream: bool = False
    include_usage: bool = False  # at the end of a stream
    include_drafted: bool = False  # with every text of a stream
    echo: bool = False  # the prompt is part of a completion's text


def delivery_of(body: Mapping[str, Any], url: str) -> tuple[Delivery, dict[str, Any]]:
    """The delivery, and the body without its fields. Raises RequestError."""
    rest = dict(body)
    echo = rest.pop("echo", None) if url == COMPLETION else None
    if echo is not None and not isinstance(echo, bool):
        raise RequestError(f"echo must be true or false; found {as_json(echo)}", "echo")
    stream, options = rest.pop("stream", None), rest.pop("stream_options", None)
    if stream is not None and not isinstance(stream, bool):
        raise RequestError(f"stream must be true or false; found {as_json(stream)}", "stream")
    if options is None:
        return Delivery(bool(stream), echo=bool(echo)), rest
    if not stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    if not isinstance(options, dict):
        raise RequestError(f"stream_options must be an object; found {as_json(options)}", "stream_options")
    for name, value in options.items():
        if name not in OPTIONS:
            raise RequestError(f"stream_options.{as_json(name)} is not supported: remove it", "stream_options")
        if value is not None and not isinstance(value, bool):
            raise RequestError(f"stream_options.{name} must be true or false; found {as_json(value)}", "stream_options")
    return Delivery(True, bool(options.get("include_usage")), bool(options.get("include_drafted")), bool(echo)), rest


def parse_requests(url: str, body: Mapping[str, Any], most: int) -> list[Request]:
    """The requests of a body: one for each prompt. Raises RequestError."""
    prompts = body.get("prompt")
    several = isinstance(prompts, list) and prompts and all(isinstance(one, str | list) for one in prompts)
    if url != COMPLETION or not several:
        return [parse_request(url, dict(body))]
    assert isinstance(prompts, list)
    if len(prompts) > most:
        raise RequestError(f"prompt has {len(prompts)} prompts: at most {most} are served at once", "prompt")
    return [parse_request(url, {**body, "prompt": one}) for one in prompts]
