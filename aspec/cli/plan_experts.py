"""What ``aspec plan`` says of experts: how they are read, what the caches find, and why there are proposals or not."""

from collections.abc import Iterator, Sequence
from typing import Any

from aspec.expert_plan import ExpertShape
from aspec.plan import Plan
from aspec.planning.experts.traffic import chain_worth, expert_traffic
from aspec.planning.workload import Choice
from aspec.profiling.model_shape import shape_of
from aspec.units import format_bytes

PASSES = (1, 8, 64)  # tokens of the passes that are shown


def expert_lines(choice: Choice, acceptance: float) -> Iterator[str]:
    """The lines of a mixture of experts; none for other models."""
    plan, other = choice.search.best.plan, choice.other
    if plan.experts is None:
        if choice.obstacle and any(layer.experts for layer in shape_of(choice.models.target).layers):
            yield f"experts: read with their layers; {choice.obstacle.partition('. ')[0]}"
        if other is not None:
            rate = other.best.forecast.tokens_per_s
            yield f"experts: read with their layers; on demand it would be {rate:.4g} tokens/s"
        return
    experts, shape = plan.experts, plan.experts.shape
    yield (
        f"experts: {max(shape.num_experts)} a layer, {shape.top_k} of a token, {format_bytes(max(shape.nbytes))} each, "
        f"{format_bytes(shape.total_bytes)} in all; read on demand"
    )
    traffic = [(tokens, expert_traffic(experts, tokens)) for tokens in PASSES]
    caches = _cache(shape, experts.cached)
    if experts.host is not None:
        caches += f" on the device, {_cache(shape, experts.host.cached)} in host memory"
    hits = ", ".join(f"{own.hit_rate:.0%}" for _, own in traffic)
    yield f"expert caches: {caches}; expected hits {hits} for passes of {', '.join(map(str, PASSES))} tokens"
    reads = ", ".join(f"{format_bytes(round(own.read_bytes))}" for _, own in traffic)
    yield f"expert reads of these passes: {reads}"
    yield _worth(plan, acceptance)
    if other is not None:
        yield f"whole layers: {other.best.forecast.tokens_per_s:.4g} tokens/s"


def _cache(shape: ExpertShape, cached: Sequence[int]) -> str:
    """The slots of the layers' caches in one memory, in words."""
    own = [cached[layer] for layer in shape.layers]
    slots = str(own[0]) if min(own) == max(own) else f"{min(own)} to {max(own)}"
    return f"{slots} of {max(shape.num_experts)} in each layer, {format_bytes(sum(own) * shape.slot_bytes)}"


def _worth(plan: Plan, acceptance: float) -> str:
    """Whether proposals are worth the experts that they bring."""
    assert plan.experts is not None
    worth = chain_worth(plan.experts, acceptance)
    if not worth.proposals:
        return "proposals cost no reads: all experts are in memory"
    words = (
        f"a chain of {worth.proposals} makes {worth.tokens:.2f} tokens of a pass that reads {worth.reads:.2f} "
        f"times the experts of one token"
    )
    pays = worth.tokens > worth.reads
    verdict = "it pays even if reads are all that takes time" if pays else "it pays only beside time that is not reads"
    return f"{words}: {verdict}; the run decides by measured prices"


def experts_object(plan: Plan, acceptance: float) -> dict[str, Any] | None:
    """The same as a JSON object, in bytes; None if no experts are read on demand."""
    if plan.experts is None:
        return None
    worth = chain_worth(plan.experts, acceptance)
    passes = {}
    for tokens in PASSES:
        own = expert_traffic(plan.experts, tokens)
        passes[str(tokens)] = {"touched": own.touched, "hit_rate": own.hit_rate, "read_bytes": own.read_bytes}
    chain = {"proposals": worth.proposals, "tokens": worth.tokens, "reads": worth.reads}
    return {"passes": passes, "best_chain": chain}
