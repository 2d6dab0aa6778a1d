"""How the answers of a batch become lines on the disk: the form of a line, and syncs that several rows share."""

import asyncio
import hashlib
import json
from typing import Any

from aspec.api import Result
from aspec.errors import NoTokenError, NumericError
from aspec.generation.tokenizer import Tokenizer
from aspec.io.settling import settle
from aspec.observe.batch_progress import BatchProgress
from aspec.serving.batch_output import Output, OutputRow
from aspec.serving.dispatch import ContextExceeded, PreparedRequest, Refused
from aspec.serving.openai_responses import Generated, Label, answer_body


def digest_of(custom_id: str) -> str:
    """24 hexadecimal digits of the custom_id's SHA-256; a row's seed and the ids in its answer derive from them."""
    return hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class BatchWriter:
    """Writes answers as lines of the output; mutable: lines wait while a sync runs."""

    def __init__(self, output: Output, model: str, progress: BatchProgress) -> None:
        self._output, self._model, self._progress = output, model, progress
        self._waiting: list[OutputRow] = []  # complete lines that no write has taken yet
        self._turn = asyncio.Lock()  # held during a write and its sync

    async def keep(self, tokenizer: Tokenizer, one: PreparedRequest, outcome: Result | Refused) -> None:
        """Write an answer; returns when it is synced. Raises WriteError."""
        row = self._row(tokenizer, one, outcome)
        if isinstance(outcome, Result):
            self._progress.count(len(outcome.token_ids), len(one.tokens), outcome.stats.num_cached_tokens)
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

    def _row(self, tokenizer: Tokenizer, one: PreparedRequest, outcome: Result | Refused) -> OutputRow:
        """The line of the output. It depends only on the row, the model and the options."""
        digest = digest_of(one.id)
        line: dict[str, Any] = {"id": f"batch_req_{digest}", "custom_id": one.id, "response": None, "error": None}
        if not isinstance(outcome, Result):
            line["error"] = {"code": error_code(outcome), "message": str(outcome)}
        else:
            made = Generated(
                outcome.text, len(one.tokens), len(outcome.token_ids), outcome.finish_reason, outcome.logprobs
            )
            label = Label(digest, self._output.created, one.request.model or self._model)
            body = answer_body(one.request, made, label, tokenizer)
            line["response"] = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
        return OutputRow(one.id, json.dumps(line).encode() + b"\n", not isinstance(outcome, Result))


def error_code(refused: Refused) -> str:
    """The error code in the output line of a row without an answer."""
    if isinstance(refused, NumericError) and not isinstance(refused, NoTokenError):
        return "numeric_error"
    return "context_length_exceeded" if isinstance(refused, ContextExceeded) else "invalid_prompt"
