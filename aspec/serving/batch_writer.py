"""How the rows of a batch become requests, and answers lines of the output, with syncs that several lines share."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aspec.api import Result
from aspec.errors import NumericError, PromptError
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import derive_seed
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.loop.settling import settle
from aspec.observe.batch_progress import BatchProgress
from aspec.serving.batch_input import BatchRow, RowId
from aspec.serving.batch_output import Output, OutputRow
from aspec.serving.batch_pipe import PipeOutput
from aspec.serving.dispatch import Outcome, PreparedRequest, encode, params_of
from aspec.serving.openai_responses import Generated, Label, answer_body
from aspec.serving.refusals import Refusal

REFUSED_AT_ONCE = 1000  # rows of one sync


def digest_of(row_id: RowId) -> str:
    """24 hexadecimal digits of an id's SHA-256; a row's seed and the ids in its answer derive from them."""
    text = row_id if isinstance(row_id, str) else f"line {row_id}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def prepare_row(tokenizer: Tokenizer, row: BatchRow, defaults: SamplingParams) -> PreparedRequest:
    """A row for the engine. May block for some milliseconds. A row without a seed derives it from its custom_id."""
    seed = derive_seed(defaults.seed, int(digest_of(row.custom_id), 16))
    params = row.request.params(defaults, seed)
    try:
        params = params_of(tokenizer, row.request, defaults, seed)
        tokens = encode(tokenizer, row.request)
    except PromptError as error:  # the check had no error: a template can exceed its time on a busy machine
        return PreparedRequest(row.custom_id, row.request, [], params, error)
    return PreparedRequest(row.custom_id, row.request, tokens, params)


@dataclass(frozen=True, slots=True)
class MadeLine:
    """The line of a row, and the tokens that it took."""

    row: OutputRow
    tokens: int = 0  # generated
    prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose KV was cached


@dataclass(frozen=True, slots=True)
class LineForm:
    """What all lines of a job share. A line depends on it, the row, the model and the options, on nothing else."""

    created: int  # when the job began, seconds since the epoch
    model: str  # its name

    def line_of(self, tokenizer: Tokenizer, one: PreparedRequest, outcome: Outcome) -> MadeLine:
        """The line of an answer."""
        if isinstance(outcome, PromptError | NumericError):
            return MadeLine(_error_row(one.id, Refusal.of(outcome)))
        return MadeLine(
            self._answer_row(tokenizer, one, outcome),
            sum(len(result.token_ids) for result in outcome),
            len(one.tokens) * len(outcome),
            sum(result.stats.num_cached_tokens for result in outcome),
        )

    def _answer_row(self, tokenizer: Tokenizer, one: PreparedRequest, results: Sequence[Result]) -> OutputRow:
        digest = digest_of(one.id)
        choices = [
            Generated(made.text, len(one.tokens), len(made.token_ids), made.finish_reason, made.logprobs)
            for made in results
        ]
        label = Label(digest, self.created, one.request.model or self.model)
        body = answer_body(one.request, choices, label, tokenizer)
        return _output_row(one.id, {"status_code": 200, "request_id": f"req_{digest}", "body": body}, None)


class BatchWriter:
    """Writes lines to the output; mutable: lines wait while a sync runs."""

    def __init__(self, output: Output | PipeOutput, progress: BatchProgress) -> None:
        self._output, self._progress = output, progress
        self._waiting: list[OutputRow] = []  # complete lines that no write has taken yet
        self._turn = asyncio.Lock()  # held during a write and its sync

    def refuse(self, refused: Sequence[tuple[RowId, Refusal]]) -> None:
        """Write the rows that cannot be served. Blocks. Raises WriteError."""
        for start in range(0, len(refused), REFUSED_AT_ONCE):
            rows = [_error_row(*one) for one in refused[start : start + REFUSED_AT_ONCE]]
            self._output.append(rows)
            self._progress.refuse(len(rows))

    async def keep(self, made: MadeLine) -> None:
        """Write a line; returns when it is synced. Raises WriteError."""
        self._progress.count(made.tokens, made.prompt_tokens, made.num_cached_tokens)
        row = made.row
        self._waiting.append(row)
        async with self._turn:
            if row in self._waiting:  # otherwise the previous holder of the lock has written it
                rows, self._waiting = self._waiting, []
                await settle(asyncio.ensure_future(asyncio.to_thread(self._commit, rows)))

    def flush(self) -> None:
        """Write and sync the waiting lines; call it when the loop has ended. Raises WriteError."""
        rows, self._waiting = self._waiting, []
        if rows:
            self._commit(rows)

    def _commit(self, rows: list[OutputRow]) -> None:
        self._output.append(rows)
        self._progress.keep(len(rows), sum(row.failed for row in rows))


def _error_row(row_id: RowId, refusal: Refusal) -> OutputRow:
    """The line of a row without an answer."""
    return _output_row(row_id, None, refusal)


def _output_row(row_id: RowId, response: dict[str, Any] | None, refusal: Refusal | None) -> OutputRow:
    """A line of the output; a row without an own custom_id has null there, and its error names the line."""
    error: dict[str, Any] | None = None if refusal is None else refusal.body()
    if error is not None and not isinstance(row_id, str):
        error |= {"message": f"line {row_id}: {error['message']}", "line": row_id}
    line = {
        "id": f"batch_req_{digest_of(row_id)}",
        "custom_id": row_id if isinstance(row_id, str) else None,
        "response": response,
        "error": error,
    }
    return OutputRow(row_id, json.dumps(line).encode() + b"\n", refusal is not None)
