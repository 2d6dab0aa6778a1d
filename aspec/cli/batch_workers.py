"""``aspec batch --workers``: the rows of the checked file go to engine processes, here or on a Ray cluster."""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from aspec.cli.interrupts import draining, run
from aspec.generation.params import SamplingParams
from aspec.observe.batch_progress import BatchProgress, follow, workers_line
from aspec.observe.console import Console
from aspec.options import NO_MODELS, EngineOptions
from aspec.planning.resolve import Resolved
from aspec.serving.batch_input import BatchFile
from aspec.serving.batch_output import OutputRow
from aspec.serving.batch_writer import BatchWriter, LineForm, MadeLine
from aspec.serving.workers.crew import Crew
from aspec.serving.workers.leases import Leases
from aspec.serving.workers.local import LocalPool, identity_of, share_of, visible_cards
from aspec.serving.workers.messages import Answered, Job
from aspec.serving.workers.pool import Pool
from aspec.serving.workers.ray_pool import RayPool


@dataclass(frozen=True, slots=True)
class Spread:
    """A checked input, its output, and the workers that are asked for."""

    workers: str
    resolved: Resolved
    defaults: SamplingParams
    form: LineForm
    rows: BatchFile
    writer: BatchWriter
    progress: BatchProgress
    console: Console
    live: bool  # whether a line on a terminal may show the progress

    def run(self, pending: list[int]) -> None:
        """Answer the pending rows. Raises AspecError, and KeyboardInterrupt if a signal stops it."""
        with open_pool(self.workers, self.resolved) as (pool, options):
            job = Job(absolute(options), self.defaults, identity_of(self.resolved), self.form.model, self.form.created)
            run(lambda: self._run(pool, job, pending))

    async def _run(self, pool: Pool, job: Job, pending: list[int]) -> None:
        drain, progress, console = asyncio.Event(), self.progress, self.console
        crew = Crew(pool, job, Leases(pending), self.rows.read_line, self._keep, console.note, self._begin)

        def line() -> str:
            return workers_line(progress, crew.num_open, pool.size, self._now_s())

        with follow(line, console, live=self.live), draining(drain, console):
            try:
                await crew.run(drain)
            finally:
                self._begin()
                progress.ended_s = self._now_s()

    async def _keep(self, answered: Answered) -> None:
        row = OutputRow(self.rows.ids[answered.row], answered.line, answered.failed)
        await self.writer.keep(MadeLine(row, answered.tokens, answered.prompt_tokens, answered.num_cached_tokens))

    def _begin(self) -> None:
        """The first engine is open: from now on rows are answered."""
        self.progress.begun_s = self.progress.begun_s or self._now_s()

    def _now_s(self) -> float:
        return self.console.stops.running_s(time.perf_counter())


@contextmanager
def open_pool(workers: str, resolved: Resolved) -> Iterator[tuple[Pool, EngineOptions]]:
    """The places for workers, and the options of each. Raises UserError if a cluster does not answer."""
    if workers.isdigit():
        cards = 0 if resolved.kind is None else resolved.kind.count()
        yield LocalPool(int(workers), visible_cards(cards)), share_of(resolved, int(workers), cards)
        return
    pool = RayPool(workers)
    try:
        yield pool, resolved.options
    finally:
        pool.close()


def absolute(options: EngineOptions) -> EngineOptions:
    """The options for a process that works in another folder: the paths of models are absolute."""
    given = {name: getattr(options, name) for name in ("target", "draft", "adapter")}
    paths = {
        name: os.path.abspath(value)
        for name, value in given.items()
        if value is not None and value not in NO_MODELS and os.path.exists(value)
    }
    return replace(options, progress=None, **paths)
