"""What a driver and its workers say to each other: a few records, pickled, each behind its length.

A worker greets first, so that another version of aspec is found before anything else is read from it. The two ends
are one program of one user, on a pipe or inside a Ray cluster; no record comes from a client.
"""

import asyncio
import pickle
import struct
from dataclasses import dataclass
from typing import TypeAlias

from aspec.generation.params import SamplingParams
from aspec.options import EngineOptions

LENGTH = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker opens, and what decides the lines that it makes."""

    options: EngineOptions
    defaults: SamplingParams
    target: str  # the identity of the target that the driver has checked the rows with
    model: str  # the name of the model in answers
    created: int  # when the job began, seconds since the epoch


@dataclass(frozen=True, slots=True)
class Lease:
    """Answer this row; ``line`` is its line of the input file."""

    row: int
    line: bytes


@dataclass(frozen=True, slots=True)
class Drop:
    """This row is answered elsewhere: stop it."""

    row: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish the rows that have generated a token, give the others back."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The engine is open, with ``seats`` rows in a pass; it takes ``window`` rows at a time."""

    seats: int
    window: int
    plan: str  # one line for people


@dataclass(frozen=True, slots=True)
class Answered:
    """The line of a row's answer, and its counts of tokens."""

    row: int
    line: bytes
    failed: bool
    tokens: int
    prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Released:
    """A row that was not begun when the job was drained."""

    row: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Why the worker ends. ``final``: it would fail again, so it is not started again."""

    kind: str  # name of the error's type
    message: str
    final: bool


Order: TypeAlias = Job | Lease | Drop | Drain
"""From the driver to a worker."""

Report: TypeAlias = Opened | Answered | Released | Failed
"""From a worker to the driver."""


def pack(message: Order | Report | tuple[str, str]) -> bytes:
    """A message, or the greeting (version, name of the node), as a frame's content."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def unpack(content: bytes) -> "Order | Report | tuple[str, str]":
    """The message of a frame's content."""
    message: Order | Report | tuple[str, str] = pickle.loads(content)
    return message


def frame(content: bytes) -> bytes:
    """Content behind its length."""
    return LENGTH.pack(len(content)) + content


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next frame's content; None where the stream ends, also in the midst of a frame."""
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
