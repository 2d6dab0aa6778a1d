"""How many bytes of experts a pass reads, and whether proposals are worth theirs: expected values, without a run.

The forecast of a plan runs it; these numbers explain the forecast.
"""

from collections import Counter
from dataclasses import dataclass

from aspec.expert_plan import ExpertPlan
from aspec.planning.experts.routes import SKEW
from aspec.tasks.cost_model import expected_tokens
from aspec.tasks.experts.routing import TEXT_EXPONENT, CachedPasses, zipf_chances

CHAINS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # proposals for which a price is computed


@dataclass(frozen=True, slots=True)
class Traffic:
    """The experts of passes of equal size, all layers together, once the caches are warm."""

    touched: float
    missing: float
    read_bytes: float

    @property
    def hit_rate(self) -> float:
        """The share of touched experts that are in a cache."""
        return 1.0 - self.missing / self.touched


def expert_traffic(experts: ExpertPlan, tokens: int) -> Traffic:
    """The experts of passes of so many tokens; ``missing``: those that come from the disk."""
    shape, cached = experts.shape, experts.cached if experts.host is None else experts.host.cached
    kinds = Counter((shape.num_experts[layer], cached[layer], shape.nbytes[layer]) for layer in shape.layers)
    touched = missing = read = 0.0
    for (number, slots, nbytes), layers in kinds.items():
        chances = zipf_chances(number, min(shape.top_k, number), SKEW)
        passes = CachedPasses.of(chances, slots, tokens**TEXT_EXPONENT, TEXT_EXPONENT)
        touched += layers * passes.touched
        missing += layers * passes.missing
        read += layers * passes.missing * nbytes
    return Traffic(touched, missing, read)


@dataclass(frozen=True, slots=True)
class Worth:
    """The chain of proposals that makes the most tokens per byte read, beside no proposals."""

    proposals: int
    tokens: float  # that a pass with these proposals makes
    reads: float  # its bytes, as a multiple of those of one token


def chain_worth(experts: ExpertPlan, acceptance: float) -> Worth:
    """The best chain where reading experts is all that takes time."""
    alone = expert_traffic(experts, 1).read_bytes
    found = [
        Worth(number, expected_tokens(acceptance, number), expert_traffic(experts, 1 + number).read_bytes / alone)
        for number in CHAINS
        if alone
    ]
    return max(found, key=lambda one: one.tokens / one.reads, default=Worth(0, 1.0, 1.0))
