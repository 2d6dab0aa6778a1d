"""From a model's name to its folder or GGUF file: a local path, or a hub id.

A hub id is org/name, org/name@revision, or org/name:Q4_K_M for the GGUF model of that quantisation.

The files of a hub id are fetched once, by huggingface_hub, into its cache, and are never copied. That library reads
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import os
import re
from pathlib import Path
from typing import Any

from aspec.errors import CheckpointError, shown
from aspec.io.fetching.fetch import Fetches, Wanted
from aspec.io.fetching.files import WANTED
from aspec.io.fetching.gguf_files import MAGIC, SUFFIX, check_begin, models_of, split_set
from aspec.io.json_file import read_json
from aspec.io.weight_format import REMEDY, file_format, folder_format

__all__ = ["WANTED", "check", "find", "known_as", "read_config", "resolve", "source_of"]

CONFIG = "config.json"
SOURCE = "aspec-gguf.json"  # in a folder that stands for a GGUF file: JSON with the file's path
SAFETENSORS = (".safetensors", ".safetensors.index.json")
MOST_LISTED = 12  # models of a folder, in a message
HUB_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)"
    r"(:(?P<quantisation>\w[\w.-]*))?(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?"
)


def resolve(name: str, *, what: str = "model", weights: bool = True, fetches: Fetches | None = None) -> Path:
    """The folder or the GGUF file of a local path or hub id; a path that exists wins. A config.json is its folder.

    Without ``weights``, the folder of a hub id may hold the headers of its shards only, if the weights are not there.
    Raises CheckpointError, one paragraph with a remedy, if there is no such model or it cannot be fetched.
    """
    found = find(name, what=what)
    return found if isinstance(found, Path) else _fetch(found, what, weights, fetches or Fetches())


def find(name: str, *, what: str = "model") -> Path | Wanted:
    """The folder or GGUF file of a local path, or what to fetch from the hub; nothing is fetched.

    A folder whose only model is in GGUF files is the first of them. Raises CheckpointError.
    """
    path = Path(name).expanduser() if name.strip() else None
    if path is not None and os.path.isdir(path):  # unlike the method of Path, it raises for no name
        return _gguf_of(path, what) or _check_format(path, what)
    if path is not None and path.name == CONFIG and os.path.isfile(path):
        return path.parent
    if path is not None and os.path.exists(path):
        if is_gguf(path):
            return path
        if (kind := file_format(path)) is not None:
            raise CheckpointError(
                f"{what} {name!r:.200} is a file in {kind} format, which aspec does not read; it reads folders of "
                f"safetensors, and GGUF files. {REMEDY}"
            )
        raise CheckpointError(
            f"{what} {name!r:.200} is a file: expected a folder with config.json and *.safetensors, or a GGUF "
            f"file. Give the file's folder."
        )
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None:
        raise CheckpointError(
            f"{what} {name!r:.200} was not found: expected an existing folder with config.json and *.safetensors, a "
            f"GGUF file, or a hub id: org/name, org/name@revision, or org/name:Q4_K_M for a GGUF file. Check the path."
        )
    return Wanted(hub_id["name"], hub_id["revision"], hub_id["quantisation"])


def check(name: str, *, what: str) -> None:
    """Raise the CheckpointError of a name or of a local folder that cannot be a model; the hub is not asked."""
    found = find(name, what=what)
    if not isinstance(found, Path):
        return
    if found.is_file():
        for file in split_set(found):
            check_begin(file, _begin(file))
    elif not (found / "adapter_config.json").is_file():  # it may name its base elsewhere
        read_config(found)


def is_gguf(path: Path) -> bool:
    """Whether a file is, or claims to be, a GGUF file: the stores of some programs give it a name without an end."""
    return path.suffix.lower() == SUFFIX or _begin(path) == MAGIC


def _begin(path: Path) -> bytes:
    """The first bytes of a file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError:
        return b""


def source_of(folder: Path) -> Path | None:
    """The GGUF file that a folder stands for; None for any other folder."""
    if not (folder / SOURCE).is_file():
        return None
    return Path(read_json(folder / SOURCE, "the name of a GGUF file", error=CheckpointError)["file"])


def known_as(path: Path) -> Path:
    """A model's folder, or a file in it, as its user knows it: of a folder that stands for a GGUF file, that file."""
    return source_of(path) or source_of(path.parent) or path


def _gguf_of(folder: Path, what: str) -> Path | None:
    """The first file of the only GGUF model in a folder without safetensors; None if there is none.

    Raises CheckpointError if there are several.
    """
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    models = [] if any(name.endswith(SAFETENSORS) for name in names) else sorted(models_of(names).values())
    if len(models) > 1:
        listed = ", ".join(shown(files[0]) for files in models[:MOST_LISTED])
        raise CheckpointError(
            f"{what} {str(folder)!r} holds {len(models)} GGUF models: expected one, found {listed}"
            f"{', ...' if len(models) > MOST_LISTED else ''}. Give the path of one file."
        )
    return folder / models[0][0] if models else None


def _check_format(folder: Path, what: str) -> Path:
    """The folder. Raises CheckpointError for one with nothing but weights in a format that is not read.

    A configuration beside the files of PyTorch is enough of a model for a plan.
    """
    found = folder_format(folder)
    if found is None or (found[0].startswith("PyTorch") and (folder / "config.json").is_file()):
        return folder
    kind, file = found
    raise CheckpointError(
        f"{what} {str(folder)!r} holds weights in {kind} format ({file:.80}), which aspec does not read; it reads "
        f"safetensors and GGUF. {REMEDY}"
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
