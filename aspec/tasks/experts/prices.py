"""What the experts of a pass cost: the seconds of reading those that are not at hand, by the tokens of the pass.

A node of a draft brings its experts into the pass; they are read while compute waits. So its price is its share of the
expected missing experts, at the rate at which experts were read. Pure policy: counts, bytes and seconds only.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from aspec.expert_plan import ExpertPlan
from aspec.tasks.experts.routing import RoutingStats
from aspec.tasks.op import Op
from aspec.tasks.task import ExpertLoad, Span

SIZES = tuple(1 << power for power in range(10))  # tokens of a pass with a price; linear between them
MOST_LAYERS = 12  # whose experts are counted for a price; the others are like them
READ_MEMORY = 0.98  # factor on earlier reads, at each: about the last fifty count
MISS_MEMORY = 0.99  # factor on earlier layers' misses, at each
MISS_PRIOR = 20.0  # experts: the weight of the expected misses as they are
WAIT_MEMORY = 0.9  # factor on earlier passes' waits, at each
WAIT_PRIOR = 0.05  # seconds: the weight of the share of reading that is usually waited for


@dataclass(slots=True)
class _Misses:
    """Decayed sums of experts that had to be read, and that were expected to; mutable, because every layer adds."""

    missing: float = 0.0
    expected: float = 0.0

    def add(self, missing: float, expected: float) -> None:
        """Add one layer of a pass."""
        self.missing = MISS_MEMORY * self.missing + missing
        self.expected = MISS_MEMORY * self.expected + expected

    def ratio(self, usual: float) -> float:
        """The ratio of both, which is ``usual`` before anything was seen."""
        return (self.missing + MISS_PRIOR * usual) / (self.expected + MISS_PRIOR)


@dataclass(slots=True)
class _Waits:
    """Decayed sums of the seconds that passes waited for experts, and that these were read; mutable."""

    waited_s: float = 0.0
    read_s: float = 0.0

    def add(self, waited_s: float, read_s: float) -> None:
        """Add one pass."""
        self.waited_s = WAIT_MEMORY * self.waited_s + waited_s
        self.read_s = WAIT_MEMORY * self.read_s + read_s

    def share(self, usual: float) -> float:
        """The share of reading that is waited for, which is ``usual`` before any was seen."""
        return (self.waited_s + WAIT_PRIOR * usual) / (self.read_s + WAIT_PRIOR)


class ExpertCaches(Protocol):
    """The experts that are in slots."""

    def held(self, layer: int) -> Collection[int]:
        """The experts of a layer that need not be read."""


class ExpertPrices:
    """Learns routes, misses and reads; prices passes by them."""

    def __init__(self, experts: ExpertPlan, caches: ExpertCaches) -> None:
        shape = experts.shape
        layers = {layer: shape.num_experts[layer] for layer in shape.layers}
        self.routing = RoutingStats(layers, shape.top_k)
        self._shape, self._caches = shape, caches
        step = -(-len(layers) // MOST_LAYERS)
        self._sample = shape.layers[step // 2 :: step]
        self._read_bytes, self._read_s = 0.0, 0.0  # decayed sums of reads, and of the seconds that they took together
        self._free_s = 0.0  # when the latest read ended
        self._misses = [_Misses() for _ in SIZES]  # of the passes that are about as large
        self._all_misses = _Misses(MISS_PRIOR, MISS_PRIOR)
        self._waits = [_Waits() for _ in SIZES]  # of the passes that are about as large
        self._all_waits = _Waits()
        self._pass_read_s = 0.0  # since the latest pass ended
        self._bytes: list[float] | None = None  # expected bytes to read, by size; None: compute them again

    def observe(self, span: Span) -> None:
        """Learn from a finished ROUTE, or from an expert that arrived; other tasks tell nothing."""
        task = span.task
        if isinstance(task.payload, ExpertLoad):
            if task.payload.guessed:
                return  # nobody waits for it
            busy_s = span.stop_s - max(span.start_s, self._free_s)  # reads in flight overlap
            self._free_s = max(self._free_s, span.stop_s)
            arrived = task.nbytes * (task.payload.slot is not None)  # by way of host memory, or from there
            self._read_bytes = READ_MEMORY * self._read_bytes + arrived
            self._read_s = READ_MEMORY * self._read_s + max(0.0, busy_s)
            self._pass_read_s += max(0.0, busy_s)
        elif task.op is Op.ROUTE and task.item is not None and task.layer is not None:
            self._learn_route(task.layer, task.num_tokens, dict(span.routed), decodes=not task.item.prefill)

    def _learn_route(self, layer: int, tokens: int, routed: Mapping[int, int], *, decodes: bool) -> None:
        """Learn from the routes of one item. What was used lately is used again, so fewer experts are missing than
        their frequencies say, and most so in small passes: the ratio is learned by size."""
        if decodes:
            held = self._caches.held(layer)
            expected = self.routing.expected_missing(layer, tokens, held)
            missing = sum(expert not in held for expert in routed)
            for misses in (self._all_misses, self._misses[min(tokens.bit_length(), len(SIZES)) - 1]):
                misses.add(missing, expected)
        self.routing.observe(layer, tokens, routed, decodes=decodes)

    def begin_round(self, tokens: int = 0, idle_s: float = 0.0) -> None:
        """The next prices are those of the caches and routes of now.

        ``idle_s``: how long the last pass, of so many decoded ``tokens`` (0: it had others), neither computed nor
        drafted. It waited for experts then; while those at hand were computed, reading cost nothing.
        """
        if tokens and self._pass_read_s:
            waited_s = min(max(0.0, idle_s), self._pass_read_s)
            for waits in (self._all_waits, self._waits[min(tokens.bit_length(), len(SIZES)) - 1]):
                waits.add(waited_s, self._pass_read_s)
        self._pass_read_s, self._bytes = 0.0, None

    def seconds(self, tokens: int) -> float:
        """Seconds that a pass waits for its reads; 0 before anything was read."""
        if not self._read_bytes:
            return 0.0
        waits = self._waits[min(tokens.bit_length(), len(SIZES)) - 1].share(self._all_waits.share(1.0))
        return self.missing_bytes(tokens) * self._read_s / self._read_bytes * waits

    def missing_bytes(self, tokens: int) -> float:
        """Bytes of the experts that a pass of so many tokens is expected to read."""
        if self._bytes is None:
            self._bytes = list(accumulate(map(self._expected_bytes, range(len(SIZES))), max))
        place = min(max(1, bisect_left(SIZES, tokens)), len(SIZES) - 1)
        low, high = SIZES[place - 1], SIZES[place]
        share = min(1.0, (tokens - low) / (high - low))
        return self._bytes[place - 1] + share * (self._bytes[place] - self._bytes[place - 1])

    def _expected_bytes(self, place: int) -> float:
        """The same for one of the SIZES, from a sample of layers."""
        nbytes, tokens, sampled = self._shape.nbytes, SIZES[place], 0
        missing, usual = 0.0, self._all_misses
        for layer in self._sample:
            sampled += nbytes[layer]
            missing += nbytes[layer] * self.routing.expected_missing(layer, tokens, self._caches.held(layer))
        every = sum(nbytes[layer] for layer in self._shape.layers)
        return missing * every / sampled * self._misses[place].ratio(usual.missing / usual.expected)
