"""What ``aspec generate --verify`` does: decode the same prompts without speculation, and compare token by token.

The reference is a second engine under the plan of the first, which has closed by then: one memory budget holds both,
one after the other. Its draws are watched, so where one differs the scores that decided say by how much.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import torch

from aspec.engine.engine import Engine, describe_plan
from aspec.errors import DivergenceError
from aspec.generation.params import SamplingParams
from aspec.generation.penalties import Context
from aspec.generation.sampler import Sampler
from aspec.generation.tokenizer import Tokenizer
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.plan import Plan
from aspec.planning.resolve import Resolved, revise

MAKES_EQUAL = "--exact makes them equal"


@dataclass(frozen=True, slots=True)
class Claim:
    """A prompt, how its tokens are drawn, and what speculation says they are."""

    prompt: list[int]
    params: SamplingParams
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token of a prompt that decoding without speculation draws otherwise; None: there the text has ended."""

    prompt: int
    position: int  # in the generated tokens
    token: int | None  # as speculation has it
    expected: int | None  # as the reference draws it
    token_text: str | None
    expected_text: str | None
    margin: float | None  # nats by which the reference preferred its own; None: the other was out of the question

    def __str__(self) -> str:
        ours, theirs = _named(self.token, self.token_text), _named(self.expected, self.expected_text)
        return (
            f"prompt {self.prompt}: after {self.position} equal tokens speculation gave {ours}, decoding without it "
            f"{theirs}; {self._preference()}."
        )

    def _preference(self) -> str:
        if self.token is None or self.expected is None:
            return "one text ends where the other goes on"
        if self.margin is None:
            return "top-k, top-p or min-p rule the other token out"
        return f"preferred by {self.margin:.2g} nats"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one prompt."""

    tokens: int  # that are equal, from the first
    divergence: Divergence | None

    def as_dict(self) -> dict[str, Any]:
        """The ``verified`` object of ``--json``."""
        divergence = asdict(self.divergence) if self.divergence else None
        return {"equal": self.divergence is None, "tokens": self.tokens, "divergence": divergence}


class ReferenceSampler(Sampler):
    """Draws as any sampler does; mutable, because it notes by how much the first draw that differs was decided."""

    def __init__(self, claim: Claim) -> None:
        super().__init__(claim.params)
        self.shares_argmax = False  # it must see its logits
        self.margin: float | None = None  # of the first draw that differs, in nats; None until there is one
        self._claim = claim

    def draw(
        self,
        logits: torch.Tensor,
        positions: Sequence[int],
        limit: int | None = None,
        context: Context | None = None,
    ) -> list[int]:
        """The draws at ``positions``, of which there is one: nothing is proposed here."""
        drawn = super().draw(logits, positions, limit, context)
        [position], [token] = positions, drawn
        index = position - len(self._claim.prompt)
        claimed = self._claim.tokens[index] if 0 <= index < len(self._claim.tokens) else token
        if claimed != token and self.margin is None:
            scores = self.scores(logits[0, :limit], position, context)
            self.margin = float(scores[token] - scores[claimed])
        return drawn


async def verify(resolved: Resolved, plan: Plan, claims: Sequence[Claim], console: Console) -> list[Verdict]:
    """Decode every claim's prompt without speculation, as the engine of ``plan`` would; a verdict for each.

    ``resolved`` and ``plan`` are of the engine that drew the claims; it must have closed. Raises AspecError.
    """
    monitor = Monitor()
    console.note("verifying: the same prompts once more, without speculation")
    reference = revise(
        resolved,
        speculation="off",
        device_memory=plan.budget_bytes,
        max_batch=plan.num_rows,
        max_context=plan.capacity,
        prefill_tokens=plan.prefill_tokens,
        progress=monitor.progress,
    )
    with watch(monitor, console, dashboard=False):  # which would hide the text that has just been printed
        async with Engine(reference, [monitor], [monitor.issued]) as engine:
            monitor.opened(engine.plan, sum(len(claim.tokens) for claim in claims))
            console.note(describe_plan(engine.plan))
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_check(engine, index, claim)) for index, claim in enumerate(claims)]
            return [task.result() for task in tasks]


def conclude(verdicts: Sequence[Verdict], *, exact: bool) -> str:
    """All verdicts in one line. Raises DivergenceError, which tells of the first prompt that differs, if one does."""
    for verdict in verdicts:
        if verdict.divergence is not None:
            remedy = "exact passes must not differ: please report this" if exact else MAKES_EQUAL
            raise DivergenceError(f"not verified: {verdict.divergence} {remedy}.")
    return f"verified: {sum(verdict.tokens for verdict in verdicts)} tokens equal those decoded without speculation"


async def _check(engine: Engine, index: int, claim: Claim) -> Verdict:
    """Decode one prompt, no further than to the first token that differs."""
    referee = ReferenceSampler(claim)
    decoded: list[int] = []
    params = replace(claim.params, logprobs=None)
    async with aclosing(engine.stream(claim.prompt, params, referee)) as stream:
        async for piece in stream:
            decoded.extend(piece.token_ids)
            if tuple(decoded) != claim.tokens[: len(decoded)]:
                break
    position = first_difference(claim.tokens, decoded)
    if position is None:
        return Verdict(len(decoded), None)
    token, expected = (tokens[position] if position < len(tokens) else None for tokens in (claim.tokens, decoded))
    ours, theirs = (_text_of(one, engine.tokenizer) for one in (token, expected))
    margin = referee.margin if referee.margin is not None and isfinite(referee.margin) else None
    return Verdict(position, Divergence(index, position, token, expected, ours, theirs, margin))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two lists of tokens part, or the shorter one ends; None where they are equal."""
    shorter = min(len(one), len(other))
    parted = next((at for at in range(shorter) if one[at] != other[at]), shorter)
    return None if parted == len(one) == len(other) else parted


def _text_of(token: int | None, tokenizer: Tokenizer) -> str | None:
    """What a token says; a special one, which says nothing, goes by its name."""
    return None if token is None else tokenizer.decode([token]) or tokenizer.vocab().get(token, "")


def _named(token: int | None, text: str | None) -> str:
    return "no further token" if token is None else f"token {token} ({text!r})"
