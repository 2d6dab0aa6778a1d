"""The figures of a server, as text that Prometheus reads (exposition format 0.0.4)."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from aspec.generation.stats import RequestStats
from aspec.plan import Plan
from aspec.serving.http.lag import LoopLag
from aspec.tasks.task import Span

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
WINDOW_S = 30.0  # over which speeds are measured


@dataclass(slots=True)
class Metrics:
    """Counts since the start; mutable, because they grow. An observer of the engine's tasks."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by path and status; 499: the client left
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts: their KV was there
    new_tokens: int = 0
    passes: int = 0
    row_passes: int = 0  # rows that decoded, summed over the passes
    decoded_tokens: int = 0  # of these rows
    streamed_bytes: int = 0
    link_rate: float | None = None  # bytes per second that the link gave when it was measured
    lag: LoopLag = field(default_factory=LoopLag)
    _last_pass: int = -1
    _spans: deque[tuple[float, int, int]] = field(default_factory=deque)  # (end, tokens, bytes) of the window

    def __call__(self, span: Span) -> None:
        """Count a finished task."""
        task = span.task
        tokens = sum(outcome.num_new for outcome in span.outcomes)
        nbytes = task.nbytes if task.filled_slot is not None else 0
        if not tokens and not nbytes:
            return
        self.new_tokens += tokens
        self.streamed_bytes += nbytes
        if span.outcomes:
            self.passes += task.number != self._last_pass
            self._last_pass = task.number
            if task.item is not None and not task.item.prefill:
                self.row_passes += len(span.outcomes)
                self.decoded_tokens += tokens
        self._spans.append((span.stop_s, tokens, nbytes))
        while self._spans[0][0] < span.stop_s - WINDOW_S:
            self._spans.popleft()

    def ended(self, stats: RequestStats) -> None:
        """Count an answer that has ended."""
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.num_cached_tokens

    def speeds(self, now_s: float) -> tuple[float, float]:
        """Tokens and streamed bytes per second over the window."""
        recent = [one for one in self._spans if one[0] >= now_s - WINDOW_S]
        return sum(one[1] for one in recent) / WINDOW_S, sum(one[2] for one in recent) / WINDOW_S

    @property
    def tokens_per_pass(self) -> float:
        """Mean tokens that a decoding row gets from a pass; 0 before the first."""
        return self.decoded_tokens / self.row_passes if self.row_passes else 0.0


@dataclass(frozen=True, slots=True)
class Present:
    """The state of a server at one moment."""

    ready: bool
    num_open: int  # answers that run or wait
    running: tuple[RequestStats, ...]  # of them with a row
    plan: Plan | None


def exposition(metrics: Metrics, present: Present, now_s: float) -> str:
    """All figures; ``now_s`` on the backend's clock."""
    lines: list[str] = []

    def add(name: str, kind: str, help: str, values: Iterable[tuple[str, float]]) -> None:
        lines.extend((f"# HELP aspec_{name} {help}", f"# TYPE aspec_{name} {kind}"))
        lines.extend(f"aspec_{name}{labels} {value:.10g}" for labels, value in values)

    codes = sorted(metrics.requests.items())
    labelled = ((f'{{path="{path}",status="{status}"}}', float(count)) for (path, status), count in codes)
    add("requests_total", "counter", "Requests by path and status; 499: the client left.", labelled)
    lag = metrics.lag
    sums = [("_sum", lag.sum_s), ("_count", float(lag.count))]
    lateness = [*((f"_bucket{label}", count) for label, count in lag.buckets()), *sums]
    add("loop_lag_seconds", "histogram", "Lateness of the event loop, which every client sees.", lateness)
    for name, kind, help, value in _figures(metrics, present, now_s):
        add(name, kind, help, [("", value)])
    return "\n".join(lines) + "\n"


def _figures(metrics: Metrics, present: Present, now_s: float) -> Iterator[tuple[str, str, str, float]]:
    tokens_per_s, bytes_per_s = metrics.speeds(now_s)
    plan, running = present.plan, present.running
    yield "ready", "gauge", "1 if requests are answered.", float(present.ready)
    yield "answers_running", "gauge", "Answers that have a row.", len(running)
    yield "answers_waiting", "gauge", "Answers that wait for a row.", present.num_open - len(running)
    yield "prompt_tokens_total", "counter", "Tokens of prompts.", metrics.prompt_tokens
    yield "cached_prompt_tokens_total", "counter", "Tokens of prompts whose KV was kept.", metrics.cached_tokens
    yield "new_tokens_total", "counter", "Generated tokens.", metrics.new_tokens
    yield "passes_total", "counter", "Passes of the target.", metrics.passes
    yield "streamed_bytes_total", "counter", "Bytes of weights that streamed.", metrics.streamed_bytes
    yield "tokens_per_s", "gauge", f"Generated tokens per second, over {WINDOW_S:g} s.", tokens_per_s
    yield "tokens_per_pass", "gauge", "Mean tokens that a decoding row gets from a pass.", metrics.tokens_per_pass
    yield "stream_bytes_per_s", "gauge", f"Bytes of weights per second, over {WINDOW_S:g} s.", bytes_per_s
    if metrics.link_rate:
        share = bytes_per_s / metrics.link_rate
        yield "ceiling_fraction", "gauge", "Share of the link's measured bytes per second that streamed.", share
    if plan is not None:
        used = sum(stats.num_prefilled + stats.completion_tokens for stats in running)
        yield "rows", "gauge", "Rows of the plan.", plan.num_rows
        yield "kv_tokens", "gauge", "Tokens of KV that the plan holds.", plan.num_rows * plan.capacity
        yield "kv_tokens_used", "gauge", "Tokens of KV of running answers.", used
