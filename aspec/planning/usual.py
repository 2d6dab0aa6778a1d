"""The plan of an engine whose work is not known: the usual shape, shrunk until it fits; and what every plan gets free.

A row beyond the first, that the user has not asked for, is taken only if it costs almost no residency: layers that
stream because of it slow every pass, and its KV helps only a second stream.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from aspec.errors import BudgetError, UserError
from aspec.plan import Plan, PlanRequest, Speculation
from aspec.planning.footprint import MAX_TREE, PREFILL_TOKENS, Models, request_for
from aspec.planning.placement import make_plan
from aspec.planning.search import TREE_ROWS
from aspec.profiling.model_shape import touched_experts

SMALLEST_CONTEXT = 256
SMALLEST_PREFILL = 64
SMALLEST_TREE = 16
MOST_CHOSEN = 0.8  # of a layer's experts, by the next tokens of all rows, for which they are read on demand
FREE_SHARE = 0.02  # of the stream: the bytes by which proposals that nobody asked for may lengthen a pass
ROWS_SHARE = 0.05  # of the stream: the bytes by which rows that nobody asked for may lengthen a pass


def usual_plan(models: Models) -> Plan:
    """The plan of the usual shape that fits. Raises BudgetError if even the smallest does not fit."""
    return with_free_proposals(models, _usual_shape(models))


def usual_choice(models: Models) -> tuple[Models, Plan]:
    """The usual plan, and the models with their experts read as it says: on demand where whole layers would stream.

    That is left to the options if they say it, and for rows that choose most experts of a layer together. Raises
    BudgetError if no plan fits.
    """
    whole: Plan | None = None
    with suppress(BudgetError):
        whole = usual_plan(models)
    open_ = models.resolved.options.experts == "auto" and (whole is None or whole.streamed_bytes > 0)
    on_demand = _on_demand(models) if open_ else None
    return on_demand or (models, whole or usual_plan(models))  # which raises


def _on_demand(models: Models) -> tuple[Models, Plan] | None:
    """The same with experts that are read on demand; None if that is not possible, or of little use."""
    try:
        reading = models.reading_experts(on_demand=True)
        plan = usual_plan(reading)
    except UserError:
        return None
    return None if choose_most(reading, plan.num_rows) else (reading, plan)


def choose_most(reading: Models, num_rows: int) -> bool:
    """Whether so many rows choose most experts of a layer together; ``reading`` them on demand."""
    shape = None if reading.on_demand is None else reading.on_demand.shape
    assert shape is not None, "its experts are in no part"
    number = max(shape.num_experts)
    return touched_experts(number, shape.top_k, num_rows) > MOST_CHOSEN * number


def with_free_proposals(models: Models, plan: Plan) -> Plan:
    """The plan with proposals from the rows' own text, if nobody decided on proposals and they cost almost nothing.

    While a text does not repeat itself nothing is proposed, so only their memory could cost time. The largest trees are
    taken whose memory streams the fewest bytes.
    """
    if not models.resolved.method.if_free or plan.num_rows > TREE_ROWS:
        return plan
    proposing = []
    for most in _halved(MAX_TREE, None, SMALLEST_TREE):
        request = replace(plan.request, speculation=Speculation.TREE, max_draft_tokens=most, from_text=True)
        with suppress(BudgetError):
            made = make_plan(models.footprint(request), request)
            proposing.append(replace(made, exact_price=plan.exact_price))
    most_bytes = int(plan.streamed_bytes * (1 + FREE_SHARE))
    free = [one for one in proposing if one.streamed_bytes <= most_bytes and one.num_slots >= plan.num_slots]
    return min(free, key=lambda one: one.streamed_bytes, default=plan)


def _usual_shape(models: Models) -> Plan:
    request, options = request_for(models), models.resolved.options
    if options.max_batch is not None:
        return shrunk(models, request)
    alone = shrunk(models, replace(request, num_rows=request.num_groups))
    most_bytes = int(alone.streamed_bytes * (1 + ROWS_SHARE))  # 0 if all layers are resident
    for rows in _halved(request.num_rows, None, alone.num_rows + 1):
        wider = replace(alone.request, num_rows=rows)
        with suppress(BudgetError):
            if (plan := make_plan(models.footprint(wider), wider)).streamed_bytes <= most_bytes:
                return plan
    return alone


def shrunk(models: Models, request: PlanRequest) -> Plan:
    """Halve the free values until the plan fits: drafts first, then prefill items, then the context, rows last.

    Raises BudgetError if even the smallest does not fit.
    """
    refusal: BudgetError | None = None
    for smaller in _smaller(models, request):
        try:
            return make_plan(models.footprint(smaller), smaller)
        except BudgetError as error:
            refusal = error
    assert refusal is not None
    raise refusal


def _smaller(models: Models, request: PlanRequest) -> Iterator[PlanRequest]:
    """The request with every combination of halved free values, the most wanted first."""
    options = models.resolved.options
    for rows in _halved(request.num_rows, options.max_batch, request.num_groups):
        for capacity in _halved(request.capacity, options.max_context, SMALLEST_CONTEXT):
            longest = min(options.prefill_tokens or PREFILL_TOKENS, rows * capacity)
            for prefill in _halved(longest, options.prefill_tokens, SMALLEST_PREFILL):
                for most in _halved(request.max_draft_tokens, options.num_draft_tokens, SMALLEST_TREE):
                    yield replace(
                        request, num_rows=rows, capacity=capacity, prefill_tokens=prefill, max_draft_tokens=most
                    )


def _halved(start: int, fixed: int | None, least: int) -> list[int]:
    """``start`` and its halves down to ``least``; only ``start`` if the user has fixed the value."""
    choices = [start]
    while fixed is None and choices[-1] // 2 >= least:
        choices.append(choices[-1] // 2)
    return choices
