"""What a request must be to run: its prompt becomes tokens, its tokens and limits are checked, a sequence is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from aspec.errors import PromptError
from aspec.generation.params import SamplingParams
from aspec.generation.processors import Processors, needs_processors
from aspec.generation.sampler import Sampler
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.generation.time_limit import TimeLimit
from aspec.generation.tokenizer import TextStream, Tokenizer
from aspec.models.model import Model

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text, token ids, or a chat as messages with role and content, which is a text or a list of text parts."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Admits requests to one target: its tokenizer, its vocabulary, and a context of ``capacity`` tokens."""

    tokenizer: Tokenizer
    target: Model
    capacity: int

    def ready(self, prompt: Prompt) -> list[int] | None:
        """The tokens of a prompt of token ids; None for a text or a chat, which ``encode`` encodes."""
        if isinstance(prompt, str) or any(isinstance(one, dict) for one in prompt):
            return None
        return [token for token in prompt if isinstance(token, int)]

    def encode(self, prompt: Prompt, limit: TimeLimit) -> list[int]:
        """The tokens of a text or a chat. Blocks. Raises PromptError, also if ``limit`` ends it."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat([message for message in prompt if isinstance(message, dict)], limit=limit)

    def sequence(self, number: int, tokens: list[int], params: SamplingParams, sampler: Sampler) -> TokenSequence:
        """A new sequence. Raises PromptError if the target cannot run its tokens, or has no room for one more."""
        room = self.capacity - len(tokens)
        most = self.capacity if params.max_length is None else params.max_length
        if not tokens:
            raise PromptError("the prompt is empty: expected at least one token; give --prompt some text.")
        if max(tokens) >= self.target.vocab_size or min(tokens) < 0:
            raise PromptError(
                f"the prompt holds token {max(tokens)}; the target knows 0 .. {self.target.vocab_size - 1}."
            )
        if room < 1:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens; the context holds {self.capacity}, and at least one must "
                f"stay free to generate. Shorten the prompt or raise --max-context (the model allows "
                f"{self.target.max_context or 'any'})."
            )
        if len(tokens) >= most:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens; max_length allows {most} of prompt and text together. Give "
                f"max_new_tokens (-n), which has precedence, or shorten the prompt."
            )
        end_ids = frozenset() if params.ignore_eos else frozenset(self.target.end_ids)
        limit = min(params.max_new_tokens, room, most - len(tokens))
        processors = None
        if needs_processors(params):
            words = [ids for text in params.bad_words for ids in self.tokenizer.spellings(text)]
            known = replace(params, bad_words_ids=(*params.bad_words_ids, *map(tuple, words)))
            processors = Processors(known, tokens, end_ids, len(tokens) + limit, self.target.vocab_size)
        return TokenSequence(
            id=number,
            tokens=tokens,
            num_prompt=len(tokens),
            params=params,
            sampler=sampler,
            text=TextStream(self.tokenizer, stop=params.stop),
            end_ids=end_ids,
            max_new_tokens=limit,
            processors=processors,
        )
