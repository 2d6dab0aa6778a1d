"""From folders and options to what an engine will be: the models agree, a plan is decided, nothing is allocated."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from aspec.errors import BudgetError
from aspec.io.layout import Part
from aspec.model import Model
from aspec.needs import NGRAM, PREFILL_TOKENS, Models, folders, is_exact, is_off, read_models, wishes_of
from aspec.options import EngineOptions
from aspec.plan import Plan
from aspec.planner import Needs, Wishes, make_plan
from aspec.planning import plan_workload

# PLANNING
from aspec.text import Tokenizer, check_tokenizer, check_vocabulary

SMALLEST_CONTEXT = 256
SMALLEST_PREFILL = 64
SMALLEST_TREE = 16


@dataclass(frozen=True, slots=True)
class Design:
    """What an engine will be: headers and configs are read, the plan is decided, nothing is allocated."""

    target: Model
    draft: Model | None
    tokenizer: Tokenizer
    plan: Plan
    parts: tuple[Part, ...]
    draft_parts: tuple[Part, ...]
    exact: bool = False
    shared_noise: bool = True
    ngram: bool = False  # the draft needs no model: it looks up what the text has said before
    continuations: int | None = None  # of a lookup; None: as many as a tree is wide


def design(options: EngineOptions) -> Design:
    """Index both checkpoints and decide the plan, from headers alone. Raises UserError."""
    tell = options.progress or (lambda *_: None)
    tell("index", 0, 0)
    models = read_models(options)
    target_folder, draft_folder = folders(options)
    tokenizer = Tokenizer.load(target_folder)
    check_tokenizer(tokenizer, models.target.vocab_size)
    if models.draft is not None and draft_folder is not None:
        check_vocabulary(tokenizer, Tokenizer.load(draft_folder), models.target.vocab_size, models.draft.vocab_size)
    tell("plan", 0, 0)
    plan = decide(options, models)
    draft, draft_parts = (models.draft, models.draft_parts) if plan.max_draft_tokens else (None, ())
    return Design(models.target, draft, tokenizer, plan, models.parts, draft_parts, **_method(options))


def decide(options: EngineOptions, models: Models) -> Plan:
    """The plan: found by a search where the work is known, otherwise the first of usual shapes that fits.

    Raises BudgetError if even the smallest does not fit.
    """
    wishes = wishes_of(options, models)
    if options.workload is not None:
        with suppress(BudgetError):  # what is open but not searched for, such as the context, may have to shrink
            return plan_workload(options, models, wishes).best.plan
    return _plan(options, wishes, models.needs)


def _plan(options: EngineOptions, wishes: Wishes, needs: Callable[[Wishes], Needs]) -> Plan:
    """What was left open shrinks until the budget holds it: rows first, then context, prefill items and drafts.

    Raises BudgetError if even the smallest does not fit.
    """
    for rows in _halved(wishes.num_rows, options.max_batch, wishes.num_groups):
        for capacity in _halved(wishes.capacity, options.max_context, SMALLEST_CONTEXT):
            longest = min(options.prefill_tokens or PREFILL_TOKENS, rows * capacity)
            for prefill in _halved(longest, options.prefill_tokens, SMALLEST_PREFILL):
                for most in _halved(wishes.max_draft_tokens, options.num_draft_tokens, SMALLEST_TREE):
                    wished = replace(
                        wishes, num_rows=rows, capacity=capacity, prefill_tokens=prefill, max_draft_tokens=most
                    )
                    try:
                        return make_plan(needs(wished), wished)
                    except BudgetError as error:
                        refusal = error
    raise refusal


def _halved(start: int, fixed: int | None, least: int) -> list[int]:
    """``start`` and its halves down to ``least``; only itself where the user has fixed it."""
    choices = [start]
    while fixed is None and choices[-1] // 2 >= least:
        choices.append(choices[-1] // 2)
    return choices


def _method(options: EngineOptions) -> dict[str, Any]:
    """How the draft proposes."""
    ngram = options.draft == NGRAM and not is_off(options)
    one = 1 if options.speculation == "chain" else None
    return {"exact": is_exact(options), "shared_noise": options.shared_noise, "ngram": ngram, "continuations": one}
