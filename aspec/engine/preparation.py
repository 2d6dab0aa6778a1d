"""Prompts that are known before an engine opens: they are encoded, checked and planned for, and no weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass

from aspec.errors import PromptError
from aspec.generation.params import SamplingParams
from aspec.generation.text.prompts import Prompt, templated
from aspec.generation.text.tokenizer import Tokenizer
from aspec.plan import Workload
from aspec.planning.fit import fit
from aspec.planning.resolve import Resolved


@dataclass(frozen=True, slots=True)
class PreparedPrompts:
    """Prompts as token ids, and models with a context and a workload for them."""

    resolved: Resolved
    tokens: list[list[int]]
    tokenizer: Tokenizer


def prepare_prompts(
    resolved: Resolved,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    raw: bool = False,
    system: str | None = None,
) -> PreparedPrompts:
    """Encode and check prompts; a text is laid out by the chat template, if there is one, unless ``raw``.

    Blocks. Raises PromptError, which names the prompt if there are several, and CheckpointError for the tokenizer.
    """
    tokenizer = Tokenizer.load(resolved.tokenizer)
    as_it_is = raw or not tokenizer.has_chat_template
    tokens: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        try:
            tokens.append(tokenizer.encode_prompt(templated(prompt, as_it_is, system)))
        except PromptError as error:
            if len(prompts) == 1:
                raise
            raise PromptError(f"prompt {index}: {error}") from error
    return PreparedPrompts(_fitted(resolved, tokens, params), tokens, tokenizer)


def _fitted(resolved: Resolved, prompts: Sequence[list[int]], params: SamplingParams) -> Resolved:
    """Set the context and the workload of these prompts. Raises PromptError for one that is too long."""
    lengths, new = [len(tokens) for tokens in prompts], params.max_new_tokens
    mean = max(1, round(sum(lengths) / len(lengths)))
    work = Workload(len(prompts), mean, max(2, new), sampled=params.temperature > 0.0)
    return fit(resolved, work, max(lengths), new)
