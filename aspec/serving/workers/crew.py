"""The driver's side: workers are started, fed with leases, and started again when they die, until every row is written.

The journal stays with the driver: a row counts when its line is synced here. So a worker may die at any moment, and a
driver that dies is continued by the same command.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aspec import __version__
from aspec.errors import BudgetError, DeviceError, UserError
from aspec.serving.workers.leases import Leases
from aspec.serving.workers.messages import (
    Answered,
    Drain,
    Drop,
    Failed,
    Job,
    Lease,
    Opened,
    Order,
    Released,
    pack,
    unpack,
)
from aspec.serving.workers.pool import Pool, StartError, Worker

MOST_DEATHS = 3  # of a worker one after another, without an answer in between; then its place stays empty


@dataclass(slots=True)
class Place:
    """A place of the pool; mutable: workers come and go."""

    number: int
    name: str = ""  # of its last worker
    worker: Worker | None = None  # while its engine is open
    seats: int = 0
    window: int = 0
    answers: int = 0  # lines that its workers have made
    deaths: int = 0  # since its last answer
    failed: Failed | None = None  # what its last worker said of its end

    def send(self, order: Order) -> None:
        """Send an order, if a worker is open."""
        if self.worker is not None:
            self.worker.send(pack(order))


@dataclass(slots=True)
class Crew:
    """The workers of a job; mutable, because they die and come back."""

    pool: Pool
    job: Job
    leases: Leases
    read: Callable[[int], bytes]  # the line of a row; blocks
    keep: Callable[[Answered], Awaitable[None]]  # returns when a line is on the disk
    note: Callable[[str], None]
    opened: Callable[[], None]  # called when an engine is open
    places: list[Place] = field(default_factory=list)
    _draining: bool = False
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _group: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup)

    @property
    def num_open(self) -> int:
        """Number of workers whose engine is open."""
        return sum(place.worker is not None for place in self.places)

    async def run(self, drain: asyncio.Event) -> None:
        """Have all rows answered; after ``drain`` is set, only those that have generated a token.

        Raises UserError or DeviceError if all workers have ended for good, WriteError from ``keep``.
        """
        self.places = [Place(number) for number in range(self.pool.size)]
        async with self._group as group:
            tending = [group.create_task(self._tend(place)) for place in self.places]
            draining = group.create_task(self._drain(drain))
            for task in tending:
                task.add_done_callback(lambda _: self._over.set() if all(one.done() for one in tending) else None)
            await self._over.wait()
            for task in (draining, *tending):
                task.cancel()
        if self.leases.num_left and not self._draining:
            raise self._failure()

    async def _drain(self, drain: asyncio.Event) -> None:
        await drain.wait()
        self._draining = True
        for place in self.places:
            place.send(Drain())
        self._check_over()

    async def _tend(self, place: Place) -> None:
        """Keep a worker at a place while that makes sense."""
        while place.deaths < MOST_DEATHS and not self._draining:
            before, place.failed = place.answers, None
            how = await self._one_life(place)
            lost, final = self.leases.lose(place.number), place.failed is not None and place.failed.final
            place.deaths = 1 if place.answers > before else place.deaths + 1
            again = "" if final or place.deaths == MOST_DEATHS or self._draining else "; it is started again"
            self.note(f"{self._named(place)} has ended ({how}); {lost} rows wait for others{again}")
            for other in self.places:
                self._feed(other)
            self._check_over()
            if final:
                return

    async def _one_life(self, place: Place) -> str:
        """Start a worker, and serve it until it ends; returns how it ended."""
        try:
            worker = await self.pool.start(place.number)
        except StartError as error:
            place.failed = Failed("StartError", str(error), final=False)
            return str(error)
        try:
            await self._hear(place, worker)
        finally:
            place.worker = None
            how = await worker.close()
        if place.failed is None:
            place.failed = Failed("", how, final=False)
        return place.failed.message

    async def _hear(self, place: Place, worker: Worker) -> None:
        """Take a worker's reports until it ends."""
        if (content := await worker.receive()) is None:
            return
        greeting: Any = unpack(content)
        version, node = greeting
        place.name = node
        if version != __version__:
            text = f"{node} has aspec {version}, the driver {__version__}. Install the same version on every machine."
            place.failed = Failed("UserError", text, final=True)
            return
        worker.send(pack(self.job))
        while (content := await worker.receive()) is not None:
            match unpack(content):
                case Opened(seats, window, plan):
                    place.worker, place.seats, place.window = worker, seats, window
                    self.opened()
                    self.note(f"{self._named(place)}: {plan}")
                    self._feed(place)
                case Answered() as answered:
                    self._group.create_task(self._take(place, answered))
                case Released(row):
                    self.leases.release(place.number, row)
                    self._check_over()
                case Failed() as failed:
                    place.failed = failed

    async def _take(self, place: Place, answered: Answered) -> None:
        """Write an answer, unless the row has one, and lease further rows."""
        place.answers += 1
        others = self.leases.answer(place.number, answered.row)
        if others is not None:
            for other in others:
                self.places[other].send(Drop(answered.row))
            await self.keep(answered)
        for one in self._hungry(place):
            self._feed(one)
        self._check_over()

    def _hungry(self, place: Place) -> Iterator[Place]:
        """``place`` first, then those that have fewer rows than seats."""
        yield place
        for other in self.places:
            if other is not place and len(self.leases.held(other.number)) < other.seats:
                yield other

    def _feed(self, place: Place) -> None:
        """Lease as many rows to a place as it takes."""
        if place.worker is not None and not self._draining:
            for row in self.leases.take(place.number, place.seats, place.window):
                self._group.create_task(self._lease(place, place.worker, row))

    async def _lease(self, place: Place, worker: Worker, row: int) -> None:
        line = await asyncio.to_thread(self.read, row)
        if not self.leases.holds(place.number, row) or place.worker is not worker:
            return  # answered by another, or lost with the worker
        if self._draining:
            self.leases.release(place.number, row)
            self._check_over()
        else:
            worker.send(pack(Lease(row, line)))

    def _check_over(self) -> None:
        if not self.leases.num_left or (self._draining and not self.leases.num_leased):
            self._over.set()

    def _named(self, place: Place) -> str:
        where = f" on {place.name}" if place.name else ""
        return f"worker {place.number + 1} of {len(self.places)}{where}"

    def _failure(self) -> UserError | DeviceError:
        """Why no worker is left; the finished rows are safe."""
        failed = [place for place in self.places if place.failed is not None]
        first = min(failed, key=lambda place: not (place.failed and place.failed.final))
        assert first.failed is not None
        text = f"all workers have ended for good, {self.leases.num_left} rows are left. {self._named(first)}: "
        text += first.failed.message
        if first.failed.kind == BudgetError.__name__:
            return BudgetError(text)
        if first.failed.final:
            return UserError(text)
        return DeviceError(
            f"{text}. A worker that ends {MOST_DEATHS} times without an answer is not started again. The finished rows "
            f"are safe: run the same command again to continue."
        )
