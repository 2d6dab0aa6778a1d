"""The open streams of an engine: which sequence waits for a row, which KV it reuses, which pieces its stream gets.

A stream ends in one of three ways: with its last piece, with an error of its own, or with the one error that ends all
of them. After that error no new stream opens. Only the loop's thread calls this.
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
from aspec.tasks.task import Event, ExpertLoad, RequestAborted, RequestAdded, Span

GATHER_S = 0.1  # the longest wait of a ready prompt for others that are being encoded, while the engine is idle


class Streams:
    """Connects streams to the scheduler; mutable, because streams open and close."""

    def __init__(
        self, plan: Plan, runner: ModelRunner, scheduler: Scheduler, post: Callable[[Event], None], *, reuse: bool
    ) -> None:
        """``post`` sends an event to the scheduler; ``reuse``: a prompt reuses the KV of one that begins like it."""
        self._plan, self._runner, self._scheduler, self._post, self._reuse = plan, runner, scheduler, post, reuse
        self._queues: dict[int, asyncio.Queue[Piece | BaseException]] = {}
        self._requests: dict[int, RequestStats] = {}
        self._waiting: deque[TokenSequence] = deque()  # unknown to the scheduler: no row is free
        self._admitted: set[int] = set()  # with a row, or with one after this pass
        self._reused_by: dict[int, int] = {}  # ended sequence -> the new one that reuses its row
        self._held = False  # no stream may start: the links are measured
        self._num_encoding = 0  # prompts that are being encoded
        self._gather_timer: asyncio.TimerHandle | None = None  # ends the wait of ready prompts for them
        self.ended: Exception | None = None  # the error that ended all streams, and refuses new ones

    def open(self, sequence: TokenSequence, stats: RequestStats) -> asyncio.Queue[Piece | BaseException]:
        """The queue of a new sequence's pieces. Raises the error that ended all streams, if there is one.

        ``stats`` of the sequence are filled as it runs.
        """
        if self.ended is not None:
            raise self.ended
        queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._queues[sequence.id] = queue
        stats.experts_before = self._scheduler.expert_counts
        self._requests[sequence.id] = stats
        self._waiting.append(sequence)
        if len(self._waiting) > 1 and sequence.id < self._waiting[-2].id:
            self._waiting = deque(sorted(self._waiting, key=lambda one: one.id))  # first called, first served
        self._admit(gather=True)
        return queue

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """A stream opens after this block. An idle engine delays ready prompts for it, to share the first pass."""
        self._num_encoding += 1
        try:
            yield
        finally:
            self._num_encoding -= 1
            if self.ended is None:
                self._admit(gather=True)

    def close(self, sequence: int) -> None:
        """Close a stream that has ended or no longer has a reader."""
        self._queues.pop(sequence, None)
        if self._requests.pop(sequence, None) is None or self.ended is not None:
            return
        if sequence in self._admitted:
            self._admitted.remove(sequence)
            self._reused_by = {ended: by for ended, by in self._reused_by.items() if by != sequence}
            self._post(RequestAborted(sequence))
            self._admit()
        else:
            self._waiting = deque(one for one in self._waiting if one.id != sequence)

    def hold(self) -> None:
        """Start no stream until ``resume``; running streams continue."""
        self._held = True

    def resume(self) -> None:
        """Start the streams that were held back."""
        self._held = False
        if self.ended is None:
            self._admit()

    def end(self, error: Exception) -> None:
        """End every open stream with ``error``, and refuse new ones with it; only the first error counts."""
        if self.ended is None:
            self.ended = error
            for queue in self._queues.values():
                queue.put_nowait(error)

    def observe(self, span: Span) -> None:
        """Turn committed tokens into pieces, and spans into statistics; runs on the loop after every task."""
        expert = isinstance(span.task.payload, ExpertLoad) and span.task.payload.slot is not None
        guessed = isinstance(span.task.payload, ExpertLoad) and span.task.payload.guessed
        if expert or span.task.filled_slot is not None:
            for stats in self._requests.values():
                stats.streamed_bytes += span.task.nbytes
                stats.experts_loaded += expert and not guessed
        item = span.task.item
        if item is not None and item.prefill and span.task.op.ends_layer:
            for row, start, count in zip(item.rows, item.starts, item.counts, strict=True):
                if (request := self._requests.get(self._runner.sequence_in(row).id)) is not None:
                    request.take_prefill(start, count, self._plan.num_layers)
        for outcome in span.outcomes:
            sequence = self._runner.sequence_in(outcome.row)
            request = self._requests.get(sequence.id)
            queue = self._queues.get(sequence.id)
            if request is None or queue is None:
                continue  # its stream is closed
            request.take(outcome, span.stop_s)
            request.num_cached_tokens = sequence.num_cached_tokens
            request.experts = self._scheduler.expert_counts - request.experts_before
            for text, tokens, logprobs, drafted in sequence.take_pieces():
                reason = sequence.finish_reason
                final = request.close(self._plan, span.stop_s) if reason else None
                queue.put_nowait(Piece(text, tokens, reason, final, logprobs, drafted, sequence.take_prompt_logprobs()))
            if sequence.failure is not None:
                queue.put_nowait(sequence.failure)
            if sequence.ended:
                self._requests.pop(sequence.id)
                self._admitted.discard(sequence.id)
        if span.outcomes:
            self._admit()

    def _admit(self, *, gather: bool = False) -> None:
        """Send a waiting sequence to the scheduler for every free row; ``gather``: not while others are being encoded.

        The KV that a prompt reuses is chosen only here. A row is assigned again in the same pass, because the scheduler
        gets the new sequence before it gets the end of the old one.
        """
        for dropped in self._scheduler.take_dropped():
            self._runner.forget(dropped)
        if gather and self._num_encoding and self._waiting and not self._admitted:
            if self._gather_timer is None:
                self._gather_timer = asyncio.get_running_loop().call_later(GATHER_S, self._end_gathering)
            return
        while self._waiting and not self._held and len(self._admitted) < self._plan.num_rows:
            sequence = self._waiting.popleft()
            self._admitted.add(sequence.id)
            self._runner.admit(sequence)
            reuse = self._reuse and not sequence.scored  # every token of a scored prompt runs
            reuse_from, num_cached = self._find_reusable(sequence) if reuse else (None, 0)
            sizes = sequence.num_prompt, sequence.max_new_tokens
            self._post(RequestAdded(sequence.id, *sizes, reuse_from, num_cached, sequence.scored))

    def _end_gathering(self) -> None:
        """The ready prompts have waited long enough: send them."""
        self._gather_timer = None
        if self.ended is None:
            self._admit()

    def _find_reusable(self, new: TokenSequence) -> tuple[int | None, int]:
        """The ended sequence in a row that shares most leading tokens with a new one, and their number.

        An aborted sequence may still be in a pass; its row is free only when that pass has committed, so the KV of that
        pass counts. The prompt's last token never counts: the target runs it to draw the next one.
        """
        in_rows = {one.id: one for one in self._runner.sequences_in_rows()}
        self._reused_by = {ended: by for ended, by in self._reused_by.items() if ended in in_rows}
        ended = [one for one in in_rows.values() if one.id not in self._requests and one.id not in self._reused_by]
        known = [
            (one.tokens[:-1] if one.num_new else one.tokens[: self._scheduler.num_kv(one.id)], one) for one in ended
        ]
        common = [(common_prefix(tokens, new.tokens[:-1]), one) for tokens, one in known]
        shared = [(self._runner.reusable(one, length), one.id) for length, one in common]
        num_cached, reuse_from = max(shared, default=(0, -1))
        if not num_cached:
            return None, 0
        self._reused_by[reuse_from] = new.id
        return reuse_from, num_cached


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of leading tokens that two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
