"""The synchronous API: one prompt or several in, results out; an engine that stays open between calls.

    with aspec.LLM(target="org/big", draft="org/small", device_memory="8GiB") as llm:
        print(llm.generate("Why is the sky blue?", max_new_tokens=64).text)

The engine runs on a loop in a thread of its own, so that everything here also works inside a running loop (a notebook)
and from several threads, whose prompts share passes.
"""

import asyncio
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from aspec.engine.engine import Engine
from aspec.engine.preparation import prepare_prompts
from aspec.errors import PromptError, UserError, first_error
from aspec.generation.defaults import sampling_params
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import TokenLogprob, derive_seed
from aspec.generation.stats import Piece, RequestStats
from aspec.generation.text.prompts import Prompt, PromptLike, as_prompt, as_prompts, conversation, is_chat, templated
from aspec.io.loop.loop_thread import LoopThread
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.options import engine_options, suggestion
from aspec.plan import Plan
from aspec.planning.resolve import resolve

T = TypeVar("T")

SAMPLING = frozenset(SamplingParams.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Result:
    """One finished generation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" | "length"
    stats: RequestStats
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, if requested


@overload
def generate(prompts: str, params: SamplingParams | None = None, **options: Any) -> Result: ...
@overload
def generate(prompts: PromptLike, params: SamplingParams | None = None, **options: Any) -> Any: ...
def generate(
    prompts: PromptLike,
    params: SamplingParams | None = None,
    *,
    raw: bool = False,
    system: str | None = None,
    **options: Any,
) -> Any:
    """Open an engine, generate as ``LLM.generate`` does, close it. Prompts are checked before a weight is read.

    Keywords are the fields of ``SamplingParams`` and ``EngineOptions``. To generate more than once, keep an ``LLM``:
    it loads its weights once. Raises UserError for input that cannot be used.
    """
    sampling = {name: options.pop(name) for name in SAMPLING & options.keys()}
    wanted, alone = as_prompts(prompts)
    if not wanted:
        return []
    resolved = resolve(engine_options(options, also=SAMPLING))
    used = replace(params, **sampling) if params else sampling_params(generation_defaults(resolved.target), sampling)
    ready = prepare_prompts(resolved, wanted, used, raw=raw, system=system)

    async def main() -> list[Result]:
        async with Engine(ready.resolved) as engine:
            return await generate_all(engine, ready.tokens, used)

    with LoopThread("aspec-engine", loop_factory()) as thread:
        results = thread.call(main)
    return results[0] if alone else results


class LLM:
    """An engine that stays open, for synchronous code; use it as a context manager, or call ``close``.

    Its weights are loaded once. Keywords are the fields of ``EngineOptions``; sizes may be texts such as "8GiB". An
    instance that is never closed ends with its last reference, or with the program. Import aspec before torch: idle
    compute threads then sleep, so that a run may take all cores beside other work. Raises UserError if an option or a
    model cannot be used.
    """

    def __init__(self, target: object = None, draft: object = None, **options: Any) -> None:
        self._engine = Engine(engine_options({"target": target, "draft": draft, **options}))
        self._thread = LoopThread("aspec-engine", loop_factory())
        self._close = weakref.finalize(self, self._thread.close)
        try:
            self._thread.call(self._engine.__aenter__)
        except BaseException:
            self._close()
            raise
        self._thread.at_end = partial(self._engine.__aexit__, None, None, None)

    @overload
    def generate(self, prompts: str, params: SamplingParams | None = None, **options: Any) -> Result: ...
    @overload
    def generate(self, prompts: PromptLike, params: SamplingParams | None = None, **options: Any) -> Any: ...
    def generate(
        self,
        prompts: PromptLike,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        system: str | None = None,
        **sampling: Any,
    ) -> Any:
        """Generate for one prompt (returns a Result) or for a sequence of prompts, which share passes (returns a list).

        A prompt is a text, token ids, or a conversation. A model with a chat template gets a text as a user's message
        after the ``system`` message, unless ``raw``. Sampling parameters come from ``sampling``, otherwise from
        ``params``; without ``params``, from the checkpoint's generation_config.json, otherwise they are greedy. With
        several prompts the seed of each one derives from the given seed and the prompt's index.

        Raises PromptError for a prompt that cannot be served, and ClosedError.
        """
        wanted, alone = as_prompts(prompts)
        used = self._params(params, sampling)
        ready = [self._templated(prompt, raw, system) for prompt in wanted]
        results = self._thread.call(lambda: generate_all(self._engine, ready, used))
        return results[0] if alone else results

    def chat(self, messages: PromptLike, params: SamplingParams | None = None, **sampling: Any) -> Result:
        """The model's answer to a conversation: messages with role and content, or one text of a user.

        Raises PromptError, also if the model has no chat template, and ClosedError.
        """
        talk = as_prompt(messages)
        talk = conversation(talk) if isinstance(talk, str) else talk
        if not is_chat(talk):
            raise PromptError("chat takes messages with role and content, or a text; found token ids. Use generate.")
        used = self._params(params, sampling)
        return self._thread.call(lambda: collect(self._engine, talk, used))

    def stream(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        system: str | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """The pieces of one generation as they come; see ``generate``. Closing the iterator stops the generation."""
        ready, used = self._templated(as_prompt(prompt), raw, system), self._params(params, sampling)
        return self._pieces(ready, used)

    @property
    def plan(self) -> Plan:
        """What is resident, what streams, and the byte counts behind it."""
        return self._engine.plan

    @property
    def max_context(self) -> int:
        """The most tokens of one sequence, prompt included."""
        return self._engine.max_context

    def close(self) -> None:
        """End all generations and free everything; may be called twice."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _pieces(self, prompt: Prompt, params: SamplingParams) -> Iterator[Piece]:
        stream = self._engine.stream(prompt, params)
        try:
            while True:
                try:
                    yield self._thread.call(stream.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            self._thread.call(stream.aclose)

    def _templated(self, prompt: Prompt, raw: bool, system: str | None) -> Prompt:
        return templated(prompt, raw or not self._engine.tokenizer.has_chat_template, system)

    def _params(self, params: SamplingParams | None, given: Mapping[str, Any]) -> SamplingParams:
        for name in given.keys() - SAMPLING:
            raise UserError(f"there is no sampling parameter {name!r}{suggestion(name, sorted(SAMPLING))}.")
        return self._engine.sampling(**given) if params is None else replace(params, **given)


async def generate_all(engine: Engine, prompts: Sequence[PromptLike], params: SamplingParams) -> list[Result]:
    """Generate for all prompts at once, each with its own seed. A PromptError names the prompt among several."""

    async def numbered(index: int, own: SamplingParams) -> Result:
        try:
            return await collect(engine, prompts[index], own)
        except PromptError as error:
            if len(prompts) == 1:
                raise
            raise PromptError(f"prompt {index}: {error}") from error

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(numbered(index, own)) for index, own in enumerate(seeded(params, len(prompts)))]
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    return [task.result() for task in tasks]


def seeded(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The parameters of each prompt: one prompt keeps the seed; several derive theirs from the seed and their index."""
    if count == 1:
        return [params]
    return [replace(params, seed=derive_seed(params.seed, index)) for index in range(count)]


async def collect(
    engine: Engine, prompt: PromptLike, params: SamplingParams, on_text: Callable[[str], None] | None = None
) -> Result:
    """Read one stream to its end; ``on_text`` receives the text as it arrives."""
    texts: list[str] = []
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    async with aclosing(engine.stream(prompt, params)) as stream:
        async for piece in stream:
            texts.append(piece.text)
            tokens.extend(piece.token_ids)
            logprobs.extend(piece.logprobs)
            if on_text is not None:
                on_text(piece.text)
            if piece.finish_reason is not None and piece.stats is not None:
                return Result("".join(texts), tuple(tokens), piece.finish_reason, piece.stats, tuple(logprobs))
    raise AssertionError("a stream ended without a finish reason")


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function on uvloop where it is available; raise the first of several errors."""

    async def body() -> T:
        return await main()

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(body())
    except BaseExceptionGroup as group:
        raise first_error(group) from None


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The constructor of the event loop: uvloop's, and asyncio's on Windows."""
    if sys.platform == "win32":
        return asyncio.new_event_loop
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
