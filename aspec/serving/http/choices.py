"""The answers to one request while they are generated: one stream of the engine for each, read side by side."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from aspec.engine.engine import Engine
from aspec.generation.params import SamplingParams
from aspec.generation.stats import Piece, RequestStats


@dataclass(slots=True)
class Wanted:
    """One answer to generate; ``stats`` fill while it runs."""

    tokens: list[int]
    params: SamplingParams
    scored: bool = False  # the prompt's own logprobs are wanted
    stats: RequestStats = field(default_factory=RequestStats)


class Choices:
    """The pieces of several answers in the order in which they come; an async context manager.

    Leaving it ends the streams that still run: their rows are free after the present pass.
    """

    def __init__(self, engine: Engine, wanted: Sequence[Wanted]) -> None:
        self.wanted = wanted
        self._engine = engine
        self._pieces: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()  # at most a piece per token
        self._open = len(wanted)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._read(index, one)) for index, one in enumerate(self.wanted)]
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def done(self) -> bool:
        """Whether every answer is complete."""
        return not self._open

    async def next(self, most_s: float) -> tuple[int, Piece] | None:
        """The next piece with the number of its answer; None after ``most_s``. Raises the error of any of them."""
        try:
            async with asyncio.timeout(most_s):
                found = await self._pieces.get()
        except TimeoutError:
            return None
        if isinstance(found, Exception):
            raise found
        self._open -= found[1].finish_reason is not None
        return found

    def progress(self) -> str:
        """How far the answers are, in words, for a client that shows them."""
        began = [one.stats for one in self.wanted if one.stats.num_prefilled]
        if not began:
            return "waiting for a free row"
        reading = [stats for stats in began if not stats.completion_tokens]
        if reading:
            done, total = sum(s.num_prefilled for s in reading), sum(s.prompt_tokens for s in reading)
            return f"prefill {done}/{total} tokens"
        return f"{sum(stats.completion_tokens for stats in began)} tokens generated"

    async def _read(self, index: int, one: Wanted) -> None:
        try:
            stream = self._engine.stream(one.tokens, one.params, stats=one.stats, scored=one.scored)
            async with aclosing(stream):
                async for piece in stream:
                    self._pieces.put_nowait((index, piece))
        except Exception as error:
            self._pieces.put_nowait(error)
