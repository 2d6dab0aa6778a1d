"""What a checkpoint says of its own generation: sampling defaults, and the tokens that end a sequence."""

import reprlib
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from aspec.errors import CheckpointError, UserError, reason_of
from aspec.io.hub import known_as
from aspec.io.json_file import read_json

FROM_CONFIG = "_from_model_config"  # among generation defaults: they are those of config.json


def generation_defaults(folder: Path) -> dict[str, Any]:
    """Settings of the checkpoint's generation_config.json; CheckpointError if it is damaged.

    Without the file they are those of config.json, where older checkpoints have them, and FROM_CONFIG is true in them;
    empty without both.
    """
    path = folder / "generation_config.json"
    try:
        if path.is_file():
            return {**GenerationConfig.from_pretrained(folder).to_diff_dict(), FROM_CONFIG: False}
        path = folder / "config.json"
        if not path.is_file():
            return {}
        stored = read_json(path, "a model's configuration", error=CheckpointError, constants=True)
        found = GenerationConfig.from_model_config(stored).to_diff_dict()
    except Exception as error:  # the loader may raise any exception for a value it does not know
        if isinstance(error, UserError):
            raise
        raise CheckpointError(
            f"{known_as(path)}: expected generation defaults in JSON, found {reason_of(error)}. Correct or remove "
            f"the file."
        ) from error
    return {name: value for name, value in found.items() if name in GenerationConfig().to_dict()}


def end_ids(folder: Path, text: PreTrainedConfig) -> frozenset[int]:
    """Tokens that end a sequence, from the generation defaults or the configuration."""
    found = generation_defaults(folder).get("eos_token_id", getattr(text, "eos_token_id", None))
    ids = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(
            f"{known_as(folder)}: expected eos_token_id to be a token id or a list of them, found "
            f"{reprlib.repr(found)}. Correct generation_config.json or config.json."
        )
    return frozenset(ids)
