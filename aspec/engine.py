"""The engine: opens a plan, runs the executor in a task of its own, and serves streams of text.

    async with open_engine(target="org/big", draft="org/small", device_memory=8 << 30) as engine:
        async for piece in engine.stream("Once upon a time", SamplingParams(max_new_tokens=64)):
            print(piece.text, end="")

Several streams at once share passes. One TaskGroup lives inside the executor's task; no generator ever yields to
a caller from inside it (PEP 789). A failure surfaces in every open stream, and once more when the engine closes
if nobody heard it.
"""

import asyncio
import contextlib
import gc
import itertools
import os
import sys
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Self

import torch

from aspec.assembly import EngineMemory, assemble, release, too_little
from aspec.errors import DeviceError, InternalError, PromptError, first_error
from aspec.executor import Executor, IssueObserver, Observer
from aspec.io.disk import DiskLane
from aspec.links import raw_link_rate
from aspec.loading import load_all
from aspec.options import EngineOptions
from aspec.params import SamplingParams
from aspec.plan import Plan, format_bytes
from aspec.resolve import Resolved, resolve
from aspec.sampling import Sampler
from aspec.scheduler import Scheduler
from aspec.sequence import Sequence as TokenSequence
from aspec.stats import Piece, RequestStats
from aspec.tasks.task import Arrived, Cancelled, Closing, Span
from aspec.text import TextStream, Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""A text, token ids, or a chat as role and content messages."""


class Engine:
    """A target, its draft and one run of the dataflow; use as an async context manager."""

    def __init__(
        self,
        options: EngineOptions | Resolved,
        observers: Iterable[Observer] = (),
        issue_observers: Iterable[IssueObserver] = (),
    ) -> None:
        self._asked = options
        self._options = options.options if isinstance(options, Resolved) else options
        self._observers = [self._observe, *observers]
        self._issue_observers = list(issue_observers)
        self._ids = itertools.count()
        self._queues: dict[int, asyncio.Queue[Piece | BaseException]] = {}
        self._requests: dict[int, RequestStats] = {}
        self._waiting: deque[TokenSequence] = deque()  # those that the scheduler has not heard of: no row is free
        self._admitted: set[int] = set()  # those that have a row, or will take one between this pass and the next
        self._followed: dict[int, int] = {}  # ended sequences whose row is to be taken, and by whom
        self._probing = asyncio.Lock()  # held while the links are measured: nothing new may start
        self._assembly: EngineMemory | None = None
        self._running: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._heard = False  # some stream has raised the failure

    async def __aenter__(self) -> Self:
        _tune_process(self._options.threads)
        assembly = await asyncio.to_thread(lambda: assemble(resolve(self._asked)))
        self._assembly = assembly
        _warn_of_unexpected(assembly)
        self._disk = DiskLane(asyncio.get_running_loop(), rate_bytes_per_s=self._options.link_rate)
        try:
            await self._load(assembly)
        except BaseException:
            self._release()
            raise
        self._backend = assembly.open_backend(self._disk)
        scheduler = Scheduler(assembly.plan)
        self._executor = Executor(scheduler, self._backend, self._observers, self._issue_observers)
        self._running = asyncio.create_task(self._run(), name="aspec engine")
        gc.freeze()  # what lives now lives until the end: keep it out of collections
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._running is not None
        if not self._running.done():
            self._executor.post(Closing(now=True))
            self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        peak_bytes = self.device_peak_bytes
        await self._backend.close()
        if peak_bytes is not None and peak_bytes > (self.plan.budget_bytes or peak_bytes):
            warnings.warn(_beyond(self.plan, peak_bytes), RuntimeWarning, stacklevel=2)
        self._release()
        if self._failure is not None and not self._heard and kind is None:
            raise self._failure

    @property
    def plan(self) -> Plan:
        """What is resident, what streams, and the arithmetic behind it."""
        return self._open.plan

    @property
    def device_peak_bytes(self) -> int | None:
        """The most that was held on the device so far, as its allocator counts; None on the host's own memory."""
        return None if self._open.device is None else self._open.device.peak_bytes

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's tokenizer."""
        return self._open.tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """What the target computes in."""
        return self._open.target.dtype

    @property
    def max_context(self) -> int:
        """Tokens that a sequence may have, prompt included."""
        return self._open.plan.capacity

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, sampler: Sampler | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Generate; yields a piece per round, the last one with a finish reason and statistics.

        ``sampler`` draws in place of the one that ``params`` ask for. Raises PromptError for a prompt that cannot be
        served, and the engine's failure if it has one.
        """
        params = params or SamplingParams()
        sequence = self._sequence(prompt, params, sampler or Sampler(params))
        if params.max_new_tokens == 0:
            yield Piece("", (), "length", RequestStats(sequence.num_prompt, 0.0).close(self.plan, 0.0))
            return
        queue = self._arrive(sequence)
        try:
            while True:
                piece = await queue.get()
                if isinstance(piece, BaseException):
                    self._heard = True
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._leave(sequence.id)

    async def probe_link_rate(self, seconds: float = 0.5) -> float | None:
        """Raw bytes per second at which what streams could come; None if nothing streams. See ``raw_link_rate``.

        Waits until the links rest: the streams under way have ended and every slot is filled again. Streams that begin
        meanwhile wait for the probe. Raises the engine's failure if it has one.
        """
        async with self._probing:
            try:
                await self._wait_rest()
                return await asyncio.to_thread(raw_link_rate, self._open, seconds, self._options.link_rate)
            finally:
                asyncio.get_running_loop().call_soon(self._admit)  # once the lock is free

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def _open(self) -> EngineMemory:
        if self._assembly is None:
            raise InternalError("the engine is not open: use it inside `async with`")
        return self._assembly

    async def _load(self, assembly: EngineMemory) -> None:
        """Read what is read once, several parts in flight; report bytes as they land."""
        total, done = sum(load.part.nbytes for load in assembly.loads), 0

        def report(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if self._options.progress is not None:
                self._options.progress("load", done, total)

        await load_all(assembly.loads, self._disk, assembly.device, report)

    async def _wait_rest(self) -> None:
        """Return when no lane has work. Raises the engine's failure if it ends first."""
        assert self._running is not None, "the engine is open"
        rest = asyncio.ensure_future(self._executor.wait_rest())
        try:
            await asyncio.wait([rest, self._running], return_when=asyncio.FIRST_COMPLETED)
        finally:
            rest.cancel()
        if self._running.done():
            self._heard = True
            raise self._failure or InternalError("the links are probed while the engine is open, found it closed")

    async def _run(self) -> None:
        """The executor's whole life; whatever ends it, every stream hears."""
        try:
            await self._executor.run()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failure = _told(error, self.plan)
            for queue in self._queues.values():
                queue.put_nowait(self._failure)

    def _release(self) -> None:
        """Join the readers and give the memory back; the models die with the assembly."""
        self._disk.close()
        assembly, self._assembly = self._assembly, None
        gc.unfreeze()
        if assembly is not None:
            release(assembly)

    def _sequence(self, prompt: Prompt, params: SamplingParams, sampler: Sampler) -> TokenSequence:
        opened = self._open
        tokens = _encode(opened.tokenizer, prompt)
        room = opened.plan.capacity - len(tokens)
        if not tokens:
            raise PromptError("the prompt is empty: expected at least one token; give --prompt some text.")
        if max(tokens) >= opened.target.vocab_size or min(tokens) < 0:
            raise PromptError(
                f"the prompt holds token {max(tokens)}; the target knows 0 .. {opened.target.vocab_size - 1}."
            )
        if room < 1:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens; the context holds {opened.plan.capacity}, and at least one must "
                f"stay free to generate. Shorten the prompt or raise --max-context (the model allows "
                f"{opened.target.max_context or 'any'})."
            )
        return TokenSequence(
            id=next(self._ids),
            tokens=tokens,
            num_prompt=len(tokens),
            params=params,
            sampler=sampler,
            text=TextStream(opened.tokenizer, stop=params.stop),
            end_ids=frozenset() if params.ignore_eos else frozenset(opened.target.end_ids),
            max_new_tokens=min(params.max_new_tokens, room),
        )

    def _arrive(self, sequence: TokenSequence) -> asyncio.Queue[Piece | BaseException]:
        if self._failure is not None:
            self._heard = True
            raise self._failure
        queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._queues[sequence.id] = queue
        self._requests[sequence.id] = RequestStats(sequence.num_prompt, self._backend.now())
        self._waiting.append(sequence)
        self._admit()
        return queue

    def _admit(self) -> None:
        """Tell the scheduler of as many sequences as rows are free.

        Whose KV a prompt can take over shows only then; and whoever ends is followed in the same pass's seating,
        because the scheduler hears of the follower before it hears of the end.
        """
        while self._waiting and not self._probing.locked() and len(self._admitted) < self.plan.num_rows:
            sequence = self._waiting.popleft()
            self._admitted.add(sequence.id)
            self._open.runner.admit(sequence)
            follows, kept = self._shared(sequence) if self._options.reuse_prefix else (None, 0)
            self._executor.post(Arrived(sequence.id, sequence.num_prompt, sequence.max_new_tokens, follows, kept))

    def _shared(self, new: TokenSequence) -> tuple[int | None, int]:
        """The ended sequence that a new one shares most leading tokens with, of those whose KV stands; how many.

        One that was left may still be in its pass: its row is free only when that pass has committed, so its KV, too,
        stands up to its last token. The prompt's last token never counts: it is fed, so that there is a draw.
        """
        sitting = {one.id: one for one in self._open.runner.occupants()}
        self._followed = {ended: by for ended, by in self._followed.items() if ended in sitting}
        ended = [one for one in sitting.values() if one.id not in self._requests and one.id not in self._followed]
        shared = [(common_prefix(one.tokens[:-1], new.tokens[:-1]), one.id) for one in ended]
        kept, follows = max(shared, default=(0, -1))
        if not kept:
            return None, 0
        self._followed[follows] = new.id
        return follows, kept

    def _leave(self, sequence: int) -> None:
        """A stream has ended or nobody listens any more."""
        self._queues.pop(sequence, None)
        if self._requests.pop(sequence, None) is None or self._assembly is None:
            return
        if sequence in self._admitted:
            self._admitted.remove(sequence)
            self._followed = {ended: by for ended, by in self._followed.items() if by != sequence}
            self._executor.post(Cancelled(sequence))
            self._admit()
        else:
            self._waiting = deque(one for one in self._waiting if one.id != sequence)

    def _observe(self, span: Span) -> None:
        """Turn committed tokens into pieces, and spans into statistics; runs on the loop after every task."""
        if span.task.filled_slot is not None:
            for stats in self._requests.values():
                stats.streamed_bytes += span.task.nbytes
        for outcome in span.outcomes:
            sequence = self._open.runner.sequence_in(outcome.row)
            request = self._requests.get(sequence.id)
            queue = self._queues.get(sequence.id)
            if request is None or queue is None:
                continue  # cancelled: nobody listens
            request.take(outcome, span.stop_s)
            request.reused_tokens = sequence.kept
            for text, tokens, logprobs in sequence.take_pieces():
                reason = sequence.finish_reason
                final = request.close(self.plan, span.stop_s) if reason else None
                queue.put_nowait(Piece(text, tokens, reason, final, logprobs))
            if sequence.finish_reason is not None:
                self._requests.pop(sequence.id)
                self._admitted.discard(sequence.id)
        if span.outcomes:
            self._admit()


def open_engine(*, observers: Iterable[Observer] = (), **options: Any) -> Engine:
    """An engine for ``async with``; keywords are the fields of ``EngineOptions``.

    Raises UserError where an option or a model cannot be used.
    """
    return Engine(EngineOptions(**options), observers)


def _encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    messages = [message for message in prompt if isinstance(message, dict)]
    return tokenizer.encode_chat(messages) if messages else [token for token in prompt if isinstance(token, int)]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _told(error: Exception, plan: Plan) -> Exception:
    """A device's own errors in our words; any other as it is."""
    first = first_error(error)
    told: Exception | None = None
    if isinstance(first, torch.OutOfMemoryError):
        told = DeviceError(too_little(plan))
    elif isinstance(first, torch.AcceleratorError):
        said = str(first).partition("\n")[0]
        told = DeviceError(f"the device failed while it ran: {said}. Nothing more can be run on it in this process.")
    if told is None:
        return error
    told.__cause__ = error
    return told


def _beyond(plan: Plan, peak_bytes: int) -> str:
    return (
        f"the device held {format_bytes(peak_bytes)} at its peak, more than the budget of "
        f"{format_bytes(plan.budget_bytes or 0)}; the plan counted {plan.describe()}. Please report this."
    )


def _warn_of_unexpected(assembly: EngineMemory) -> None:
    """Stored tensors that a model has no use for: the folder may hold more than its config.json tells."""
    for model in (assembly.target, assembly.draft):
        if model is not None and (unused := model.unexpected):
            names = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            text = f"{model.folder}: {len(unused)} stored tensors have no use in this model and are not read: {names}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def _tune_process(threads: int | None) -> None:
    """Leave the interpreter responsive beside compute threads, and a core to the readers and the loop.

    With a thread per core, whatever else runs makes every parallel region wait for a scheduler slice at its barrier.
    """
    sys.setswitchinterval(1e-3)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores - 1))


def describe_plan(plan: Plan) -> str:
    """One line for people: what streams per pass, what is held."""
    streamed = format_bytes(plan.streamed_bytes)
    return f"{len(plan.streamed)} of {len(plan.parts)} parts stream, {streamed} per pass; held: {plan.describe()}"
