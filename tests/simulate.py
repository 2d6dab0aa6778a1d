"""Runs of the real scheduler, graph and executor on the simulated machine."""

import hashlib
from dataclasses import replace

from aspec.expert_plan import ExpertPlan, ExpertShape
from aspec.plan import Plan, PlannedPart, PlanRequest, Tier
from aspec.planning.sim_backend import HOST_RESOURCES, SimBackend, SimCosts
from aspec.tasks.executor import Executor
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import RequestAdded, Shutdown


def make_plan(
    num_layers=4,
    parts_per_layer=2,
    num_slots=4,
    resident=(),
    nbytes=10_000_000,
    tier=Tier.DISK,
    decoded=0,
    in_place=True,
    **changes,
):
    parts = tuple(
        PlannedPart(i, i // parts_per_layer, nbytes, nbytes, own, decoded, decoded, in_place)
        for i in range(num_layers * parts_per_layer)
        for own in [Tier.DEVICE if i in resident else tier]
    )
    defaults = dict(num_rows=3, capacity=512, max_draft_tokens=8, fixed_draft_tokens=4, prefill_tokens=64)
    return plan_of(parts, num_layers, num_slots, nbytes, **{**defaults, **changes})


def with_experts(plan, cached=2, passing=2, num_experts=8, top_k=2, dense=(), nbytes=1_000_000):
    """The plan with experts on demand in all layers but the ``dense`` ones."""
    numbers = tuple(0 if layer in dense else num_experts for layer in range(plan.num_layers))
    shape = ExpertShape(numbers, top_k, tuple(nbytes * bool(number) for number in numbers), nbytes)
    slots = tuple(min(cached, number) for number in numbers)
    return replace(plan, experts=ExpertPlan(shape, slots, passing))


def plan_of(parts, num_layers, num_slots, slot_bytes, **fields):
    """A plan from its own fields and those of its request, mixed."""
    asked = {name: fields.pop(name) for name in PlanRequest.__slots__ if name in fields}
    return Plan(parts, num_layers, num_slots, slot_bytes, PlanRequest(**asked), **fields)


def asking(plan, **changes):
    """The same plan, with another request."""
    return replace(plan, request=replace(plan.request, **changes))


class Checked:
    """The scheduler, validated after every event."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.decisions = []

    @property
    def done(self):
        return self.scheduler.done

    @property
    def idle(self):
        return self.scheduler.idle

    @property
    def waits_for(self):
        return self.scheduler.waits_for

    def handle(self, events):
        tasks = self.scheduler.handle(events)
        self.scheduler.validate()
        self.decisions.append(tasks)
        return tasks


async def simulate(plan, arrivals=((0, 20, 16),), backend=None, profile=None, resources=HOST_RESOURCES):
    """Serve arrivals, the fields of ``RequestAdded``, to the end; returns (spans, scheduler, backend)."""
    experts = None if plan.experts is None else plan.experts.shape
    backend = backend or SimBackend(profile or SimCosts(), resources, experts=experts)
    scheduler = Scheduler(plan)
    spans = []
    executor = Executor(Checked(scheduler), backend, [spans.append])
    for arrival in arrivals:
        executor.post(RequestAdded(*arrival))
    executor.post(Shutdown())
    try:
        await executor.run()
    finally:
        await backend.close()
    return spans, scheduler, backend


def trace_hash(spans):
    text = repr([(s.task.id, s.task.label, round(s.start_s, 9), round(s.stop_s, 9)) for s in spans])
    return hashlib.sha256(text.encode()).hexdigest()
