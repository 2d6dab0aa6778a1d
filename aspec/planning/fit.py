"""What an engine must hold for the prompts at hand: their context, and the work that a plan is searched for.

The checks need a model's configuration only: no weight is read for a prompt that does not fit.
"""

import warnings

from aspec.errors import PromptError
from aspec.models.configuration.context import ContextLimit, context_limit
from aspec.models.skeleton import load_config
from aspec.plan import Workload
from aspec.planning.resolve import Resolved, revise


def fit(resolved: Resolved, work: Workload, longest: int, new_tokens: int) -> Resolved:
    """The models with a context for the ``longest`` prompt and ``new_tokens`` after it, planned for ``work``.

    What the context cuts off is told in a warning. Raises PromptError for a prompt that does not fit.
    """
    options, limit = resolved.options, most_context(resolved)
    wanted = options.max_context or max(2, longest + new_tokens)
    context = wanted if limit is None else min(wanted, limit)
    if longest + min(new_tokens, 1) > context:
        raise PromptError(too_long(longest, context, context_of(resolved).trained))
    if longest + new_tokens > context:
        warnings.warn(
            f"{new_tokens} new tokens were asked for; after the longest prompt, of {longest} tokens, the context of "
            f"{context} has room for {context - longest}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return revise(resolved, max_context=context, workload=work)


def most_context(resolved: Resolved) -> int | None:
    """The most tokens of a sequence of the target, which is more if the user has asked for more; None: any number."""
    return context_of(resolved).most(resolved.asked_context)


def context_of(resolved: Resolved) -> ContextLimit:
    """The limits of the target, by its configuration."""
    return context_limit(load_config(resolved.target).get_text_config())


def too_long(tokens: int, context: int, limit: int | None) -> str:
    """The message for a prompt that leaves no room in its context."""
    return (
        f"the prompt has {tokens} tokens; the context holds {context}, and at least one must stay free to generate. "
        f"Shorten the prompt or raise --max-context (the model allows {limit or 'any'})."
    )
