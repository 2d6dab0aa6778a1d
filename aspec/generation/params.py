"""Sampling parameters of one request; standard library only, so that the command line starts fast."""

from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real

from aspec.errors import PromptError

MAX_LOGPROBS = 20  # as in OpenAI's and vLLM's interfaces


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw one request's tokens.

    Raises PromptError at construction if a value is not valid. ``stop`` may be given as one string or any
    sequence of strings; it is kept as a tuple.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # of prompt and generated tokens, as in transformers; 1: off
    presence_penalty: float = 0.0  # of generated tokens, as OpenAI defines it; 0: off
    frequency_penalty: float = 0.0  # of generated tokens, per occurrence, as OpenAI defines it; 0: off
    logprobs: int | None = None  # None: off; 0: of the drawn tokens; k: also of the k likeliest tokens at each position
    seed: int = 0  # any integer; taken modulo 2^64
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        for name, (fine, expected) in self._checks().items():
            if not fine:
                default = type(self).__dataclass_fields__[name].default
                raise PromptError(
                    f"{name} must be {expected}; found {getattr(self, name)!r}. Change it, or leave it out for the "
                    f"default, {default!r}."
                )

    def _checks(self) -> dict[str, tuple[bool, str]]:
        """For each field: whether its value is valid, and the expected values in words."""
        top_p, repetition, logprobs = self.top_p, self.repetition_penalty, self.logprobs
        penalty = "between -2 and 2; 0 switches it off"
        return {
            "max_new_tokens": (_whole(self.max_new_tokens, 0), "a whole number, at least 0"),
            "temperature": (_number(self.temperature, 0), "finite and at least 0; 0 is greedy"),
            "top_k": (_whole(self.top_k, 0), "a whole number, at least 0; 0 switches it off"),
            "top_p": (_number(top_p, 0, 1) and top_p > 0, "above 0 and at most 1; 1 switches it off"),
            "min_p": (_number(self.min_p, 0, 1), "between 0 and 1; 0 switches it off"),
            "repetition_penalty": (_number(repetition, 0) and repetition > 0, "finite and above 0; 1 switches it off"),
            "presence_penalty": (_number(self.presence_penalty, -2, 2), penalty),
            "frequency_penalty": (_number(self.frequency_penalty, -2, 2), penalty),
            "logprobs": (
                logprobs is None or _whole(logprobs, 0, MAX_LOGPROBS),
                f"a whole number from 0 to {MAX_LOGPROBS}, or None, which switches it off",
            ),
            "seed": (_whole(self.seed), "a whole number"),
            "stop": (all(isinstance(text, str) and text for text in self.stop), "made of texts that are not empty"),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "true or false"),
        }


def _whole(value: object, low: float = -inf, high: float = inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _number(value: object, low: float = -inf, high: float = inf) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value) and low <= float(value) <= high
