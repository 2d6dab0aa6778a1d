"""The open streams of an engine: who waits for a row, whose KV a prompt takes over, and what every stream receives.

A stream ends in one of three ways: with its last piece, with an error of its own, or with the one error that ends all
of them. After that error no stream opens any more. Belongs to the loop's thread.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from aspec.engine.model_runner import ModelRunner
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.generation.stats import Piece, RequestStats
from aspec.plan import Plan
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import Event, RequestAborted, RequestAdded, Span

GATHER_S = 0.1  # that a ready prompt waits for those that are becoming tokens, before an idle engine begins a pass


class Streams:
    """Between those who listen and the scheduler; mutable, because streams come and go."""

    def __init__(
        self, plan: Plan, runner: ModelRunner, scheduler: Scheduler, post: Callable[[Event], None], *, reuse: bool
    ) -> None:
        """``post`` tells the scheduler; ``reuse``: prompts take over the KV of those that began like them."""
        self._plan, self._runner, self._scheduler, self._post, self._reuse = plan, runner, scheduler, post, reuse
        self._queues: dict[int, asyncio.Queue[Piece | BaseException]] = {}
        self._requests: dict[int, RequestStats] = {}
        self._waiting: deque[TokenSequence] = deque()  # those that the scheduler has not heard of: no row is free
        self._admitted: set[int] = set()  # those that have a row, or will take one between this pass and the next
        self._followed: dict[int, int] = {}  # ended sequences whose row is to be taken, and by whom
        self._held = False  # nothing new may start: the links are measured
        self._coming = 0  # prompts that become tokens at present
        self._gathering: asyncio.TimerHandle | None = None  # until then those that are ready wait for those
        self.ended: Exception | None = None  # the error that ended all streams, and refuses new ones

    def open(self, sequence: TokenSequence, now_s: float) -> asyncio.Queue[Piece | BaseException]:
        """What ``sequence`` brings from now on. Raises the error that ended all streams, if one did."""
        if self.ended is not None:
            raise self.ended
        queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._queues[sequence.id] = queue
        self._requests[sequence.id] = RequestStats(sequence.num_prompt, now_s)
        self._waiting.append(sequence)
        if len(self._waiting) > 1 and sequence.id < self._waiting[-2].id:
            self._waiting = deque(sorted(self._waiting, key=lambda one: one.id))  # first called, first served
        self._admit(gather=True)
        return queue

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """A stream opens behind this block. An idle engine waits for it a little: both then share the first pass."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            if self.ended is None:
                self._admit(gather=True)

    def leave(self, sequence: int) -> None:
        """A stream has ended, or is not read any more."""
        self._queues.pop(sequence, None)
        if self._requests.pop(sequence, None) is None or self.ended is not None:
            return
        if sequence in self._admitted:
            self._admitted.remove(sequence)
            self._followed = {ended: by for ended, by in self._followed.items() if by != sequence}
            self._post(RequestAborted(sequence))
            self._admit()
        else:
            self._waiting = deque(one for one in self._waiting if one.id != sequence)

    def hold(self) -> None:
        """No stream begins until ``go_on``; those that have begun go on."""
        self._held = True

    def go_on(self) -> None:
        """Those that were held back begin."""
        self._held = False
        if self.ended is None:
            self._admit()

    def end(self, error: Exception) -> None:
        """Every open stream ends with ``error``, and new ones are refused with it; only the first error counts."""
        if self.ended is None:
            self.ended = error
            for queue in self._queues.values():
                queue.put_nowait(error)

    def observe(self, span: Span) -> None:
        """Turn committed tokens into pieces, and spans into statistics; runs on the loop after every task."""
        if span.task.filled_slot is not None:
            for stats in self._requests.values():
                stats.streamed_bytes += span.task.nbytes
        for outcome in span.outcomes:
            sequence = self._runner.sequence_in(outcome.row)
            request = self._requests.get(sequence.id)
            queue = self._queues.get(sequence.id)
            if request is None or queue is None:
                continue  # it was left
            request.take(outcome, span.stop_s)
            request.num_cached_tokens = sequence.num_cached_tokens
            for text, tokens, logprobs in sequence.take_pieces():
                reason = sequence.finish_reason
                final = request.close(self._plan, span.stop_s) if reason else None
                queue.put_nowait(Piece(text, tokens, reason, final, logprobs))
            if sequence.failure is not None:
                queue.put_nowait(sequence.failure)
            if sequence.ended:
                self._requests.pop(sequence.id)
                self._admitted.discard(sequence.id)
        if span.outcomes:
            self._admit()

    def _admit(self, *, gather: bool = False) -> None:
        """Tell the scheduler of as many sequences as rows are free; ``gather``: not yet, if more are coming soon.

        Whose KV a prompt can take over shows only then. A row that becomes free is taken in the same pass, because the
        scheduler hears of the follower before it hears of the end.
        """
        for dropped in self._scheduler.take_dropped():
            self._runner.forget(dropped)
        if gather and self._coming and self._waiting and not self._admitted:
            if self._gathering is None:
                self._gathering = asyncio.get_running_loop().call_later(GATHER_S, self._gathered)
            return
        while self._waiting and not self._held and len(self._admitted) < self._plan.num_rows:
            sequence = self._waiting.popleft()
            self._admitted.add(sequence.id)
            self._runner.admit(sequence)
            reuse_from, kept = self._shared(sequence) if self._reuse else (None, 0)
            self._post(RequestAdded(sequence.id, sequence.num_prompt, sequence.max_new_tokens, reuse_from, kept))

    def _gathered(self) -> None:
        """Those that are ready waited long enough."""
        self._gathering = None
        if self.ended is None:
            self._admit()

    def _shared(self, new: TokenSequence) -> tuple[int | None, int]:
        """The ended sequence that a new one shares most leading tokens with, of those whose KV stands; how many.

        One that was left may still be in its pass: its row is free only when that pass has committed, so its KV, too,
        stands up to its last token. The prompt's last token never counts: it is fed, so that there is a draw.
        """
        sitting = {one.id: one for one in self._runner.occupants()}
        self._followed = {ended: by for ended, by in self._followed.items() if ended in sitting}
        ended = [one for one in sitting.values() if one.id not in self._requests and one.id not in self._followed]
        shared = [(common_prefix(one.tokens[:-1], new.tokens[:-1]), one.id) for one in ended]
        kept, reuse_from = max(shared, default=(0, -1))
        if not kept:
            return None, 0
        self._followed[reuse_from] = new.id
        return reuse_from, kept


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
