"""From a model's name to its folder: a local path, or a hub id fetched once through huggingface_hub.

That library reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, and shows the progress on stderr. The weights
stay in its cache and are never copied.
"""

import errno
import re
from pathlib import Path

from aspec.errors import CheckpointError

# A checkpoint is the files at the top of its repository; its folders hold other formats (original/, onnx/).
WANTED = [
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "merges.txt",
    "vocab.*",
    "*.model",
    "*.tiktoken",
    "*.jinja",
]
UNWANTED = ["*/*", "consolidated*", "*.bin", "*.gguf", "*.bin.index.json"]
CONFIG = "config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def resolve(name: str, *, what: str = "model") -> Path:
    """The folder of a local path or hub id; a path that exists wins. A config.json stands for its folder.

    Raises CheckpointError, one paragraph with a remedy, if there is no such model or it cannot be fetched.
    """
    path = Path(name).expanduser() if name.strip() else None
    if path is not None and path.is_dir():
        return path
    if path is not None and path.name == CONFIG and path.is_file():
        return path.parent
    if path is not None and path.exists():
        raise CheckpointError(
            f"{what} {name!r} is a file: expected a folder with config.json and *.safetensors. Give the file's folder."
        )
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{what} {name!r} was not found: expected an existing folder with config.json and *.safetensors, or a hub "
            f"id of the form org/name. Check the path."
        )
    return _fetch(name, what)


def _fetch(name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and a local folder does not need it

    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # errors of the library, its HTTP client, its storage client and the OS
        raise CheckpointError(f"{what} {name!r} {_explain(error)}") from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{what} {name!r} has no weights that can be read: expected *.safetensors at the top of the repository; "
            f"found {_listing(folder)} in {folder}. Choose a repository with safetensors, or, if the local copy is "
            f"incomplete, run again with a network."
        )
    return folder


def _explain(error: Exception) -> str:
    """The problem and its remedy, to follow the model's name."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            "is gated: expected an account that may read it. Accept its licence on the hub's page of the model, then "
            "set HF_TOKEN or run `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "is neither a local folder nor a model on the hub. Check the spelling; if the repository is private, "
            "set HF_TOKEN or run `hf auth login`."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "is not a local folder, is not (or only in part) in the local hub cache, and the hub cannot be reached "
            "(offline, HF_HUB_OFFLINE is set, or its servers fail). Fetch it with a network, or give a local folder."
        )
    if isinstance(error, errors.HfHubHTTPError) and _status(error) in (401, 403):
        return "was refused by the hub: the token is invalid or may not read it. Set HF_TOKEN to a token with access."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "does not fit on the disk of the hub cache. Free some space, or set HF_HOME to a larger disk."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot be stored: {error.filename} may not be written. Set HF_HOME to a folder that may be written."
    reason = " ".join(str(error).split())[:300].rstrip(".: ")
    return (
        f"could not be fetched from the hub ({type(error).__name__}: {reason}). Try again (a download continues where "
        f"it stopped), or give a local folder."
    )


def _status(error: Exception) -> object:
    return getattr(getattr(error, "response", None), "status_code", None)


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.glob("*"))
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
