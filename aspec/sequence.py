"""A sequence: one request's tokens, its draws and its text, from prompt to finish reason."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from aspec.params import SamplingParams
from aspec.sampling import Sampler
from aspec.text import TextStream

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(slots=True)
class Sequence:
    """Mutable, because it grows: only ACCEPT commits to it, on the worker that runs ACCEPT.

    ``tokens`` holds the prompt and all committed tokens; nothing after an end token is ever committed.
    """

    id: int
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    sampler: Sampler
    text: TextStream
    end_ids: frozenset[int]
    max_new_tokens: int  # the request's, cut to what the context holds
    finish_reason: FinishReason | None = None
    pieces: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # committed and not yet delivered

    @property
    def num_new(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    def commit(self, drawn: SequenceOf[int]) -> int:
        """Append accepted tokens up to an end token, a stop string or the limit; returns how many counted."""
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
        self.pieces.append(("".join(text), tuple(new)))
        return len(new)

    def take_pieces(self) -> list[tuple[str, tuple[int, ...]]]:
        """What was committed since the last call: (text, token ids) per round."""
        pieces, self.pieces = self.pieces, []
        return pieces
