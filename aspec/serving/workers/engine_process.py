"""The process of one worker: an engine that answers leased rows. ``python -m aspec.serving.workers.engine_process``.

Frames come on standard input and go to what was standard output; whatever a library prints goes to standard error.
The process ends at once when its input ends: then the driver has what it wants, or is dead.
"""

import asyncio
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

from aspec import __version__
from aspec.api import loop_factory
from aspec.engine.engine import Engine, describe_plan
from aspec.errors import AspecError, UserError, first_error
from aspec.planning.resolve import Resolved, resolve
from aspec.serving.batch_input import parse_row
from aspec.serving.batch_writer import LineForm, prepare_row
from aspec.serving.dispatch import WINDOW, answer
from aspec.serving.workers.local import identity_of
from aspec.serving.workers.messages import (
    Answered,
    Drain,
    Drop,
    Failed,
    Job,
    Lease,
    Opened,
    Order,
    Released,
    Report,
    frame,
    pack,
    read_frame,
    unpack,
)


class Written(asyncio.BaseProtocol):
    """Tells when a pipe that was closed has taken everything."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self.closed.set()


class Link:
    """The pipes to the driver; mutable: orders wait until they are taken."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.WriteTransport, written: "Written") -> None:
        self._reader, self._writer, self._written = reader, writer, written
        self.orders: asyncio.Queue[Order] = asyncio.Queue()

    @classmethod
    async def open(cls) -> "Link":
        """Take standard input and output; from now on prints go to standard error."""
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        out = os.dup(1)
        os.dup2(2, 1)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb", closefd=False))
        writer, written = await loop.connect_write_pipe(Written, os.fdopen(out, "wb"))
        return cls(reader, writer, written)

    async def listen(self) -> None:
        """Queue the orders of the driver; ends the process when they end."""
        while (content := await read_frame(self._reader)) is not None:
            order: Any = unpack(content)
            self.orders.put_nowait(order)
        os._exit(0)

    def send(self, report: Report | tuple[str, str]) -> None:
        """Queue a frame for the driver."""
        self._writer.write(frame(pack(report)))

    async def wait_sent(self) -> None:
        """Close the pipe to the driver; returns when all frames are in it."""
        self._writer.close()
        await self._written.closed.wait()


@dataclass(frozen=True, slots=True)
class Desk:
    """An open engine, and the rows that it answers."""

    link: Link
    engine: Engine
    job: Job
    running: dict[int, asyncio.Task[None]]  # of the rows without an answer
    drained: asyncio.Future[None]

    async def work(self, group: asyncio.TaskGroup) -> None:
        """Obey the driver, for ever."""
        while True:
            match await self.link.orders.get():
                case Lease(row, line):
                    self.running[row] = group.create_task(self._answer(row, line))
                case Drop(row):
                    if (task := self.running.pop(row, None)) is not None:
                        task.cancel()
                case Drain():
                    self.drained.set_result(None)

    async def _answer(self, row: int, line: bytes) -> None:
        tokenizer, job = self.engine.tokenizer, self.job
        one = await asyncio.to_thread(lambda: prepare_row(tokenizer, parse_row(line), job.defaults))
        outcome = await answer(self.engine, one, self.drained)
        if self.running.pop(row, None) is None:
            return
        if outcome is None:
            self.link.send(Released(row))
            return
        made = LineForm(job.created, job.model).line_of(tokenizer, one, outcome)
        counts = (made.tokens, made.prompt_tokens, made.num_cached_tokens)
        self.link.send(Answered(row, made.row.line, made.row.failed, *counts))


async def work(link: Link) -> None:
    """Open the engine of the driver's job and answer rows, for ever. Raises AspecError."""
    job = await link.orders.get()
    assert isinstance(job, Job)
    resolved = await asyncio.to_thread(_found, job)
    async with Engine(resolved, [], []) as engine:
        seats = engine.plan.num_rows
        link.send(Opened(seats, WINDOW * seats, f"{engine.plan.shape}; {describe_plan(engine.plan)}"))
        desk = Desk(link, engine, job, {}, asyncio.get_running_loop().create_future())
        async with asyncio.TaskGroup() as group:
            await desk.work(group)


def _found(job: Job) -> Resolved:
    """The models of a job as this machine has them. Raises UserError, also if the target is another one."""
    resolved = resolve(job.options)
    if (found := identity_of(resolved)) != job.target:
        raise UserError(
            f"the target {resolved.target} on {socket.gethostname()} is another one than the driver's: expected the "
            f"fingerprint {job.target}, found {found}. Give every machine the same files."
        )
    return resolved


async def main() -> int:
    """Greet the driver and work for it; returns the exit code of a failure, after the driver was told of it."""
    link = await Link.open()
    listening = asyncio.ensure_future(link.listen())
    link.send((__version__, socket.gethostname()))
    try:
        await work(link)
    except (AspecError, BaseExceptionGroup, MemoryError) as raised:
        error = first_error(raised)
        if not isinstance(error, AspecError | MemoryError):
            raise
        link.send(Failed(type(error).__name__, str(error) or "out of memory", isinstance(error, UserError)))
        await link.wait_sent()
    listening.cancel()
    return 1


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        sys.exit(runner.run(main()))
