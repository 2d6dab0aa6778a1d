"""The probability that the target accepts a proposal, learnt online from the draft's own scores.

Pure policy: log scores and verdicts in, probabilities out. Source: isotonic regression by pool adjacent violators
(Zadrozny and Elkan, 2002), here over decayed counts.
"""

from collections.abc import Mapping
from math import exp, inf, log, log1p

NUM_BUCKETS = 16
LOWEST_BUCKET = -4.625  # log odds of the first bucket: probability 0.01; that of the last one is 0.9987
BUCKET_STEP = 0.75  # log odds between neighbours
PRIOR = 0.5  # weight of a bucket's own probability, in observations; no decay, so no estimate reaches 0 or 1
DECAY = 0.98  # factor on a bucket's counts at each observation there: about the last 50 count
LEAST_REST = 1e-6  # probability of all but the best, where the best is certain
DRAFT_SHARE = 1 / 64  # share of the draft's own probability in every estimate: it keeps its order in pooled buckets


class Calibration:
    """Maps the log score of a child, given its parent was accepted, to the chance that the child is accepted.

    It keeps counts at 16 points, evenly spaced in log odds. An observation counts at the two points around it. An
    estimate is interpolated between them, so without observations it is the draft's own probability. A path's
    probability is the product over its nodes. Use one object for each kind of scores: greedy, sampled, n-gram.
    """

    def __init__(self) -> None:
        self._accepted = [0.0] * NUM_BUCKETS  # decayed counts, at most those of _seen
        self._seen = [0.0] * NUM_BUCKETS  # decayed counts, below 1 / (1 - DECAY)
        self._log_odds: list[float] | None = None  # estimates at the points, ascending; None: pool them again

    def observe(self, log_score: float, accepted: bool) -> None:
        """Learn one verdict on a child whose parent was accepted; a log score of -inf teaches nothing."""
        if log_score == -inf:
            return
        low, share = _interpolate(log_score)
        for bucket, weight in ((low, 1.0 - share), (low + 1, share)):
            if weight > 0.0:
                self._seen[bucket] = self._seen[bucket] * DECAY + weight
                self._accepted[bucket] = self._accepted[bucket] * DECAY + weight * accepted
        self._log_odds = None

    def probability(self, log_score: float) -> float:
        """The chance of acceptance in (0, 1], ascending with the log score; 0 for a banned token's -inf."""
        if log_score == -inf:
            return 0.0
        points = self._log_odds  # a verdict may come from another lane in between
        if points is None:
            points = self._log_odds = self._pool()
        low, share = _interpolate(log_score)
        odds = points[low] + share * (points[low + 1] - points[low])
        odds += min(0.0, _to_log_odds(log_score) - LOWEST_BUCKET)  # below all points follow the draft's log odds
        return (1.0 - DRAFT_SHARE) * _to_probability(odds) + DRAFT_SHARE * exp(min(0.0, log_score))

    def log_probability(self, log_score: float) -> float:
        """The logarithm of ``probability``; ``Tree`` adds it up along a path."""
        chance = self.probability(log_score)
        return log(chance) if chance > 0.0 else log_score  # the smallest scores underflow: return them as they are

    def _pool(self) -> list[float]:
        """Log odds at the points, ascending: neighbours out of order share their counts (pool adjacent violators)."""
        blocks: list[tuple[float, float, int]] = []  # accepted, seen, points
        for bucket, (accepted, seen) in enumerate(zip(self._accepted, self._seen, strict=True)):
            prior = _to_probability(LOWEST_BUCKET + BUCKET_STEP * bucket)
            block = (accepted + PRIOR * prior, seen + PRIOR, 1)
            while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
                before = blocks.pop()
                block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
            blocks.append(block)
        return [log(accepted / (seen - accepted)) for accepted, seen, points in blocks for _ in range(points)]


def one_of(claims: Mapping[int, float]) -> dict[int, float]:
    """Log probabilities of events of which one comes true at most, by key, from those that were claimed of each alone.

    Claims of several sources that add up to more than 1 contradict one another. The best is believed (the smallest key
    among equals), the others share what it leaves, in their proportions: on recorded drafts and verdicts that foretold
    acceptance better than to shrink all alike, to cut the last ones, or to believe one source always.
    """
    total = sum(map(exp, claims.values()))
    if total <= 1.0 or len(claims) < 2:
        return dict(claims)
    first = min(claims, key=lambda key: (-claims[key], key))
    rest = 1.0 - exp(claims[first])
    shrink = log(max(rest, LEAST_REST) / (total - 1.0 + rest))
    return {key: claim if key == first else claim + min(0.0, shrink) for key, claim in claims.items()}


def _interpolate(log_score: float) -> tuple[int, float]:
    """The point below a log score, and the share of the way to the next point, 0 .. 1; clamped at both ends."""
    at = (_to_log_odds(log_score) - LOWEST_BUCKET) / BUCKET_STEP
    at = min(max(at, 0.0), NUM_BUCKETS - 1.0)
    low = min(int(at), NUM_BUCKETS - 2)
    return low, at - low


def _to_log_odds(log_score: float) -> float:
    """log(p / (1 - p)) from log p; +inf at p = 1."""
    chance = exp(log_score)
    return log_score - log1p(-chance) if chance < 1.0 else inf


def _to_probability(log_odds: float) -> float:
    return 1.0 / (1.0 + exp(-log_odds)) if log_odds > -700.0 else 0.0
