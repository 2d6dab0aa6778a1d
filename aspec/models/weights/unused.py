"""Stored tensors that a model does not use: an error where config.json contradicts them, otherwise a text for the user.

A configuration contradicts a tensor if the same family uses it with one of its switches set the other way. No table
names these switches: the model is built once more for each of them, on meta.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from aspec.errors import CheckpointError, UnsupportedModelError
from aspec.io.checkpoint import Checkpoint, TensorRef
from aspec.io.hub import known_as
from aspec.models.families import family_of
from aspec.models.skeleton import build_on_meta
from aspec.models.weights.tensor_map import TensorMap, parameter_names

MOST_NAMES = 6
READ_BYTES = 1 << 20


def check_unused(model: PreTrainedModel, checkpoint: Checkpoint, unused: Sequence[str]) -> None:
    """Raise CheckpointError if ``model`` would use a stored tensor with one switch of config.json set the other way.

    A bias that is zero changes nothing: it is no contradiction.
    """
    left = [name for name in unused if not (name.endswith(".bias") and _is_zero(checkpoint.tensors[name]))]
    if not left:
        return
    found = {key: used for key, value in _switches(model.config) if (used := _used_if(model, key, not value, left))}
    if not found:
        return
    values = dict(_switches(model.config))
    said = " and ".join(f"{key} is {_json(values[key])}" for key in found)
    names = list(dict.fromkeys(name for used in found.values() for name in used))
    count = f"{len(names)} stored tensors have" if len(names) > 1 else "a stored tensor has"
    raise CheckpointError(
        f"{known_as(checkpoint.folder / 'config.json')} contradicts the weights: {said}, but {count} a use only "
        f"with the other value: {summary(names)}. Without them the text is another. Correct config.json, or remove the "
        f"tensors."
    )


def without_towers(config: PreTrainedConfig, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the stored names that the model does not use with its towers either."""
    if not names or not family_of(config.model_type).text_class:
        return tuple(names)
    whole = build_on_meta(config, torch.float32, "eager", whole=True)
    rename, state = parameter_names(whole), whole.state_dict()
    return tuple(name for name in names if rename(name) not in state)


def _used_if(model: PreTrainedModel, key: str, value: bool, names: Sequence[str]) -> list[str]:
    """Those of the stored names that the model uses if a switch of its configuration has this value."""
    config = copy.deepcopy(model.config)
    for own in _levels(config):
        if isinstance(getattr(own, key, None), bool):
            setattr(own, key, value)
    try:
        other = build_on_meta(config, model.dtype, "eager")
    except UnsupportedModelError:
        return []
    rename, state = parameter_names(other), other.state_dict()
    return [name for name in names if rename(name) in state]


def unread_bytes(checkpoint: Checkpoint, tensors: TensorMap) -> int:
    """Bytes of the stored tensors that text does not need: of towers for images, or of heads for training."""
    read = {ref.name for entry in tensors.entries for ref in entry.refs}
    return sum(ref.nbytes for name, ref in checkpoint.tensors.items() if name not in read)


def unused_text(folder: Path, unused: Sequence[str]) -> str:
    """The warning of stored tensors that are not read."""
    return f"{folder}: {len(unused)} stored tensors have no use in this model and are not read: {summary(unused)}"


def summary(names: Iterable[str]) -> str:
    """Names in a few words, fit for a terminal: those that differ in numbers only are one, with their count."""
    kinds = Counter(re.sub(r"\d+", "*", name) for name in names)
    words = [
        repr(kind)[1:-1][:100] + (f" ({count})" if count > 1 else "") for kind, count in kinds.most_common(MOST_NAMES)
    ]
    return ", ".join(words) + (", ..." if len(kinds) > MOST_NAMES else "")


def _switches(config: PreTrainedConfig) -> list[tuple[str, bool]]:
    """The true and false values of a configuration that belong to its family."""
    common = PreTrainedConfig().to_dict()
    found = {key: value for own in _levels(config) for key, value in own.to_dict().items()}
    return [(key, value) for key, value in found.items() if isinstance(value, bool) and key not in common]


def _levels(config: PreTrainedConfig) -> Iterable[PreTrainedConfig]:
    """A configuration and that of its language model, if the model has towers beside it."""
    text = config.get_text_config()
    return (config,) if text is config else (config, text)


def _is_zero(ref: TensorRef) -> bool:
    """Whether all bytes of a stored tensor are zero."""
    try:
        with open(ref.file, "rb") as file:
            file.seek(ref.offset)
            left = ref.nbytes
            while left and not any(data := file.read(min(left, READ_BYTES))):
                if not data:
                    return False
                left -= len(data)
            return left == 0
    except OSError:
        return False


def _json(value: bool) -> str:
    return "true" if value else "false"
