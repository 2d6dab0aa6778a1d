"""The recorder: an observer that keeps every span in 61 packed bytes, or the last so many.

It is on the loop's path, so it does one pack and one append; everything else waits until ``timeline`` is asked for.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise
from struct import Struct

from aspec.errors import UserError
from aspec.observe.timeline import Round, Slice, Timeline
from aspec.tasks.op import Op
from aspec.tasks.task import Span

_RECORD = Struct("<ddqqqqiiiB")  # start, stop, nbytes, id, cause, round, layer, part or step, tokens, op
_OPS = tuple(Op)
_CODE = {op: code for code, op in enumerate(_OPS)}
BLOCK_SPANS = 4096


class Recorder:
    """Takes spans; mutable, because a run goes on. ``max_spans``: older ones are dropped, whole blocks at a time."""

    def __init__(self, max_spans: int | None = None) -> None:
        if max_spans is not None and max_spans < 1:
            raise UserError(f"a trace must hold at least one span, found a limit of {max_spans}.")
        blocks = None if max_spans is None else -(-max_spans // BLOCK_SPANS)
        self._max_spans = max_spans
        self._full: deque[bytes] = deque(maxlen=blocks)
        self._block = bytearray()  # the block that is being filled
        self._left = BLOCK_SPANS  # records that still fit it
        self._rounds: deque[tuple[int, float, int, int, int]] = deque(maxlen=max_spans)

    def __call__(self, span: Span) -> None:
        """Take one finished task."""
        task, layer, detail = span.task, span.task.layer, span.task.detail
        self._block += _RECORD.pack(
            span.start_s,
            span.stop_s,
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
        """Spans that are kept."""
        kept = len(self._full) * BLOCK_SPANS + BLOCK_SPANS - self._left
        return kept if self._max_spans is None else min(kept, self._max_spans)

    def clear(self) -> None:
        """Forget everything so far."""
        self._full.clear()
        self._block.clear()
        self._left = BLOCK_SPANS
        self._rounds.clear()

    def timeline(self, facts: Mapping[str, str | int | float] | None = None) -> Timeline:
        """What was recorded, by start."""
        kept = list(self._slices())[-len(self) :] if len(self) else []
        slices = tuple(sorted(kept, key=lambda s: (s.start_s, s.id)))
        first_s = slices[0].start_s if slices else 0.0
        return Timeline(slices, tuple(self._merged_rounds(first_s)), facts or {})

    def _slices(self) -> Iterator[Slice]:
        for block in (*self._full, bytes(self._block)):
            for start, stop, nbytes, number, cause, round_, layer, detail, tokens, code in _RECORD.iter_unpack(block):
                op = _OPS[code]
                name = op.label(layer, detail)
                part, shown = (detail, -1) if op.loads else (-1, round_)  # loads are counted: they belong to no round
                yield Slice(number, op.lane, name, start, stop, shown, layer, part, tokens, nbytes, cause)

    def _merged_rounds(self, first_s: float) -> Iterator[Round]:
        """One round per pass: its work items accept one by one."""
        merged: dict[int, tuple[float, int, int, int]] = {}
        for number, stop, proposed, accepted, tokens in self._rounds:
            _, p, a, t = merged.get(number, (0.0, 0, 0, 0))
            if stop > first_s:  # of earlier ones no task is kept
                merged[number] = (stop, p + proposed, a + accepted, t + tokens)
        ends = [first_s, *(stop for stop, *_ in merged.values())]
        for (number, (_, p, a, t)), (start, stop) in zip(merged.items(), pairwise(ends), strict=True):
            yield Round(number, start, stop, p, a, t)
