"""What a request cost: counts and seconds, from the same spans everything else reads."""

from dataclasses import dataclass

from aspec.generation.sampler import TokenLogprob
from aspec.plan import Plan
from aspec.tasks.task import RowOutcome


@dataclass(frozen=True, slots=True)
class Piece:
    """A round's worth of one stream; the last piece carries a reason and the statistics."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # "stop" | "length"
    stats: "RequestStats | None" = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, where they were asked for


@dataclass(slots=True)
class RequestStats:
    """Counts of one request; mutable while it runs, complete after ``close``."""

    prompt_tokens: int
    arrived_s: float
    num_cached_tokens: int = 0  # of the prompt: their KV stood from an earlier sequence, only the others were prefilled
    completion_tokens: int = 0
    passes: int = 0  # target passes after the one that prefilled
    proposed: int = 0
    accepted: int = 0
    streamed_bytes: int = 0  # loads that finished between arrival and end
    prefill_s: float = 0.0  # arrival to first token
    decode_s: float = 0.0  # first token to last
    bytes_per_pass: int = 0
    _first_token_s: float | None = None
    _decode_from_bytes: int = 0

    def take(self, outcome: RowOutcome, now_s: float) -> None:
        """One ACCEPT of this request."""
        self.completion_tokens += outcome.num_new
        if self._first_token_s is None:
            self._first_token_s = now_s
            self._decode_from_bytes = self.streamed_bytes
            return
        self.passes += 1
        self.proposed += outcome.num_proposed
        self.accepted += outcome.num_accepted

    def close(self, plan: Plan, now_s: float) -> "RequestStats":
        """The request has ended."""
        first = self._first_token_s if self._first_token_s is not None else now_s
        self.prefill_s, self.decode_s = first - self.arrived_s, now_s - first
        self.bytes_per_pass = plan.streamed_bytes
        return self

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that one pass of the target brought, the prefill's own token excluded."""
        return (self.completion_tokens - 1) / self.passes if self.passes else None

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the proposals that were accepted."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed, the prefill excluded."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else None

    @property
    def stream_bytes_per_s(self) -> float | None:
        """Rate of the weight stream while this request decoded; None if nothing streamed."""
        nbytes = self.streamed_bytes - self._decode_from_bytes
        return nbytes / self.decode_s if nbytes and self.decode_s > 0 else None

    def as_dict(self, link_rate: float | None, peak_rss_bytes: int) -> dict[str, float | int | None]:
        """The ``stats`` object of ``--json``; ``link_rate`` is the raw rate probed on the same files."""
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
            "ceiling_tokens_per_s": ceiling,
            "ceiling_fraction": self.tokens_per_s / ceiling if ceiling and self.tokens_per_s else None,
            "peak_rss_bytes": peak_rss_bytes,
        }
