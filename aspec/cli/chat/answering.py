"""One answer in the terminal: its words wrap as they arrive, keys stay out of it, a line tells what it cost."""

import asyncio
import os
import sys
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field

from aspec.cli.chat.keys import HeldKeys, keys_held
from aspec.cli.chat.prefill import PrefillProgress, shown_while_reading
from aspec.cli.chat.wrapping import Wrapper
from aspec.cli.interrupts import present
from aspec.engine.engine import Engine
from aspec.generation.params import SamplingParams
from aspec.generation.stats import Piece, RequestStats
from aspec.observe.console import Console


@dataclass(slots=True)
class Answer:
    """The pieces of an answer; mutable, because they arrive one by one. Ctrl-C ends it at any of them."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return [token for piece in self.pieces for token in piece.token_ids]

    @property
    def is_whole(self) -> bool:
        """Whether the model ended it, or a limit did; otherwise Ctrl-C stopped it."""
        return bool(self.pieces) and self.pieces[-1].finish_reason is not None


class Answering:
    """Prints the answers of an engine; ``runner`` owns the engine's loop, which runs during an answer."""

    def __init__(
        self, runner: asyncio.Runner, engine: Engine, progress: PrefillProgress, console: Console, *, mark_pastes: bool
    ) -> None:
        self._runner, self._engine, self._progress, self._console = runner, engine, progress, console
        self._mark_pastes = mark_pastes  # the next prompt understands bracketed paste

    def ask(self, prompt: list[int], params: SamplingParams) -> Answer:
        """Print the answer to a prompt as it arrives. Ctrl-C stops it. Raises an error of the stream."""
        answer = Answer()
        try:
            with keys_held(mark_pastes=self._mark_pastes) as keys:
                present().run(self._runner, self._stream(prompt, params, answer, keys))
        finally:
            if answer.pieces:
                self._console.write("\n")
        self._console.show_warnings()
        if answer.pieces and self._console.stderr.is_terminal:
            self._console.note(footer(answer, len(prompt), self._engine.max_context))
        return answer

    async def _stream(self, prompt: list[int], params: SamplingParams, answer: Answer, keys: HeldKeys | None) -> None:
        """Collect and print the pieces; Ctrl-C cancels this task."""
        wrapper = Wrapper()
        self._progress.begin(len(prompt), self._engine.plan.num_layers)
        with suppress(asyncio.CancelledError), ExitStack() as reading:
            reading.enter_context(shown_while_reading(self._progress, self._console))
            async with aclosing(self._engine.stream(prompt, params)) as stream:
                async for piece in stream:
                    reading.close()
                    answer.pieces.append(piece)
                    columns, stops = terminal_columns(), keys.num_stops if keys else 0
                    self._console.write(piece.text if columns is None else wrapper.push(piece.text, columns, stops))


def terminal_columns() -> int | None:
    """The width of the terminal of stdout now, 0 if it has none; None if stdout is no terminal that shows lines."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "").lower() in ("dumb", "unknown", ""):
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return 0


def footer(answer: Answer, num_prompt: int, context: int) -> str:
    """One line: tokens of the answer, seconds to the first one, speed, new prompt tokens, use of the context."""
    stats, num_tokens = answer.pieces[-1].stats, len(answer.token_ids)
    used = num_prompt + num_tokens
    words = _costs(stats, answer.pieces[-1].finish_reason) if stats else [f"stopped after {num_tokens} tokens"]
    words.append(f"context: {used} of {context}")
    if not answer.text:
        words.append("the answer is empty")
    return ", ".join(words) + ("; it is full: the next message drops the oldest turns" if used >= context else "")


def _costs(stats: RequestStats, reason: str | None) -> list[str]:
    words = [f"{stats.completion_tokens} tokens ({reason})", f"first after {stats.prefill_s:.2f} s"]
    if stats.tokens_per_s is not None:
        words.append(f"{stats.tokens_per_s:.2f} tokens/s")
    if stats.tokens_per_pass is not None and stats.proposed:
        words.append(f"{stats.tokens_per_pass:.2f} tokens per pass")
    new = stats.prompt_tokens - stats.num_cached_tokens
    return [*words, f"prompt: {new} tokens new, {stats.num_cached_tokens} reused"]
