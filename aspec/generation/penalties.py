"""Penalties for repetition: tokens before a position change their own logits at that position.

The tokens before a position are the prompt, the committed tokens and the proposals on its own path, never a token of
another branch. So a position is penalised as if its path were committed, and its draw does not depend on drafts.
Committed tokens are counted once, when they are committed; a position adds the few tokens of its path.

Sources: transformers' ``RepetitionPenaltyLogitsProcessor`` (Keskar et al., CTRL) over prompt and generated tokens,
then OpenAI's ``mu[j] - c[j] * frequency - (c[j] > 0) * presence`` over generated tokens; vLLM keeps this order.

Rule: a penalised logit is a function of the raw logit and a count, element by element; nothing is penalised twice.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from aspec.generation.params import SamplingParams
from aspec.generation.processors import Processors
from aspec.io.pinned import upload

FARTHEST = 1e30  # largest factor: a larger one may make a float32 logit infinite, and has no stronger effect


class TokenCounts:
    """Counts of one request's tokens; mutable, because the request grows.

    Every commit to the sequence must also commit the same tokens here.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._slots: dict[int, int] = {}  # token -> its index in the two arrays, in order of first appearance
        self._ids = array("q")
        self._generated = array("f")  # how often the token was generated; 0: only the prompt has it
        self._largest = -1
        for token in prompt:
            self._slot(token)

    @classmethod
    def of(cls, params: SamplingParams, prompt: Iterable[int]) -> Self | None:
        """The counts for a request's penalties; None if no penalty is set."""
        if Penalties.of(params) is None:
            return None
        return cls(prompt if params.repetition_penalty != 1 else ())

    def commit(self, tokens: Iterable[int]) -> None:
        """Count generated tokens."""
        for token in tokens:
            self._generated[self._slot(token)] += 1

    def generated(self, token: int) -> int:
        """How often a token was generated so far."""
        slot = self._slots.get(token)
        return 0 if slot is None else int(self._generated[slot])

    def table(self, limit: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct tokens below ``limit`` [U] int64, and how often each was generated [U] float32."""
        ids, generated = np.array(self._ids), np.array(self._generated)  # copies: an exported array cannot grow
        if self._largest >= limit:  # a draft may know fewer tokens than its target
            ids, generated = ids[ids < limit], generated[ids < limit]
        return upload(torch.from_numpy(ids), device), upload(torch.from_numpy(generated), device)

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._ids))
        if slot == len(self._ids):
            self._ids.append(token)
            self._generated.append(0)
            self._largest = max(self._largest, token)
        return slot


@dataclass(frozen=True, slots=True)
class Context:
    """The tokens before each of the N positions that are drawn together for one request.

    ``paths[n]`` holds the proposals between the committed tokens and position ``n``, first to last; ``((),)`` is
    the one position after the committed tokens.
    """

    counts: TokenCounts | None  # for penalties; None if none is set
    paths: Sequence[Sequence[int]] = ((),)
    processors: Processors | None = None  # None if the request needs none
    tokens: Sequence[int] = ()  # prompt and committed tokens, for the processors

    def at(self, position: int) -> Self:
        """The context of one of the positions."""
        return replace(self, paths=self.paths[position : position + 1])


def proposal_paths(proposals: Sequence[int], parents: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """N + 1 paths: to the position after the last committed token, then to the position after each of N proposals.

    ``parents[n]`` is the proposal that proposal ``n`` continues, -1 for the last committed token; parents come
    before their children. Without ``parents`` every proposal continues the one before.
    """
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(proposals, range(-1, len(proposals) - 1) if parents is None else parents, strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


@dataclass(frozen=True, slots=True)
class Penalties:
    """The strength of each penalty; 1, 0 and 0 switch them off."""

    repetition: float
    presence: float
    frequency: float

    @classmethod
    def of(cls, params: SamplingParams) -> Self | None:
        """A request's penalties; None if none is set."""
        wanted = float(params.repetition_penalty), float(params.presence_penalty), float(params.frequency_penalty)
        if wanted == (1, 0, 0):
            return None
        return cls(min(max(wanted[0], 1 / FARTHEST), FARTHEST), *wanted[1:])

    def apply(self, scores: torch.Tensor, context: Context) -> None:
        """Penalise raw logits [N, V] float32 in place, each position by the tokens before it."""
        device, counts = scores.device, context.counts
        assert counts is not None, "penalties need counts"
        ids, generated = counts.table(scores.shape[-1], device)
        on_paths = [
            (row, token, counts.generated(token) + times)
            for row, path in enumerate(context.paths)
            for token, times in Counter(path).items()
            if token < scores.shape[-1]
        ]
        extra = upload(torch.tensor(on_paths, dtype=torch.int64), device)
        rows, tokens, totals = extra.reshape(-1, 3).unbind(1)
        raw = scores[rows, tokens]
        scores[:, ids] = self._penalised(scores[:, ids], generated)
        scores[rows, tokens] = self._penalised(raw, totals.float())

    def _penalised(self, raw: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        """Penalised logits from raw ones [..., U]; each token was generated ``generated`` [U] float32 times."""
        repeated = torch.where(raw < 0, raw * self.repetition, raw / self.repetition)
        return repeated - (generated * self.frequency + (generated > 0) * self.presence)
