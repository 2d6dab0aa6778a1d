"""Which worker answers which row: a pure policy without a clock, so that tests can play every death and every delay.

Rules. A worker holds at most its window of rows and asks for the next ones as its answers are written. The rows of a
worker that ends are given out again, before all others. When no row waits, a worker with an idle seat takes copies of
rows that others hold, the last that they were given first: the one that answers first counts, the others are told to
drop the row. So a worker that is slow, or hangs, delays nobody. A row counts once, whatever arrives later.
"""

from collections import deque
from collections.abc import Iterable


class Leases:
    """The rows of a job that have no answer yet; mutable: rows are leased, answered and lost."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._waiting = deque(rows)  # leased to nobody, in the order of the file
        self._holders: dict[int, list[int]] = {}  # leased row -> its workers; disjoint from ``_waiting``
        self._held: dict[int, dict[int, None]] = {}  # worker -> its rows, the oldest first; agrees with ``_holders``

    @property
    def num_left(self) -> int:
        """Number of rows without an answer."""
        return len(self._waiting) + len(self._holders)

    @property
    def num_leased(self) -> int:
        """Number of rows that a worker holds."""
        return len(self._holders)

    def held(self, worker: int) -> tuple[int, ...]:
        """The rows of a worker, the oldest first."""
        return tuple(self._held.get(worker, ()))

    def holds(self, worker: int, row: int) -> bool:
        """Whether a worker still has to answer a row."""
        return row in self._held.get(worker, ())

    def take(self, worker: int, seats: int, window: int) -> list[int]:
        """Lease rows to a worker until it holds ``window``; copies only until it holds ``seats``."""
        held = self._held.setdefault(worker, {})
        taken = []
        while self._waiting and len(held) < window:
            taken.append(self._lease(worker, self._waiting.popleft()))
        while len(held) < seats and (row := self._to_copy(worker)) is not None:
            taken.append(self._lease(worker, row))
        return taken

    def answer(self, worker: int, row: int) -> list[int] | None:
        """Take a row out at its answer; the other workers that hold it, or None if it has been answered before."""
        holders = self._holders.pop(row, None)
        if holders is None:
            return None
        for holder in holders:
            del self._held[holder][row]
        return [holder for holder in holders if holder != worker]

    def release(self, worker: int, row: int) -> None:
        """A worker gives a row back without an answer."""
        if self.holds(worker, row):
            del self._held[worker][row]
            self._holders[row].remove(worker)
            if not self._holders[row]:
                del self._holders[row]
                self._waiting.appendleft(row)

    def lose(self, worker: int) -> int:
        """A worker has ended: the rows that only it held wait again, before the others. Returns their number."""
        before = len(self._waiting)
        for row in reversed(self.held(worker)):
            self.release(worker, row)
        self._held.pop(worker, None)
        return len(self._waiting) - before

    def _lease(self, worker: int, row: int) -> int:
        self._held[worker][row] = None
        self._holders.setdefault(row, []).append(worker)
        return row

    def _to_copy(self, worker: int) -> int | None:
        """The row to copy: of those with the fewest holders, the last one of the worker that holds the most."""
        others = [rows for other, rows in self._held.items() if other != worker]
        own = self._held[worker]
        found = (
            (len(self._holders[row]), -len(rows), -place, row) for rows in others for place, row in enumerate(rows)
        )
        return min((one for one in found if one[-1] not in own), default=(None,))[-1]
