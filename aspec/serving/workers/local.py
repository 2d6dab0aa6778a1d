"""Engine processes on this machine, which share its cores, its memory and its cards."""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from subprocess import PIPE

from aspec.io.loop.settling import settle
from aspec.options import EngineOptions
from aspec.planning.resolve import Resolved
from aspec.preparing.identity import fingerprint
from aspec.serving.workers.messages import frame, read_frame
from aspec.serving.workers.pool import StartError

MODULE = "aspec.serving.workers.engine_process"
CARDS = "CUDA_VISIBLE_DEVICES"
MOST_LINES, LONGEST_LINE = 8, 500  # of a process's last words that a message repeats, and characters of each


class LocalWorker:
    """A process of this machine, with frames on its standard input and output.

    It has a session of its own, so that Ctrl-C reaches the driver alone; it ends with its standard input, so no death
    of the driver leaves it behind.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said: deque[str] = deque(maxlen=MOST_LINES)  # the last lines of standard error
        self._listening = asyncio.ensure_future(self._listen())

    @classmethod
    async def start(cls, environment: Mapping[str, str]) -> "LocalWorker":
        """Start a process with these variables beside those of this one. Raises StartError."""
        command, variables = (sys.executable, "-m", MODULE), {**os.environ, **environment}
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=variables, start_new_session=True
            )
        except OSError as error:
            raise StartError(f"{sys.executable} cannot be started: {error.strerror or error}") from error
        return cls(process)

    def send(self, content: bytes) -> None:
        """Queue a frame; nothing happens if the process has ended."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(frame(content))

    async def receive(self) -> bytes | None:
        """The next frame; None when the process has ended."""
        assert self._process.stdout is not None
        return await read_frame(self._process.stdout)

    async def close(self) -> str:
        """Kill the process if it runs; returns how it ended. It writes no file that a kill could tear."""
        gone = asyncio.ensure_future(self._process.wait())
        try:
            if self._process.stdout is not None and self._process.stdout.at_eof():
                await asyncio.wait([gone], timeout=1.0)  # it ends by itself: its exit code tells more
        finally:
            if self._process.returncode is None:
                self._process.kill()
        code = await settle(gone)
        await asyncio.wait([self._listening], timeout=1.0)
        self._listening.cancel()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ". ".join([how, " / ".join(self._said)]) if self._said and code > 0 else how

    async def _listen(self) -> None:
        """Keep the last lines of standard error, however much there is."""
        assert self._process.stderr is not None
        rest = b""
        while data := await self._process.stderr.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:LONGEST_LINE]
            for line in lines:
                if text := line.decode("utf-8", "replace").strip():
                    self._said.append(text[:LONGEST_LINE])


class LocalPool:
    """Places on this machine; with several cards they take turns on them."""

    def __init__(self, size: int, cards: tuple[str, ...]) -> None:
        self.size = size
        self._cards = cards

    async def start(self, place: int) -> LocalWorker:
        """Start a process. Raises StartError."""
        cards = {CARDS: self._cards[place % len(self._cards)]} if self._cards else {}
        return await LocalWorker.start(cards)


def identity_of(resolved: Resolved) -> str:
    """What tells a target and its adapter from others, without reading all of them."""
    return " + ".join(fingerprint(path) for path in (resolved.target, resolved.adapter) if path is not None)


def visible_cards(count: int) -> tuple[str, ...]:
    """The names of this process's cards, of which torch sees ``count``."""
    named = os.environ.get(CARDS, "")
    names = [name.strip() for name in named.split(",") if name.strip()] or [str(card) for card in range(count)]
    return tuple(names[:count])


def share_of(resolved: Resolved, workers: int, cards: int) -> EngineOptions:
    """The options of one of several workers of this machine: what was given holds for each, the rest is divided."""
    options = resolved.options
    per_card = workers if resolved.kind is None else -(-workers // max(1, cards))
    if options.device_memory is None and options.process_memory is None and (options.target or resolved.kind):
        options = replace(options, device_memory=max(1, resolved.budget_bytes // per_card))
    if options.host_memory is None and resolved.host_bytes is not None:
        options = replace(options, host_memory=max(1, resolved.host_bytes // workers))
    if options.threads is None and workers > 1:
        options = replace(options, threads=max(1, len(os.sched_getaffinity(0)) // workers))
    return options
