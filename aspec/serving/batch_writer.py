"""How the answers of a batch become lines of the output: the form of a line, and syncs that several rows share."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from aspec.api import Result
from aspec.errors import NumericError, PromptError
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.loop.settling import settle
from aspec.observe.batch_progress import BatchProgress
from aspec.serving.batch_input import RowId
from aspec.serving.batch_output import Output, OutputRow
from aspec.serving.batch_pipe import PipeOutput
from aspec.serving.dispatch import Outcome, PreparedRequest
from aspec.serving.openai_responses import Generated, Label, answer_body
from aspec.serving.refusals import Refusal

REFUSED_AT_ONCE = 1000  # rows of one sync


def digest_of(row_id: RowId) -> str:
    """24 hexadecimal digits of an id's SHA-256; a row's seed and the ids in its answer derive from them."""
    text = row_id if isinstance(row_id, str) else f"line {row_id}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class BatchWriter:
    """Writes answers as lines of the output; mutable: lines wait while a sync runs."""

    def __init__(self, output: Output | PipeOutput, model: str, progress: BatchProgress) -> None:
        self._output, self._model, self._progress = output, model, progress
        self._waiting: list[OutputRow] = []  # complete lines that no write has taken yet
        self._turn = asyncio.Lock()  # held during a write and its sync

    def refuse(self, refused: Sequence[tuple[RowId, Refusal]]) -> None:
        """Write the rows that cannot be served. Blocks. Raises WriteError."""
        for start in range(0, len(refused), REFUSED_AT_ONCE):
            rows = [_error_row(*one) for one in refused[start : start + REFUSED_AT_ONCE]]
            self._output.append(rows)
            self._progress.refuse(len(rows))

    async def keep(self, tokenizer: Tokenizer, one: PreparedRequest, outcome: Outcome) -> None:
        """Write an answer; returns when it is synced. Raises WriteError."""
        if isinstance(outcome, PromptError | NumericError):
            row = _error_row(one.id, Refusal.of(outcome))
        else:
            row = self._answer_row(tokenizer, one, outcome)
            for result in outcome:
                self._progress.count(len(result.token_ids), len(one.tokens), result.stats.num_cached_tokens)
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

    def _answer_row(self, tokenizer: Tokenizer, one: PreparedRequest, results: Sequence[Result]) -> OutputRow:
        """The line of an answer. It depends only on the row, the model and the options."""
        digest = digest_of(one.id)
        choices = [
            Generated(made.text, len(one.tokens), len(made.token_ids), made.finish_reason, made.logprobs)
            for made in results
        ]
        label = Label(digest, self._output.created, one.request.model or self._model)
        body = answer_body(one.request, choices, label, tokenizer)
        return _output_row(one.id, {"status_code": 200, "request_id": f"req_{digest}", "body": body}, None)


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
