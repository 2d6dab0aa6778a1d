"""What ``aspec generate --verify`` does: decode the same prompts without speculation and compare the tokens.

The reference is a second engine with the plan of the first. It opens after the first has closed, so both use the same
memory budget. Its sampler records the scores of the first draw that differs; their difference is the margin.
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
from aspec.generation.text.tokenizer import Tokenizer
from aspec.observe.console import Console
from aspec.observe.dashboard import watch
from aspec.observe.monitor import Monitor
from aspec.plan import Plan
from aspec.planning.resolve import Resolved, revise

MAKES_EQUAL = "--exact makes them equal"


@dataclass(frozen=True, slots=True)
class Generation:
    """A prompt, its sampling parameters, and the tokens that speculation generated."""

    prompt: list[int]
    params: SamplingParams
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token that differs from decoding without speculation. A token is None where a text has ended."""

    prompt: int  # index
    position: int  # number of generated tokens before it
    token: int | None  # from speculation
    expected: int | None  # from the reference
    token_text: str | None
    expected_text: str | None
    margin: float | None  # nats by which the reference prefers its own token; None: it rules the other token out

    def __str__(self) -> str:
        ours, theirs = _named(self.token, self.token_text), _named(self.expected, self.expected_text)
        return (
            f"prompt {self.prompt}: after {self.position} equal tokens speculation gave {ours}, decoding without it "
            f"gave {theirs}; {self._preference()}."
        )

    def _preference(self) -> str:
        if self.token is None or self.expected is None:
            return "one text ends, the other continues"
        if self.margin is None:
            return "top-k, top-p or min-p rule the other token out"
        return f"preferred by {self.margin:.2g} nats"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the comparison for one prompt."""

    tokens: int  # number of equal tokens before the first difference
    divergence: Divergence | None

    def as_dict(self) -> dict[str, Any]:
        """The ``verified`` object of ``--json``."""
        divergence = asdict(self.divergence) if self.divergence else None
        return {"equal": self.divergence is None, "tokens": self.tokens, "divergence": divergence}


class ReferenceSampler(Sampler):
    """A sampler that records the margin of the first draw that differs; mutable for that."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation.params)
        self.shares_argmax = False  # draw() needs the logits
        self.margin: float | None = None  # of the first draw that differs, in nats; None until there is one
        self._generation = generation

    def draw(
        self,
        logits: torch.Tensor,
        positions: Sequence[int],
        limit: int | None = None,
        context: Context | None = None,
    ) -> list[int]:
        """Draw at ``positions``, a single position, because the reference has no proposals."""
        drawn = super().draw(logits, positions, limit, context)
        [position], [token] = positions, drawn
        index = position - len(self._generation.prompt)
        claimed = self._generation.tokens[index] if 0 <= index < len(self._generation.tokens) else token
        if claimed != token and self.margin is None:
            scores = self.scores(logits[0, :limit], position, context)
            self.margin = float(scores[token] - scores[claimed])
        return drawn


async def verify(resolved: Resolved, plan: Plan, generations: Sequence[Generation], console: Console) -> list[Verdict]:
    """Decode the prompt of each generation without speculation; returns a verdict for each.

    ``resolved`` and ``plan`` belong to the engine that made the generations; it must be closed. Raises AspecError.
    """
    monitor = Monitor(console.stops)
    console.note("verifying: the same prompts once more, without speculation")
    reference = revise(
        resolved,
        speculation="off",
        exact=plan.request.exact,
        workload=None,
        device_memory=plan.budget_bytes,
        process_memory=None,
        max_batch=plan.num_rows,
        max_context=plan.capacity,
        prefill_tokens=plan.prefill_tokens,
        progress=monitor.progress,
    )
    with watch(monitor, console, dashboard=False):  # a dashboard would hide the printed text
        async with Engine(reference, [monitor], [monitor.issued]) as engine:
            monitor.opened(engine.plan, sum(len(generation.tokens) for generation in generations))
            console.note(describe_plan(engine.plan))
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(_check(engine, index, generation)) for index, generation in enumerate(generations)
                ]
            return [task.result() for task in tasks]


def conclude(verdicts: Sequence[Verdict], *, exact: bool) -> str:
    """All verdicts in one line. Raises a DivergenceError for the first prompt that differs."""
    for verdict in verdicts:
        if verdict.divergence is not None:
            remedy = "exact passes must not differ: please report this bug" if exact else MAKES_EQUAL
            raise DivergenceError(f"not verified: {verdict.divergence} {remedy}.")
    return f"verified: {sum(verdict.tokens for verdict in verdicts)} tokens equal those decoded without speculation"


async def _check(engine: Engine, index: int, generation: Generation) -> Verdict:
    """Decode one prompt, up to the first token that differs."""
    sampler = ReferenceSampler(generation)
    decoded: list[int] = []
    params = replace(generation.params, logprobs=None)
    async with aclosing(engine.stream(generation.prompt, params, sampler)) as stream:
        async for piece in stream:
            decoded.extend(piece.token_ids)
            if tuple(decoded) != generation.tokens[: len(decoded)]:
                break
    position = first_difference(generation.tokens, decoded)
    if position is None:
        return Verdict(len(decoded), None)
    token, expected = (tokens[position] if position < len(tokens) else None for tokens in (generation.tokens, decoded))
    ours, theirs = (_text_of(one, engine.tokenizer) for one in (token, expected))
    margin = sampler.margin if sampler.margin is not None and isfinite(sampler.margin) else None
    return Verdict(position, Divergence(index, position, token, expected, ours, theirs, margin))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first index where two lists of tokens differ or one ends; None if they are equal."""
    shorter = min(len(one), len(other))
    index = next((at for at in range(shorter) if one[at] != other[at]), shorter)
    return None if index == len(one) == len(other) else index


def _text_of(token: int | None, tokenizer: Tokenizer) -> str | None:
    """The text of a token; for a special token without text, its name."""
    return None if token is None else tokenizer.decode([token]) or tokenizer.vocab().get(token, "")


def _named(token: int | None, text: str | None) -> str:
    return "no further token" if token is None else f"token {token} ({text!r})"
