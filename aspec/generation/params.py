"""Sampling parameters of one request; standard library only, so that the command line starts fast."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

from aspec.errors import PromptError
from aspec.generation.grammar.grammar import Grammar

MAX_LOGPROBS = 20  # as in OpenAI's and vLLM's interfaces
MAX_BIAS = 100.0  # of ``logit_bias``, as in OpenAI's interface
LARGEST = 1e30  # of a sequence's bias: a larger one may make a float32 logit infinite

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw one request's tokens.

    Raises PromptError at construction if a value is not valid. ``stop`` may be given as one string or any sequence of
    strings, ``logit_bias`` as a mapping; all collections are kept as tuples. A field that transformers'
    GenerationConfig has, too, means what it means there.
    """

    max_new_tokens: int = 128
    max_length: int | None = None  # most tokens of prompt and text together; None: the context
    min_new_tokens: int = 0  # no end token before so many generated tokens
    min_length: int = 0  # likewise of prompt and text together
    temperature: float = 0.0  # 0: greedy
    top_h: float | None = None  # keep the likeliest tokens up to this share of the entropy; None: off
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    typical_p: float = 1.0  # 1: off
    epsilon_cutoff: float = 0.0  # 0: off
    eta_cutoff: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # of prompt and generated tokens, as in transformers; 1: off
    encoder_repetition_penalty: float = 1.0  # of tokens that the prompt lacks; 1: off
    presence_penalty: float = 0.0  # of generated tokens, as OpenAI defines it; 0: off
    frequency_penalty: float = 0.0  # of generated tokens, per occurrence, as OpenAI defines it; 0: off
    no_repeat_ngram_size: int = 0  # no n-gram of prompt and text occurs twice; 0: off
    encoder_no_repeat_ngram_size: int = 0  # no n-gram of the prompt occurs in the text; 0: off
    bad_words_ids: tuple[TokenIds, ...] = ()  # sequences of tokens that the text never completes
    bad_words: tuple[str, ...] = ()  # likewise as texts, alone and after a space, as in vLLM
    suppress_tokens: TokenIds = ()  # never drawn
    begin_suppress_tokens: TokenIds = ()  # never drawn as the first token
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, addition to its logit), as OpenAI defines it
    sequence_bias: tuple[tuple[TokenIds, float], ...] = ()  # (tokens, addition to the logit of the last after the rest)
    forced_bos_token_id: int | None = None  # the first token after a prompt of one token
    forced_eos_token_id: TokenIds = ()  # the token at the limit of the length is one of these
    exponential_decay_length_penalty: tuple[int, float] | None = None  # (tokens before it, factor) in favour of the end
    logprobs: int | None = None  # None: off; 0: of the drawn tokens; k: also of the k likeliest tokens at each position
    seed: int = 0  # any integer; taken modulo 2^64
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None  # what the text must match; the end tokens come where it is complete

    def __post_init__(self) -> None:
        for field in fields(self):
            fine, expected = CHECKS[field.name]
            value = getattr(self, field.name)
            if isinstance(field.default, tuple) or field.name in PAIRS:
                value = field.default if value is None else _as_tuples(value)
                object.__setattr__(self, field.name, value)
            if not fine(value):
                raise PromptError(
                    f"{field.name} must be {expected}; found {reprlib.repr(value)}. Change it, or leave it out for the "
                    f"default, {field.default!r}."
                )
        if self.grammar is not None and self.ignore_eos:
            raise PromptError("ignore_eos has no meaning for a text that is complete where its grammar is. Remove it.")


def _as_tuples(value: object, depth: int = 3) -> object:
    """A collection as a tuple, also inside; a mapping as its sorted pairs, and a single value as a tuple of one.

    The keys of a JSON object are texts: those of digits become numbers.
    """
    if isinstance(value, Mapping):
        pairs = [(int(key) if isinstance(key, str) and key.isdecimal() else key, one) for key, one in value.items()]
        return tuple(sorted(pairs, key=lambda pair: (str(type(pair[0])), pair[0])))
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return (value,)
    inside = depth > 1
    return tuple(_as_tuples(one, depth - 1) if inside and isinstance(one, list | tuple) else one for one in value)


# -- the values of each field ----------------------------------------------------------------------------------


def _whole(value: object, low: float = -inf, high: float = inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _number(value: object, low: float = -inf, high: float = inf) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value) and low <= float(value) <= high


def _count(value: object) -> bool:
    return _whole(value, 0)


def _positive(value: object, high: float = inf) -> bool:
    return _number(value, 0, high) and value != 0


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _tokens(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_count, value))


def _sequence(value: Any) -> bool:
    return _tokens(value) and len(value) > 0


def _decay(value: Any) -> bool:
    return value is None or (len(value) == 2 and _count(value[0]) and _positive(value[1]))


def _biases(value: Any, fine: Callable[[object], bool], most: float) -> bool:
    pairs = all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
    return pairs and all(fine(tokens) and _number(bias, -most, most) for tokens, bias in value)


Check = tuple[Callable[[Any], bool], str]
"""Whether a value is valid, and the expected values in words."""

PAIRS = ("exponential_decay_length_penalty",)  # None, or a collection
COUNT: Check = (_count, "a whole number, at least 0")
OFF_COUNT: Check = (_count, "a whole number, at least 0; 0 switches it off")
FACTOR: Check = (_positive, "finite and above 0; 1 switches it off")
PENALTY: Check = (lambda value: _number(value, -2, 2), "between -2 and 2; 0 switches it off")
SHARE: Check = (lambda value: _positive(value, 1), "above 0 and at most 1; 1 switches it off")
CUTOFF: Check = (lambda value: _number(value, 0, 1) and value < 1, "at least 0 and below 1; 0 switches it off")
SUPPRESSED: Check = (lambda value: all(map(_whole, value)), "a list of token ids")  # -1 is none, as in transformers
TEXTS: Check = (lambda value: all(isinstance(text, str) and text for text in value), "made of texts that are not empty")

CHECKS: Mapping[str, Check] = {
    "max_new_tokens": COUNT,
    "max_length": (lambda value: value is None or _count(value), "a whole number, at least 0, or None for no limit"),
    "min_new_tokens": COUNT,
    "min_length": COUNT,
    "temperature": (lambda value: _number(value, 0), "finite and at least 0; 0 is greedy"),
    "top_h": (lambda value: value is None or _positive(value, 1), "above 0 and at most 1; None switches it off"),
    "top_k": OFF_COUNT,
    "top_p": SHARE,
    "min_p": (lambda value: _number(value, 0, 1), "between 0 and 1; 0 switches it off"),
    "typical_p": SHARE,
    "epsilon_cutoff": CUTOFF,
    "eta_cutoff": CUTOFF,
    "repetition_penalty": FACTOR,
    "encoder_repetition_penalty": FACTOR,
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "no_repeat_ngram_size": OFF_COUNT,
    "encoder_no_repeat_ngram_size": OFF_COUNT,
    "bad_words_ids": (lambda value: all(map(_sequence, value)), "a list of lists of token ids, none of them empty"),
    "bad_words": TEXTS,
    "suppress_tokens": SUPPRESSED,
    "begin_suppress_tokens": SUPPRESSED,
    "logit_bias": (
        lambda value: _biases(value, _count, MAX_BIAS),
        f"a mapping from token ids to numbers between {-MAX_BIAS:g} and {MAX_BIAS:g}",
    ),
    "sequence_bias": (
        lambda value: _biases(value, _sequence, LARGEST),
        f"a list of pairs, each a list of token ids and a number between {-LARGEST:g} and {LARGEST:g}",
    ),
    "forced_bos_token_id": (lambda value: value is None or _count(value), "a token id"),
    "forced_eos_token_id": (_tokens, "a token id, or a list of them"),
    "exponential_decay_length_penalty": (_decay, "a pair, a number of tokens and a factor above 0"),
    "logprobs": (
        lambda value: value is None or _whole(value, 0, MAX_LOGPROBS),
        f"a whole number from 0 to {MAX_LOGPROBS}, or None, which switches it off",
    ),
    "seed": (_whole, "a whole number"),
    "stop": TEXTS,
    "ignore_eos": (_flag, "true or false"),
    "grammar": (lambda value: value is None or isinstance(value, Grammar), "a Grammar, or None, which switches it off"),
}
