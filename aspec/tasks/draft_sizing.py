"""How much to draft: a chain's tokens, a tree's levels and nodes, and when to draft ahead. From measured costs alone.

A node is worth its calibrated path probability in tokens and costs seconds in which the engine makes tokens at its
running rate: it is verified while it is worth more than it costs, and a level is drafted while it brings more than the
same engine would make in that time. For a rate that settles this maximises tokens per second (Dinkelbach, 1967; trees
of the kind of Sequoia, arXiv 2402.12374, and OPT-Tree, arXiv 2406.17276).
Pure policy: counts, bytes and seconds only.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

from aspec.plan import Plan
from aspec.tasks.cost_model import Average, CostModel
from aspec.tasks.task import COMPUTE

LEAST_NODES = 16  # that a tree may grow to
MAX_LEVELS = 16  # that are told apart; those beyond count as the last one
LEAST_GAIN = 0.02  # tokens; a level that promises less is not worth the loop's time
TRY_AGAIN_EVERY = 32  # rounds without a draft, once proposals do not pay

Probabilities = Mapping[int, Sequence[float]]
"""Path probabilities of the nodes of every row, descending."""

Cost = Callable[[int], float] | Sequence[tuple[int, float]]
"""Seconds that node n (from 1) adds to a pass; or measured (tokens, seconds) of whole passes, the root's included."""


class Sizing:
    """Decides sizes for one plan; remembers only whether proposals have paid lately."""

    def __init__(self, plan: Plan, costs: CostModel) -> None:
        self._plan, self._costs = plan, costs
        self._quiet_rounds = 0  # decode rounds without a proposal since the last one with
        self._chosen = Average()  # nodes of a row that were worth verifying
        self._yields = [Average() for _ in range(MAX_LEVELS)]  # of what a level promised, the share that it brought

    @property
    def most(self) -> int:
        """Nodes that a row's tree may grow to: no more than could be worth verifying, by what lately was."""
        fixed = self._plan.fixed_draft_tokens
        if fixed is not None:
            return fixed
        chosen = self._chosen.value
        return min(self._plan.max_draft_tokens, LEAST_NODES + int(2 * chosen) if chosen is not None else 1 << 30)

    @property
    def deepest(self) -> int:
        """Tokens of a tree's longest path."""
        fixed = self._plan.fixed_draft_depth
        return self._plan.max_draft_depth if fixed is None else fixed

    # -- trees -----------------------------------------------------------------------------------------------

    def rests(self) -> bool:
        """Whether this round goes without a draft: the longer proposals have not paid, the rarer one is tried."""
        quiet = self._quiet_rounds
        self._quiet_rounds += quiet > 0
        return not self.most or (quiet > 0 and quiet % TRY_AGAIN_EVERY != 0)

    def learn(self, level: int, gain_bound: float, before: Probabilities, after: Probabilities) -> None:
        """A level promised ``gain_bound`` tokens; these are the nodes before and after it."""
        if gain_bound > 0.0:
            share = (self._worth(after) - self._worth(before)) / gain_bound
            self._yields[min(level, MAX_LEVELS - 1)].add(min(1.0, max(0.0, share)))

    def _worth(self, probabilities: Probabilities) -> float:
        """Tokens expected of the nodes of all rows, as many as lately were verified."""
        chosen = self._chosen.value
        most = None if chosen is None else max(1, round(chosen)) * len(probabilities)
        return sum(sorted((p for own in probabilities.values() for p in own), reverse=True)[:most])

    def level_pays(self, level: int, gain_bound: float, elapsed_s: float, num_tokens: int) -> bool:
        """Whether what a level promises is worth its seconds, after drafting for ``elapsed_s`` of ``num_tokens``."""
        plan = self._plan
        if plan.fixed_draft_tokens is not None or plan.fixed_draft_depth is not None:
            return True
        level_s = self._costs.level_seconds(plan, elapsed_s, num_tokens)
        if gain_bound <= LEAST_GAIN or level_s == 0.0:
            return gain_bound > LEAST_GAIN
        share = self._yields[min(level, MAX_LEVELS - 1)].value
        return another_level(gain_bound if share is None else gain_bound * share, self._costs.tokens_per_s, level_s)

    def nodes(self, probabilities: Probabilities, drafted_s: float) -> dict[int, int]:
        """How many nodes of every row to verify: the likeliest of all rows, while a node is worth its seconds."""
        plan = self._plan
        if plan.fixed_draft_tokens is not None:
            return {row: len(own) for row, own in probabilities.items()}
        ranked = sorted(((p, row) for row, own in probabilities.items() for p in own), reverse=True)
        points = self._costs.round_seconds(plan, drafted_s, len(probabilities) + len(ranked))
        num_rows, rate = len(probabilities), self._costs.tokens_per_s
        best = 0 if rate else LEAST_NODES * num_rows  # until a round has told what one costs
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
        """Whether to draft a level while a pass runs, whose next layer waits for ``loads`` loads in all.

        On a compute lane of the draft's own always; on the target's where the level ends before they have landed.
        """
        if gain <= LEAST_GAIN:
            return False
        if self._plan.draft_resource != COMPUTE:
            return True
        return self._costs.draft_step_s <= self._costs.seconds_until(loads, self._plan.slot_bytes, now_s)

    # -- chains ----------------------------------------------------------------------------------------------

    def chains(self, limits: Mapping[int, int]) -> dict[int, int]:
        """How many tokens to propose for every row, up to its limit."""
        fixed = self._plan.fixed_draft_tokens
        chosen = self._best_chain(len(limits)) if fixed is None else fixed
        most = min(chosen, self._plan.max_draft_tokens)
        return {row: min(most, limit) for row, limit in limits.items()}

    def _best_chain(self, num_rows: int) -> int:
        """By measured cost; where speculation loses, one proposal now and then keeps the estimate alive."""
        plan = self._plan
        if not num_rows or not plan.max_draft_tokens:
            return 0
        best = self._costs.best_draft_tokens(plan, num_rows)
        self._quiet_rounds = 0 if best else self._quiet_rounds + 1
        return best or int(self._quiet_rounds % TRY_AGAIN_EVERY == 0)


# -- the rules of size ---------------------------------------------------------------------------------------


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
