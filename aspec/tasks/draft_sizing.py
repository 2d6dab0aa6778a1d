"""The size of drafts: a chain's tokens, a tree's levels and nodes, and when to draft ahead. From measured costs alone.

A node brings its calibrated path probability in expected tokens, and costs seconds in which the engine would make
tokens at a rate. As many nodes are verified as bring the most tokens beyond their cost; a level is drafted while it is
expected to raise that profit by more than its seconds are worth. When the rate converges, this maximises tokens per
second (Dinkelbach, 1967; for the trees see Sequoia, arXiv 2402.12374, and OPT-Tree, arXiv 2406.17276). The rate is the
running one, or more where this round's nodes promise more: a text that becomes easy is not left at the size of a hard
one. Pure policy: counts, bytes and seconds only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from math import ceil, sqrt

from aspec.plan import Plan
from aspec.tasks.cost_model import FEW_TOKENS, SMOOTHING, Average, CostModel
from aspec.tasks.task import COMPUTE

LEAST_NODES = 16  # every tree may grow to at least this many nodes
FIRST_NODES = 48  # and the first tree to this many
MAX_LEVELS = 16  # levels with an average of their own; deeper levels share the last one
LEAST_GAIN = 0.02  # tokens; a level with a smaller gain bound is not worth the loop's time
TRY_AGAIN_EVERY = 32  # most rounds between two trials of a draft, while proposals do not pay
TRIAL_SHARE = 0.02  # of the time: the most that such trials may cost while they pause for fewer rounds
RECOVERY = 0.1  # by which the yield of a level that was not drafted approaches that of the level before, per round

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Tokens of a row in a pass, the root and its nodes: few sizes, so that each is measured often and has its kernels."""

Probabilities = Mapping[int, Sequence[float]]
"""By row: the path probabilities of its nodes, descending."""


class DraftSizing:
    """Decides the sizes of drafts for one plan, from costs and from the results of recent rounds."""

    def __init__(self, plan: Plan, costs: CostModel) -> None:
        self._plan, self._costs = plan, costs
        self._failed = 0  # drafts in a row whose proposals did not pay
        self._paused = 0  # rounds without a draft that are left after them
        self._chosen = Average()  # nodes per row that were worth verifying
        self._yields = [1.0] * MAX_LEVELS  # by level: gain of profit / gain bound, as a running average
        self._deepest = -1  # level that this round has drafted

    @property
    def max_nodes(self) -> int:
        """Most nodes of a row's tree: a bound derived from the nodes recently worth verifying."""
        fixed = self._plan.fixed_draft_tokens
        if fixed is not None:
            return fixed
        chosen = self._chosen.value
        return min(self._plan.max_draft_tokens, FIRST_NODES if chosen is None else LEAST_NODES + int(2 * chosen))

    @property
    def max_depth(self) -> int:
        """Most tokens of a tree's longest path."""
        fixed = self._plan.fixed_draft_depth
        return self._plan.max_draft_depth if fixed is None else fixed

    def _rate(self, num_rows: int, found: "Sequence[Size]") -> float:
        """Tokens per second against which seconds are weighed: the running rate, or a guess in the first round.

        What the best size ``found`` in this round promises is as good a guess of what the next rounds will make.
        """
        alone_s = self._costs.round_seconds(self._plan, num_rows, 0.0)
        alone = num_rows / alone_s if alone_s else 0.0  # a rate that is always to be had: without a draft
        running = max(self._costs.tokens_per_s or FEW_TOKENS * alone, alone)
        return max(running, sqrt(running * max(size.rate for size in found)))

    # -- trees -----------------------------------------------------------------------------------------------

    def skips_draft(self) -> bool:
        """Whether this round has no draft, because proposals did not pay. Call it once per round: it counts them."""
        paused, self._paused = self._paused, max(0, self._paused - 1)
        return not self.max_nodes or paused > 0

    def learn(self, level: int, gain_bound: float, before: Probabilities, after: Probabilities) -> None:
        """Learn the share of ``gain_bound`` tokens by which a level raised the profit of the nodes to verify."""
        if gain_bound > 0.0:
            self._deepest = place = min(level, MAX_LEVELS - 1)
            smaller, larger = self._sizes(before), self._sizes(after)
            rate = self._rate(len(after), larger)
            gain = most_profitable(larger, rate).profit(rate) - most_profitable(smaller, rate).profit(rate)
            share = gain / gain_bound
            self._yields[place] += SMOOTHING * (min(1.0, max(0.0, share)) - self._yields[place])

    def level_pays(self, level: int, gain_bound: float, elapsed_s: float, probabilities: Probabilities) -> bool:
        """Whether a level's expected gain is worth its seconds, in a round that has drafted for ``elapsed_s``."""
        plan = self._plan
        if plan.fixed_draft_tokens is not None or plan.fixed_draft_depth is not None:
            return True
        num_rows, found = len(probabilities), self._sizes(probabilities)
        rate = self._rate(num_rows, found)
        level_s = self._costs.level_seconds(plan, elapsed_s, num_rows * (1 + most_profitable(found, rate).nodes))
        if gain_bound <= LEAST_GAIN or level_s == 0.0:
            return gain_bound > LEAST_GAIN
        gain = gain_bound * self._yields[min(level, MAX_LEVELS - 1)]
        return another_level(gain, rate, level_s)

    def nodes(self, probabilities: Probabilities, drafted_s: float) -> dict[int, int]:
        """The number of nodes to verify, by row: the likeliest, as many as are worth the seconds of the pass.

        All rows of a pass are as wide as the widest, so all get the same number, if they have it.
        """
        plan = self._plan
        if plan.fixed_draft_tokens is not None:
            return {row: len(own) for row, own in probabilities.items()}
        found = self._sizes(probabilities, drafted_s)
        best = most_profitable(found, self._rate(len(probabilities), found)).nodes
        self._chosen.add(best)
        for level in range(max(1, self._deepest + 1), MAX_LEVELS):  # not drafted: it has no price of today
            self._yields[level] += RECOVERY * max(0.0, self._yields[level - 1] - self._yields[level])
        self._deepest = -1
        self._pause_after(best, len(probabilities), drafted_s)
        return {row: min(best, len(own)) for row, own in probabilities.items()}

    def _sizes(self, probabilities: Probabilities, drafted_s: float = 0.0) -> "list[Size]":
        """What a round can choose from, after a draft of so many seconds."""
        num_rows = len(probabilities)
        return sizes(
            list(probabilities.values()),
            lambda width: self._costs.round_seconds(self._plan, num_rows * width, drafted_s) or 0.0,
        )

    def _pause_after(self, num_nodes: int, num_rows: int, drafted_s: float) -> None:
        """Pause after a draft that did not pay: longer each time, but no longer than limits what trials cost."""
        alone_s = self._costs.round_seconds(self._plan, num_rows, 0.0) or 1.0
        trial_s = (self._costs.round_seconds(self._plan, num_rows, drafted_s) or alone_s) - alone_s
        longest = min(TRY_AGAIN_EVERY - 1, ceil(trial_s / alone_s / TRIAL_SHARE))
        self._failed = 0 if num_nodes else min(self._failed + 1, TRY_AGAIN_EVERY)
        self._paused = min(longest, 2 ** max(0, self._failed - 1) - 1)  # one hard place in a text is no reason

    def ahead_pays(self, gain: float, loads: int, now_s: float) -> bool:
        """Whether to draft a level while a pass runs whose next layer needs ``loads`` loads since the first pass.

        Yes, if the draft has a compute lane of its own; on the target's lane only if the level ends before they landed.
        """
        if gain <= LEAST_GAIN:
            return False
        if self._plan.draft_resource != COMPUTE:
            return True
        return self._costs.draft_step_s <= self._costs.seconds_until(self._plan, loads, now_s)

    # -- chains ----------------------------------------------------------------------------------------------

    def chains(self, limits: Mapping[int, int]) -> dict[int, int]:
        """The number of tokens to propose, by row, up to its limit."""
        fixed = self._plan.fixed_draft_tokens
        chosen = self._best_chain(len(limits)) if fixed is None else fixed
        most = min(chosen, self._plan.max_draft_tokens)
        return {row: min(most, limit) for row, limit in limits.items()}

    def _best_chain(self, num_rows: int) -> int:
        """The chain length by measured cost; where speculation loses, a rare proposal keeps the estimate current."""
        plan = self._plan
        if not num_rows or not plan.max_draft_tokens:
            return 0
        best = self._costs.best_draft_tokens(plan, num_rows)
        if not best and self._paused:
            self._paused -= 1
            return 0
        self._pause_after(best, num_rows, self._costs.draft_step_s)
        return best or 1


# -- the rules of size ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Size:
    """What a number of nodes in every row of a pass brings and takes."""

    nodes: int
    tokens: float  # expected of all nodes, the roots not counted
    seconds: float
    rows: int

    @property
    def rate(self) -> float:
        """Tokens per second, the roots' own tokens too; 0 where seconds have no price."""
        return (self.rows + self.tokens) / self.seconds if self.seconds else 0.0

    def profit(self, rate: float) -> float:
        """Tokens, less those that are made elsewhere in the same seconds at ``rate``."""
        return self.tokens - rate * self.seconds


def sizes(probabilities: Sequence[Sequence[float]], cost: Callable[[int], float]) -> list[Size]:
    """The sizes to choose from, ascending; ``probabilities`` of every row's nodes, descending.

    ``cost``: seconds of a pass, by the tokens of its widest row (1 for the root alone).
    """
    longest = max(map(len, probabilities), default=0)
    padded = zip_longest(*probabilities, fillvalue=0.0)
    gains = list(accumulate(map(sum, padded), initial=0.0))
    counts = [width - 1 for width in WIDTHS if width <= longest] + [longest]
    return [Size(nodes, gains[nodes], cost(nodes + 1), len(probabilities)) for nodes in counts]


def most_profitable(found: Sequence[Size], rate: float) -> Size:
    """The most profitable size at ``rate`` tokens per second. Among equals the smallest wins."""
    return max(found, key=lambda size: size.profit(rate))


def another_level(gain_tokens: float, rate: float, level_s: float) -> bool:
    """Whether a draft level that gains ``gain_tokens`` in ``level_s`` seconds beats decoding at ``rate`` tokens/s."""
    return gain_tokens > rate * level_s
