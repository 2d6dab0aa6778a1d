"""From a model's name to its folder: a local path, or a hub id such as org/name or org/name@revision.

The files of a hub id are fetched once, by huggingface_hub, into its cache, and are never copied. That library reads
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import os
import re
from pathlib import Path
from typing import Any

from aspec.errors import CheckpointError
from aspec.io.fetching.fetch import Fetches, Wanted
from aspec.io.fetching.files import WANTED
from aspec.io.json_file import read_json
from aspec.io.weight_format import REMEDY, file_format, folder_format

__all__ = ["WANTED", "check", "find", "read_config", "resolve"]

CONFIG = "config.json"
HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")


def resolve(name: str, *, what: str = "model", weights: bool = True, fetches: Fetches | None = None) -> Path:
    """The folder of a local path or hub id; a path that exists wins. A config.json stands for its folder.

    Without ``weights``, the folder of a hub id may hold the headers of its shards only, if the weights are not there.
    Raises CheckpointError, one paragraph with a remedy, if there is no such model or it cannot be fetched.
    """
    found = find(name, what=what)
    return found if isinstance(found, Path) else _fetch(found, what, weights, fetches or Fetches())


def find(name: str, *, what: str = "model") -> Path | Wanted:
    """The folder of a local path, or what to fetch from the hub; nothing is fetched. Raises CheckpointError."""
    path = Path(name).expanduser() if name.strip() else None
    if path is not None and os.path.isdir(path):  # unlike the method of Path, it raises for no name
        _check_format(path, what)
        return path
    if path is not None and path.name == CONFIG and os.path.isfile(path):
        return path.parent
    if path is not None and os.path.exists(path):
        if (kind := file_format(path)) is not None:
            raise CheckpointError(
                f"{what} {name!r:.200} is a file in {kind} format, which aspec does not read; it reads folders of "
                f"safetensors. {REMEDY}"
            )
        raise CheckpointError(
            f"{what} {name!r:.200} is a file: expected a folder with config.json and *.safetensors. Give the "
            f"file's folder."
        )
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None:
        raise CheckpointError(
            f"{what} {name!r:.200} was not found: expected an existing folder with config.json and *.safetensors, or "
            f"a hub id of the form org/name or org/name@revision. Check the path."
        )
    return Wanted(hub_id["name"], hub_id["revision"])


def check(name: str, *, what: str) -> None:
    """Raise the CheckpointError of a name or of a local folder that cannot be a model; the hub is not asked."""
    found = find(name, what=what)
    if isinstance(found, Path) and not (found / "adapter_config.json").is_file():  # it may name its base elsewhere
        read_config(found)


def _check_format(folder: Path, what: str) -> None:
    """Raise CheckpointError for a folder with nothing but weights in another format.

    A configuration beside the files of PyTorch is enough of a model for a plan.
    """
    found = folder_format(folder)
    if found is None or (found[0].startswith("PyTorch") and (folder / "config.json").is_file()):
        return
    kind, file = found
    raise CheckpointError(
        f"{what} {str(folder)!r} holds weights in {kind} format ({file:.80}), which aspec does not read; it reads "
        f"safetensors. {REMEDY}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The object in a folder's config.json, with the name of its model_type. Raises CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json: expected a model folder in transformers' format. Check the path."
        )
    raw = read_json(path, "a model's configuration", error=CheckpointError, constants=True)  # some write Infinity
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(
            f"{path}: expected a JSON object with the name of a model_type, found none. Fetch the checkpoint again."
        )
    return raw


def _fetch(wanted: Wanted, what: str, weights: bool, fetches: Fetches) -> Path:
    try:
        return fetches.fetch(wanted, weights=weights)
    except CheckpointError as error:
        raise CheckpointError(f"{what} {str(wanted)!r} {error}") from error
