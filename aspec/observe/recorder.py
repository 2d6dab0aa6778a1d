"""The recorder: an observer that keeps all spans, or the latest ones, in 63 packed bytes each.

It runs on the loop, so it does one pack and one append per span; ``timeline`` does the rest of the work later.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise
from struct import Struct

from aspec.errors import UserError
from aspec.observe.timeline import Round, Slice, Timeline
from aspec.tasks.op import Op
from aspec.tasks.task import Span

_RECORD = Struct("<ddfqqqqhiiB")  # start, stop, states, nbytes, id, cause, round, layer, part or step, tokens, op
_OPS = tuple(Op)
_CODE = {op: code for code, op in enumerate(_OPS)}
BLOCK_SPANS = 4096


class Recorder:
    """Records spans; mutable, because a run goes on. ``max_spans`` limits them: whole old blocks are dropped.

    Raises UserError if ``max_spans`` is below 1.
    """

    def __init__(self, max_spans: int | None = None) -> None:
        if max_spans is not None and max_spans < 1:
            raise UserError(f"a trace must hold at least one span, found a limit of {max_spans}.")
        blocks = None if max_spans is None else -(-max_spans // BLOCK_SPANS)
        self._max_spans = max_spans
        self._full: deque[bytes] = deque(maxlen=blocks)
        self._block = bytearray()  # the block in progress
        self._left = BLOCK_SPANS  # number of records that still fit in it
        self._rounds: deque[tuple[int, float, int, int, int]] = deque(maxlen=max_spans)

    def __call__(self, span: Span) -> None:
        """Record a finished task."""
        task, layer, detail = span.task, span.task.layer, span.task.detail
        self._block += _RECORD.pack(
            span.start_s,
            span.stop_s,
            span.states_s,
            task.nbytes,
            task.id,
            span.cause,
            task.number,
            -1 if layer is None else layer,
            -1 if detail is None else detail,
            task.num_tokens,
            _CODE[task.op],
        )
        self._left -= 1
        if not self._left:
            self._full.append(bytes(self._block))
            self._block.clear()
            self._left = BLOCK_SPANS
        if span.outcomes:
            proposed = sum(outcome.num_proposed for outcome in span.outcomes)
            accepted = sum(outcome.num_accepted for outcome in span.outcomes)
            tokens = sum(outcome.num_new for outcome in span.outcomes)
            self._rounds.append((task.number, span.stop_s, proposed, accepted, tokens))

    def __len__(self) -> int:
        """The number of spans kept."""
        kept = len(self._full) * BLOCK_SPANS + BLOCK_SPANS - self._left
        return kept if self._max_spans is None else min(kept, self._max_spans)

    def clear(self) -> None:
        """Drop all records."""
        self._full.clear()
        self._block.clear()
        self._left = BLOCK_SPANS
        self._rounds.clear()

    def timeline(self, facts: Mapping[str, str | int | float] | None = None) -> Timeline:
        """The recorded run, slices in order of start."""
        kept = list(self._slices())[-len(self) :] if len(self) else []
        slices = tuple(sorted(kept, key=lambda s: (s.start_s, s.id)))
        first_s = slices[0].start_s if slices else 0.0
        return Timeline(slices, tuple(self._merged_rounds(first_s)), facts or {})

    def _slices(self) -> Iterator[Slice]:
        for block in (*self._full, bytes(self._block)):
            for (
                start,
                stop,
                states_s,
                nbytes,
                number,
                cause,
                round_,
                layer,
                detail,
                tokens,
                code,
            ) in _RECORD.iter_unpack(block):
                op = _OPS[code]
                name = op.label(layer, detail)
                part, shown = (detail, -1) if op.loads else (-1, round_)  # a load belongs to no round
                yield Slice(number, op.lane, name, start, stop, shown, layer, part, tokens, nbytes, cause, states_s)

    def _merged_rounds(self, first_s: float) -> Iterator[Round]:
        """One round per pass; its work items are accepted one by one."""
        merged: dict[int, tuple[float, int, int, int]] = {}
        for number, stop, proposed, accepted, tokens in self._rounds:
            _, p, a, t = merged.get(number, (0.0, 0, 0, 0))
            if stop > first_s:  # no task of an earlier round is kept
                merged[number] = (stop, p + proposed, a + accepted, t + tokens)
        ends = [first_s, *(stop for stop, *_ in merged.values())]
        for (number, (_, p, a, t)), (start, stop) in zip(merged.items(), pairwise(ends), strict=True):
            yield Round(number, start, stop, p, a, t)
