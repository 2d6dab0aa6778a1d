"""A server on a tiny engine, in the loop of a test, and a client that knows what it sends and receives."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from aspec.engine.engine import Engine
from aspec.generation.params import SamplingParams
from aspec.observe.monitor import Monitor
from aspec.options import EngineOptions
from aspec.serving.http.app import make_app
from aspec.serving.http.guard import LOOPBACK, Guard
from aspec.serving.http.limits import Limits
from aspec.serving.http.server import bind, make_server
from aspec.serving.http.service import Names, Service


@dataclass
class Answer:
    """A response that is complete."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        """The JSON objects of the events, without [DONE]."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def comments(self):
        return [line[2:] for line in self.body.decode().split("\n") if line.startswith(": ")]

    @property
    def error(self):
        return self.json["error"]


@dataclass
class Running:
    """A server that listens, and the parts of it."""

    service: Service
    engine: Engine | None
    port: int
    said: list  # errors that it told its own console

    async def ask(self, path, body=None, method=None, **headers):
        """The whole response to a request; ``body``: bytes, or an object that becomes JSON."""
        reader, writer = await self.send(path, body, method, **headers)
        try:
            return await read_answer(reader)
        finally:
            writer.close()

    async def send(self, path, body=None, method=None, **headers):
        """Send a request; the streams of its connection."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        method = method or ("GET" if data is None else "POST")
        fields = {"host": f"127.0.0.1:{self.port}", "connection": "close", **headers}
        fields |= {} if data is None else {"content-length": str(len(data))}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + b"\r\n" + (data or b""))
        return reader, writer


async def read_answer(reader):
    """A response from a connection that closes behind it."""
    data = await asyncio.wait_for(reader.read(), 60)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return Answer(int(first.split()[1]), headers, body)


def unchunked(body):
    """The content of a chunked body; a body that broke off raises."""
    parts = []
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            return b"".join(parts)
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]


@asynccontextmanager
async def served(target, draft=None, *, limits=None, key=None, most=16, opened=True, **options):
    """A running server; without ``opened`` its engine is still loading."""
    params = SamplingParams(max_new_tokens=most)
    service = Service(Names(("tiny",), 1), limits or Limits(), params, replace(params), Monitor())
    said = []
    app = make_app(service, Guard(key, LOOPBACK), said.append)
    listening = bind("127.0.0.1", 0)
    server = make_server(app, service.limits)
    port = listening.getsockname()[1]
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        if not opened:
            yield Running(service, None, port, said)
            return
        given = {"device": "cpu", "threads": 1, "speculation": "off" if draft is None else "auto", **options}
        made = EngineOptions(target=target, draft=draft, **given)
        async with Engine(made, [service.metrics, service.monitor], [service.monitor.issued]) as engine:
            service.monitor.opened(engine.plan, 0)
            service.ready(engine)
            yield Running(service, engine, port, said)
            service.end_answers()
    finally:
        server.should_exit = True
        await serving
        listening.close()
