"""How far the model has read a message: counted from spans, and shown in a line that the answer replaces."""

import sys
import time
from typing import Self

from aspec.observe.console import Console
from aspec.observe.ticker import Ticker
from aspec.tasks.task import Span

PERIOD_S = 0.25  # between two lines
PATIENCE_S = 0.5  # a message that is read faster shows no line


class PrefillProgress:
    """Observes the layers of one prompt's prefill; mutable, because it follows it. ``line`` is for any thread."""

    def __init__(self) -> None:
        self._num_layers, self._prompt_tokens = 1, 0
        self._cached_tokens = 0  # of the prompt, which the model does not read again
        self._layer_tokens = 0  # finished: tokens, summed over the layers
        self._begun_s: float | None = None  # on the backend's clock, which is ``time.perf_counter``
        self._pass = self._old_pass = -1  # the latest pass; passes up to the old one belong to earlier prompts

    def begin(self, prompt_tokens: int, num_layers: int) -> None:
        """Follow a new prompt. The pass of a stopped one may still run."""
        self._num_layers, self._prompt_tokens, self._old_pass = num_layers, prompt_tokens, self._pass
        self._layer_tokens, self._cached_tokens, self._begun_s = 0, prompt_tokens, None

    def __call__(self, span: Span) -> None:
        """Count a finished layer of a part of the prompt."""
        item = span.task.item
        if item is None or not item.prefill or not span.task.op.ends_layer:
            return
        self._pass = max(self._pass, span.task.number)
        if span.task.number > self._old_pass:
            self._cached_tokens = min(self._cached_tokens, *item.starts)
            self._begun_s = span.start_s if self._begun_s is None else self._begun_s
            self._layer_tokens += item.num_tokens

    def line(self, now_s: float) -> str:
        """Tokens read of all new ones, their rate, and the seconds that are left."""
        total, done, begun_s = self._prompt_tokens - self._cached_tokens, self._layer_tokens, self._begun_s
        if not done or begun_s is None or now_s <= begun_s:
            return f"reading {self._prompt_tokens} tokens"
        read = min(total, done // self._num_layers)
        rate = done / self._num_layers / (now_s - begun_s)
        return f"reading: {read} of {total} tokens, {rate:.4g} tokens/s, {(total - read) / rate:.0f} s left"


class ReadingLine:
    """The progress in the line of the cursor, until ``close``; nothing if stderr is no terminal, or when quiet."""

    def __init__(self, progress: PrefillProgress, console: Console) -> None:
        self._progress, self._console = progress, console
        shows = console.stderr.is_terminal and not console.stderr.is_dumb_terminal and not console.quiet
        self._begun_s = time.perf_counter()
        self._drawn = False
        self._ticker = Ticker(PERIOD_S, self._draw, "prefill") if shows else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Erase the line; it may be called again."""
        ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.close()
            if self._drawn:
                self._write("\r\x1b[K")

    def _draw(self) -> None:
        now_s = time.perf_counter()
        if now_s - self._begun_s >= PATIENCE_S:
            text = f"aspec: {self._progress.line(now_s)}"[: max(1, self._console.stderr.width - 1)]
            self._drawn = True
            self._write(f"\r\x1b[2m{text}\x1b[0m\x1b[K")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
