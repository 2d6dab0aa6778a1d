"""Measures what exactness and threads cost in a model's own layers, as ratios of interleaved passes. Blocking.

The layers have random weights, so nothing is read. All ways to compute a pass take turns, so that a busy moment of the
machine falls on all of them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from aspec.models.kv_cache import KVCache
from aspec.models.model import Activation, Model
from aspec.models.weights.parts import Part

CONTEXT, TREE, PROMPT = 256, 32, 256  # tokens before a pass, nodes of a tree, tokens of a prompt
ROUNDS = 7
LEAST_BYTES = 64 << 20  # of layers that take turns, if the model has them: more than most caches hold
SPREAD = 0.02  # of the random weights

PASSES: dict[str, tuple[int, list[int] | None]] = {
    "row": (1, None),
    "tree": (TREE, [-1, *(node // 2 for node in range(TREE - 1))]),
    "prompt": (PROMPT, None),
}
"""By kind of pass: (tokens, the parents of a tree's nodes)."""


@dataclass(frozen=True, slots=True)
class LayerRatios:
    """Seconds of one way to compute a pass over those of another, by kind of pass: row, tree, prompt."""

    exact: dict[str, float]  # exact over not exact, with ``threads``
    cores: dict[str, float]  # a thread per core over one thread, in the mode that was asked for; empty on one core
    threads: int  # of the comparison of exactness
    num_cores: int


def measure_layer_ratios(
    folder: Path, dtype: torch.dtype | None, *, exact: bool, threads: int, cores: int
) -> LayerRatios:
    """The ratios for the model in ``folder``: in a few seconds, and in the memory of a few of its layers."""
    before = torch.get_num_threads()
    ways = list(dict.fromkeys([(False, threads), (True, threads), (exact, 1), (exact, cores)]))
    seconds: dict[tuple[str, bool, int], list[float]] = {}
    try:
        layers = _TrialLayers(folder, dtype)
        for number in sorted({number for _, number in ways}):
            torch.set_num_threads(number)
            layers.prove()
        for round_, (kind, (is_exact, number)) in product(range(1 + ROUNDS), product(PASSES, ways)):
            torch.set_num_threads(number)
            took = layers.seconds(*PASSES[kind], exact=is_exact)
            if round_:  # the first round only warms up
                seconds.setdefault((kind, is_exact, number), []).append(took)
    finally:
        torch.set_num_threads(before)

    def ratios(one: tuple[bool, int], other: tuple[bool, int]) -> dict[str, float]:
        pairs = {kind: zip(seconds[kind, *one], seconds[kind, *other], strict=True) for kind in PASSES}
        return {kind: median(a / b for a, b in own) for kind, own in pairs.items()}

    by_cores = ratios((exact, cores), (exact, 1)) if cores > 1 else {}
    return LayerRatios(ratios((True, threads), (False, threads)), by_cores, threads, cores)


class _TrialLayers:
    """The first layers of a model, bound to random weights, and caches for one row."""

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self._model = Model(folder, dtype=dtype)
        parts = self._model.parts(1 << 40)  # the frame's, then one of each layer
        self._used = _enough(parts[1:])
        for part in (parts[0], *self._used):
            buffer = torch.zeros(part.size, dtype=torch.uint8)  # the system gives memory only where it is written
            scratch = torch.zeros(part.scratch_bytes, dtype=torch.uint8)
            self._model.bind(replace(part, scratch_at=0), buffer, scratch)
        for part in self._used:
            for parameter in self._model.layer_modules[part.layer].parameters():
                if parameter.is_contiguous():  # the weights of packed products are in the scratch
                    parameter.data.normal_(0.0, SPREAD)
        shapes, capacity = self._model.kv_shapes(), CONTEXT + max(PROMPT, TREE)
        kept: dict[str, Any] = {"states": self._model.state_shapes, "log_slots": TREE}
        self._has_states = any(self._model.state_shapes)
        self._caches = {
            exact: KVCache(shapes, 1, capacity, self._model.dtype, exact=exact, **kept) for exact in (False, True)
        }

    def prove(self) -> None:
        """Find the kernels that passes with the present number of threads use, as an engine does."""
        self._model.prove_products()

    @torch.inference_mode()
    def seconds(self, tokens: int, parents: Sequence[int] | None, *, exact: bool) -> float:
        """Seconds of one pass through the layers."""
        start = 0 if tokens == PROMPT or self._has_states else CONTEXT  # a state is known of tokens that were read
        finals = [start + tokens if parents is None else start + 1]
        links = None if parents is None else [parents]
        step = self._caches[exact].step([0], [start], [tokens], links, finals=finals)
        activation: Activation = self._model.embed(torch.zeros(1, tokens, dtype=torch.long), step)
        activation.hidden = torch.randn_like(activation.hidden)  # products of zeros are faster
        begun = time.perf_counter()
        for part in self._used:
            self._model.layer(part.layer, activation)
        return time.perf_counter() - begun


def _enough(parts: Sequence[Part]) -> list[Part]:
    """The first layers, until they have LEAST_BYTES."""
    used: list[Part] = []
    for part in parts:
        if sum(one.size for one in used) >= LEAST_BYTES:
            break
        used.append(part)
    return used
