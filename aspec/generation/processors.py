"""What a request's parameters do to the logits of a position, by transformers' own logits processors and warpers.

A processor may read all tokens before a position: the prompt, the committed tokens and the proposals on the position's
own path, never a token of another branch. So a draw does not depend on drafts. The order is that of transformers'
``generate``: biases, then the penalties (``penalties.py``), then the other processors; the masks of a grammar follow,
and the sampler's temperature and filters come last. Positions with equally many tokens before them share a call; every
call treats its rows apart.

Rule: a processor is a function of tokens and logits; nothing here remembers a call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from aspec.errors import PromptError
from aspec.generation.grammar.masks import GrammarMasks
from aspec.generation.params import SamplingParams
from aspec.io.pinned import upload

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens [N, T] int64, scores [N, V] float32) -> new scores."""

USES = (
    *("logit_bias", "sequence_bias", "encoder_repetition_penalty", "no_repeat_ngram_size"),
    *(
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "bad_words",
        "min_length",
        "min_new_tokens",
        "forced_bos_token_id",
    ),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    "grammar",
)
"""The fields of SamplingParams that need a processor."""


def needs_processors(params: SamplingParams) -> bool:
    """Whether a request's draws need processors."""
    return any(getattr(params, name) != SamplingParams.__dataclass_fields__[name].default for name in USES)


class Processors:
    """The processors of one request, made for each device at the first use there.

    ``bad_words`` must be among ``bad_words_ids``, too: no tokenizer is known here.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        end_ids: frozenset[int],
        max_length: int,
        vocab_size: int,
        grammar: GrammarMasks | None = None,
    ) -> None:
        """For a request that may grow to ``max_length`` tokens, prompt included; ``grammar``: of its parameters.

        Raises PromptError if a parameter names a token that the target does not know.
        """
        self._params = _within(params, vocab_size)
        self._prompt, self._max_length = list(prompt), max_length
        self._end_ids = sorted(token for token in end_ids if 0 <= token < vocab_size)
        self._vocab_size, self._grammar = vocab_size, grammar
        self._made: dict[torch.device, tuple[list[Processor], list[Processor]]] = {}  # complete ones only

    def bias(self, scores: torch.Tensor, tokens: Sequence[int], paths: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scores [N, V] float32 of the positions after ``tokens`` and each of N paths, from raw logits."""
        return self._apply(self._on(scores.device)[0], scores, tokens, paths)

    def apply(self, scores: torch.Tensor, tokens: Sequence[int], paths: Sequence[Sequence[int]]) -> torch.Tensor:
        """Likewise, from penalised logits; they may be overwritten.

        Where the grammar allows an end and nothing else is left, the text ends: no other parameter holds it open.
        """
        ends = [token for token in self._end_ids if token < scores.shape[-1]]
        of_ends = scores[:, ends]  # a copy
        processed = self._apply(self._on(scores.device)[1], scores, tokens, paths)
        if self._grammar is None or not paths:
            return processed
        forbidden = self._forbidden(self._grammar, tokens, paths, scores)
        processed = processed.masked_fill_(forbidden, -torch.inf)
        if len(empty := (processed.amax(-1) == -torch.inf).nonzero()):
            processed[empty, ends] = of_ends.masked_fill(forbidden[:, ends], -torch.inf)[empty[:, 0]]
        return processed

    def num_allowed(self, tokens: Sequence[int], path: Sequence[int]) -> int:
        """How many leading tokens of ``path`` the request's grammar allows after ``tokens``."""
        if self._grammar is None:
            return len(path)
        return self._grammar.num_allowed(tokens[len(self._prompt) :], path)

    def _forbidden(
        self, grammar: GrammarMasks, tokens: Sequence[int], paths: Sequence[Sequence[int]], scores: torch.Tensor
    ) -> torch.Tensor:
        """[N, V] bool of the tokens that the grammar forbids, for scores [N, V]; a draft may know fewer tokens."""
        packed = grammar.masks(tokens[len(self._prompt) :], paths)
        if scores.device.type == "cpu":
            bits = torch.from_numpy(np.unpackbits(~packed.numpy(), axis=1, bitorder="little")).view(torch.bool)
        else:
            places = torch.arange(8, dtype=torch.uint8, device=scores.device)
            shifted = upload(packed, scores.device)[:, :, None].bitwise_right_shift(places)
            bits = (shifted.bitwise_and_(1) == 0).reshape(len(packed), -1)
        return bits[:, : scores.shape[-1]]

    def _on(self, device: torch.device) -> tuple[list[Processor], list[Processor]]:
        """The processors before and after the penalties; lanes of several threads may ask at once."""
        if device not in self._made:
            prompt = torch.tensor([self._prompt], dtype=torch.int64, device=device)
            ends = torch.tensor(self._end_ids, dtype=torch.int64, device=device)
            made = list(_biases(self._params, prompt)), list(_others(self._params, prompt, ends, self._max_length))
            scores = torch.zeros(1, self._vocab_size, device=device)
            for process in (*made[0], *made[1]):  # some complete themselves in their first call
                process(prompt, scores)
            self._made.setdefault(device, made)
        return self._made[device]

    def _apply(
        self,
        processors: Sequence[Processor],
        scores: torch.Tensor,
        tokens: Sequence[int],
        paths: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        if not processors or not paths:
            return scores
        num_ids, device = scores.shape[-1], scores.device
        if num_ids < self._vocab_size:  # a draft may know fewer tokens than its target
            scores = torch.nn.functional.pad(scores, (0, self._vocab_size - num_ids), value=-torch.inf)
        before = upload(torch.tensor(tokens, dtype=torch.int64), device)
        done = torch.empty_like(scores)
        for depth in sorted({len(path) for path in paths}):
            places = [place for place, path in enumerate(paths) if len(path) == depth]
            own = torch.tensor([list(paths[place]) for place in places], dtype=torch.int64).reshape(len(places), depth)
            ids = torch.cat([before.expand(len(places), -1), upload(own, device)], dim=1)
            index, alone = upload(torch.tensor(places), device), len(places) == len(paths)
            result = scores if alone else scores[index]
            for process in processors:
                result = process(ids, result)
            if alone:
                return result[:, :num_ids]
            done[index] = result
        return done[:, :num_ids]


def _within(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """The parameters without sequences that no text can hold. Raises PromptError for a token that cannot be drawn."""
    drawn = {
        "logit_bias": [token for token, _ in params.logit_bias],
        "forced_bos_token_id": [params.forced_bos_token_id or 0],
        "forced_eos_token_id": params.forced_eos_token_id,
    }
    for name, tokens in drawn.items():
        if max(tokens, default=0) >= vocab_size:
            raise PromptError(
                f"{name} names token {max(tokens)}: expected tokens of the target, 0 .. {vocab_size - 1}. Remove it."
            )
    return replace(
        params,
        bad_words_ids=tuple(word for word in params.bad_words_ids if max(word) < vocab_size),
        sequence_bias=tuple((word, bias) for word, bias in params.sequence_bias if max(word) < vocab_size),
    )


def _biases(params: SamplingParams, prompt: torch.Tensor) -> Iterator[Processor]:
    """The processors before the penalties, in transformers' order."""
    if params.logit_bias:  # not as sequences: transformers 5.17 takes none with token 0
        tokens = torch.tensor([token for token, _ in params.logit_bias], device=prompt.device)
        added = torch.tensor([float(bias) for _, bias in params.logit_bias], device=prompt.device)
        yield lambda _, scores: scores.index_add(1, tokens, added.expand(len(scores), -1))
    if params.sequence_bias:
        yield SequenceBiasLogitsProcessor([[list(tokens), float(bias)] for tokens, bias in params.sequence_bias])
    if params.encoder_repetition_penalty != 1:
        reward = EncoderRepetitionPenaltyLogitsProcessor(float(params.encoder_repetition_penalty), prompt)
        yield lambda ids, scores: torch.cat([reward(ids, row[None]) for row in scores])  # it knows one prompt


def _others(params: SamplingParams, prompt: torch.Tensor, ends: torch.Tensor, max_length: int) -> Iterator[Processor]:
    """The processors after the penalties, in transformers' order; ``ends``: the end tokens, empty if none ends."""
    num_prompt, device, has_ends = prompt.shape[-1], prompt.device, len(ends) > 0
    if params.no_repeat_ngram_size:
        yield NoRepeatNGramLogitsProcessor(int(params.no_repeat_ngram_size))
    if params.encoder_no_repeat_ngram_size:
        yield EncoderNoRepeatNGramLogitsProcessor(int(params.encoder_no_repeat_ngram_size), prompt)
    bad_words = [list(word) for word in params.bad_words_ids if len(word) > 1 or word[0] not in ends.tolist()]
    if bad_words:
        yield NoBadWordsLogitsProcessor(bad_words, None)
    if params.min_new_tokens and has_ends:
        yield MinNewTokensLengthLogitsProcessor(num_prompt, int(params.min_new_tokens), ends, device)
    elif params.min_length and has_ends:
        yield MinLengthLogitsProcessor(int(params.min_length), ends, device)
    if params.forced_bos_token_id is not None:
        yield ForcedBOSTokenLogitsProcessor(int(params.forced_bos_token_id))
    if params.forced_eos_token_id:
        yield ForcedEOSTokenLogitsProcessor(max_length, list(params.forced_eos_token_id), device)
    if params.exponential_decay_length_penalty and has_ends:
        yield _decay(params.exponential_decay_length_penalty, ends, num_prompt)
    if params.suppress_tokens:
        yield SuppressTokensLogitsProcessor(params.suppress_tokens, device)
    if params.begin_suppress_tokens:
        forced = num_prompt <= 1 and params.forced_bos_token_id is not None
        yield SuppressTokensAtBeginLogitsProcessor(params.begin_suppress_tokens, num_prompt + forced, device)


def _decay(penalty: tuple[int, float], ends: torch.Tensor, num_prompt: int) -> Processor:
    """transformers' penalty for length; where its power is beyond a float, the end is certain."""
    raise_ends, most = ExponentialDecayLengthPenalty(penalty, ends, num_prompt), torch.finfo(torch.float32).max

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        try:
            raised = raise_ends(ids, scores).clamp(max=most)
            return torch.where(scores.isfinite(), raised, scores)  # 5.17 makes NaN of a forbidden end
        except OverflowError:
            return scores.index_fill(1, ends, most)

    return process


# -- the filters of sampling --------------------------------------------------------------------------------------

Warper = Callable[[Any, torch.Tensor], torch.Tensor]
"""(not read, scores [N, V] float32) -> scores, -inf for tokens that it removes."""


def warpers_of(params: SamplingParams) -> list[Warper]:
    """The filters of a request, in transformers' order, for scores at its temperature."""
    return [
        *([TopHLogitsWarper(float(params.top_h))] if params.top_h is not None else []),
        *([TopKLogitsWarper(int(params.top_k))] if params.top_k > 0 else []),
        *([TopPLogitsWarper(float(params.top_p))] if params.top_p < 1 else []),
        *([MinPLogitsWarper(float(params.min_p))] if params.min_p > 0 else []),
        *([TypicalLogitsWarper(float(params.typical_p))] if params.typical_p < 1 else []),
        *([EpsilonLogitsWarper(float(params.epsilon_cutoff))] if params.epsilon_cutoff > 0 else []),
        *([_eta(float(params.eta_cutoff))] if params.eta_cutoff > 0 else []),
    ]


def narrows(params: SamplingParams) -> bool:
    """Whether top-k, top-p and min-p are the only filters: they need no scores of tokens that cannot survive."""
    others = params.top_h, params.typical_p, params.epsilon_cutoff, params.eta_cutoff
    return others == (None, 1, 0, 0)


def _eta(cutoff: float) -> Warper:
    """The eta filter on the device of the scores."""
    return lambda _, scores: EtaLogitsWarper(cutoff, device=scores.device)(_, scores)
