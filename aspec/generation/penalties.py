"""Penalties for repetition: the tokens that lead to a position lower, or raise, their logits there.

What leads to a position is the prompt, the committed tokens and the proposals on its own path, never a token of
another branch. So a position is penalised as if its path were committed, and what it draws does not depend on
drafts. Committed tokens are counted once, as they are committed; a position adds the few of its path.

Sources: transformers' ``RepetitionPenaltyLogitsProcessor`` (Keskar et al., CTRL) over prompt and generated tokens,
then OpenAI's ``mu[j] - c[j] * frequency - (c[j] > 0) * presence`` over generated tokens; vLLM keeps this order.

Rule: a penalised logit is a function of the raw logit and a count, element by element; nothing is penalised twice.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from aspec.generation.params import SamplingParams
from aspec.io.upload import upload

FARTHEST = 1e30  # from 1: beyond it float32 may lose a penalised logit to infinity, and no penalty could be stronger


class TokenCounts:
    """One request's tokens, counted; mutable, because the request grows.

    Whoever commits tokens to the sequence commits the very same tokens here.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._slots: dict[int, int] = {}  # token -> where the two arrays hold it, in order of first appearance
        self._ids = array("q")
        self._generated = array("f")  # how often the token was generated; 0: only the prompt has it
        self._largest = -1
        for token in prompt:
            self._slot(token)

    @classmethod
    def of(cls, params: SamplingParams, prompt: Iterable[int]) -> Self | None:
        """What a request's penalties need to know; None where none is set."""
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
        ids, generated = np.array(self._ids), np.array(self._generated)  # copies: arrays in use cannot grow
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
    """What leads to each of the N positions that are drawn together for one request.

    ``paths[n]`` holds the proposals between the committed tokens and position ``n``, first to last; ``((),)`` is
    the one position that follows the committed tokens.
    """

    counts: TokenCounts
    paths: Sequence[Sequence[int]] = ((),)


def proposal_paths(proposals: Sequence[int], parents: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """The path to the position behind the last committed token, then the path behind every proposal: N + 1 of them.

    ``parents[n]`` is the proposal that proposal ``n`` continues, -1 for the last committed token; parents come
    before their children. Without it every proposal continues the one before.
    """
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(proposals, range(-1, len(proposals) - 1) if parents is None else parents, strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


@dataclass(frozen=True, slots=True)
class Penalties:
    """How strong each penalty is; 1, 0 and 0 switch them off."""

    repetition: float
    presence: float
    frequency: float

    @classmethod
    def of(cls, params: SamplingParams) -> Self | None:
        """A request's penalties; None where none is set."""
        wanted = float(params.repetition_penalty), float(params.presence_penalty), float(params.frequency_penalty)
        if wanted == (1, 0, 0):
            return None
        return cls(min(max(wanted[0], 1 / FARTHEST), FARTHEST), *wanted[1:])

    def apply(self, scores: torch.Tensor, context: Context) -> None:
        """Penalise raw logits [N, V] float32 in place, every position by what leads to it."""
        device, counts = scores.device, context.counts
        ids, generated = counts.table(scores.shape[-1], device)
        on_paths = [
            (row, token, counts.generated(token) + times)
            for row, path in enumerate(context.paths)
            for token, times in Counter(path).items()
            if token < scores.shape[-1]
        ]
        told = upload(torch.tensor(on_paths, dtype=torch.int64), device)
        rows, tokens, totals = told.reshape(-1, 3).unbind(1)
        raw = scores[rows, tokens]
        scores[:, ids] = self._penalised(scores[:, ids], generated)
        scores[rows, tokens] = self._penalised(raw, totals.float())

    def _penalised(self, raw: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        """Raw logits [..., U] of tokens that appeared, ``generated`` [U] float32 times since the prompt."""
        repeated = torch.where(raw < 0, raw * self.repetition, raw / self.repetition)
        return repeated - (generated * self.frequency + (generated > 0) * self.presence)
