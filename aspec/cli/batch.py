"""What ``aspec batch`` does: serve the rows of an input file and write each answer to an output file.

The whole input is checked before the engine opens; rows that cannot be served become error rows. The engine holds a
bounded window of rows, so the next row begins as soon as one ends. An answer is on the disk before its worker takes
the next row, so no finished row is lost. Rows that end while a sync runs share the next sync.
"""

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aspec.cli.batch_workers import Spread
from aspec.cli.flags.commands import BatchFlags
from aspec.cli.front.opening import fetching
from aspec.cli.interrupts import draining, run
from aspec.engine.engine import Engine, describe_plan
from aspec.errors import BudgetError, UserError, WriteError
from aspec.generation.defaults import describe, sampling_params
from aspec.generation.params import SamplingParams
from aspec.generation.text.tokenizer import Tokenizer
from aspec.models.configuration.generation_defaults import generation_defaults
from aspec.observe.batch_progress import BatchProgress, follow, line_of
from aspec.observe.console import Console
from aspec.observe.monitor import Monitor
from aspec.observe.ticker import Ticker
from aspec.planning.fit import most_context
from aspec.planning.resolve import Resolved, resolve, revise
from aspec.preparing.identity import fingerprint
from aspec.serving.batch_check import RowCheck, check_file
from aspec.serving.batch_input import PIPE, BatchFile
from aspec.serving.batch_journal import journal_of
from aspec.serving.batch_output import FinishedRows, Output, check_startable, open_output
from aspec.serving.batch_pipe import PipeOutput
from aspec.serving.batch_writer import BatchWriter, LineForm, prepare_row
from aspec.serving.dispatch import Outcome, PreparedRequest, serve

CHECK_LINE_S = 5.0  # seconds between two progress lines of the check
DEMO_NAME = "aspec-demo"


# -- the job ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchJob:
    """A checked input, and everything that decides its answers."""

    flags: BatchFlags
    resolved: Resolved
    rows: BatchFile
    tokenizer: Tokenizer
    defaults: SamplingParams
    ties: dict[str, Any]  # what the output rows depend on; the journal's header records it
    if_too_small: str  # the remedy if the budget does not hold the context
    console: Console

    def requests(self, pending: list[int]) -> Iterator[PreparedRequest]:
        """Read rows again and prepare them for the engine."""
        for row in map(self.rows.read, pending):
            yield prepare_row(self.tokenizer, row, self.defaults)

    @property
    def model(self) -> str:
        """The model's name in answers to requests that name none."""
        return self.flags.target or DEMO_NAME

    @property
    def live(self) -> bool:
        """Whether a line on a terminal may show the progress: not where answers come to the same terminal."""
        return not (self.flags.no_dashboard or (self.flags.output == PIPE and sys.stdout.isatty()))


def batch_to_console(flags: BatchFlags, console: Console) -> None:
    """Serve a file. Raises AspecError when it cannot be served, KeyboardInterrupt when it is stopped before its end."""
    assert flags.input is not None
    assert flags.output is not None
    if flags.output != PIPE:
        check_paths(flags.input, flags.output, overwrite=flags.overwrite)
    if flags.input == PIPE and sys.stdin is not None and sys.stdin.isatty():
        console.note("rows are read from this terminal; Ctrl-D ends them")
    with BatchFile(flags.input) as rows:
        job = prepare(flags, rows, console)
        if flags.output == PIPE:
            console.note("answers go to standard output without a journal: a stopped job begins anew")
            _serve_file(job, PipeOutput(int(time.time())), FinishedRows(frozenset()))
            return
        output, finished = open_output(flags.output, job.ties, int(time.time()), overwrite=flags.overwrite)
        with output:
            _serve_file(job, output, finished)


def check_paths(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse paths that cannot work, before any file is read. Raises UserError."""
    target = Path(os.path.realpath(output))
    for file in (target, journal_of(target)):
        if _is_same(source, file):
            raise UserError(f"the output {file} is the input {source}: it would be overwritten. Give another -o.")
    if target.is_dir():
        raise UserError(f"the output {output} is a folder: expected a file. Give -o a file in it.")
    if not target.parent.is_dir():
        raise UserError(f"the output's folder {target.parent} does not exist. Make it, or give another -o.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(f"the output's folder {target.parent} is not writable. Change its mode, or give another -o.")
    check_startable(target, overwrite=overwrite)


def _is_same(source: Path, file: Path) -> bool:
    """Whether an existing file is the input, which may be standard input."""
    try:
        return os.path.samestat(os.fstat(0) if source == PIPE else os.stat(source), os.stat(file))
    except OSError:  # one of them does not exist
        return False


def prepare(flags: BatchFlags, rows: BatchFile, console: Console) -> BatchJob:
    """Find the models and check every row. Blocks for long when a model is downloaded or the file has many rows.

    Raises UserError when a model or a row cannot be used.
    """
    with fetching(console) as fetches:
        resolved = resolve(flags.options(), fetches)
    tokenizer = Tokenizer.load(resolved.tokenizer)
    asked, given = generation_defaults(resolved.target), flags.sampling()
    defaults = sampling_params(asked, given)
    if asked_for := describe(asked, given):
        console.note(asked_for)
    limit = min(filter(None, (most_context(resolved), resolved.options.max_context)), default=None)
    check = RowCheck(tokenizer, defaults, limit)
    _check_rows(rows, check, flags, console)
    context = limit if resolved.options.max_context else check.longest
    resolved = revise(resolved, max_context=context, workload=check.workload(), exact=resolved.exact)
    ties = {
        "input": f"sha256 {rows.digest}",
        "target": f"sha256 {fingerprint(resolved.target)}",
        **({} if resolved.adapter is None else {"adapter": f"sha256 {fingerprint(resolved.adapter)}"}),
        "dtype": resolved.options.dtype,
        "exact": resolved.exact,
        "max_context": context,
        **{name: getattr(defaults, name) for name in SamplingParams.__slots__},
    }
    if_too_small = "" if resolved.asked_context else check.longest_row()
    return BatchJob(flags, resolved, rows, tokenizer, defaults, ties, if_too_small, console)


def _check_rows(rows: BatchFile, check: RowCheck, flags: BatchFlags, console: Console) -> None:
    """Check every row; tell how far the check is, and what it found. Raises UserError if no row may be served."""
    ticker = Ticker(CHECK_LINE_S, lambda: console.progress(f"{len(rows.ids)} rows checked"), "check")
    try:
        check_file(rows, check, strict=flags.strict)
    finally:
        ticker.close()
    if rows.refused:
        console.note(rows.problems())
    for note in check.notes(flags.target or DEMO_NAME):
        console.note(note)


# -- the run ---------------------------------------------------------------------------------------------------


def _serve_file(job: BatchJob, output: Output | PipeOutput, finished: FinishedRows) -> None:
    console, rows, total = job.console, job.rows, len(job.rows.ids)
    left = [index for index, row_id in enumerate(rows.ids) if row_id not in finished.done]
    pending = [index for index in left if index not in rows.refused]
    progress = BatchProgress(total, done=len(finished.done), failed=finished.num_failed)
    if finished.done:
        console.note(f"{output.path} holds {len(finished.done)} of {total} rows; {len(left)} rows are left")
    if finished.cut_bytes:
        console.note(f"{finished.cut_bytes} bytes of unfinished rows were removed; these rows are generated again")
    writer, form = BatchWriter(output, progress), LineForm(output.created, job.model)
    writer.refuse([(rows.ids[index], rows.refused[index]) for index in left if index in rows.refused])
    if pending:
        try:
            _answer(job, pending, form, writer, progress)
        except BudgetError as error:
            raise BudgetError(f"{error} {job.if_too_small}".rstrip()) from error
        except KeyboardInterrupt:
            pass  # a signal stopped the run at once
        finally:
            with suppress(WriteError, BrokenPipeError):  # serve() has raised the same error already
                writer.flush()
        console.note(progress.summary())
    output.verify()
    rows.check_unchanged()
    errors = f", {progress.failed} of them errors" if progress.failed else ""
    console.note(f"{progress.done} of {total} rows are in {output.path}{errors}")
    if progress.done < total:
        console.note("to continue, run the same command again")
        raise KeyboardInterrupt


def _answer(job: BatchJob, pending: list[int], form: LineForm, writer: BatchWriter, progress: BatchProgress) -> None:
    """Answer the pending rows here, or on workers."""
    workers = job.flags.workers
    if workers is None:
        run(partial(_run, job, pending, form, writer, progress))
        return
    models = job.resolved, job.defaults
    Spread(workers, *models, form, job.rows, writer, progress, job.console, job.live).run(pending)


async def _run(job: BatchJob, pending: list[int], form: LineForm, writer: BatchWriter, progress: BatchProgress) -> None:
    monitor, drain = Monitor(job.console.stops), asyncio.Event()
    clock = job.console.stops.running_s
    with follow(line_of(progress, monitor), job.console, live=job.live):
        resolved = revise(job.resolved, progress=monitor.progress)
        async with Engine(resolved, [monitor, progress], [monitor.issued]) as engine:
            monitor.opened(engine.plan, 0)
            job.console.note(f"{engine.plan.shape}; {describe_plan(engine.plan)}")

            async def keep(one: PreparedRequest, outcome: Outcome) -> None:
                await writer.keep(form.line_of(engine.tokenizer, one, outcome))

            progress.begun_s = progress.ended_s = clock(time.perf_counter())
            try:
                with draining(drain, job.console):
                    await serve(engine, job.requests(pending), keep, drain)
            finally:
                progress.ended_s = clock(time.perf_counter())
