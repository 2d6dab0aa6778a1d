"""What ``aspec serve`` does: answer requests over HTTP until a signal comes, then finish the answers that run.

The port is taken and the models are found before anything is loaded. While the model loads the server listens and
says so. A failure of the engine does not end the process: every request, and ``/health``, is told of it.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aspec.cli.flags.serving import ServeFlags
from aspec.cli.front.opening import fetching
from aspec.cli.interrupts import present, run
from aspec.engine.engine import Engine, describe_plan
from aspec.errors import ClosedError
from aspec.generation.defaults import describe, sampling_params
from aspec.generation.params import SamplingParams
from aspec.io.loop.settling import settle_all
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.planning.resolve import Resolved, resolve, revise
from aspec.serving.http.app import make_app
from aspec.serving.http.guard import LOOPBACK, Guard
from aspec.serving.http.limits import Limits
from aspec.serving.http.server import bind, make_server
from aspec.serving.http.service import Names, Service, State

DEMO_NAME = "aspec-demo"
COMPLETION_TOKENS = 16  # of a plain completion that does not say, as in OpenAI's interface
WHOLE_CONTEXT = 1 << 40  # tokens of a chat's answer that does not say: as many as the context holds


@dataclass(frozen=True, slots=True)
class ServeJob:
    """A found model, and how to serve it."""

    flags: ServeFlags
    resolved: Resolved
    chat: SamplingParams
    text: SamplingParams
    console: Console


def serve_on_console(flags: ServeFlags, console: Console) -> None:
    """Serve until a signal. Raises AspecError if the port or a model cannot be used, and if the engine has failed."""
    listening = bind(flags.host, flags.port)
    with listening:
        job = _prepare(flags, console)
        run(partial(_run, job, listening))


def _prepare(flags: ServeFlags, console: Console) -> ServeJob:
    """Find the models, which may block for long (a download). Raises UserError."""
    with fetching(console) as fetches:
        resolved = resolve(flags.options(), fetches)
    asked, given = generation_defaults(resolved.target), flags.sampling()
    if asked_for := describe(asked, given):
        console.note(asked_for)
    chat, text = (sampling_params(asked, given, most) for most in (WHOLE_CONTEXT, COMPLETION_TOKENS))
    return ServeJob(flags, resolved, chat, text, console)


def names_of(flags: ServeFlags) -> tuple[str, ...]:
    """The names of the model: as the user says, otherwise as it is called; of a folder or a file without its path."""
    target = flags.target or DEMO_NAME
    own = Path(target).resolve().name if Path(target).exists() else target
    return tuple(flags.served_model_name or [own])


async def _run(job: ServeJob, listening: socket.socket) -> None:
    flags, console, monitor = job.flags, job.console, Monitor(job.console.stops)
    limits = Limits(queued=flags.max_queue, stop_s=flags.stop_after)
    service = Service(Names(names_of(flags), int(time.time())), limits, job.chat, job.text, monitor, flags.seed)
    guard = Guard(flags.api_key, LOOPBACK | {flags.host} if flags.host in LOOPBACK else None)
    app = make_app(service, guard, console.error, console.note if flags.log_requests else None)
    async with _listening(app, limits, listening):
        with watch(monitor, console, dashboard=False):
            engine = Engine(
                revise(job.resolved, progress=monitor.progress), [monitor, service.metrics], [monitor.issued]
            )
            await engine.__aenter__()
        async with _closing(engine, service):
            monitor.opened(engine.plan, 0)
            console.note(describe_plan(engine.plan))
            service.metrics.link_rate = await engine.probe_link_rate()
            service.ready(engine)
            lagging = asyncio.create_task(service.metrics.lag.measure(), name="aspec loop lag")
            console.note(f"{service.names.known[0]} is served at {address_of(listening)}; Ctrl-C stops it")
            try:
                await _wait_stop(service, engine, console)
                await _finish(service, console)
            finally:
                lagging.cancel()


@asynccontextmanager
async def _listening(app: object, limits: Limits, listening: socket.socket) -> AsyncIterator[None]:
    """The server listens in the block; afterwards its connections are closed."""
    server = make_server(app, limits)
    serving = asyncio.create_task(server.serve(sockets=[listening]), name="aspec server")
    try:
        yield
    finally:
        server.should_exit = True
        await settle_all([serving])


@asynccontextmanager
async def _closing(engine: Engine, service: Service) -> AsyncIterator[None]:
    """Close the engine after the block, and after every answer has ended."""
    try:
        yield
    finally:
        service.stop()
        service.end_answers()
        await engine.__aexit__(None, None, None)


async def _wait_stop(service: Service, engine: Engine, console: Console) -> None:
    """Wait for the first signal. A failure of the engine is told once; its requests are refused from then on."""
    stop, ended = asyncio.Event(), asyncio.ensure_future(engine.wait_end())
    interrupts = present()
    interrupts.drain, interrupts.always_drains = stop.set, True
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([stopping, ended], return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not stop.is_set():
            failure = ended.result() or ClosedError("the engine has ended")
            service.fail(str(failure))
            console.error(f"the engine has failed, so every request gets status 503: {failure}")
            await stopping
    finally:
        interrupts.drain = None
        for task in (stopping, ended):
            task.cancel()


async def _finish(service: Service, console: Console) -> None:
    """Let the running answers finish, at most until the deadline."""
    service.stop()
    if service.num_open and service.state is State.STOPPING:
        console.note(
            f"no new requests; {service.num_open} answers have {service.limits.stop_s:g} s to finish. Another signal "
            f"ends them at once"
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(service.limits.stop_s):
                await service.idle.wait()
    service.end_answers()


def address_of(listening: socket.socket) -> str:
    """The address of the interface, as clients need it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
