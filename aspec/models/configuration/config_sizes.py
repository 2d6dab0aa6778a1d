"""Sizes in a config.json that no model has: they are refused before transformers builds lists and modules of that size.

transformers trusts a configuration: a billion layers are a list of a billion names, then a billion modules.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from aspec.errors import CheckpointError, shown
from aspec.io.checkpoint import Checkpoint
from aspec.io.hub import known_as
from aspec.units import format_bytes

LIMITS = (
    (re.compile(r"(layers?|blocks)$"), 1024),  # modules of a list: the deepest models have less than 200
    (re.compile(r"^(num|n)_(?!embd|inner|positions|ctx|vocab)"), 1 << 16),  # heads, experts, groups, labels
    (re.compile(""), 1 << 60),  # anything else: sums of it must fit a tensor's 64 bits
)
"""Pattern of a key -> the largest whole number that it may have; the first pattern that is found counts."""

MAX_TABLE_BYTES = 1 << 30  # of the tables that a model computes, such as rotary frequencies and causal masks


def check_numbers(path: Path, raw: Any) -> None:
    """Raise CheckpointError if a whole number in a config.json is absurd."""
    for key, number in _numbers(raw):
        limit = next(limit for pattern, limit in LIMITS if pattern.search(key))
        if abs(number) > limit:
            raise CheckpointError(
                f"{path}: expected {shown(key)} to be at most {limit}, found {shown(number)}. Correct the file or "
                f"fetch it again."
            )


def _numbers(raw: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers of a JSON value, each with the key nearest above it."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from _numbers(value, name)
    elif isinstance(raw, list):
        for value in raw:
            yield from _numbers(value, key)
    elif isinstance(raw, int):
        yield key, raw


def check_layers(num_layers: int, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a configuration has more layers than tensors are stored."""
    if num_layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"{known_as(checkpoint.folder)}: config.json has {num_layers} layers, expected at least one tensor of "
            f"each, found {len(checkpoint.tensors)} stored tensors. config.json and the weights do not belong together."
        )


def check_tables(model: PreTrainedModel) -> None:
    """Raise CheckpointError if the tables that a model on meta would compute are absurdly large."""
    sizes = {name: tensor.nbytes for name, tensor in model.named_buffers()}
    if (total := sum(sizes.values())) > MAX_TABLE_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise CheckpointError(
            f"{model.config.name_or_path}: config.json asks for computed tables of {format_bytes(total)}, expected at "
            f"most {format_bytes(MAX_TABLE_BYTES)}; the largest is {largest}. Correct its sizes or fetch it again."
        )


ACTIVE_KEYS = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts")
"""Configuration keys of the model families for the number of experts of a token."""


def experts_per_token(config: PreTrainedConfig) -> int:
    """Experts of one token; 1 if the configuration does not give them."""
    text = config.get_text_config()
    return next((int(value) for key in ACTIVE_KEYS if (value := getattr(text, key, None))), 1)
