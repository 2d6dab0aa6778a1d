"""The statistics of a request: counts and seconds, from the same spans that all observers read."""

from dataclasses import dataclass

from aspec.generation.sampler import TokenLogprob
from aspec.plan import Plan
from aspec.tasks.experts.prefetch import NO_COUNTS, ExpertCounts
from aspec.tasks.task import RowOutcome


@dataclass(frozen=True, slots=True)
class Piece:
    """The output of one round of a stream; the last piece has a finish reason and the statistics."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # "stop" | "length"
    stats: "RequestStats | None" = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, if requested
    num_drafted: int = 0  # leading characters of the text that were proposed, and accepted by the target
    prompt_logprobs: tuple[
        TokenLogprob, ...
    ] = ()  # in the first piece, if requested: of the prompt but its first token


@dataclass(slots=True)
class RequestStats:
    """Counts of one request; mutable while it runs, complete after ``close``."""

    prompt_tokens: int = 0
    arrived_s: float = 0.0
    num_cached_tokens: int = 0  # of the prompt: their KV came from an earlier sequence, the others were prefilled
    completion_tokens: int = 0
    passes: int = 0  # target passes after the prefill
    proposed: int = 0
    accepted: int = 0
    streamed_bytes: int = 0  # loads that finished between arrival and end
    prefill_s: float = 0.0  # arrival to first token
    decode_s: float = 0.0  # first token to last
    bytes_per_pass: int = 0
    experts: ExpertCounts = NO_COUNTS  # on demand, while the request ran
    experts_before: ExpertCounts = NO_COUNTS  # before it arrived
    experts_loaded: int = 0  # chosen ones that were neither in memory nor on their way there
    num_prefilled: int = 0  # prompt tokens that have KV, cached ones included; on the way, of a mean layer
    _prefilled: int = 0  # likewise without the cached ones, summed over the layers
    is_closed: bool = False  # the request has ended
    _first_token_s: float | None = None
    _decode_from_bytes: int = 0

    def begin(self, prompt_tokens: int, now_s: float) -> None:
        """The request has arrived."""
        self.prompt_tokens, self.arrived_s = prompt_tokens, now_s

    def take_prefill(self, start: int, count: int, num_layers: int) -> None:
        """Add one layer of ``count`` prompt tokens from ``start`` on."""
        if not self._prefilled:
            self.num_cached_tokens = start
        self._prefilled += count
        self.num_prefilled = self.num_cached_tokens + self._prefilled // num_layers

    def take(self, outcome: RowOutcome, now_s: float) -> None:
        """Add the outcome of one ACCEPT of this request."""
        self.completion_tokens += outcome.num_new
        if self._first_token_s is None:
            self._first_token_s = now_s
            self._decode_from_bytes = self.streamed_bytes
            return
        self.passes += 1
        self.proposed += outcome.num_proposed
        self.accepted += outcome.num_accepted

    def close(self, plan: Plan, now_s: float) -> "RequestStats":
        """Complete the statistics at the end of the request; returns itself."""
        first = self._first_token_s if self._first_token_s is not None else now_s
        self.prefill_s, self.decode_s = first - self.arrived_s, now_s - first
        self.bytes_per_pass, self.is_closed = plan.streamed_bytes, True
        if plan.experts is not None and self.passes:
            self.bytes_per_pass = (self.streamed_bytes - self._decode_from_bytes) // self.passes
        return self

    @property
    def expert_hit_rate(self) -> float | None:
        """The share of the chosen experts that were in memory; None if none were read on demand."""
        return max(0.0, 1.0 - self.experts_loaded / self.experts.chosen) if self.experts.chosen else None

    @property
    def prefetch_hit_rate(self) -> float | None:
        """The share of experts read before their route that were chosen then; None if none were."""
        return self.experts.used / self.experts.guessed if self.experts.guessed else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens per pass of the target, without the prefill and its token."""
        return (self.completion_tokens - 1) / self.passes if self.passes else None

    @property
    def acceptance_rate(self) -> float | None:
        """The share of proposals that were accepted."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens per second, without the prefill and its token."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else None

    @property
    def stream_bytes_per_s(self) -> float | None:
        """Bytes per second of the weight stream during this request's decoding; None if nothing streamed."""
        nbytes = self.streamed_bytes - self._decode_from_bytes
        return nbytes / self.decode_s if nbytes and self.decode_s > 0 else None

    def as_dict(self, link_rate: float | None, peak_rss_bytes: int) -> dict[str, float | int | None]:
        """The ``stats`` object of ``--json``; ``link_rate``: the raw bytes per second, probed on the same files."""
        per_pass = self.tokens_per_pass
        ceiling = per_pass * link_rate / self.bytes_per_pass if per_pass and link_rate and self.bytes_per_pass else None
        return {
            "num_cached_tokens": self.num_cached_tokens,
            "passes": self.passes,
            "tokens_per_pass": per_pass,
            "acceptance_rate": self.acceptance_rate,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
            "streamed_bytes": self.streamed_bytes,
            "stream_bytes_per_s": self.stream_bytes_per_s,
            "experts_chosen": self.experts.chosen,
            "experts_loaded": self.experts_loaded,
            "expert_hit_rate": self.expert_hit_rate,
            "experts_prefetched": self.experts.guessed,
            "prefetch_hit_rate": self.prefetch_hit_rate,
            "prefetch_wasted_bytes": max(0, self.experts.wasted_bytes),
            "ceiling_tokens_per_s": ceiling,
            "ceiling_fraction": self.tokens_per_s / ceiling if ceiling and self.tokens_per_s else None,
            "peak_rss_bytes": peak_rss_bytes,
        }
