"""What a server holds: its engine and the state of it, the requests that are open, what conversations have said.

Only the loop's thread calls this.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from aspec.engine.engine import Engine
from aspec.generation.params import SamplingParams
from aspec.io.loop.settling import in_thread
from aspec.observe.monitor import Monitor
from aspec.serving.dispatch import check_room, params_of
from aspec.serving.http.choices import Wanted
from aspec.serving.http.errors import RETRY_S, HttpError
from aspec.serving.http.limits import Limits
from aspec.serving.http.metrics import Metrics, Present
from aspec.serving.http.turns import Turns
from aspec.serving.openai_requests import Request

MOST_WAIT_S = 60  # that a refused client is told to wait


def cut_short() -> HttpError:
    """The error of an answer that a stopping server has not finished."""
    return HttpError(503, "the server has stopped before the answer was complete", code="stopping", retry_s=RETRY_S)


class State(StrEnum):
    """Whether a server answers."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the model: the first one is what answers say; a request may give any of them."""

    known: tuple[str, ...]
    created: int  # seconds since the epoch

    def check(self, model: str | None) -> str:
        """The name to answer with. Raises HttpError for another model."""
        if model is not None and model not in self.known:
            raise HttpError(
                404,
                f"there is no model {model!r} here: expected {self.known[0]!r}, or no model at all",
                code="model_not_found",
                param="model",
            )
        return model or self.known[0]


class Service:
    """Mutable, because an engine opens, requests come and go, and it stops."""

    def __init__(
        self,
        names: Names,
        limits: Limits,
        chat: SamplingParams,
        text: SamplingParams,
        monitor: Monitor,
        seed: int | None = None,
    ) -> None:
        """``chat`` and ``text``: the sampling of chats and of plain completions, where a request gives none.

        ``seed``: likewise; None: another one for every request.
        """
        self.names, self.limits, self.monitor = names, limits, monitor
        self.defaults = {True: chat, False: text}  # by whether it is a chat
        self.seed = seed
        self.metrics = Metrics()
        self.turns = Turns()
        self.state = State.LOADING
        self.reason = "the model is being loaded"  # why it is not ready
        self.cut = False  # running answers end now
        self.num_open = 0  # answers that are promised
        self.idle = asyncio.Event()  # no answer is open
        self.idle.set()
        self._engine: Engine | None = None
        self._running: dict[asyncio.Task[Any], Sequence[Wanted]] = {}
        self._took_s = 1.0  # seconds of an answer, a moving mean

    # -- state -----------------------------------------------------------------------------------------------

    def ready(self, engine: Engine) -> None:
        """The engine is open."""
        self._engine, self.state, self.reason = engine, State.READY, ""
        self.turns.most = 4 * engine.plan.num_rows

    def fail(self, reason: str) -> None:
        """The engine has failed for good."""
        self.state, self.reason = State.FAILED, reason

    def stop(self) -> None:
        """Answer no new request."""
        if self.state is not State.FAILED:
            self.state, self.reason = State.STOPPING, "the server is stopping"

    def end_answers(self) -> None:
        """End the answers that still run, each with an error."""
        self.cut = True
        for task in self._running:
            task.cancel()

    @property
    def engine(self) -> Engine:
        """The open engine. Raises HttpError if there is none to use."""
        if self._engine is None or self.state is not State.READY:
            retry_s = None if self.state is State.FAILED else RETRY_S
            reason = "the engine has failed" if self.state is State.FAILED else self.reason
            raise HttpError(503, reason, code=self.state.value, retry_s=retry_s)
        return self._engine

    # -- requests --------------------------------------------------------------------------------------------

    @contextmanager
    def promised(self, num_answers: int) -> Iterator[Engine]:
        """The engine, for a request with so many answers. Raises HttpError if the queue is full."""
        engine = self.engine
        free = engine.plan.num_rows + self.limits.queued - self.num_open
        if num_answers > free:
            wait_s = self._took_s * self.num_open / engine.plan.num_rows
            raise HttpError(
                429,
                f"{self.num_open} answers are running or waiting; the request asks for {num_answers}, and "
                f"{max(0, free)} more may wait. Try again later",
                code="queue_full",
                retry_s=max(1, min(MOST_WAIT_S, round(wait_s))),
            )
        begun_s = time.monotonic()
        self.num_open += num_answers
        self.idle.clear()
        try:
            yield engine
            self._took_s += 0.2 * (time.monotonic() - begun_s - self._took_s)
        finally:
            self.num_open -= num_answers
            if not self.num_open:
                self.idle.set()

    @contextmanager
    def running(self, wanted: Sequence[Wanted]) -> Iterator[None]:
        """The present task generates these answers in the block; ``end_answers`` cancels it. Raises HttpError after."""
        if self.cut:
            raise cut_short()
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = wanted
        try:
            yield
        finally:
            del self._running[task]
            for one in wanted:
                self.metrics.ended(one.stats)

    def present(self) -> Present:
        """The state now, for the metrics."""
        stats = (one.stats for wanted in self._running.values() for one in wanted)
        running = tuple(one for one in stats if one.num_prefilled and not one.is_closed)
        plan = None if self._engine is None else self._engine.plan
        return Present(self.state is State.READY, self.num_open, running, plan)

    async def wanted(self, engine: Engine, request: Request, seed: int) -> Wanted:
        """A request's tokens and sampling. Raises PromptError if it cannot be served."""
        defaults = self.defaults[request.is_chat]
        params = await in_thread(partial(params_of, engine.tokenizer, request, defaults, seed))
        prompt = list(request.prompt) if not isinstance(request.prompt, str) else request.prompt
        said = self.turns.said(request.prompt) if request.is_chat else ()
        tokens = await engine.encode(prompt, said, request.template)
        check_room(len(tokens), request.max_new_tokens, engine.max_context)
        return Wanted(tokens, params)

    def said(self, messages: Sequence[Mapping[str, Any]], text: str, tokens: Sequence[int]) -> None:
        """Note the tokens of a conversation and its answer: the next turn continues them."""
        self.turns.add([*messages, {"role": "assistant", "content": text}], tokens)
