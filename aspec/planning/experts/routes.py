"""The routes of a simulated text: skewed, and repeating what was chosen lately, as those of trained models are.

A token's choice repeats that of an earlier token, most often a recent one; otherwise it is drawn by Zipf's law. The
numbers are fitted to the published routes of Qwen3-30B-A3B (128 experts, 8 of a token): neighbours share 0.3 of their
experts, 25 tokens touch 43 to 50, and a segmented LRU over 16, 32, 48 % of the experts hits 0.72, 0.85, 0.91 here (0.84
and 0.94 with 32 and 48 % were published). Every draw is an integer hash: the same in every plan.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, count

from aspec.expert_plan import ExpertShape
from aspec.tasks.experts.routing import TEXT_EXPONENT, touch_chances, touch_logs, zipf_chances
from aspec.tasks.task import WorkItem

SKEW = 1.0  # exponent of Zipf's law
REPEAT = 0.7  # chance that a choice repeats an earlier one
LAG = 0.8  # the chance that it is more than n tokens back is n^-LAG
MOST_TOKENS = 32  # of a prompt, drawn one by one; the experts of a longer one are drawn by their chances
STREAMS = 1 << 12  # draws of one token in one layer, at most


class SimRoutes:
    """Draws the experts of work items."""

    def __init__(self, shape: ExpertShape, chance: Callable[[int, int, int], float]) -> None:
        """``chance`` is a number in [0, 1) by (sequence, position, stream)."""
        self._shape, self._chance = shape, chance
        self._order = cache(self._order_of)
        self._chances = cache(lambda number: zipf_chances(number, min(shape.top_k, number), SKEW))
        self._bounds = cache(lambda number: list(accumulate(self._chances(number))))

    def of_item(self, item: WorkItem, layer: int, sequences: Sequence[int]) -> Counter[int]:
        """By expert, the tokens of an item that choose it; ``sequences``: those of its rows."""
        routed: Counter[int] = Counter()
        for sequence, start, tokens in zip(sequences, item.starts, item.counts, strict=True):
            if item.prefill and tokens > MOST_TOKENS:
                routed += self._of_many(sequence, start, tokens, layer)
            else:
                for position in range(start, start + tokens):
                    routed.update(self._of_token(sequence, position, layer))
        return routed

    def _of_token(self, sequence: int, position: int, layer: int) -> set[int]:
        """The experts of one token."""
        order = self._order(layer)
        chosen: set[int] = set()
        for place in range(min(self._shape.top_k, len(order))):
            draws = count((layer * self._shape.top_k + place + 1) * STREAMS)
            source = position
            while self._chance(sequence, source, next(draws)) < REPEAT:
                back = int((1.0 - self._chance(sequence, source, next(draws))) ** (-1.0 / LAG))
                if back > source:
                    break
                source -= back
                draws = count((layer * self._shape.top_k + place + 1) * STREAMS)
            expert = self._drawn(self._chance(sequence, source, next(draws)), order)
            while expert in chosen:
                expert = self._drawn(self._chance(sequence, position, next(draws)), order)
            chosen.add(expert)
        return chosen

    def _drawn(self, chance: float, order: Sequence[int]) -> int:
        bounds = self._bounds(len(order))
        return order[min(bisect_left(bounds, chance * bounds[-1]), len(order) - 1)]

    def _of_many(self, sequence: int, start: int, tokens: int, layer: int) -> Counter[int]:
        """The experts of a long run of tokens, each touched by its chance."""
        order = self._order(layer)
        chances = self._chances(len(order))
        touched = touch_chances(touch_logs(chances), tokens**TEXT_EXPONENT)
        return Counter(
            {
                expert: max(1, round(tokens * chance))
                for rank, (expert, chance) in enumerate(zip(order, chances, strict=True))
                if self._chance(sequence, start, (layer + 1) * STREAMS + rank) < touched[rank]
            }
        )

    def _order_of(self, layer: int) -> list[int]:
        """A layer's experts, the most wanted first."""
        return sorted(range(self._shape.num_experts[layer]), key=lambda expert: self._chance(-1, layer, expert))
