"""What a request must be to run: its prompt becomes tokens, its tokens and limits are checked, a sequence is made."""

from dataclasses import dataclass, replace
from functools import partial

from aspec.errors import PromptError
from aspec.generation.grammar.compiler import Grammars
from aspec.generation.params import SamplingParams
from aspec.generation.processors import Processors, needs_processors
from aspec.generation.sampler import Sampler
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.generation.text.prompts import first_bad
from aspec.generation.text.tokenizer import TextStream, Tokenizer
from aspec.io.loop.settling import in_thread, settle
from aspec.models.model import Model
from aspec.planning.fit import too_long


@dataclass(frozen=True, slots=True)
class Admission:
    """Admits requests to one target: its tokenizer, its vocabulary, and a context of ``capacity`` tokens."""

    tokenizer: Tokenizer
    grammars: Grammars
    target: Model
    capacity: int

    def check_tokens(self, tokens: list[int]) -> None:
        """Raise PromptError if a prompt has no tokens, or one that the target has not."""
        if not tokens:
            raise PromptError("the prompt is empty: expected at least one token.")
        if (bad := first_bad(tokens, self.target.vocab_size)) is not None:
            raise PromptError(
                f"the prompt's token {bad[0]} is {bad[1]}: expected a token of the target, 0 .. "
                f"{self.target.vocab_size - 1}. Encode the prompt with the target's own tokenizer."
            )

    async def sequence(
        self, number: int, tokens: list[int], params: SamplingParams, sampler: Sampler, *, scored: bool = False
    ) -> TokenSequence:
        """A new sequence; a thread compiles its grammar.

        Raises PromptError if the target cannot run its tokens, has no room for one more, or the grammar is not valid.
        """
        room = self.capacity - len(tokens)
        most = len(tokens) + room if params.max_length is None else params.max_length
        self.check_tokens(tokens)
        if room < (1 if scored else min(params.max_new_tokens, 1)):
            raise PromptError(too_long(len(tokens), self.capacity, self.target.max_context))
        if params.max_length is not None and len(tokens) >= most:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens; max_length allows {most} of prompt and text together. Give "
                f"max_new_tokens (-n), which has precedence, or shorten the prompt."
            )
        end_ids = frozenset() if params.ignore_eos else frozenset(self.target.end_ids)
        wanted = max(1, params.max_new_tokens) if scored else params.max_new_tokens  # a score comes with a draw
        limit = min(wanted, room, most - len(tokens))
        processors = None
        if needs_processors(params):
            grammar = None
            if params.grammar is not None:
                grammar = await settle(in_thread(partial(self.grammars.masks, params.grammar)))
            words = [ids for text in params.bad_words for ids in self.tokenizer.spellings(text)]
            known = replace(params, bad_words_ids=(*params.bad_words_ids, *map(tuple, words)))
            most = len(tokens) + limit
            processors = Processors(known, tokens, end_ids, most, self.target.vocab_size, grammar)
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
            scored=scored,
        )
