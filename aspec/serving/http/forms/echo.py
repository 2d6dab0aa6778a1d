"""A completion that repeats its prompt, with the prompt's logprobs: how likely a given text is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aspec.generation.sampler import TokenLogprob
from aspec.generation.text.tokenizer import Tokenizer
from aspec.serving.openai_requests import Request
from aspec.serving.openai_responses import completion_logprobs

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")  # of a completion's logprobs


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is repeated."""

    text: str
    tokens: Sequence[int]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, request: Request, tokens: Sequence[int], tokenizer: Tokenizer) -> "Echo":
        """The echo of a request's prompt."""
        return cls(request.prompt if isinstance(request.prompt, str) else tokenizer.decode(tokens), tokens, tokenizer)

    def logprobs(self, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The ``logprobs`` object of the prompt, from the scores of its tokens but the first, which has none."""
        first = self.tokenizer.spell(self.tokens[:1])
        rest = completion_logprobs(scores, self.tokenizer, len(first))
        heads = dict(zip(LISTS, (first, None, None, 0), strict=True))
        return {name: [heads[name], *rest[name]] for name in LISTS}

    def before(self, choice: dict[str, Any], scores: Sequence[TokenLogprob]) -> dict[str, Any]:
        """A whole choice behind the prompt."""
        own = choice["logprobs"]
        if own is not None:
            prompt = self.logprobs(scores)
            length = sum(map(len, prompt["tokens"]))
            own = {**own, "text_offset": [length + offset for offset in own["text_offset"]]}
            own = {name: [*prompt[name], *own[name]] for name in LISTS}
        return {**choice, "text": self.text + choice["text"], "logprobs": own}
