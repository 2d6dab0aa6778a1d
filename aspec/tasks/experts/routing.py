"""How many experts a pass will touch, learned from the routes of earlier passes; the policy prices proposals with it.

Of a layer whose tokens choose expert e with frequency p_e, a pass of n tokens touches sum_e 1 - (1 - p_e)^m experts if
m tokens choose on their own. Tokens of one text do not: neighbours share experts. So m = n^b, where b is fitted to the
unions that were seen (about 0.8 for proposals; uniform, independent draws would say 1.2 to 1.6 times as many).
Pure policy: counts only.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, log1p

MEMORY = 256.0  # tokens: how far back frequencies look; text changes its experts, and prompts share few
PRIOR = 8.0  # tokens: the weight of equal frequencies, which count before any route was seen
TEXT_EXPONENT = 0.8  # b of the published routes to which simulated ones are fitted: ``planning/experts/routes.py``
FIRST_EXPONENT = 0.85  # b before any union was seen
EXPONENT_MEMORY = 0.99  # factor on earlier unions, at each: about the last hundred layers count
EXPONENT_PRIOR = 4.0  # the weight of FIRST_EXPONENT, in unions
LEAST_EXPONENT = 0.3
MOST_CHANCE = 1.0 - 1e-9  # of an expert, so that its logarithm exists


class LayerRoutes:
    """The frequencies of one layer's experts."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self._even = top_k / num_experts
        self._counts = [0.0] * num_experts  # decayed tokens that chose an expert
        self._tokens = 0.0  # decayed tokens

    def add(self, tokens: int, routed: Mapping[int, int]) -> None:
        """Learn from a pass of so many tokens: by expert, the tokens that chose it."""
        kept = exp(-tokens / MEMORY)
        scale = MEMORY * (1.0 - kept) / tokens  # a prompt longer than the memory does not outweigh it
        self._tokens = self._tokens * kept + scale * tokens
        self._counts = [count * kept for count in self._counts]
        for expert, chosen in routed.items():
            self._counts[expert] += scale * chosen

    def chances(self) -> list[float]:
        """The share of tokens that choose an expert, by expert; their sum is about the experts of a token."""
        total = self._tokens + PRIOR
        return [min(MOST_CHANCE, (count + PRIOR * self._even) / total) for count in self._counts]


class RoutingStats:
    """The routes of all layers: expected unions, and expected experts that are not at hand."""

    def __init__(self, num_experts: Mapping[int, int], top_k: int) -> None:
        self._layers = {layer: LayerRoutes(number, top_k) for layer, number in num_experts.items()}
        self._logs: dict[int, list[float]] = {}  # by layer: log(1 - p_e), until its frequencies change
        self._information = EXPONENT_PRIOR  # decayed sum of squares of the relative slope of unions by b
        self.exponent = FIRST_EXPONENT

    def observe(self, layer: int, tokens: int, routed: Mapping[int, int], *, decodes: bool = True) -> None:
        """Learn from the routes of one layer in one pass: by expert, the tokens that chose it.

        The exponent is that of passes that decode: a long prompt touches nearly all experts and tells nothing.
        """
        if decodes and tokens > 1 and routed:
            self._fit(layer, tokens, len(routed))
        self._layers[layer].add(tokens, routed)
        self._logs.pop(layer, None)

    def _fit(self, layer: int, tokens: int, union: int) -> None:
        """Move b towards the value that gives the union: recursive least squares on its relative error."""
        logs, draws = self._logs_of(layer), tokens**self.exponent
        misses = [exp(draws * one) for one in logs]
        expected = len(logs) - sum(misses)
        by_draws = -sum(miss * one for miss, one in zip(misses, logs, strict=True))
        slope = by_draws * draws * log(tokens) / expected
        self._information = EXPONENT_MEMORY * self._information + slope**2
        step = slope * (union / expected - 1.0) / self._information
        self.exponent = min(1.0, max(LEAST_EXPONENT, self.exponent + step))

    def expected_union(self, layer: int, tokens: int) -> float:
        """Experts of a layer that a pass of so many tokens touches."""
        return sum(touch_chances(self._logs_of(layer), tokens**self.exponent))

    def expected_missing(self, layer: int, tokens: int, held: Collection[int] = ()) -> float:
        """Experts that it touches and that are not among ``held``."""
        chances = touch_chances(self._logs_of(layer), tokens**self.exponent)
        return sum(chances) - sum(chances[expert] for expert in held)

    def _logs_of(self, layer: int) -> list[float]:
        if layer not in self._logs:
            self._logs[layer] = touch_logs(self._layers[layer].chances())
        return self._logs[layer]


def touch_logs(chances: Iterable[float]) -> list[float]:
    """log(1 - p), by expert: the chances that it is not touched are multiples of it in the exponent."""
    return [log1p(-min(MOST_CHANCE, chance)) for chance in chances]


def touch_chances(logs: Iterable[float], draws: float) -> list[float]:
    """1 - (1 - p)^draws, by expert, from log(1 - p)."""
    return [1.0 - exp(draws * one) for one in logs]


def zipf_chances(num_experts: int, top_k: int, exponent: float) -> list[float]:
    """Frequencies that fall as rank^-exponent and sum to ``top_k``, none above 1; descending."""
    weights = [rank**-exponent for rank in range(1, num_experts + 1)]
    certain = 0  # experts that every token chooses
    while certain < top_k and weights[certain] * (top_k - certain) > sum(weights[certain:]):
        certain += 1
    rest = sum(weights[certain:])
    return [MOST_CHANCE] * certain + [weight * (top_k - certain) / rest for weight in weights[certain:]]


@dataclass(frozen=True, slots=True)
class CachedPasses:
    """What passes of equal size find in a layer's cache, once it is warm.

    The cache holds the experts of the last passes, as many as fill its slots. P passes of m draws touch as many experts
    as m P^b draws, so the next one misses what P + 1 passes touch beyond P. It is the law of the least recently used
    (Che, Tung and Wang, "Hierarchical web caching systems", 2002) for draws that repeat.
    """

    touched: float  # experts that a pass touches
    missing: float  # those of them that are not in the cache

    @classmethod
    def of(cls, chances: Sequence[float], slots: float, draws: float, exponent: float) -> "CachedPasses":
        """A layer with these frequencies; a pass is like so many ``draws``, and passes repeat by ``exponent``, b."""
        logs = touch_logs(chances)
        touched = sum(touch_chances(logs, draws))
        if slots >= len(chances):
            return cls(touched, 0.0)
        low, high = 0.0, 1.0
        while sum(touch_chances(logs, high)) < slots:
            low, high = high, 2.0 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(touch_chances(logs, middle)) < slots else (low, middle)
        passes = (high / draws) ** (1.0 / exponent)
        beyond = sum(touch_chances(logs, draws * (passes + 1.0) ** exponent)) - slots
        return cls(touched, min(touched, max(0.0, beyond)))
