"""A sequence: one request's tokens, its draws and its text, from prompt to finish reason."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from aspec.errors import NumericError
from aspec.generation.params import SamplingParams
from aspec.generation.penalties import Context, TokenCounts, proposal_paths
from aspec.generation.processors import Processors
from aspec.generation.sampler import Sampler, TokenLogprob
from aspec.generation.text.tokenizer import TextStream

Committed = tuple[str, tuple[int, ...], tuple[TokenLogprob, ...], int]
"""The text, token ids and, if requested, logprobs of one round; the leading characters that were proposed."""

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(slots=True)
class Sequence:
    """One sequence; mutable, because it grows. Only ACCEPT commits to it, on the worker that runs ACCEPT.

    ``tokens`` holds the prompt and all committed tokens; nothing after an end token is ever committed.
    """

    id: int
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    sampler: Sampler
    text: TextStream
    end_ids: frozenset[int]
    max_new_tokens: int  # the request's, cut to the free context
    num_cached_tokens: int = 0  # leading tokens with KV when the row was assigned; only assignment sets it
    finish_reason: FinishReason | None = None
    failure: NumericError | None = None  # the error that ended it, in place of a finish reason
    pieces: list[Committed] = field(default_factory=list)  # committed and not yet delivered
    processors: Processors | None = None  # None if the parameters need none
    counts: TokenCounts | None = None  # for penalties; None if none is set
    scored: bool = False  # the logprobs of the prompt's own tokens are wanted
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position, until they are delivered

    def __post_init__(self) -> None:
        self.counts = TokenCounts.of(self.params, self.tokens)

    @property
    def reads_context(self) -> bool:
        """Whether the tokens before a position change its draw in other ways than through the model."""
        return self.counts is not None or self.processors is not None

    def context(self, proposals: SequenceOf[int] = (), parents: SequenceOf[int] | None = None) -> Context | None:
        """The context of the position after the committed tokens and after each proposal; None if no draw reads it."""
        return self.context_of(proposal_paths(proposals, parents)) if self.reads_context else None

    def context_of(self, paths: SequenceOf[SequenceOf[int]]) -> Context | None:
        """Likewise of the positions after some paths."""
        return Context(self.counts, paths, self.processors, self.tokens) if self.reads_context else None

    def num_allowed(self, proposals: SequenceOf[int]) -> int:
        """How many leading proposals of a chain after the committed tokens the request's grammar allows."""
        return len(proposals) if self.processors is None else self.processors.num_allowed(self.tokens, proposals)

    @property
    def ended(self) -> bool:
        """Whether the sequence is complete: no more tokens are committed."""
        return self.finish_reason is not None or self.failure is not None

    @property
    def num_new(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    def commit(self, drawn: SequenceOf[int], logprobs: SequenceOf[TokenLogprob] = ()) -> int:
        """Append accepted tokens up to an end token, a stop string or the limit; returns the number committed.

        All but the last of ``drawn`` were proposed. ``logprobs`` are theirs; empty if not requested.
        """
        if not drawn:
            return 0
        new: list[int] = []
        text: list[str] = []
        for token in drawn:
            new.append(token)
            self.tokens.append(token)
            if token in self.end_ids:
                self.finish_reason = "stop"
            else:
                text.append(self.text.push([token]))
                if self.text.stopped:
                    self.finish_reason = "stop"
            if self.num_new >= self.max_new_tokens and self.finish_reason is None:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                text.append(self.text.finish())
                break
        if self.counts is not None:
            self.counts.commit(new)
        proposed = sum(map(len, text[: len(drawn) - 1]))
        self.pieces.append(("".join(text), tuple(new), tuple(logprobs[: len(new)]), proposed))
        return len(new)

    def fail(self, error: NumericError) -> None:
        """End the sequence with an error; only the first counts, and none after a finish reason."""
        if not self.ended:
            self.failure = error

    def take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """The logprobs of the prompt's tokens but the first, once; they are complete with the first drawn token."""
        taken, self.prompt_logprobs = self.prompt_logprobs, {}
        return tuple(taken[position] for position in sorted(taken))

    def take_pieces(self) -> list[Committed]:
        """The rounds that were committed since the last call."""
        pieces, self.pieces = self.pieces, []
        return pieces
