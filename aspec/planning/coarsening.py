"""Plans in fewer tasks: parts and layers are merged, so that a simulated pass of a large model stays small."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil

from aspec.expert_plan import ExpertPlan
from aspec.plan import Plan, PlannedPart
from aspec.profiling.cost_tables import LayerCost, SimCosts

ROUTED_TASKS = 2  # of a layer with experts on demand, beside the reads of its experts
MAX_TASKS = 400  # of a pass: with more tasks, parts and layers are merged


def tasks_per_pass(plan: Plan) -> int:
    """The approximate number of tasks in one pass of a group."""
    per_layer = 1 if plan.attention_resource == "compute" else (5 if plan.kv_on_host else 3) * plan.micro_batches
    loads = len(plan.streamed) * (1 + bool(plan.num_staging)) + len(plan.decoding)
    routed = 0 if plan.experts is None else len(plan.experts.shape.layers) * (ROUTED_TASKS + plan.experts.shape.top_k)
    return plan.num_layers * per_layer + loads + routed + 8


def coarse(plan: Plan, profile: SimCosts, max_tasks: int = MAX_TASKS) -> tuple[Plan, SimCosts]:
    """A plan with about ``max_tasks`` tasks in a pass and about equal bytes and seconds; itself if it has fewer."""
    if tasks_per_pass(plan) <= max_tasks:
        return plan, profile
    merged = _merge_parts(plan, 1)
    layers = ceil(tasks_per_pass(merged) / max_tasks)
    if layers == 1:
        return merged, profile
    merged = _merge_parts(plan, layers)
    cost_table = profile.cost_table
    if cost_table is None:
        return merged, replace(profile, layer_s=profile.layer_s * layers, layer_token_s=profile.layer_token_s * layers)
    target = replace(cost_table.target, layers=tuple(_merge_layers(cost_table.target.layers, layers)))
    return merged, replace(
        profile, cost_table=replace(cost_table, target=target, handover_s=layers * cost_table.handover_s)
    )


def _merge_parts(plan: Plan, layers: int) -> Plan:
    """The plan with one part for each tier and each group of ``layers`` layers."""
    together: dict[tuple[int, str, bool], list[PlannedPart]] = {}
    for part in plan.parts:
        together.setdefault((part.layer // layers, part.tier, part.packed), []).append(part)
    parts = tuple(
        PlannedPart(
            index,
            layer,
            nbytes=sum(part.nbytes for part in own),
            size=sum(part.size for part in own),
            tier=own[0].tier,
            scratch_bytes=sum(part.scratch_bytes for part in own),
            decoded_bytes=sum(part.decoded_bytes for part in own),
            in_place=any(part.in_place for part in own),
            packed=own[0].packed,
        )
        for index, ((layer, *_), own) in enumerate(sorted(together.items(), key=lambda one: one[0]))
    )
    groups = (plan.crossing[start : start + layers] for start in range(0, len(plan.crossing), layers))
    crossing = tuple((sum(out for out, _ in own), sum(back for _, back in own)) for own in groups)
    experts = None if plan.experts is None else _merge_experts(plan.experts, layers)
    num_layers = ceil(plan.num_layers / layers)
    expected = tuple((tokens, seconds * plan.num_layers / num_layers) for tokens, seconds in plan.expected_layer_s)
    merged = partial(
        replace,
        plan,
        parts=parts,
        num_layers=num_layers,
        crossing=crossing,
        experts=experts,
        expected_layer_s=expected,
    )
    streamed = [part for part in parts if part.tier != "device"]
    if not streamed:
        return merged()
    slot = max(part.size for part in streamed)
    least = max(sum(part.layer == layer for part in streamed) for layer in {part.layer for part in streamed})
    slots = max(least, round(plan.num_slots * plan.slot_bytes / slot))
    return merged(num_slots=slots, slot_bytes=slot)


def _merge_experts(experts: ExpertPlan, layers: int) -> ExpertPlan:
    """One layer for every ``layers`` layers: its experts are as large as theirs together, and its cache an average."""
    shape = experts.shape
    groups = [range(start, min(start + layers, len(shape.nbytes))) for start in range(0, len(shape.nbytes), layers)]
    routed = [[layer for layer in group if shape.num_experts[layer]] for group in groups]
    merged = replace(
        shape,
        num_experts=tuple(max((shape.num_experts[layer] for layer in own), default=0) for own in routed),
        nbytes=tuple(sum(shape.nbytes[layer] for layer in own) for own in routed),
        slot_bytes=layers * shape.slot_bytes,
    )

    def merge(cached: Sequence[int]) -> tuple[int, ...]:
        return tuple(round(sum(cached[layer] for layer in own) / max(1, len(own))) for own in routed)

    host = None if experts.host is None else replace(experts.host, cached=merge(experts.host.cached))
    return replace(experts, shape=merged, cached=merge(experts.cached), host=host)


def _merge_layers(layers: tuple[LayerCost, ...], count: int) -> Iterable[LayerCost]:
    """One layer for every ``count`` layers, with their summed cost."""
    for start in range(0, len(layers), count):
        own = layers[start : start + count]
        yield own[0].times(len(own))
