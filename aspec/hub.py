"""Where a model is: a local folder, or a hub id fetched once through huggingface_hub.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured by that library; the weights are never copied.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from aspec.errors import CheckpointError

WANTED = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "tokenizer*"]
UNWANTED = ["original/*", "*/original/*", "onnx/*", "consolidated*", "*.msgpack"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name: str, *, what: str = "model") -> Path:
    """The folder of a local path or hub id. Raises CheckpointError, in one paragraph, where there is none."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{what} {name!r} was not found: expected a folder with config.json and *.safetensors, or a hub id such as "
            f"org/name. Check the path."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{what} {name!r} is gated: accept its licence on the hub, then set HF_TOKEN or run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{what} {name!r} is neither a local folder nor a model on the hub (or it is private: set HF_TOKEN)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{what} {name!r} is not a local folder, is not in the local hub cache, and the hub cannot be reached "
            f"(offline, or HF_HUB_OFFLINE is set). Download it where there is a network, or give a local folder."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{what} {name!r} could not be fetched from the hub: {reason}") from error
