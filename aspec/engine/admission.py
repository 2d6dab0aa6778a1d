"""What a request must be to run: its prompt becomes tokens, its tokens and limits are checked, a sequence is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from aspec.errors import PromptError
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.generation.time_limit import TimeLimit
from aspec.generation.tokenizer import TextStream, Tokenizer
from aspec.models.model import Model
from aspec.planning.fit import too_long

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""A text, token ids, or a chat as role and content messages."""


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
        if not tokens:
            raise PromptError("the prompt is empty: expected at least one token; give --prompt some text.")
        if max(tokens) >= self.target.vocab_size or min(tokens) < 0:
            raise PromptError(
                f"the prompt holds token {max(tokens)}; the target knows 0 .. {self.target.vocab_size - 1}."
            )
        if room < min(params.max_new_tokens, 1):
            raise PromptError(too_long(len(tokens), self.capacity, self.target.max_context))
        return TokenSequence(
            id=number,
            tokens=tokens,
            num_prompt=len(tokens),
            params=params,
            sampler=sampler,
            text=TextStream(self.tokenizer, stop=params.stop),
            end_ids=frozenset() if params.ignore_eos else frozenset(self.target.end_ids),
            max_new_tokens=min(params.max_new_tokens, room),
        )
