"""The assignment of sequences to rows, and the work items of a pass.

Row ``n`` belongs to group ``n % num_groups``: its sequence is drafted for and verified with that group's. A free row
retains the KV of its last sequence until another one is assigned: a prompt with the same beginning takes that row and
prefills only the rest. Pure policy: counts and ids only.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aspec.tasks.task import RequestAdded, RowAssignment, RowOutcome, WorkItem


@dataclass(slots=True)
class Row:
    """A sequence in a row; mutable, because every round adds tokens."""

    sequence: int
    length: int  # committed tokens; the last one is not in the target's KV yet
    remaining: int  # tokens that may still be generated; at 0 the row is freed
    decoding: bool = False  # False until its prompt has gone through a pass
    cancelled: bool = False
    num_cached_tokens: int = 0  # leading tokens with KV in the row at its assignment: they are not prefilled
    scored: bool = False  # the logprobs of the prompt's own tokens are wanted
    num_prefilled: int = 0  # prompt tokens behind the cached ones that earlier passes ran; the others join the next one

    @property
    def start(self) -> int:
        """The first token of the prompt that has not gone through a pass."""
        return self.num_cached_tokens + self.num_prefilled

    @property
    def num_kv(self) -> int:
        """Leading tokens that have KV, at the latest when the running pass ends."""
        return self.length - 1 if self.decoding else self.start


class RowTable:
    """The rows of an engine (occupied, retained or never used), and the sequences that wait for one."""

    def __init__(self, num_rows: int, num_groups: int = 1, most_prompt_tokens: int | None = None) -> None:
        """At most ``most_prompt_tokens`` of waiting prompts join a group at once; a longer prompt joins alone."""
        self.rows: dict[int, Row] = {}  # by row number; only occupied rows
        self._num_rows, self._num_groups, self._most_prompt_tokens = num_rows, num_groups, most_prompt_tokens
        self._retained: dict[int, Row] = {}  # by number of a free row: its last sequence, whose KV is retained
        self._waiting: deque[RequestAdded] = deque()

    def rows_of(self, group: int) -> dict[int, Row]:
        """The occupied rows of a group, by number."""
        return {n: row for n, row in sorted(self.rows.items()) if n % self._num_groups == group}

    def decoding(self, group: int = 0) -> dict[int, Row]:
        """The rows of a group whose prompt has gone through a pass."""
        return {n: row for n, row in self.rows_of(group).items() if row.decoding}

    def joining(self, group: int = 0) -> dict[int, Row]:
        """The rows of a group whose prompt has not gone through a pass."""
        return {n: row for n, row in self.rows_of(group).items() if not row.decoding}

    def num_kv(self, sequence: int) -> int:
        """Leading tokens of a sequence that have KV in its row, or in the one that it had."""
        rows = (*self.rows.values(), *self._retained.values())
        return next((row.num_kv for row in rows if row.sequence == sequence), 0)

    def add(self, request: RequestAdded) -> None:
        """Append a sequence to the waiting ones."""
        self._waiting.append(request)

    def advance(self, outcome: RowOutcome) -> None:
        """Add the new tokens of a row after ACCEPT."""
        row = self.rows[outcome.row]
        row.decoding = True
        row.length += outcome.num_new
        row.remaining = 0 if outcome.stopped else row.remaining - outcome.num_new

    def cancel(self, sequence: int | None = None) -> list[int]:
        """End one sequence, or all of them if None; returns the waiting sequences that it removed."""
        dropped = [request.sequence for request in self._waiting if sequence is None or request.sequence == sequence]
        self._waiting = deque(request for request in self._waiting if request.sequence not in dropped)
        for row in self.rows.values():
            row.cancelled |= sequence is None or row.sequence == sequence
        return dropped

    def assign_rows(self, group: int = 0) -> list[RowAssignment]:
        """Between passes of a group: free its finished rows and assign free rows to waiting sequences.

        The sequence with most cached tokens chooses first. The groups share all sequences equally, so that no group is
        idle while another is full.
        """
        freed = [number for number, row in self.rows_of(group).items() if row.remaining <= 0 or row.cancelled]
        self._retained |= {number: self.rows.pop(number) for number in freed}
        assignments = [RowAssignment(number, None) for number in freed]
        joining = sorted(self._take_waiting(group), key=lambda request: -request.num_cached_tokens)
        return assignments + [self._assign_row(request, group) for request in joining]

    def _take_waiting(self, group: int) -> list[RequestAdded]:
        """Remove and return the waiting sequences that join a group now."""
        occupied = len(self.rows_of(group))
        share = -(-(len(self.rows) + len(self._waiting)) // self._num_groups)
        num_free = min(len(range(group, self._num_rows, self._num_groups)), share) - occupied
        most = self._most_prompt_tokens
        taken: list[RequestAdded] = []
        while self._waiting and len(taken) < num_free:
            tokens = sum(request.prompt_tokens - request.num_cached_tokens for request in (*taken, self._waiting[0]))
            if taken and most is not None and tokens > most:
                break
            taken.append(self._waiting.popleft())
        return taken

    def validate(self, capacity: int) -> None:
        """Check the invariants; tests call it after every event."""
        assert all(0 <= row < self._num_rows for row in self.rows)
        assert all(row.num_cached_tokens < row.length <= capacity for row in self.rows.values())
        assert not self.rows.keys() & self._retained.keys()
        assert all(row.start <= row.length for row in (*self.rows.values(), *self._retained.values()))

    def _assign_row(self, request: RequestAdded, group: int) -> RowAssignment:
        """Assign the group's free row with most (reused - overwritten) cached tokens; of equal rows the first one."""
        reused = {
            n: request.num_cached_tokens for n, row in self._retained.items() if row.sequence == request.reuse_from
        }
        lost = {n: row.num_kv - reused.get(n, 0) for n, row in self._retained.items()}
        free = (n for n in range(group, self._num_rows, self._num_groups) if n not in self.rows)
        number = max(free, key=lambda n: (reused.get(n, 0) - lost.get(n, 0), -n))
        self._retained.pop(number, None)
        row = Row(
            request.sequence,
            request.prompt_tokens,
            request.max_new_tokens,
            num_cached_tokens=reused.get(number, 0),
            scored=request.scored,
        )
        self.rows[number] = row
        return RowAssignment(number, row.sequence, row.num_cached_tokens)


def decode_item(rows: dict[int, Row], lengths: dict[int, int], group: int = 0) -> WorkItem:
    """The work item of decoding rows: the last committed token of every row and its ``lengths`` of proposed tokens."""
    numbers = tuple(rows)
    starts = tuple(rows[n].length - 1 for n in numbers)
    return WorkItem(0, numbers, starts, tuple(1 + lengths.get(n, 0) for n in numbers), group=group)


def micro_batches(item: WorkItem, most: int) -> list[WorkItem]:
    """Divide an item, in the order of its rows, into at most ``most`` items with about equal tokens."""
    items: list[WorkItem] = []
    start = 0  # number of rows in the items so far
    for stop in range(1, len(item.rows) + 1):
        tokens, following = sum(item.counts[:stop]), sum(item.counts[: stop + 1])
        share = (len(items) + 1) * item.num_tokens / most
        if stop < len(item.rows) and share - tokens > following - share:
            continue  # with one more row the item is nearer to its share of tokens
        own = slice(start, stop)
        items.append(
            replace(item, index=len(items), rows=item.rows[own], starts=item.starts[own], counts=item.counts[own])
        )
        start = stop
    return items


def prefill_stops(
    rows: dict[int, Row], most_pass_tokens: int | None, most_tokens: int, *, beside_decoding: bool
) -> dict[int, int]:
    """By row: where its prompt ends in this pass of at most ``most_pass_tokens``; the earlier sequence goes first.

    Beside decoding rows a prompt is cut after whole items of ``most_tokens``. Otherwise no prompt is cut, so that some
    row draws in every pass; the first one may be longer than a pass. A row without a place waits for the next pass.
    """
    left = most_pass_tokens
    stops: dict[int, int] = {}
    for number, row in sorted(rows.items(), key=lambda pair: pair[1].sequence):
        taken = row.length - row.start
        if left is not None and taken > left and (beside_decoding or stops):
            taken = left // most_tokens * most_tokens if beside_decoding else 0
        if taken > 0:
            stops[number] = row.start + taken
            left = None if left is None else left - taken
    return stops


def prefill_items(
    rows: dict[int, Row], first_index: int, most_tokens: int, group: int = 0, stops: dict[int, int] | None = None
) -> list[WorkItem]:
    """Work items of at most ``most_tokens`` padded tokens for the prompts of a group, without those that have KV.

    ``stops``: by row, where its prompt ends in this pass; None: all prompts as a whole.

    A longer prompt is cut into chunks; only the last chunk draws. Shorter prompts of similar length share an item. A
    scored prompt has its items for itself.
    """
    items: list[WorkItem] = []
    short: list[int] = []
    if stops is None:
        stops = {number: row.length for number, row in rows.items()}
    for number, stop in sorted(stops.items(), key=lambda pair: pair[1] - rows[pair[0]].start):
        row = rows[number]
        length = stop - row.start
        if row.scored or stop < row.length:
            items += _chunks(number, row, stop, first_index + len(items), most_tokens, group)
            continue
        if length <= most_tokens and (len(short) + 1) * length <= most_tokens:
            short.append(number)  # lengths grow, so this row's length is the item's width
            continue
        items += _shared_item(rows, short, first_index + len(items), group)
        short = [number] if length <= most_tokens else []
        if length > most_tokens:
            items += _chunks(number, row, stop, first_index + len(items), most_tokens, group)
    return items + _shared_item(rows, short, first_index + len(items), group)


def _shared_item(rows: dict[int, Row], numbers: Sequence[int], index: int, group: int) -> list[WorkItem]:
    if not numbers:
        return []
    ordered = tuple(sorted(numbers))
    starts = tuple(rows[n].start for n in ordered)
    counts = tuple(rows[n].length - rows[n].start for n in ordered)
    return [WorkItem(index, ordered, starts, counts, prefill=True, group=group)]


def _chunks(number: int, row: Row, stop: int, index: int, most_tokens: int, group: int) -> list[WorkItem]:
    starts = range(row.start, stop, most_tokens)
    return [
        WorkItem(
            index + i,
            (number,),
            (start,),
            (min(most_tokens, stop - start),),
            prefill=True,
            samples=start == starts[-1] and stop == row.length,
            group=group,
            scored=row.scored,
        )
        for i, start in enumerate(starts)
    ]
