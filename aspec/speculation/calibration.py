"""How likely a proposal is accepted, learnt online from the draft's own scores.

Pure policy: it is handed log scores and verdicts. Source: isotonic regression by pool adjacent violators (Zadrozny and
Elkan, 2002), here over decayed counts.
"""

from math import exp, inf, log, log1p

NUM_BUCKETS = 16
LOWEST, STEP = -4.625, 0.75  # log odds of the first bucket and from one to the next: probabilities 0.01 .. 0.9987
PRIOR = 0.5  # observations that a bucket's own probability counts for; never decays, so no estimate reaches 0 or 1
KEEP = 0.98  # what remains of a bucket's counts after one more observation there: the last 50 count
TILT = 1 / 64  # share of the draft's own probability in every estimate: pooled buckets keep the draft's order


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
