"""Sampling parameters of one request; standard library only."""

from dataclasses import dataclass

from aspec.errors import PromptError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw; raises PromptError at construction where a value makes no sense."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 0, "at least 0"),
            "temperature": (0 <= self.temperature < float("inf"), "at least 0 and finite; 0 is greedy"),
            "top_k": (self.top_k >= 0, "at least 0; 0 switches it off"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1; 1 switches it off"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1; 0 switches it off"),
            "stop": (all(self.stop), "no empty string"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise PromptError(f"{name} must be {expected}, found {getattr(self, name)!r}.")
