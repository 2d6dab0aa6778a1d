"""How a text is drawn where the user has not said: as the checkpoint does, otherwise greedily."""

from collections.abc import Mapping
from typing import Any

from aspec.generation.params import SamplingParams

TAKEN_FROM_CHECKPOINT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_params(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """Flags first, then generation_config.json, then greedy."""
    values = dict(given)
    sampled = bool(defaults.get("do_sample"))
    for name in TAKEN_FROM_CHECKPOINT:
        if values[name] is None:
            applies = sampled or name == "repetition_penalty"  # which transformers applies to greedy text as well
            values[name] = defaults.get(name) if applies else None
    if values["temperature"] is None and sampled:
        values["temperature"] = 1.0
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})
