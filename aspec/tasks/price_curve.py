"""The seconds of one kind of work by its number of tokens, learned from few and noisy samples.

A machine beside other processes is slower for seconds at a time, a size that was never run has no price, and the first
run of a size creates kernels. So the curve keeps an estimate with its uncertainty: a Kalman filter over the logarithm
of the seconds at fixed sizes. From one size to the next the logarithm moves like a random walk, so a sample tells much
of sizes near it and little of others; all sizes move together with the speed of the machine, so a slow minute does not
make the sizes dear that happen to run in it.
``seconds`` is optimistic (optimism in the face of uncertainty, Lai and Robbins, 1985): a size that was never run costs
less than its estimate, so it is run and measured as soon as it could pay, and not again if it does not.
Pure policy: counts and seconds only.
"""

from bisect import bisect_right
from itertools import accumulate, pairwise
from math import exp, log, log2, sqrt
from operator import mul

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Tokens at which the curve has a value of its own. Between them it is linear in the logarithms; beyond the last one
seconds are proportional to tokens."""

BALANCES = (2, 16, 128, 1024)
"""Numbers of tokens that compute as long as the weights' way from memory takes: a roofline of each is considered, and
counts the more the better it foretells the samples. So a curve that was flat so far is expected to stay flat."""

TRUST = 0.95  # factor on the evidence for a roofline, per sample: about the last twenty count
SPREAD = 0.25  # standard deviation of the factor by which seconds grow when tokens double, as a logarithm
REACH = 1.5  # doublings over which that factor stays alike
NOISE = 0.1  # standard deviation of a sample's logarithm
NEW_NOISE = 0.3  # likewise of the first sample of a number of tokens: its kernels may have to be created
DRIFT = 0.15  # standard deviation of the machine's speed from one sample to the next, as a logarithm
FORGETTING = 0.005  # of the certainty of every size, per sample
MOST_SURPRISE = 4.0  # standard deviations; a sample farther off counts as one so far off
UNKNOWN_SPEED = 100.0  # variance of its logarithm before the first sample
OPTIMISM = 0.5  # standard deviations by which a price is below its estimate

_AT = tuple(log2(size) for size in SIZES)


def _prior() -> list[list[float]]:
    """The covariance of the logarithms, by size, while the speed of the machine is known: that of one token is 0."""
    steps = [b - a for a, b in pairwise(_AT)]
    near = [[exp(-abs(a - b) / REACH) for b in _AT[1:]] for a in _AT[1:]]
    moves = [
        [SPREAD**2 * one * two * c for c, two in zip(row, steps, strict=True)]
        for row, one in zip(near, steps, strict=True)
    ]
    return [[sum(sum(row[:to]) for row in moves[:at]) for to in range(len(_AT))] for at in range(len(_AT))]


_PRIOR = _prior()


class PriceCurve:
    """Learns the seconds of a number of tokens; None until the first sample."""

    def __init__(self) -> None:
        self._means: list[list[float]] = []  # logarithms of seconds by size, for every roofline
        self._evidence = [0.0] * len(BALANCES)  # decayed log likelihoods
        self._covariance = _PRIOR  # of the logarithms, the same for every roofline
        self._known: set[int] = set()  # token counts that have run
        self._prices: list[float] | None = None  # logarithms by size, ascending; None: compute them again

    def add(self, tokens: int, seconds: float, noise: float = NOISE) -> None:
        """Learn one sample."""
        if seconds <= 0.0:
            return
        low, share, beyond = _place(tokens)
        sample, speed = log(seconds) - beyond, DRIFT**2
        if not self._means:
            shapes = [[log(1.0 + size / balance) for size in SIZES] for balance in BALANCES]
            self._means = [[value + sample - _between(shape, low, share) for value in shape] for shape in shapes]
            speed = UNKNOWN_SPEED
        covariance = [
            [(1.0 - FORGETTING) * c + FORGETTING * prior + speed for c, prior in zip(row, priors, strict=True)]
            for row, priors in zip(self._covariance, _PRIOR, strict=True)
        ]
        together = [_between(row, low, share) for row in covariance]  # covariance of the sample with each size
        variance = _between(together, low, share) + (noise if tokens in self._known else max(noise, NEW_NOISE)) ** 2
        gains = [own / variance for own in together]
        most = MOST_SURPRISE * sqrt(variance)
        for number, mean in enumerate(self._means):
            surprise = min(most, max(-most, sample - _between(mean, low, share)))
            self._evidence[number] = TRUST * self._evidence[number] - surprise**2 / variance / 2
            self._means[number] = [value + gain * surprise for value, gain in zip(mean, gains, strict=True)]
        self._covariance = [
            [c - gain * other for c, other in zip(row, together, strict=True)]
            for row, gain in zip(covariance, gains, strict=True)
        ]
        self._known.add(tokens)
        self._prices = None

    def expect(self, tokens: int, seconds: float) -> None:
        """Learn what a size is expected to take, before it has run: less surely than from a sample."""
        before = set(self._known)
        self.add(tokens, seconds, NEW_NOISE)
        self._known = before

    def seconds(self, tokens: int) -> float | None:
        """The price: never above that of more tokens, because whatever disturbs a sample makes it slower."""
        if not self._means:
            return None
        if self._prices is None:
            weights = [exp(evidence - max(self._evidence)) for evidence in self._evidence]
            means = [sum(map(mul, weights, values)) / sum(weights) for values in zip(*self._means, strict=True)]
            low = [m - OPTIMISM * doubt for m, doubt in zip(means, self._doubts(), strict=True)]
            self._prices = list(accumulate(reversed(low), min))[::-1]
        low_place, share, beyond = _place(tokens)
        return exp(_between(self._prices, low_place, share) + beyond)

    def _doubts(self) -> list[float]:
        """Standard deviations of larger sizes from the best known one; 0 for smaller ones, and for the speed itself.

        A smaller size needs no optimism: it is cheaper anyway, and costs proposals that are known to pay.
        """
        own = [row[place] for place, row in enumerate(self._covariance)]
        known = own.index(min(own))
        beside = self._covariance[known]
        return [
            sqrt(max(0.0, variance + own[known] - 2.0 * beside[place])) if place > known else 0.0
            for place, variance in enumerate(own)
        ]


def _place(tokens: int) -> tuple[int, float, float]:
    """The size below, the share of the way to the next one, and the logarithm of the factor beyond the last one."""
    if tokens >= SIZES[-1]:
        return len(SIZES) - 2, 1.0, log(tokens / SIZES[-1])
    low = bisect_right(SIZES, tokens) - 1
    return low, (log2(tokens) - _AT[low]) / (_AT[low + 1] - _AT[low]), 0.0


def _between(values: list[float], low: int, share: float) -> float:
    return values[low] + share * (values[low + 1] - values[low])
