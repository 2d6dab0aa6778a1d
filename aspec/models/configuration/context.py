"""How many tokens a model can read: the length it was made for, and the length that its positions allow.

Configurations write the length of scaled rotary positions in several ways, and transformers has no rule:

- yarn: ``factor`` times the original length, which is ``original_max_position_embeddings`` or, without that key, the
  whole ``max_position_embeddings``. Some checkpoints write the product into ``max_position_embeddings`` too
  (DeepSeek-V3, gpt-oss), others keep the original length there (Qwen), so the larger one counts.
- linear: the same where the original length is given; otherwise ``factor`` times ``max_position_embeddings``, as vLLM
  reads it, unless only some layer types are scaled (Gemma 3 writes the product).
- llama3, proportional, default: ``max_position_embeddings`` is the length.
- longrope, dynamic: the angles of all tokens change beyond the original length, so cached keys would become wrong.
  aspec runs these models up to the original length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

ORIGINAL = "original_max_position_embeddings"
CHANGING = frozenset({"longrope", "dynamic"})
"""Rotary types whose angles change beyond the original length."""


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """The most tokens of a row; None: no limit."""

    trained: int | None  # by the configuration
    possible: int | None  # beyond it, positions have no embedding, or other angles

    def most(self, asked: int | None) -> int | None:
        """The limit for a user who has asked for ``asked`` tokens; None: the user has not."""
        return self.trained if asked is None else self.possible


def rope_entries(text: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """The parameters of rotary positions: one entry for all layers, or one per layer type; empty without any."""
    rope = getattr(text, "rope_parameters", None) or {}
    entries = [rope, *rope.values()]
    return [entry for entry in entries if isinstance(entry, dict) and _type(entry) is not None]


def rope_types(text: PreTrainedConfig) -> set[str]:
    """The types of rotary positions in a configuration, over all its layer types."""
    return {str(_type(entry)) for entry in rope_entries(text)}


def context_limit(text: PreTrainedConfig) -> ContextLimit:
    """The limits of a model by its configuration."""
    entries, written = rope_entries(text), _length(getattr(text, "max_position_embeddings", None))
    original = _length(getattr(text, ORIGINAL, None))
    if rope_types(text) & CHANGING:
        lengths = [original, written, *(_length(entry.get(ORIGINAL)) for entry in entries)]
        capped = min(filter(None, lengths), default=None)
        return ContextLimit(capped, capped)
    scaled = [_scaled(entry, written, original, alone=len(entries) == 1) for entry in entries]
    trained = max(filter(None, [written, *scaled]), default=None)
    return ContextLimit(trained, None if entries else trained)  # rotary angles have no end, a table has


def _scaled(entry: Mapping[str, Any], written: int | None, original: int | None, *, alone: bool) -> int | None:
    """The scaled length of one entry; None if it scales nothing, or does not say how far."""
    kind, factor = _type(entry), entry.get("factor")
    outside = original if alone else None  # transformers prefers it then
    start = outside or _length(entry.get(ORIGINAL)) or (written if kind == "yarn" or alone else None)
    if kind not in ("yarn", "linear") or start is None or not isinstance(factor, int | float):
        return None
    return _length(start * factor)


def _type(entry: Mapping[str, Any]) -> Any:
    return entry.get("rope_type", entry.get("type"))


def _length(value: object) -> int | None:
    """A number of tokens; None for anything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 1
    return int(value) if known else None  # type: ignore[call-overload]  # known: a finite number
