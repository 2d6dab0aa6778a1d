"""The listening server: uvicorn with limits on connections and on slow heads, and an orderly end."""

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from aspec.errors import UserError
from aspec.serving.http.errors import RETRY_S, HttpError
from aspec.serving.http.limits import Limits

KEEP_ALIVE_S = 75  # that an idle connection stays open, longer than clients keep it: none meets a closing one
HEAD_BYTES = 1 << 16  # of a request's head
BACKLOG = 512  # connections that wait to be accepted
FLUSH_S = 2  # for the last bytes of ended answers
HALF_CLOSED_S = 1.0  # that an answer may take whose client sends nothing more: it may read on, or have gone


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host {host} is no address: {error.strerror or error}. Give a name or an address."
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise UserError(
            f"port {port} of {host} cannot be used: {error.strerror or error}. Give another --port, or end the program "
            f"that uses it."
        ) from error
    listening.setblocking(False)
    return listening


class Server(uvicorn.Server):
    """uvicorn's server without its own handling of signals: the command has handled them already."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle no signal."""
        yield


def make_server(app: Any, limits: Limits) -> Server:
    """A server for an ASGI application; ``serve(sockets=[...])`` runs it until ``should_exit``."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)  # the application tells what went wrong

    class Connection(LimitedProtocol):
        """A connection within these limits."""

    Connection.limits = limits
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.CRITICAL + 1,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_S,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    return Server(config)


class LimitedProtocol(H11Protocol):
    """A connection that is refused beyond a number of them, and closed if the head of a request is slow."""

    limits = Limits()

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._head_timer: asyncio.TimerHandle | None = None  # runs while a head is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            refuse(transport, HttpError(503, "too many connections", code="too_many_connections", retry_s=RETRY_S))
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Parse; the first bytes of a further request start the time for its head."""
        if self.cycle is not None and self.cycle.response_complete and self._head_timer is None:
            self._await_head()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._head_is_here()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Leave a client that has closed its half the time for an error, or for the last bytes of an answer."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self.loop.call_later(HALF_CLOSED_S, self.transport.close)
        return answering

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._head_is_here()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_s, self._head_is_late)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        late = HttpError(408, f"no request was complete after {self.limits.header_s:g} s", code="timeout")
        refuse(self.transport, late)


def refuse(transport: asyncio.Transport, error: HttpError) -> None:
    """Answer outside of any request, and close the connection."""
    status, headers, body = error.response()
    lines = [b"%s: %s" % pair for pair in headers if pair[0] != b"connection"]
    head = b"\r\n".join([b"HTTP/1.1 %d %s" % (status, error.refusal.code.encode()), *lines, b"connection: close"])
    transport.write(head + b"\r\n\r\n" + body)
    transport.close()
