"""The size of drafts: a chain's tokens, a tree's levels and nodes, and when to draft ahead. From measured costs alone.

A node brings its calibrated path probability in expected tokens, and costs seconds in which the engine would make
tokens at its running rate. A node is verified while it brings more tokens than it costs; a level is drafted under the
same condition. When the rate converges, this maximises tokens per second (Dinkelbach, 1967; for the trees see Sequoia,
arXiv 2402.12374, and OPT-Tree, arXiv 2406.17276).
Pure policy: counts, bytes and seconds only.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

from aspec.plan import Plan
from aspec.tasks.cost_model import Average, CostModel
from aspec.tasks.task import COMPUTE

LEAST_NODES = 16  # every tree may grow to at least this many nodes
MAX_LEVELS = 16  # levels with an average of their own; deeper levels share the last one
LEAST_GAIN = 0.02  # tokens; a level with a smaller gain bound is not worth the loop's time
TRY_AGAIN_EVERY = 32  # rounds between two trials of a draft, while proposals do not pay

Probabilities = Mapping[int, Sequence[float]]
"""By row: the path probabilities of its nodes, descending."""

MarginalCost = Callable[[int], float] | Sequence[tuple[int, float]]
"""Seconds that node n (from 1) adds to a pass; or measured (tokens, seconds) of whole passes, including the root."""


class DraftSizing:
    """Decides the sizes of drafts for one plan, from costs and from the results of recent rounds."""

    def __init__(self, plan: Plan, costs: CostModel) -> None:
        self._plan, self._costs = plan, costs
        self._quiet_rounds = 0  # decode rounds since the last one with a proposal
        self._chosen = Average()  # nodes per row that were worth verifying
        self._yields = [Average() for _ in range(MAX_LEVELS)]  # by level: actual gain / gain bound

    @property
    def max_nodes(self) -> int:
        """Most nodes of a row's tree: a bound derived from the nodes recently worth verifying."""
        fixed = self._plan.fixed_draft_tokens
        if fixed is not None:
            return fixed
        chosen = self._chosen.value
        return min(self._plan.max_draft_tokens, LEAST_NODES + int(2 * chosen) if chosen is not None else 1 << 30)

    @property
    def max_depth(self) -> int:
        """Most tokens of a tree's longest path."""
        fixed = self._plan.fixed_draft_depth
        return self._plan.max_draft_depth if fixed is None else fixed

    # -- trees -----------------------------------------------------------------------------------------------

    def skips_draft(self) -> bool:
        """Whether this round has no draft: while proposals do not pay, one is tried every ``TRY_AGAIN_EVERY`` rounds.

        Call it once per round: it counts the rounds.
        """
        quiet = self._quiet_rounds
        self._quiet_rounds += quiet > 0
        return not self.max_nodes or (quiet > 0 and quiet % TRY_AGAIN_EVERY != 0)

    def learn(self, level: int, gain_bound: float, before: Probabilities, after: Probabilities) -> None:
        """Learn the share of ``gain_bound`` tokens that a level brought, from the nodes before and after it."""
        if gain_bound > 0.0:
            share = (self._worth(after) - self._worth(before)) / gain_bound
            self._yields[min(level, MAX_LEVELS - 1)].add(min(1.0, max(0.0, share)))

    def _worth(self, probabilities: Probabilities) -> float:
        """Expected tokens of the likeliest nodes of all rows, as many nodes as were recently verified."""
        chosen = self._chosen.value
        most = None if chosen is None else max(1, round(chosen)) * len(probabilities)
        return sum(sorted((p for own in probabilities.values() for p in own), reverse=True)[:most])

    def level_pays(self, level: int, gain_bound: float, elapsed_s: float, num_tokens: int) -> bool:
        """Whether a level's expected gain is worth its seconds.

        The round has drafted for ``elapsed_s`` and would verify ``num_tokens``.
        """
        plan = self._plan
        if plan.fixed_draft_tokens is not None or plan.fixed_draft_depth is not None:
            return True
        level_s = self._costs.level_seconds(plan, elapsed_s, num_tokens)
        if gain_bound <= LEAST_GAIN or level_s == 0.0:
            return gain_bound > LEAST_GAIN
        share = self._yields[min(level, MAX_LEVELS - 1)].value
        return another_level(gain_bound if share is None else gain_bound * share, self._costs.tokens_per_s, level_s)

    def nodes(self, probabilities: Probabilities, drafted_s: float) -> dict[int, int]:
        """The number of nodes to verify, by row: the likeliest of all rows, while a node is worth its seconds."""
        plan = self._plan
        if plan.fixed_draft_tokens is not None:
            return {row: len(own) for row, own in probabilities.items()}
        ranked = sorted(((p, row) for row, own in probabilities.items() for p in own), reverse=True)
        points = self._costs.round_seconds(plan, drafted_s, len(probabilities) + len(ranked))
        num_rows, rate = len(probabilities), self._costs.tokens_per_s
        best = 0 if rate else LEAST_NODES * num_rows  # before the first measured round
        if points:
            worth = worthwhile(
                [p for p, _ in ranked], rate or num_rows / points[0][1], marginal_seconds(points, num_rows)
            )
            best = max(best, worth)
        chosen = {row: sum(owner == row for _, owner in ranked[:best]) for row in probabilities}
        self._chosen.add(sum(chosen.values()) / len(chosen))
        self._quiet_rounds = 0 if any(chosen.values()) else self._quiet_rounds + 1
        return chosen

    def ahead_pays(self, gain: float, loads: int, now_s: float) -> bool:
        """Whether to draft a level while a pass runs whose next layer needs ``loads`` loads since the first pass.

        Yes, if the draft has a compute lane of its own; on the target's lane only if the level ends before they landed.
        """
        if gain <= LEAST_GAIN:
            return False
        if self._plan.draft_resource != COMPUTE:
            return True
        return self._costs.draft_step_s <= self._costs.seconds_until(loads, self._plan.slot_bytes, now_s)

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
        self._quiet_rounds = 0 if best else self._quiet_rounds + 1
        return best or int(self._quiet_rounds % TRY_AGAIN_EVERY == 0)


# -- the rules of size ---------------------------------------------------------------------------------------


def worthwhile(probabilities: Sequence[float], rate: float, marginal_s: MarginalCost) -> int:
    """The number of nodes to verify at ``rate`` tokens per second; ``probabilities`` of their paths, descending.

    A node pays while its probability exceeds ``rate`` times its marginal seconds. Where costs jump (a kernel's tile
    is full) several nodes beyond the jump may pay for it together, so the function returns the number with the largest
    sum of gains. Where marginal costs never decrease, both rules agree.
    """
    cost = marginal_s if callable(marginal_s) else marginal_seconds(marginal_s)
    gains = accumulate(p - rate * cost(number) for number, p in enumerate(probabilities, 1))
    best, most = 0, 0.0
    for number, gain in enumerate(gains, 1):
        if gain > most:
            best, most = number, gain
    return best


def marginal_seconds(points: Sequence[tuple[int, float]], other_tokens: int = 1) -> Callable[[int], float]:
    """A function of n: the seconds that node n adds to a pass of ``other_tokens`` and n - 1 nodes.

    ``points``: measured (tokens, seconds) of passes. The function interpolates between the points and extends the last
    line. A pass measured faster than a smaller one counts as equally slow. A single point has no slope: further nodes
    then cost 0 until a larger pass is measured.
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
    """Whether a draft level that gains ``gain_tokens`` in ``level_s`` seconds beats decoding at ``rate`` tokens/s."""
    return gain_tokens > rate * level_s
