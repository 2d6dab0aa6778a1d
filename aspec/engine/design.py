"""From resolved options to the design of an engine: models are checked, a plan is decided, nothing is allocated."""

from dataclasses import dataclass, replace

from aspec.generation.text.tokenizer import Tokenizer, check_tokenizer, check_vocabulary
from aspec.plan import Plan
from aspec.planning.footprint import Models, read_models
from aspec.planning.memory_check import check_memory
from aspec.planning.resolve import Resolved
from aspec.planning.usual import usual_choice
from aspec.planning.workload import choose, threads_for, with_prices


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
    models, plan = decide(models)
    check_memory(plan, resolved)
    return ResolvedEngine(models if plan.max_draft_tokens else models.without_draft(), tokenizer, plan)


def decide(models: Models) -> tuple[Models, Plan]:
    """The plan: the best of a search if the work is known, otherwise the usual shape, as large as fits.

    The models come with their experts read as the plan says. Raises BudgetError if even the smallest does not fit.
    """
    if models.resolved.options.workload is not None:
        choice = choose(models)
        return choice.models, choice.search.best.plan
    models, plan = usual_choice(models)
    plan = replace(plan, request=replace(plan.request, threads=threads_for(models)))
    return models, with_prices(models, plan)
