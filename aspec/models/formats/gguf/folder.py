"""A folder that stands for a GGUF file: its configuration and tokenizer as transformers keeps them, no weights.

All commands open folders. The folder of a GGUF file is made once, in the user's cache; it names the file that holds the
weights, and is made anew for a changed file or another version of what made it. Folders of files that are gone, or have
changed, are removed when another one is made.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers

from aspec.errors import CheckpointError
from aspec.io.checkpoint import Checkpoint, version_of
from aspec.io.fetching.gguf_files import split_set
from aspec.io.gguf import Gguf, read_gguf
from aspec.io.hub import SOURCE
from aspec.models.formats.gguf.config import generation_config, model_config
from aspec.models.formats.gguf.tokenizer import save_tokenizer
from aspec.models.formats.gguf.weights import open_weights
from aspec.models.formats.packed import PackedWeight
from aspec.options import cache_folder

FORM = 2  # of what a folder holds; another one makes all folders anew


def folder_of(path: Path) -> Path:
    """The folder for a GGUF file. Raises CheckpointError and UnsupportedModelError as opening the model would."""
    files = split_set(path.absolute())  # a link of the hub's cache keeps its name, on which a set depends
    folder = cache_folder() / "gguf" / f"{files[0].stem[:80]}-{_key(files)}"
    if not (folder / SOURCE).is_file():
        _make(read_gguf(files[0]), folder)
    return folder


def open_stored(folder: Path, source: Path) -> tuple[Checkpoint, tuple[PackedWeight, ...]]:
    """What is stored in the GGUF file ``source``, for which ``folder`` stands, and the packed weights among it.

    Plain tensors have the names of parameters. Raises CheckpointError and UnsupportedModelError.
    """
    gguf = read_gguf(source)
    weights = open_weights(gguf, model_config(gguf))
    stored = {ref.name: ref for weight in weights.packed for ref in weight.refs}
    nbytes = sum(tensor.ref.nbytes for tensor in gguf.tensors.values())
    return Checkpoint(folder, {**weights.tensors, **stored}, nbytes, gguf.files), weights.packed


def _key(files: Sequence[Path]) -> str:
    """What a folder depends on, in short."""
    return hashlib.sha256(repr((FORM, transformers.__version__, _versions(files))).encode()).hexdigest()[:16]


def _versions(files: Sequence[Path]) -> str:
    """The files as they are now."""
    return repr([(str(file), version_of(file)) for file in files])


def _remove_stale(folders: Path) -> None:
    """Remove the folders whose files are not there any more as they were; one that cannot be removed stays."""
    for folder in list(folders.iterdir()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):  # not ours to judge
            found = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
            file, versions = Path(found["file"]), found["versions"]
            if not file.is_file() or _versions(split_set(file)) != versions:
                shutil.rmtree(folder, ignore_errors=True)


def _make(gguf: Gguf, folder: Path) -> None:
    """Write a folder as a whole: another process sees all of it, or nothing."""
    config = model_config(gguf)
    open_weights(gguf, config)  # which refuses what does not fit, before a folder claims to be a model
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    except OSError as error:
        raise _unwritable(gguf, folder.parent, error) from error
    try:
        save_tokenizer(gguf, made)
        for name, content in (
            ("config.json", config),
            ("generation_config.json", generation_config(gguf)),
            (SOURCE, {"file": str(gguf.path), "versions": _versions(split_set(gguf.path))}),
        ):
            (made / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(made, folder)
        _remove_stale(folder.parent)
    except OSError as error:
        if not (folder / SOURCE).is_file():  # else another process was first
            raise _unwritable(gguf, folder.parent, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _unwritable(gguf: Gguf, folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{gguf.path}: its configuration and tokenizer cannot be kept: expected a folder {folder} that can be written, "
        f"found: {error.strerror}. Free some space, or set XDG_CACHE_HOME to another folder."
    )
