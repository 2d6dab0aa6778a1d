"""Who sits in which row, and what of a row goes into a pass.

Row ``n`` belongs to group ``n % num_groups``: its sequence is drafted for and verified with that group's. A row keeps
the KV of the sequence that sat in it last, until another one is seated: a prompt that begins like it takes that row and
prefills only the rest. Pure policy: counts and ids only.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aspec.tasks.task import RequestAdded, RowAssignment, RowOutcome, WorkItem


@dataclass(slots=True)
class Row:
    """A sequence in a row; mutable, because every round moves it on."""

    sequence: int
    length: int  # committed tokens; the last one is not in the target's KV yet
    remaining: int  # tokens that may still be generated; the row retires at 0
    decoding: bool = False  # False until its prompt has gone through a pass
    cancelled: bool = False
    num_cached_tokens: int = 0  # leading tokens whose KV stood in the row when it was taken: they are not prefilled


class RowTable:
    """The rows of an engine, occupied, resting or never used, and the sequences that wait for one."""

    def __init__(self, num_rows: int, num_groups: int = 1, most_prompt_tokens: int | None = None) -> None:
        """``most_prompt_tokens`` may join a group at once; a longer prompt joins alone."""
        self.rows: dict[int, Row] = {}  # by row number; only occupied rows
        self._num_rows, self._num_groups, self._most_prompt_tokens = num_rows, num_groups, most_prompt_tokens
        self._retained: dict[int, Row] = {}  # by row number; the last to sit in a free row, whose KV stands
        self._waiting: deque[RequestAdded] = deque()

    def rows_of(self, group: int) -> dict[int, Row]:
        """The occupied rows of a group, by number."""
        return {n: row for n, row in sorted(self.rows.items()) if n % self._num_groups == group}

    def decoding(self, group: int = 0) -> dict[int, Row]:
        """Those whose prompt has gone through a pass."""
        return {n: row for n, row in self.rows_of(group).items() if row.decoding}

    def joining(self, group: int = 0) -> dict[int, Row]:
        """Those whose prompt has not."""
        return {n: row for n, row in self.rows_of(group).items() if not row.decoding}

    def arrive(self, arrived: RequestAdded) -> None:
        """A sequence waits."""
        self._waiting.append(arrived)

    def advance(self, outcome: RowOutcome) -> None:
        """A row has got new tokens."""
        row = self.rows[outcome.row]
        row.decoding = True
        row.length += outcome.num_new
        row.remaining = 0 if outcome.stopped else row.remaining - outcome.num_new

    def cancel(self, sequence: int | None = None) -> list[int]:
        """End one sequence, or all of them if None; returns those that had no row and will not get one."""
        gone = [one.sequence for one in self._waiting if sequence is None or one.sequence == sequence]
        self._waiting = deque(one for one in self._waiting if one.sequence not in gone)
        for row in self.rows.values():
            row.cancelled |= sequence is None or row.sequence == sequence
        return gone

    def reseat(self, group: int = 0) -> list[RowAssignment]:
        """Between passes of a group: retire its rows that are done, seat those that wait.

        Who has most to keep chooses first. Groups share what there is, so that none idles while another is full.
        """
        gone = [number for number, row in self.rows_of(group).items() if row.remaining <= 0 or row.cancelled]
        self._retained |= {number: self.rows.pop(number) for number in gone}
        seatings = [RowAssignment(number, None) for number in gone]
        arriving = sorted(self._next(group), key=lambda arrived: -arrived.num_cached_tokens)
        return seatings + [self._seat(arrived, group) for arrived in arriving]

    def _next(self, group: int) -> list[RequestAdded]:
        """Of those that wait, who joins a group now."""
        occupied = len(self.rows_of(group))
        share = -(-(len(self.rows) + len(self._waiting)) // self._num_groups)
        num_free = min(len(range(group, self._num_rows, self._num_groups)), share) - occupied
        most = self._most_prompt_tokens
        arriving: list[RequestAdded] = []
        while self._waiting and len(arriving) < num_free:
            tokens = sum(one.prompt_tokens - one.num_cached_tokens for one in (*arriving, self._waiting[0]))
            if arriving and most is not None and tokens > most:
                break
            arriving.append(self._waiting.popleft())
        return arriving

    def validate(self, capacity: int) -> None:
        """Check the invariants; tests call it after every event."""
        assert all(0 <= row < self._num_rows for row in self.rows)
        assert all(row.num_cached_tokens < row.length <= capacity for row in self.rows.values())
        assert not self.rows.keys() & self._retained.keys()
        assert all(row.decoding for row in self._retained.values())  # their KV stands

    def _seat(self, arrived: RequestAdded, group: int) -> RowAssignment:
        """Take the group's free row in which most tokens are kept, less those that are lost; the lowest of equals."""
        kept = {n: arrived.num_cached_tokens for n, row in self._retained.items() if row.sequence == arrived.reuse_from}
        lost = {n: row.length - kept.get(n, 0) for n, row in self._retained.items()}
        free = (n for n in range(group, self._num_rows, self._num_groups) if n not in self.rows)
        number = max(free, key=lambda n: (kept.get(n, 0) - lost.get(n, 0), -n))
        self._retained.pop(number, None)
        row = Row(
            arrived.sequence, arrived.prompt_tokens, arrived.max_new_tokens, num_cached_tokens=kept.get(number, 0)
        )
        self.rows[number] = row
        return RowAssignment(number, row.sequence, row.num_cached_tokens)


def decode_item(rows: dict[int, Row], lengths: dict[int, int], group: int = 0) -> WorkItem:
    """The last committed token of every row and its proposals."""
    numbers = tuple(rows)
    starts = tuple(rows[n].length - 1 for n in numbers)
    return WorkItem(0, numbers, starts, tuple(1 + lengths.get(n, 0) for n in numbers), group=group)


def micro_batches(item: WorkItem, most: int) -> list[WorkItem]:
    """Its rows, in their order, as at most ``most`` items of about as many tokens each."""
    items: list[WorkItem] = []
    start = 0  # rows in the items so far
    for stop in range(1, len(item.rows) + 1):
        tokens, following = sum(item.counts[:stop]), sum(item.counts[: stop + 1])
        share = (len(items) + 1) * item.num_tokens / most
        if stop < len(item.rows) and share - tokens > following - share:
            continue  # one more row brings it nearer to its share
        own = slice(start, stop)
        items.append(
            replace(item, index=len(items), rows=item.rows[own], starts=item.starts[own], counts=item.counts[own])
        )
        start = stop
    return items


def prefill_items(rows: dict[int, Row], first_index: int, most_tokens: int, group: int = 0) -> list[WorkItem]:
    """Prompts of a group, less what is kept of them, as work items of at most ``most_tokens`` padded tokens.

    A longer prompt is cut into chunks, of which only the last one draws; shorter ones of like length share an item.
    """
    items: list[WorkItem] = []
    short: list[int] = []
    for number, row in sorted(rows.items(), key=lambda pair: pair[1].length - pair[1].num_cached_tokens):
        length = row.length - row.num_cached_tokens
        if length <= most_tokens and (len(short) + 1) * length <= most_tokens:
            short.append(number)  # lengths grow, so this row's length is the item's width
            continue
        items += _shared_item(rows, short, first_index + len(items), group)
        short = [number] if length <= most_tokens else []
        if length > most_tokens:
            items += _chunks(number, row, first_index + len(items), most_tokens, group)
    return items + _shared_item(rows, short, first_index + len(items), group)


def _shared_item(rows: dict[int, Row], numbers: Sequence[int], index: int, group: int) -> list[WorkItem]:
    if not numbers:
        return []
    ordered = tuple(sorted(numbers))
    starts = tuple(rows[n].num_cached_tokens for n in ordered)
    counts = tuple(rows[n].length - rows[n].num_cached_tokens for n in ordered)
    return [WorkItem(index, ordered, starts, counts, prefill=True, group=group)]


def _chunks(number: int, row: Row, index: int, most_tokens: int, group: int) -> list[WorkItem]:
    starts = range(row.num_cached_tokens, row.length, most_tokens)
    return [
        WorkItem(
            index + i,
            (number,),
            (start,),
            (min(most_tokens, row.length - start),),
            prefill=True,
            samples=start == starts[-1],
            group=group,
        )
        for i, start in enumerate(starts)
    ]
