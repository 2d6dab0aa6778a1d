"""The plan for a known workload: runs the search on a machine's costs and the models' shapes.

``best_plans`` is the one planner: an engine runs its best plan, and ``aspec plan`` shows it.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial

from aspec.backends.registry import HOST
from aspec.errors import BudgetError, UnsupportedModelError, UserError
from aspec.models.model import Model
from aspec.plan import Plan, PlannedPart, PlanRequest, Speculation, Workload
from aspec.planning.footprint import MAX_CHAIN, MAX_TREE, MICRO_BATCHES, Models, request_for
from aspec.planning.forecast import FEW_PROMPTS, Forecaster, with_expectations
from aspec.planning.placement import make_plan
from aspec.planning.resolve import Resolved, revise
from aspec.planning.search import CAPS, DECODINGS, GROUPS, SLOTS, Candidate, Search, SearchSpace, rows_for, search
from aspec.planning.usual import choose_most, shrunk, with_free_proposals
from aspec.profiling.cost_tables import SimCosts
from aspec.profiling.hardware import Hardware
from aspec.profiling.model_shape import shape_of
from aspec.profiling.profile_cache import (
    AcceptanceStats,
    decoding_profile,
    int4_profile,
    known_acceptance,
    machine_profile,
)
from aspec.profiling.roofline import prices
from aspec.profiling.threads import choose_threads, thread_counts
from aspec.tasks.task import COMPUTE, CPU
from aspec.threads import Threads

MOST_EXACT_PRICE = 0.1  # share of the seconds; where exact passes cost more, they are for those who ask for them
ON_DEMAND_MARGIN = 0.8  # of the seconds with whole layers: experts on demand are forecast less surely
USUAL_TOKENS = 128, 128  # of prompts and answers that are not known
PREFILLS = (256, 128, 64)  # tokens of smaller prefill items, tried if memory is short


@dataclass(frozen=True, slots=True)
class CostBasis:
    """The input of forecasts: the machine, and how often the target accepts the draft's proposals."""

    hardware: Hardware  # with the threads of the target's decoding
    known: AcceptanceStats
    draft_hardware: Hardware | None = None  # with the threads of the draft; None: the same
    threads: Threads | None = None


def measured_basis(models: Models) -> CostBasis:
    """The basis for this machine: from the cache, or measured now, which takes some seconds."""
    resolved, options = models.resolved, models.resolved.options
    machine = cache(partial(_this_machine, models))
    threads = threads_for(models, machine)
    draft, sampled = resolved.draft, options.workload is not None and options.workload.sampled
    known = AcceptanceStats() if draft is None else known_acceptance(resolved.trained, draft, sampled=sampled)
    return CostBasis(machine(threads.decode), known, machine(threads.draft), threads)


def threads_for(models: Models, machine: Callable[[int], Hardware] | None = None) -> Threads:
    """The compute threads for these models on this machine; ``machine`` measures it with a number of threads."""
    resolved = models.resolved
    counts = thread_counts(resolved.options.threads, on_device=resolved.kind is not None)
    if len(counts) == 1:
        return Threads.all(*counts)
    measured = {number: (machine or partial(_this_machine, models))(number) for number in counts}
    draft = None if models.draft is None else shape_of(models.draft)
    return choose_threads(measured, shape_of(models.target), draft, exact=resolved.exact)


def _this_machine(models: Models, threads: int) -> Hardware:
    """This machine with so many compute threads: from the cache, or measured now."""
    resolved, options = models.resolved, models.resolved.options
    dtype, rate, tell = models.target.dtype, options.link_rate, options.progress
    machine = machine_profile(resolved.target, dtype, threads, kind=resolved.kind, link_rate=rate, tell=tell)
    packed = models.target if models.draft is None or models.target.packed else models.draft
    if resolved.kind is not None or not packed.packed:
        return machine
    decoders = max(thread_counts(options.threads))
    cpu = replace(
        machine.cpu,
        decode_weight_s=decoding_profile(models.target, decoders),
        int4_weight_s=int4_profile(packed, threads, exact=False),
        exact_int4_weight_s=int4_profile(packed, threads, exact=True),
    )
    return replace(machine, cpu=cpu)


@dataclass(frozen=True, slots=True)
class Choice:
    """The models with their experts read as is best, and the search for their plan."""

    models: Models
    search: Search
    other: Search | None = None  # with the experts read the other way; None: not possible, not allowed, or no use
    obstacle: str = ""  # to reading experts on demand


def choose(models: Models, basis: CostBasis | None = None, progress: Callable[[int], None] = lambda _: None) -> Choice:
    """The best plans of ``best_plans``, over both ways of reading experts where the options leave that open.

    Experts are read on demand where that is faster by ``ON_DEMAND_MARGIN``. Whole layers need no search if even their
    lower bound is slower, and experts on demand none if the rows of the best plan choose most of a layer's: to foretell
    the experts of many rows takes long. Raises BudgetError if no plan fits.
    """
    if models.resolved.options.experts != "auto":
        return Choice(models, best_plans(models, basis, progress))
    try:
        on_demand = models.reading_experts(on_demand=True)
    except UserError as error:
        return Choice(models, best_plans(models, basis, progress), obstacle=str(error))
    basis, work, whole = basis or measured_basis(models), models.resolved.options.workload, None
    if work is not None and work.num_prompts > FEW_PROMPTS:
        with suppress(BudgetError):
            whole = best_plans(models, basis, progress)
        if whole is not None and choose_most(on_demand, whole.best.plan.num_rows):
            return Choice(models, whole, obstacle=f"{whole.best.plan.num_rows} rows choose most of a layer together")
    try:
        chosen = best_plans(on_demand, basis, progress)
    except BudgetError:
        return Choice(models, whole or best_plans(models, basis, progress))
    if chosen.best.forecast.job_s < ON_DEMAND_MARGIN * _least_s(models, basis):
        return Choice(on_demand, chosen)
    try:
        whole = whole or best_plans(models, basis, progress)
    except BudgetError:
        return Choice(on_demand, chosen)
    if chosen.best.forecast.job_s < ON_DEMAND_MARGIN * whole.best.forecast.job_s:
        return Choice(on_demand, chosen, whole)
    return Choice(models, whole, chosen)


def _least_s(models: Models, basis: CostBasis) -> float:
    """A lower bound on the seconds of one prompt with whole layers; 0 for more prompts, whose rows are open."""
    work, request = models.resolved.options.workload, request_for(models)
    if work is None or work.num_prompts > 1:
        return 0.0
    try:
        plan = make_plan(models.footprint(request), request)
    except BudgetError:
        return 0.0
    return forecast_for(models, request, basis, _within(work, request.capacity)).least_s(plan)


def best_plans(
    models: Models, basis: CostBasis | None = None, progress: Callable[[int], None] = lambda _: None
) -> Search:
    """The plans for the workload of the options, the best first.

    The search varies the settings that the options leave open. If nothing in it fits, the usual shape is shrunk until
    it fits. Raises BudgetError if even the smallest plan does not fit, and UserError for more groups than prompts.
    """
    work = models.resolved.options.workload
    assert work is not None, "the search needs a workload"
    basis = basis or measured_basis(models)
    request = replace(request_for(models), threads=basis.threads)
    if request.num_groups > work.num_prompts:
        raise UserError(
            f"{request.num_groups} groups need at least as many prompts, found {work.num_prompts}. Lower --groups."
        )
    work = _within(work, request.capacity)
    forecaster = forecast_for(models, request, basis, work)
    space = search_space(models, basis.hardware, work)
    if not basis.known.proposals and work.num_prompts <= FEW_PROMPTS:
        proposing = tuple(pair for pair in space.speculations if pair[0] is not None)
        space = replace(  # do not follow a guess of the acceptance far: proposals that do not pay end while it runs
            space, usual=request.speculation, caps=(), speculations=proposing or space.speculations
        )
    try:
        found = search(request, space, models.footprint, forecaster.least_s, forecaster, progress)
        found = _with_exactness_settled(found, models, basis, work)
    except BudgetError:
        rows = max(request.num_groups, min(request.num_rows, work.num_prompts))
        plan = shrunk(models, replace(request, num_rows=rows))
        found = Search((Candidate(plan.request, plan, forecaster(plan)),), 0, 0)
    plan = _with_prices(models, with_free_proposals(models, found.best.plan), basis, work)
    return replace(found, found=(Candidate(plan.request, plan, found.best.forecast), *found.found[1:]))


def with_prices(models: Models, plan: Plan) -> Plan:
    """A plan for work that is not known, with the prices of this machine where it was measured to choose threads."""
    options = models.resolved.options
    if len(thread_counts(options.threads, on_device=models.resolved.kind is not None)) == 1:
        return plan
    return _with_prices(models, plan, measured_basis(models), Workload(plan.num_rows, *USUAL_TOKENS))


def _with_prices(models: Models, plan: Plan, basis: CostBasis, work: Workload) -> Plan:
    costs = pricing(models, basis, exact=plan.request.exact, sampled=work.sampled)(plan)
    return with_expectations(plan, costs, work)


def unpacked(models: Models, best: Candidate, basis: CostBasis, work: Workload) -> Candidate | None:
    """The same request for the same model in whole layers of the dtype that it computes in; None if it does not fit.

    Its parts are about as large as those of the packed model.
    """
    request = replace(best.plan.request, on_demand=False)
    footprint = models.footprint(request)
    sizes = {part.index: part.made_bytes for part in models.parts}
    parts: list[PlannedPart] = []
    for part in footprint.parts:
        pieces = max(1, round(sizes[part.index] / part.nbytes))
        nbytes = -(-sizes[part.index] // pieces)
        parts += [PlannedPart(len(parts) + piece, part.layer, nbytes, nbytes) for piece in range(pieces)]
    plain = replace(footprint, parts=tuple(parts))
    if models.resolved.method.if_free:  # the forecast of the packed model is without them, too
        request = replace(request, max_draft_tokens=0)
    try:
        plan = make_plan(plain, request)
    except BudgetError:
        return None
    return Candidate(plan.request, plan, forecast_for(models, plan.request, basis, work)(plan))


def _with_exactness_settled(found: Search, models: Models, basis: CostBasis, work: Workload) -> Search:
    """Make the best plan inexact if exact passes would take much longer and nobody asked for them.

    Large jobs stay exact: a job that goes on after a stop must make the same tokens, whatever is left of it.
    """
    best = found.best
    if models.resolved.options.exact is not None or not best.plan.request.exact or work.num_prompts > FEW_PROMPTS:
        return found
    request = replace(best.plan.request, exact=False)
    other = replace(best.plan, request=request)
    forecast = forecast_for(models, request, basis, work)(other)
    price = best.forecast.job_s / forecast.job_s - 1.0 if forecast.job_s else 0.0
    settled = replace(best, plan=replace(best.plan, exact_price=price))
    if price > MOST_EXACT_PRICE:
        settled = Candidate(replace(best.request, exact=False), replace(other, exact_price=price), forecast)
    return replace(found, found=(settled, *found.found[1:]))


def _within(work: Workload, capacity: int) -> Workload:
    """The work that a context of so many tokens allows: longer rows end there."""
    prompt = max(1, min(work.prompt_tokens, capacity - 2))
    return replace(work, prompt_tokens=prompt, new_tokens=max(2, min(work.new_tokens, capacity - prompt)))


def forecast_for(models: Models, request: PlanRequest, basis: CostBasis, work: Workload) -> Forecaster:
    """A forecaster that runs plans in virtual time, on the costs of the basis."""
    return Forecaster(pricing(models, basis, exact=request.exact, sampled=work.sampled), work)


def pricing(models: Models, basis: CostBasis, *, exact: bool, sampled: bool) -> Callable[[Plan], SimCosts]:
    """A function from a plan to the costs of its tasks, by the models' shapes. Plans with equal costs share them."""
    target, draft = shape_of(models.target), None if models.draft is None else shape_of(models.draft)

    @cache
    def priced(tree: bool, cpu_attention: bool) -> SimCosts:
        return prices(
            target,
            draft,
            basis.hardware,
            draft_hardware=basis.draft_hardware,
            exact=exact,
            sampled=sampled,
            tree=tree,
            cpu_attention=cpu_attention,
            acceptance=basis.known.acceptance,
            spread=basis.known.spread,
            decoders=1 if basis.threads is None or models.resolved.kind is not None else basis.threads.weights,
        )

    return lambda plan: priced(plan.proposes_trees, plan.attention_resource == CPU)


def search_space(models: Models, hardware: Hardware, work: Workload) -> SearchSpace:
    """The values to try for each setting; one value if the user fixed it."""
    options = models.resolved.options
    rows = rows_for(work.num_prompts) if options.max_batch is None else (min(options.max_batch, work.num_prompts),)
    can_move = hardware.h2d_bytes_per_s is not None and models.on_demand is None and _can_attend_on_host(models.target)
    places = {"device": (COMPUTE,), "cpu": (CPU,), "auto": (COMPUTE, CPU) if can_move else (COMPUTE,)}
    return SearchSpace(
        rows=rows,
        groups=GROUPS if options.num_groups is None else (options.num_groups,),
        speculations=_speculations(models.resolved),
        attention=places[options.attention],
        micro_batches=MICRO_BATCHES,
        caps=CAPS if options.num_draft_tokens is None else (),
        slots=SLOTS,
        decodings=DECODINGS if any(part.decoded_bytes for part in models.parts if part.layer >= 0) else (),
        prefills=PREFILLS if options.prefill_tokens is None else (),
    )


def _can_attend_on_host(model: Model) -> bool:
    """Whether the model's layers can attend on the CPU, with the KV cache in host memory."""
    with suppress(UnsupportedModelError):
        return bool(model.offload.kept)
    return False


def _speculations(resolved: Resolved) -> tuple[tuple[Speculation | None, int], ...]:
    """(shape, most proposals of a row) to try; shape None: no draft."""
    fixed, asked, shapes = resolved.options.num_draft_tokens, resolved.options.speculation, resolved.method.shapes
    if not shapes or resolved.method.if_free:
        return ((None, 0),)
    wanted = shapes if asked == "auto" else tuple(shape for shape in shapes if shape == asked) or shapes
    most = {Speculation.CHAIN: MAX_CHAIN, Speculation.TREE: MAX_TREE}
    drafting = tuple((shape, most[shape] if fixed is None else fixed) for shape in wanted)
    may_skip_draft = fixed is None and (asked == "auto" or not resolved.method.has_model)
    return ((None, 0), *drafting) if may_skip_draft else drafting


def elsewhere(resolved: Resolved, hardware: Hardware) -> Resolved:
    """The same models on a machine that is not at hand; the device of this machine does not matter."""
    asked = resolved.options.exact
    exact = hardware.h2d_bytes_per_s is None if asked is None else asked
    moved = _on_machine(revise(resolved, device=HOST, exact=exact), hardware)
    is_given = moved.options.device_memory is not None or moved.options.process_memory is not None
    return moved if is_given else replace(moved, budget_bytes=hardware.device_memory or moved.budget_bytes)


def _on_machine(resolved: Resolved, hardware: Hardware) -> Resolved:
    """The same models with the host memory of ``hardware``; None if its device is the host's own memory."""
    if hardware.h2d_bytes_per_s is None:
        return replace(resolved, host_bytes=None)
    return replace(resolved, host_bytes=resolved.options.host_memory or hardware.host_memory)
