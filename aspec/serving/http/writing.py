"""How an answer is written while it is made: never silent for long, and never for a client that has gone."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from aspec.serving.http.errors import HttpError
from aspec.serving.http.limits import Left, Receive

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = (b"content-type", b"application/json")
EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy (nginx) passes every event on at once
)


async def send_whole(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Send a complete response."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def unless_left(receive: Receive, work: Awaitable[None]) -> None:
    """Do ``work``, and cancel it when the client leaves: then raise Left."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_left(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Left
        await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventWriter:
    """Server-sent events (WHATWG HTML, 9.2), each sent when it is known; mutable, because it knows the last time."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._last_s = time.monotonic()  # of the last byte

    @property
    def silence_s(self) -> float:
        """Seconds since the last byte."""
        return time.monotonic() - self._last_s

    async def begin(self) -> None:
        """Send the head of the response."""
        await self._send({"type": "http.response.start", "status": 200, "headers": list(EVENTS)})

    async def event(self, data: dict[str, Any], name: str | None = None) -> None:
        """Send an event with a JSON object."""
        head = f"event: {name}\n" if name else ""
        await self._write(f"{head}data: {json.dumps(data)}\n\n")

    async def fill(self, progress: str) -> None:
        """Send a comment: clients ignore it, and it ends their wait for a byte."""
        await self._write(f": {progress}\n\n")

    async def fail(self, error: HttpError) -> None:
        """Send an error as the last event."""
        await self.event(error.body)
        await self.end()

    async def done(self) -> None:
        """Send the mark of a complete stream."""
        await self._write("data: [DONE]\n\n")

    async def end(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b""})

    async def _write(self, text: str) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        self._last_s = time.monotonic()


class WholeWriter:
    """A JSON answer that is sent when it is complete. A long wait is filled with spaces, which JSON ignores.

    The first space settles the status: an error after it can only break the response off. Mutable for that.
    """

    def __init__(self, send: Send) -> None:
        self._send, self._begun = send, False
        self._last_s = time.monotonic()  # of the last byte

    @property
    def silence_s(self) -> float:
        """Seconds since the last byte."""
        return time.monotonic() - self._last_s

    async def fill(self, progress: str) -> None:
        """Send a space, after the head if there is none yet; JSON has no place for the progress."""
        await self._begin()
        await self._send({"type": "http.response.body", "body": b" ", "more_body": True})
        self._last_s = time.monotonic()

    async def answer(self, body: dict[str, Any]) -> None:
        """Send the answer."""
        data = json.dumps(body).encode()
        if not self._begun:
            await send_whole(self._send, 200, [JSON, (b"content-length", str(len(data)).encode())], data)
            return
        await self._send({"type": "http.response.body", "body": data})

    async def fail(self, error: HttpError) -> None:
        """Send an error in place of the answer. Raises it after a space: the response breaks off, without an end."""
        if self._begun:
            raise error
        await send_whole(self._send, *error.response())

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [JSON]})
