"""How likely a proposal is accepted, learnt online from the draft's own scores, and how large a tree pays.

Pure policy: it is handed log scores, verdicts, rates and seconds. Source of the rules of size: a node is worth its
path probability in tokens and costs seconds in which the engine makes tokens at its running rate; for a rate that
settles this maximises tokens per second (Dinkelbach, 1967; trees of the kind of Sequoia, arXiv 2402.12374, and
OPT-Tree, arXiv 2406.17276). Source of the calibration: isotonic regression by pool adjacent violators (Zadrozny and
Elkan, 2002), here over decayed counts.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import exp, inf, log, log1p

NUM_BUCKETS = 16
LOWEST, STEP = -4.625, 0.75  # log odds of the first bucket and from one to the next: probabilities 0.01 .. 0.9987
PRIOR = 0.5  # observations that a bucket's own probability counts for; never decays, so no estimate reaches 0 or 1
KEEP = 0.98  # what remains of a bucket's counts after one more observation there: the last 50 count
TILT = 1 / 64  # share of the draft's own probability in every estimate: pooled buckets keep the draft's order

Cost = Callable[[int], float] | Sequence[tuple[int, float]]
"""Seconds that node n (from 1) adds to a pass; or measured (tokens, seconds) of whole passes, the root's included."""


class Calibration:
    """Maps the log score of a child, given its parent was accepted, to the chance that the child is accepted.

    Counts stand at 16 points evenly spaced in log odds. An observation counts at the two points around it, an
    estimate lies on the line between them, so without observations the draft is believed. A path's probability is
    the product over its nodes. One object serves one kind of scores: keep greedy, sampled and n-gram rows apart.
    """

    def __init__(self) -> None:
        self._accepted = [0.0] * NUM_BUCKETS  # decayed counts, at most those of _seen
        self._seen = [0.0] * NUM_BUCKETS  # decayed counts, below 1 / (1 - KEEP)
        self._log_odds: list[float] | None = None  # ascending estimates at the points; None: to be pooled again

    def observe(self, log_score: float, accepted: bool) -> None:
        """Learn one verdict on a child whose parent was accepted; a log score of -inf teaches nothing."""
        if log_score == -inf:
            return
        low, share = _place(log_score)
        for bucket, weight in ((low, 1.0 - share), (low + 1, share)):
            if weight > 0.0:
                self._seen[bucket] = self._seen[bucket] * KEEP + weight
                self._accepted[bucket] = self._accepted[bucket] * KEEP + weight * accepted
        self._log_odds = None

    def probability(self, log_score: float) -> float:
        """The chance of acceptance in (0, 1], ascending with the log score; 0 for a banned token's -inf."""
        if log_score == -inf:
            return 0.0
        if self._log_odds is None:
            self._log_odds = self._pool()
        low, share = _place(log_score)
        odds = self._log_odds[low] + share * (self._log_odds[low + 1] - self._log_odds[low])
        odds += min(0.0, _to_log_odds(log_score) - LOWEST)  # below all points the draft's own slope goes on
        return (1.0 - TILT) * _to_probability(odds) + TILT * exp(min(0.0, log_score))

    def log_probability(self, log_score: float) -> float:
        """The logarithm of ``probability``: what ``Tree`` adds up along a path."""
        chance = self.probability(log_score)
        return log(chance) if chance > 0.0 else log_score  # the smallest scores underflow, the draft's word stands

    def _pool(self) -> list[float]:
        """Log odds at the points, ascending: neighbours out of order share their counts (pool adjacent violators)."""
        blocks: list[tuple[float, float, int]] = []  # accepted, seen, points
        for bucket, (accepted, seen) in enumerate(zip(self._accepted, self._seen, strict=True)):
            prior = _to_probability(LOWEST + STEP * bucket)
            block = (accepted + PRIOR * prior, seen + PRIOR, 1)
            while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
                before = blocks.pop()
                block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
            blocks.append(block)
        return [log(accepted / (seen - accepted)) for accepted, seen, points in blocks for _ in range(points)]


def worthwhile(probabilities: Sequence[float], rate: float, marginal_s: Cost) -> int:
    """How many of the nodes, given by descending path probability, to verify at ``rate`` tokens per second.

    A node pays while its probability exceeds ``rate`` times its marginal seconds. Where costs jump (a kernel's tile
    is full) nodes beyond the jump may pay for it together, so the number with the largest sum of gains is chosen;
    for costs that never fall from node to node that is the same rule.
    """
    cost = marginal_s if callable(marginal_s) else marginal_seconds(marginal_s)
    gains = accumulate(p - rate * cost(number) for number, p in enumerate(probabilities, 1))
    best, most = 0, 0.0
    for number, gain in enumerate(gains, 1):
        if gain > most:
            best, most = number, gain
    return best


def marginal_seconds(points: Sequence[tuple[int, float]], other_tokens: int = 1) -> Callable[[int], float]:
    """What node n adds to a pass that has ``other_tokens`` without it, from measured (tokens, seconds) of passes.

    Lines between the points, the last line prolonged beyond them; a pass measured faster than a smaller one is taken
    as equally slow. A single point knows no slope: further nodes then cost nothing until a larger pass is measured.
    """
    ordered = sorted(dict(points).items())
    tokens = [count for count, _ in ordered]
    seconds = list(accumulate((s for _, s in ordered), max))
    slopes = [(s2 - s1) / (t2 - t1) for (t1, s1), (t2, s2) in pairwise(zip(tokens, seconds, strict=True))]

    def marginal(node: int) -> float:
        if not slopes:
            return 0.0
        before = other_tokens + node - 1  # the line from the tokens before this node to those with it
        if before < tokens[0]:
            return 0.0
        return slopes[min(bisect_right(tokens, before), len(slopes)) - 1]

    return marginal


def another_level(gain_tokens: float, rate: float, level_s: float) -> bool:
    """Whether a draft level of ``level_s`` seconds that gains ``gain_tokens`` beats going on at ``rate`` tokens/s."""
    return gain_tokens > rate * level_s


def _place(log_score: float) -> tuple[int, float]:
    """The point below a log score, and how far towards the next one it lies, in 0 .. 1; the ends are cut."""
    at = (_to_log_odds(log_score) - LOWEST) / STEP
    at = min(max(at, 0.0), NUM_BUCKETS - 1.0)
    low = min(int(at), NUM_BUCKETS - 2)
    return low, at - low


def _to_log_odds(log_score: float) -> float:
    """log(p / (1 - p)) from log p; +inf at p = 1."""
    chance = exp(log_score)
    return log_score - log1p(-chance) if chance < 1.0 else inf


def _to_probability(log_odds: float) -> float:
    return 1.0 / (1.0 + exp(-log_odds)) if log_odds > -700.0 else 0.0
