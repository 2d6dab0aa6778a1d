"""What ``aspec batch`` does: the rows of a file to answers in another one, none of which is ever lost.

The input is checked whole before anything is opened. A bounded window of rows is in the engine's hands, so that a
row that ends is followed at once; each answer is on the disk before its worker takes the next row. Rows that end
while a sync is under way share the next one.
"""

import asyncio
import hashlib
import json
import os
import signal
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from aspec.api import Result, run
from aspec.cli.command_flags import BatchFlags
from aspec.engine.engine import Engine, describe_plan
from aspec.errors import NumericError, PromptError, UserError, WriteError
from aspec.generation.defaults import sampling_params
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import derive_seed
from aspec.generation.tokenizer import Tokenizer
from aspec.io.hub import WANTED
from aspec.io.settling import settle
from aspec.models.model import generation_defaults
from aspec.models.skeleton import load_config, max_context
from aspec.observe.batch_progress import BatchProgress, follow
from aspec.observe.console import Console
from aspec.observe.monitor import Monitor
from aspec.observe.ticker import Ticker
from aspec.plan import Workload
from aspec.planning.resolve import Resolved, resolve, revise
from aspec.serving.batch_input import BatchFile, BatchRow
from aspec.serving.batch_output import Found, Output, Row, check_startable, journal_of, open_output
from aspec.serving.dispatch import ContextExceeded, PreparedRequest, Refused, encode, serve
from aspec.serving.openai_responses import Generated, Label, answer_body

CHECK_LINE_S = 5.0
LARGE_BYTES = 64 << 20  # files up to here are small: tokenizers, configurations
SAMPLE_BYTES = 1 << 16  # of a shard's beginning, middle and end, by which its weights are told from others
DEMO_NAME = "aspec-demo"


# -- a job -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """A checked input, and all that its answers follow from."""

    flags: BatchFlags
    resolved: Resolved
    rows: BatchFile
    tokenizer: Tokenizer
    defaults: SamplingParams
    ties: dict[str, Any]
    console: Console

    def ask(self, row: BatchRow) -> PreparedRequest:
        """A row, ready for the engine; its seed follows from its custom_id where it gives none."""
        seed = derive_seed(self.defaults.seed, int(digest_of(row.custom_id), 16))
        params = row.request.params(self.defaults, seed)
        return PreparedRequest(row.custom_id, row.request, encode(self.tokenizer, row.request), params)


@dataclass(frozen=True, slots=True)
class Extent:
    """How much the rows are."""

    longest: int  # tokens of a row, what it asks for included
    workload: Workload


def batch_to_console(flags: BatchFlags, console: Console) -> None:
    """Serve a file. Raises AspecError where it cannot be, and KeyboardInterrupt where it was stopped before its end."""
    assert flags.input is not None
    assert flags.output is not None
    check_paths(flags.input, flags.output, overwrite=flags.overwrite)
    with BatchFile(flags.input) as rows:
        job = prepare(flags, rows, console)
        output, found = open_output(flags.output, job.ties, int(time.time()), overwrite=flags.overwrite)
        with output:
            _serve_file(job, output, found)


def check_paths(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse what cannot be meant, before anything is read. Raises UserError."""
    target = Path(os.path.realpath(output))
    for file in (target, journal_of(target)):
        if source.exists() and file.exists() and source.samefile(file):
            raise UserError(f"the output {file} is the input {source}: it would be overwritten. Give another -o.")
    if target.is_dir():
        raise UserError(f"the output {output} is a folder: expected a file. Give -o a file in it.")
    if not target.parent.is_dir():
        raise UserError(f"the output's folder {target.parent} does not exist. Make it, or give another -o.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(f"the output's folder {target.parent} may not be written. Change its mode, or give another -o.")
    check_startable(target, overwrite=overwrite)


def prepare(flags: BatchFlags, rows: BatchFile, console: Console) -> Job:
    """Find the models and check every row; blocks for long where a model is fetched or rows are many.

    Raises UserError where anything cannot be used.
    """
    resolved = resolve(flags.options())
    folders = [folder for folder in (resolved.target, resolved.draft) if folder is not None]
    tokenizer = Tokenizer.load(resolved.target)
    defaults = sampling_params(generation_defaults(resolved.target), flags.sampling())
    limit = min(filter(None, map(_context_limit, folders)), default=None)
    extent = _check_rows(rows, tokenizer, defaults, limit, console)
    context = min(filter(None, (resolved.options.max_context or extent.longest, limit)))
    resolved = revise(resolved, max_context=context, workload=extent.workload)
    ties = {
        "input": f"sha256 {rows.digest}",
        "target": f"sha256 {fingerprint(resolved.target)}",
        "dtype": resolved.options.dtype,
        "exact": resolved.exact,
        "max_context": context,
        **{name: getattr(defaults, name) for name in SamplingParams.__slots__},
    }
    return Job(flags, resolved, rows, tokenizer, defaults, ties, console)


def digest_of(custom_id: str) -> str:
    """24 hexadecimal digits that stand for a row in the ids of its answer, and in its seed."""
    return hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def fingerprint(folder: Path) -> str:
    """SHA-256 over a checkpoint's small files and over samples of its large ones."""
    digest = hashlib.sha256()
    wanted = {path for pattern in WANTED for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(wanted):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            small = size <= LARGE_BYTES and path.suffix != ".safetensors"
            for start in (0,) if small else (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(LARGE_BYTES if small else SAMPLE_BYTES))
    return digest.hexdigest()


def _context_limit(folder: Path) -> int | None:
    return max_context(load_config(folder).get_text_config())


def _check_rows(
    rows: BatchFile, tokenizer: Tokenizer, defaults: SamplingParams, limit: int | None, console: Console
) -> Extent:
    """Encode every row once. Raises UserError that lists what is wrong."""
    longest = checked = prompts = new = 0
    sampled = False

    def check(row: BatchRow) -> None:
        nonlocal longest, checked, prompts, new, sampled
        count = len(encode(tokenizer, row.request))
        if limit is not None and count >= limit:
            raise PromptError(
                f"the prompt has {count} tokens; the model's context holds {limit}, and one must stay free to generate"
            )
        wanted = row.request.max_new_tokens
        wanted = defaults.max_new_tokens if wanted is None else wanted
        longest = max(longest, 2, count + wanted)
        checked, prompts, new = checked + 1, prompts + count, new + wanted
        sampled = sampled or row.request.params(defaults, seed=0).temperature > 0.0

    ticker = Ticker(CHECK_LINE_S, lambda: console.note(f"check: {checked} rows"), "check")
    try:
        rows.scan(check)
    finally:
        ticker.close()
    mean_prompt, mean_new = max(1, round(prompts / checked)), max(2, round(new / checked))
    return Extent(longest, Workload(checked, mean_prompt, mean_new, sampled=sampled))


# -- its run ---------------------------------------------------------------------------------------------------


def _serve_file(job: Job, output: Output, found: Found) -> None:
    console, total = job.console, len(job.rows.custom_ids)
    pending = [index for index, name in enumerate(job.rows.custom_ids) if name not in found.done]
    tally = BatchProgress(total, done=len(found.done), failed=found.num_failed)
    if found.done:
        console.note(f"{output.path} holds {len(found.done)} of {total} rows; {len(pending)} are left")
    if found.cut_bytes:
        console.note(f"{found.cut_bytes} bytes of rows that were not finished were cut off; they are made again")
    if pending:
        writer = BatchWriter(output, job.flags.target or DEMO_NAME, tally)
        try:
            run(partial(_run, job, pending, writer, tally))
        except asyncio.CancelledError:
            pass  # stopped at once
        finally:
            with suppress(WriteError):  # that one is on its way already
                writer.flush()
        console.note(tally.summary())
    errors = f", {tally.failed} of them errors" if tally.failed else ""
    console.note(f"{tally.done} of {total} rows are in {output.path}{errors}")
    if tally.done < total:
        console.note("run the same command again to go on")
        raise KeyboardInterrupt


async def _run(job: Job, pending: list[int], writer: "BatchWriter", tally: BatchProgress) -> None:
    monitor = Monitor()
    with (
        Interrupts(job.console) as interrupts,
        follow(tally, monitor, job.console, live=not job.flags.no_dashboard),
    ):
        async with AsyncExitStack() as stack:
            resolved = revise(job.resolved, progress=monitor.progress)
            engine = await stack.enter_async_context(Engine(resolved, [monitor, tally], [monitor.issued]))
            monitor.opened(engine.plan, 0)
            job.console.note(f"{engine.plan.shape}; {describe_plan(engine.plan)}")
            asked = (job.ask(job.rows.read(index)) for index in pending)
            interrupts.politely = True
            tally.begun_s = tally.ended_s = time.perf_counter()
            try:
                await serve(engine, asked, partial(writer.keep, engine.tokenizer), interrupts.drain)
            finally:
                tally.ended_s = time.perf_counter()


class BatchWriter:
    """Answers to lines to the disk; mutable: lines wait while a sync is under way."""

    def __init__(self, output: Output, model: str, tally: BatchProgress) -> None:
        self._output, self._model, self._tally = output, model, tally
        self._waiting: list[Row] = []  # made, in nobody's hands yet
        self._turn = asyncio.Lock()

    async def keep(self, tokenizer: Tokenizer, one: PreparedRequest, outcome: Result | Refused) -> None:
        """Write an answer; returns when it is synced. Raises WriteError."""
        row = self._row(tokenizer, one, outcome)
        if isinstance(outcome, Result):
            self._tally.count(len(outcome.token_ids), len(one.tokens), outcome.stats.num_cached_tokens)
        self._waiting.append(row)
        async with self._turn:
            if row in self._waiting:  # otherwise whoever had the turn before has written it
                rows, self._waiting = self._waiting, []
                await settle(asyncio.ensure_future(asyncio.to_thread(self._commit, rows)))

    def flush(self) -> None:
        """Write and sync what waits, when the loop has ended. Raises WriteError."""
        rows, self._waiting = self._waiting, []
        if rows:
            self._commit(rows)

    def _commit(self, rows: list[Row]) -> None:
        self._output.append(rows)
        self._tally.keep(len(rows), sum(row.failed for row in rows))

    def _row(self, tokenizer: Tokenizer, one: PreparedRequest, outcome: Result | Refused) -> Row:
        """The line of the output, which nothing but the row, the model and the options decides."""
        digest = digest_of(one.id)
        line: dict[str, Any] = {"id": f"batch_req_{digest}", "custom_id": one.id, "response": None, "error": None}
        if not isinstance(outcome, Result):
            line["error"] = {"code": _code_of(outcome), "message": str(outcome)}
        else:
            made = Generated(
                outcome.text, len(one.tokens), len(outcome.token_ids), outcome.finish_reason, outcome.logprobs
            )
            label = Label(digest, self._output.created, one.request.model or self._model)
            body = answer_body(one.request, made, label, tokenizer)
            line["response"] = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
        return Row(one.id, json.dumps(line).encode() + b"\n", not isinstance(outcome, Result))


def _code_of(refused: Refused) -> str:
    """What the line of a row without an answer gives as its error's code."""
    if isinstance(refused, NumericError):
        return "numeric_error"
    return "context_length_exceeded" if isinstance(refused, ContextExceeded) else "invalid_prompt"


class Interrupts:
    """What SIGINT and SIGTERM do to the running task: end it, or at first, once ``politely`` is set, drain.

    Mutable, because the second signal means more than the first. Belongs to the loop's thread.
    """

    def __init__(self, console: Console) -> None:
        self.drain = asyncio.Event()
        self.politely = False
        self._console = console
        self._cancelled = False  # once is enough: what closes then must not be cancelled, too

    def __enter__(self) -> Self:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        self._loop.add_signal_handler(signal.SIGINT, self._interrupt)
        self._loop.add_signal_handler(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_signal_handler(signal.SIGINT)
        self._loop.remove_signal_handler(signal.SIGTERM)

    def _interrupt(self) -> None:
        if not self.politely or self.drain.is_set():
            self._stop()
            return
        self.drain.set()
        self._console.note("no new rows; those under way are finished. Ctrl-C again stops at once: no row is lost")

    def _stop(self) -> None:
        if not self._cancelled and self._main is not None:
            self._cancelled = True
            self._main.cancel()
