"""Sampling parameters of one request; standard library only, so that the command line starts fast."""

from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real

from aspec.errors import PromptError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw one request's tokens.

    Raises PromptError at construction where a value makes no sense. ``stop`` may be given as one string or any
    sequence of strings; it is kept as a tuple.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    seed: int = 0  # any integer; taken modulo 2^64
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        max_new_tokens, temperature = self.max_new_tokens, self.temperature
        checks = {
            "max_new_tokens": (_whole(max_new_tokens) and max_new_tokens >= 0, "a whole number, at least 0"),
            "temperature": (_number(temperature) and temperature >= 0, "finite and at least 0; 0 is greedy"),
            "top_k": (
                _whole(self.top_k) and self.top_k >= 0,
                "a whole number, at least 0; 0 switches it off",
            ),
            "top_p": (
                _number(self.top_p) and 0 < self.top_p <= 1,
                "above 0 and at most 1; 1 switches it off",
            ),
            "min_p": (_number(self.min_p) and 0 <= self.min_p <= 1, "between 0 and 1; 0 switches it off"),
            "seed": (_whole(self.seed), "a whole number"),
            "stop": (
                all(isinstance(text, str) and text for text in stop),
                "made of texts that are not empty",
            ),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "true or false"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                default = type(self).__dataclass_fields__[name].default
                raise PromptError(
                    f"{name} must be {expected}; found {getattr(self, name)!r}. Change it, or leave it out for the "
                    f"default, {default!r}."
                )


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
