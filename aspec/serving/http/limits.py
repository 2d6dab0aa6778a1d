"""What a server takes from a client: sizes, counts and seconds, and the reading of a body within them."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from aspec.serving.http.errors import HttpError
from aspec.serving.openai_requests import parse_json

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

LARGE_BYTES = 1 << 16  # a larger body is parsed in a thread


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server."""

    body_bytes: int = 8 << 20
    depth: int = 64  # of objects and lists in a body
    connections: int = 512
    header_s: float = 10.0  # until the head of a request is complete
    body_s: float = 60.0  # until its body is complete
    queued: int = 128  # answers that wait for a row
    prompts: int = 256  # of one request
    comment_s: float = 10.0  # the longest silence in an answer
    stop_s: float = 30.0  # that running answers have to finish after a signal


async def read_object(receive: Receive, limits: Limits) -> dict[str, Any]:
    """The JSON object of a request's body. Raises HttpError, RequestError for what is no JSON, and Left."""
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Left
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise HttpError(413, f"the body has more than {limits.body_bytes} bytes", code="body_too_large")
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise HttpError(408, f"the body was not complete after {limits.body_s:g} s", code="timeout") from None
    parse = parse_json if len(body) <= LARGE_BYTES else _parse_in_thread
    value = parse(bytes(body))
    if asyncio.iscoroutine(value):
        value = await value
    check_depth(value, limits.depth)
    if not isinstance(value, dict):
        raise HttpError(400, "the body must be a JSON object", code="invalid_json")
    return value


async def _parse_in_thread(body: bytes) -> Any:
    return await asyncio.to_thread(parse_json, body)


def check_depth(value: object, most: int) -> None:
    """Raise HttpError if lists and objects are nested deeper than ``most``."""
    level, depth = [value], 0
    while level:
        if depth > most:
            raise HttpError(400, f"the body is nested deeper than {most} levels", code="invalid_json")
        inner: list[object] = []
        for one in level:
            members = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
            inner += [member for member in members if isinstance(member, dict | list)]
        level, depth = inner, depth + 1


class Left(Exception):
    """The client has gone: nobody reads an answer."""
