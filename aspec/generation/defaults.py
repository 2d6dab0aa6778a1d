"""Default sampling parameters: the user's, otherwise the checkpoint's, otherwise greedy."""

from collections.abc import Mapping
from typing import Any

from aspec.generation.params import SamplingParams

TAKEN_FROM_CHECKPOINT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_params(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """Values of the flags first, then of generation_config.json (``defaults``), then greedy. May raise PromptError."""
    values = dict(given)
    sampled = bool(defaults.get("do_sample"))
    for name in TAKEN_FROM_CHECKPOINT:
        if values[name] is None:
            applies = sampled or name == "repetition_penalty"  # transformers applies it to greedy text too
            values[name] = defaults.get(name) if applies else None
    if values["temperature"] is None and sampled:
        values["temperature"] = 1.0
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})
