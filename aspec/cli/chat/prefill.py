"""How far the model has read a message: counted from spans, and shown in a line that the answer replaces."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from aspec.observe.console import Console
from aspec.observe.dashboard import show
from aspec.tasks.task import Span

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


@contextmanager
def shown_while_reading(progress: PrefillProgress, console: Console) -> Iterator[None]:
    """Show the progress until the block ends: on a terminal in the line of the cursor, which is then erased."""
    begun_s = time.perf_counter()

    def line() -> str:
        return progress.line(time.perf_counter())

    def draw() -> str:
        if time.perf_counter() - begun_s < PATIENCE_S:
            return ""
        return f"\r\x1b[2maspec: {line()}\x1b[0m\x1b[K"

    with show(console, draw, line, covers=False, live=True):
        yield
