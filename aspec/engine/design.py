"""From resolved options to the design of an engine: models are checked, a plan is decided, nothing is allocated."""

from contextlib import suppress
from dataclasses import dataclass, replace

from aspec.errors import BudgetError
from aspec.generation.tokenizer import Tokenizer, check_tokenizer, check_vocabulary
from aspec.plan import Plan, PlanRequest
from aspec.planning.footprint import PREFILL_TOKENS, Models, read_models, request_for
from aspec.planning.placement import make_plan
from aspec.planning.resolve import Resolved
from aspec.planning.workload import plan_workload

SMALLEST_CONTEXT = 256
SMALLEST_PREFILL = 64
SMALLEST_TREE = 16


@dataclass(frozen=True, slots=True)
class ResolvedEngine:
    """The design of an engine: headers and configs are read, the plan is decided, nothing is allocated."""

    models: Models  # without the draft if the plan proposes nothing
    tokenizer: Tokenizer
    plan: Plan


def design(resolved: Resolved) -> ResolvedEngine:
    """Index both checkpoints and decide the plan, from headers alone. Raises UserError."""
    tell = resolved.options.progress or (lambda *_: None)
    tell("index", 0, 0)
    models = read_models(resolved)
    tokenizer = Tokenizer.load(resolved.tokenizer)
    check_tokenizer(tokenizer, models.target.vocab_size)
    if models.draft is not None and resolved.draft is not None:
        own = Tokenizer.load(resolved.draft)
        check_vocabulary(tokenizer, own, models.target.vocab_size, models.draft.vocab_size)
    tell("plan", 0, 0)
    plan = decide(models)
    return ResolvedEngine(models if plan.max_draft_tokens else models.without_draft(), tokenizer, plan)


def decide(models: Models) -> Plan:
    """The plan: the best of a search if the workload is known, otherwise the first of the usual shapes that fits.

    Raises BudgetError if even the smallest does not fit.
    """
    request = request_for(models)
    if models.resolved.options.workload is not None:
        with suppress(BudgetError):  # a free value outside of the search, such as the context, may have to shrink
            return plan_workload(models, request).best.plan
    return _shrunk(models, request)


def _shrunk(models: Models, request: PlanRequest) -> Plan:
    """Halve the free values until the plan fits: drafts first, then prefill items, then the context, rows last.

    Raises BudgetError if even the smallest does not fit.
    """
    options = models.resolved.options
    for rows in _halved(request.num_rows, options.max_batch, request.num_groups):
        for capacity in _halved(request.capacity, options.max_context, SMALLEST_CONTEXT):
            longest = min(options.prefill_tokens or PREFILL_TOKENS, rows * capacity)
            for prefill in _halved(longest, options.prefill_tokens, SMALLEST_PREFILL):
                for most in _halved(request.max_draft_tokens, options.num_draft_tokens, SMALLEST_TREE):
                    smaller = replace(
                        request, num_rows=rows, capacity=capacity, prefill_tokens=prefill, max_draft_tokens=most
                    )
                    try:
                        return make_plan(models.footprint(smaller), smaller)
                    except BudgetError as error:
                        refusal = error
    raise refusal


def _halved(start: int, fixed: int | None, least: int) -> list[int]:
    """``start`` and its halves down to ``least``; only ``start`` if the user has fixed the value."""
    choices = [start]
    while fixed is None and choices[-1] // 2 >= least:
        choices.append(choices[-1] // 2)
    return choices
