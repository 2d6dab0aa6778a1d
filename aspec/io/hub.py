"""From a model's name to its folder: a local path, or a hub id such as org/name or org/name@revision.

The files of a hub id are fetched once, by huggingface_hub, into its cache, and are never copied. That library reads
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import re
from pathlib import Path

from aspec.errors import CheckpointError
from aspec.io.fetching.fetch import Fetches, Wanted
from aspec.io.fetching.files import WANTED

__all__ = ["WANTED", "find", "resolve"]

HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>\w[\w./-]*))?")


def resolve(name: str, *, what: str = "model", weights: bool = True, fetches: Fetches | None = None) -> Path:
    """The folder of a local path or hub id; a path that exists wins.

    Without ``weights``, the folder of a hub id may hold the headers of its shards only, if the weights are not there.
    Raises CheckpointError, one paragraph with a remedy, if there is no such model or it cannot be fetched.
    """
    found = find(name, what=what)
    return found if isinstance(found, Path) else _fetch(found, what, weights, fetches or Fetches())


def find(name: str, *, what: str = "model") -> Path | Wanted:
    """The folder of a local path, or what to fetch from the hub; nothing is fetched. Raises CheckpointError."""
    path = Path(name).expanduser() if name.strip() else None
    if path is not None and path.is_dir():
        return path
    if path is not None and path.exists():
        raise CheckpointError(
            f"{what} {name!r} is a file: expected a folder with config.json and *.safetensors. Give the file's folder."
        )
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None:
        raise CheckpointError(
            f"{what} {name!r} was not found: expected an existing folder with config.json and *.safetensors, or a hub "
            f"id of the form org/name or org/name@revision. Check the path."
        )
    return Wanted(hub_id["name"], hub_id["revision"])


def _fetch(wanted: Wanted, what: str, weights: bool, fetches: Fetches) -> Path:
    try:
        return fetches.fetch(wanted, weights=weights)
    except CheckpointError as error:
        raise CheckpointError(f"{what} {str(wanted)!r} {error}") from error
