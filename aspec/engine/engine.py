"""The engine: opens a plan, runs the executor in a task of its own, and serves streams of text.

    async with open_engine(target="org/big", draft="org/small", device_memory=8 << 30) as engine:
        async for piece in engine.stream("Once upon a time", SamplingParams(max_new_tokens=64)):
            print(piece.text, end="")

Several streams at once share passes. One TaskGroup lives inside the executor's task; no generator ever yields to
a caller from inside it (PEP 789). Every open stream raises a failure of the engine; if no stream did, closing raises
it. Shutdown ends every open stream with a ClosedError.

A failed opening and every closing free all memory, threads and files, also after an error or a cancellation; the
cancellation of a caller is raised after that.
"""

import asyncio
import itertools
import os
import sys
import warnings
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Self, cast

import torch

from aspec.engine.admission import Admission
from aspec.engine.allocate import EngineMemory, assemble, free_memory
from aspec.engine.failures import over_budget, translate_error
from aspec.engine.link_rate import raw_link_rate
from aspec.engine.load import load_all
from aspec.engine.observers import guarded
from aspec.engine.streams import Streams
from aspec.errors import ClosedError, DeviceError, PromptError, UserError
from aspec.generation.defaults import sampling_params
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler
from aspec.generation.stats import Piece, RequestStats
from aspec.generation.text.prompts import PromptLike, as_prompt, is_chat
from aspec.generation.text.time_limit import TimeLimit
from aspec.generation.text.tokenizer import TEMPLATE_S, Tokenizer
from aspec.io.disk import DiskLane
from aspec.io.fetching.fetch import Fetches
from aspec.io.loop.settling import close_all, in_thread, settle, settle_all
from aspec.io.memory import freeze
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.options import EngineOptions, engine_options
from aspec.plan import Plan
from aspec.planning.resolve import Resolved, resolve
from aspec.tasks.backend import Backend
from aspec.tasks.executor import Executor, IssueObserver, Observer
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import Event, Shutdown
from aspec.units import format_bytes

MOST_KERNELS = 48  # compiled products that torch keeps


class Engine:
    """A target, its draft and one run of the dataflow; use as an async context manager."""

    def __init__(
        self,
        options: EngineOptions | Resolved,
        observers: Iterable[Observer] = (),
        issue_observers: Iterable[IssueObserver] = (),
    ) -> None:
        """An observer that raises is dropped with a RuntimeWarning."""
        self._to_resolve = options
        self._options = options.options if isinstance(options, Resolved) else options
        self._observers = [guarded(observer) for observer in observers]
        self._issue_observers = [guarded(observer) for observer in issue_observers]
        self._ids = itertools.count()
        self._probing = asyncio.Lock()  # held while the links are measured: no stream may start
        self._assembly: EngineMemory | None = None
        self._disk: DiskLane | None = None
        self._backend: Backend | None = None
        self._streams: Streams | None = None  # None before the opening
        self._thaw: Callable[[], None] = lambda: None  # lets garbage collections see what the opening has made
        self._running: asyncio.Task[None] | None = None
        self._encoding: set[TimeLimit] = set()  # of the prompts that are being encoded
        self._defaults: dict[str, Any] | None = None  # of generation_config.json; None: not read
        self._failure: Exception | None = None
        self._failure_raised = False  # whether a stream has raised it

    async def __aenter__(self) -> Self:
        if self._streams is not None:
            raise UserError("an engine opens once, and this one was opened before. Make another one.")
        _tune_process()
        try:
            await self._start()
        except BaseException as error:
            try:
                await self._shut()
            except Exception as another:
                error.add_note(f"closing what was open failed, too: {another}")
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        plan, peak_bytes = self.plan, self.device_peak_bytes
        await self._shut()
        if peak_bytes is not None and peak_bytes > (plan.budget_bytes or peak_bytes):
            warnings.warn(over_budget(plan, peak_bytes), RuntimeWarning, stacklevel=2)
        if self._failure is not None and not self._failure_raised and kind is None:
            raise self._failure

    @property
    def plan(self) -> Plan:
        """The plan: which parts are resident, which stream, and the byte counts behind it."""
        return self._open.plan

    @property
    def device_peak_bytes(self) -> int | None:
        """The peak bytes held on the device so far, by its allocator's count; None for the host's own memory."""
        return None if self._open.device is None else self._open.device.peak_bytes

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's tokenizer."""
        return self._open.tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the target computes."""
        return self._open.target.dtype

    @property
    def max_context(self) -> int:
        """The most tokens of one sequence, prompt included."""
        return self._open.plan.capacity

    async def wait_end(self) -> Exception | None:
        """Wait until nothing runs any more; returns the failure that ended it, None if the engine was closed."""
        assert self._running is not None, "the engine is open"
        await asyncio.wait([self._running])
        return self._failure

    def check_tokens(self, tokens: list[int]) -> None:
        """Raise PromptError if a prompt has no tokens, or one that the target has not."""
        self._admission.check_tokens(tokens)

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling parameters: the given ones, then those of the checkpoint's generation_config.json, then greedy."""
        if self._defaults is None:
            self._defaults = generation_defaults(self._open.target.folder)
        return sampling_params(self._defaults, {**dict.fromkeys(SamplingParams.__dataclass_fields__), **given})

    async def encode(
        self, prompt: PromptLike, said: Sequence[int] = (), variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """A prompt's tokens; see ``stream``. Raises PromptError, and ClosedError if the engine ends meanwhile.

        A thread encodes texts and chats; a closing engine or a cancelled caller ends it. ``said`` and ``variables``
        are of a chat, see ``Tokenizer.encode_chat``.
        """
        tokenizer, (streams, _) = self._open.tokenizer, self._serving()  # raises if the engine has ended
        plain = as_prompt(prompt)
        if not isinstance(plain, str) and not is_chat(plain):
            return cast("list[int]", plain)
        limit = TimeLimit(TEMPLATE_S)
        encode = partial(tokenizer.encode_prompt, plain, limit, said, variables)
        self._encoding.add(limit)
        try:
            with streams.encoding():
                return await settle(in_thread(encode), limit.stop)
        except PromptError:
            self._serving()  # if the closing engine has stopped it, raise that error
            raise
        finally:
            self._encoding.remove(limit)

    async def stream(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        sampler: Sampler | None = None,
        stats: RequestStats | None = None,
        *,
        scored: bool = False,
    ) -> AsyncGenerator[Piece, None]:
        """Generate; yields a piece per round, the last one with a finish reason and statistics.

        A text is continued as it is; messages pass through the model's chat template. ``params``: by default the
        checkpoint's own, as ``sampling()`` returns them; ``sampler`` replaces the sampler of ``params``; ``stats`` are
        filled while it runs. ``scored``: the first piece has the logprobs of the prompt, with as many likeliest tokens
        as ``params`` ask for. Raises PromptError for a prompt that cannot be served, and the engine's failure.
        """
        params, number = params or self.sampling(), next(self._ids)
        tokens = await self.encode(prompt)
        sequence = await self._admission.sequence(number, tokens, params, sampler or Sampler(params), scored=scored)
        streams, backend = self._serving()
        stats = stats or RequestStats()
        stats.begin(sequence.num_prompt, backend.now())
        nothing_new = params.max_new_tokens == 0
        if nothing_new and not scored:
            yield Piece("", (), "length", stats.close(self.plan, stats.arrived_s))
            return
        queue = streams.open(sequence, stats)
        try:
            while True:
                piece = await queue.get()
                if isinstance(piece, BaseException):
                    self._failure_raised |= piece is self._failure
                    raise piece
                if nothing_new:  # but the scores of the prompt
                    piece = replace(piece, text="", token_ids=(), logprobs=(), finish_reason="length")
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            streams.close(sequence.id)

    async def probe_link_rate(self, seconds: float = 0.5) -> float | None:
        """The best rate of the weight stream now, in bytes per second; None if nothing streams. See ``raw_link_rate``.

        Waits until the links are idle: all running streams have ended and every slot is filled again. New streams wait
        for the probe. Raises the engine's failure if there is one.
        """
        streams, _ = self._serving()
        async with self._probing:
            streams.hold()
            try:
                await self._wait_rest()
                return await settle(in_thread(partial(raw_link_rate, self._open, seconds, self._options.link_rate)))
            finally:
                streams.resume()

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def _open(self) -> EngineMemory:
        if self._assembly is None:
            raise self._closed()
        return self._assembly

    @property
    def _admission(self) -> Admission:
        return Admission(self._open.tokenizer, self._open.grammars, self._open.target, self._open.plan.capacity)

    def _serving(self) -> tuple[Streams, Backend]:
        """The streams and the backend. Raises the error that refuses new streams, if there is one."""
        streams, backend = self._streams, self._backend
        if streams is None or backend is None or streams.ended is not None:
            raise self._closed()
        return streams, backend

    def _closed(self) -> Exception:
        """The error for a call to an engine that is not open."""
        if self._streams is None or self._streams.ended is None:
            return UserError("the engine is not open: expected a call inside `async with engine`. Open it first.")
        self._failure_raised |= self._streams.ended is self._failure
        return self._streams.ended

    async def _start(self) -> None:
        fetches = Fetches(self._options.progress)
        assembling = in_thread(lambda: assemble(resolve(self._to_resolve, fetches)))
        try:
            await settle(assembling, fetches.stop)
        finally:  # also after a cancellation: the allocated memory must be freed
            if not assembling.cancelled() and assembling.exception() is None:
                self._assembly = assembling.result()
        opened = self._open
        _warn(opened)
        loop, rate = asyncio.get_running_loop(), self._options.link_rate
        self._disk = DiskLane(loop, rate_bytes_per_s=rate, versions=opened.files)
        await self._load(opened, self._disk)
        self._backend = opened.open_backend(self._disk)
        scheduler = Scheduler(opened.plan)
        reuse = self._options.reuse_prefix
        streams = self._streams = Streams(opened.plan, opened.runner, scheduler, self._post, reuse=reuse)
        observers = [streams.observe, *(check.observe for check in opened.checks), *self._observers]
        self._executor = Executor(scheduler, self._backend, observers, self._issue_observers)
        self._running = asyncio.create_task(self._run(self._executor, streams), name="aspec engine")
        self._thaw = freeze()  # these objects live until the end: keep them out of collections

    def _post(self, event: Event) -> None:
        self._executor.post(event)

    async def _load(self, assembly: EngineMemory, disk: DiskLane) -> None:
        """Read the parts that are read once, several at a time; report the bytes that are loaded."""
        total, done = sum(load.part.nbytes for load in assembly.loads), 0

        def report(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if self._options.progress is not None:
                self._options.progress("load", done, total)

        await load_all(assembly.loads, disk, assembly.device, report, assembly.plan.request.threads)

    async def _wait_rest(self) -> None:
        """Wait until no lane has work. Raises the engine's failure if it ends first."""
        assert self._running is not None, "the engine is open"
        rest = asyncio.ensure_future(self._executor.wait_rest())
        try:
            await asyncio.wait([rest, self._running], return_when=asyncio.FIRST_COMPLETED)
        finally:
            rest.cancel()
        if self._running.done():
            raise self._closed()

    async def _run(self, executor: Executor, streams: Streams) -> None:
        """Run the executor to its end; then end every open stream with an error."""
        try:
            await executor.run()
        except Exception as error:
            self._failure = translate_error(error, self.plan)
            streams.end(self._failure)
        finally:
            streams.end(ClosedError("the engine's run was cancelled before this stream had ended."))

    async def _shut(self) -> None:
        """End the streams, settle the tasks, free everything; an error or a cancellation skips no step."""
        async with AsyncExitStack() as stack:
            stack.callback(self._free_memory)
            stack.push_async_callback(self._close_backend)
            for limit in self._encoding:
                limit.stop()
            if self._streams is not None:
                self._streams.end(ClosedError("the engine was closed before this stream had ended."))
            if self._running is not None:
                if not self._running.done():
                    self._executor.post(Shutdown(now=True))
                    self._running.cancel()
                await settle_all([self._running])

    async def _close_backend(self) -> None:
        try:
            if self._backend is not None:
                await self._backend.close()
        except DeviceError:
            if self._assembly is not None:
                self._assembly.device = None  # the device may still write: its memory stays
            raise

    def _free_memory(self) -> None:
        """Join the disk threads and free the memory; the models are freed with the assembly."""
        assembly, self._assembly = self._assembly, None
        self._thaw()
        close_all(
            [
                *([] if self._disk is None else [self._disk.close]),
                *([] if assembly is None else [partial(free_memory, assembly)]),
            ]
        )


def open_engine(*, observers: Iterable[Observer] = (), **options: Any) -> Engine:
    """An engine for ``async with``; keywords are the fields of ``EngineOptions``.

    Raises UserError if an option or a model cannot be used.
    """
    return Engine(engine_options(options), observers)


def _warn(assembly: EngineMemory) -> None:
    """Warn of what the user should know of the models."""
    for text in dict.fromkeys(remark for model in assembly.models for remark in model.remarks):
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _tune_process() -> None:
    """Keep the interpreter responsive beside compute threads, and few compiled products.

    A CPU's bf16 products are compiled for every new shape and kept, 0.6 MB each, in two caches of 1,024. Fewer suffice:
    a batch's shapes are seldom the same again. torch reads the variables at its first such product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(MOST_KERNELS))
    sys.setswitchinterval(1e-3)


def describe_plan(plan: Plan) -> str:
    """One line for people: parts and bytes streamed per pass, what proposes without a model, threads, bytes held."""
    streamed = format_bytes(plan.streamed_bytes)
    words = [f"{len(plan.streamed)} of {len(plan.parts)} parts stream, {streamed} per pass"]
    words += ["proposals from the text itself"] if plan.request.from_text else []
    words += [] if plan.request.threads is None else [str(plan.request.threads)]
    words += [plan.exactness] if plan.exactness else []
    return "; ".join([*words, f"held: {plan.describe()}"])
