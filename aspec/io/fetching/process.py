"""The process that fetches one model, so that Ctrl-C ends a download at once: no thread of the library can be stopped.

It reads one order from its standard input and writes events to its standard output, a JSON object per line. At the end
of its standard input it leaves: its parent has closed the pipe, or has died. The names of its own half files are known
to no other process, so it removes them; whole files stay.
"""

import contextlib
import errno
import glob
import json
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import DryRunFileInfo, HfApi, constants, errors, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from tqdm import tqdm

from aspec.errors import CheckpointError, shown
from aspec.io.fetching.files import SIZES, UNWANTED, WANTED, WEIGHTS, listing
from aspec.io.fetching.gguf_files import SUFFIX, choose_files, quantisations
from aspec.io.fetching.headers import BadHeaderError, fetch_headers
from aspec.units import format_bytes

HALF = ".incomplete"  # the end of the names of half files
SPARE_BYTES = 64 << 20  # that must stay free on the disk of the cache


class FetchError(Exception):
    """A problem and its remedy, to follow the model's name."""


class Events:
    """Writes events for the parent; any thread may call."""

    def __init__(self, file: int) -> None:
        self._file, self._lock = file, threading.Lock()

    def send(self, kind: str, **values: Any) -> None:
        """One line."""
        with self._lock:
            os.write(self._file, json.dumps({"event": kind, **values}).encode() + b"\n")


class _Forward(logging.Handler):
    """Sends what the library logs, such as that it tries again."""

    def __init__(self, events: Events) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """One message."""
        self._events.send("log", text=record.getMessage())


class _Bar(tqdm):  # type: ignore[misc]
    """The library's progress bar, which draws nothing and sends the bytes that are done."""

    events: Events
    total_bytes = 0  # of the files to fetch
    done_bytes = 0  # a bar counts the received bytes, another the written ones

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("name", "disable", "file")}
        self._nothing = open(os.devnull, "w")  # noqa: SIM115 - closed below
        super().__init__(*args, **kwargs, file=self._nothing)

    def display(self, *_: Any, **__: Any) -> None:
        if self.unit == "B" and self.total_bytes:
            _Bar.done_bytes = max(self.done_bytes, min(int(self.n), self.total_bytes))
            self.events.send("fetch", done=self.done_bytes, total=self.total_bytes)

    def close(self) -> None:
        super().close()
        self._nothing.close()


def main() -> None:
    """Fetch what the order says, and report the folder or the reason why there is none."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a terminal sends them to this process, too: the parent decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    events = Events(os.dup(1))
    os.dup2(2, 1)  # a library that prints must not print events
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_leave_with_parent, args=(_HalfFiles(),), daemon=True).start()
    logging.getLogger("huggingface_hub").handlers = [_Forward(events)]
    warnings.showwarning = lambda message, category, *_, **__: events.send(
        "warning", category=category.__name__, text=str(message)
    )
    try:
        fetch = _fetch if order["quantisation"] is None else _fetch_gguf
        events.send("folder", folder=str(fetch(order, events)))
    except Exception as error:  # errors of the library, its HTTP client, its storage client and the OS
        events.send("error", text=explain(error))


class _HalfFiles:
    """The half files that this process has opened; mutable: every open of Python is noted."""

    def __init__(self) -> None:
        self._paths: set[str] = set()
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args and str(args[0]).endswith(HALF):
            self._paths.add(os.path.abspath(str(args[0])))

    def remove(self) -> None:
        """Remove them; no thread can open another one any more, where the system allows to forbid it."""
        opened = {file.path for file in psutil.Process().open_files() if file.path.endswith(HALF)}  # by other languages
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for path in opened | self._paths:
            Path(path).unlink(missing_ok=True)


def _leave_with_parent(half_files: _HalfFiles) -> None:
    """End the process when the parent closes the pipe; half files of this process are removed."""
    while sys.stdin.buffer.read(1):
        pass
    half_files.remove()
    os._exit(1)


def _fetch(order: Mapping[str, Any], events: Events) -> Path:
    """The folder with all wanted files, or, for a plan, with the headers of the weights."""
    name = order["name"]
    more: dict[str, Any] = {"revision": order["revision"], "ignore_patterns": UNWANTED, "tqdm_class": _Bar}
    _Bar.events = events
    try:
        files = snapshot_download(name, allow_patterns=WANTED, dry_run=True, **more)
    except errors.DryRunError:  # the hub cannot be asked: only the cache can serve
        return _cached(name, Path(order["headers"]), more, weights=order["weights"])
    if not any(file.filename.endswith(WEIGHTS) for file in files):
        _refuse_gguf(name, HfApi().list_repo_files(name, revision=order["revision"]))
    missing = [file for file in files if file.will_download]
    if not order["weights"] and any(file.filename.endswith(WEIGHTS) for file in missing):
        return _fetch_headers(name, files, Path(order["headers"]), events, more)
    _expect(missing)
    folder = Path(snapshot_download(name, allow_patterns=WANTED, **more))
    return _checked(name, folder, weights=order["weights"])


def _fetch_gguf(order: Mapping[str, Any], events: Events) -> Path:
    """The first of the files that are the GGUF model of one quantisation; for a plan, their headers are enough."""
    name, asked, headers = order["name"], order["quantisation"], Path(order["headers"])
    _Bar.events = events
    try:
        files = _gguf_files(name, order["revision"])
    except errors.DryRunError:
        return _cached_gguf(order)
    chosen = choose_files([file.filename for file in files], asked)
    own = sorted((file for file in files if file.filename in chosen), key=lambda file: chosen.index(file.filename))
    missing = [file for file in own if file.will_download]
    if missing and not order["weights"]:
        from aspec.io.fetching.gguf_headers import fetch_gguf_headers  # takes the seconds of importing torch

        folder = headers / own[0].commit_hash / asked.upper()
        return fetch_gguf_headers(name, own, folder, lambda done: events.send("headers", done=done, total=len(own)))
    _expect(missing)
    wanted = [glob.escape(file) for file in chosen]
    return Path(snapshot_download(name, allow_patterns=wanted, revision=order["revision"], tqdm_class=_Bar), chosen[0])


def _gguf_files(name: str, revision: str | None) -> list[DryRunFileInfo]:
    """The GGUF files of a repository. Raises DryRunError if the hub cannot be asked."""
    how: dict[str, Any] = {"revision": revision, "allow_patterns": f"*{SUFFIX}", "tqdm_class": _Bar}
    return list(snapshot_download(name, dry_run=True, **how))


def _cached_gguf(order: Mapping[str, Any]) -> Path:
    """What an earlier run has fetched. Raises the library's error, which says why the hub was not asked."""
    name, asked, revision = order["name"], str(order["quantisation"]), order["revision"] or constants.DEFAULT_REVISION
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    ref = repository / "refs" / revision
    snapshot: Path = repository / "snapshots" / (ref.read_text() if ref.is_file() else revision)
    names = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob(f"*{SUFFIX}") if file.exists()]
    try:
        return snapshot / choose_files(names, asked)[0]
    except CheckpointError:
        folder = Path(order["headers"], snapshot.name, asked.upper())
        if not order["weights"] and (folder / SIZES).exists():
            return min(folder.glob(f"*{SUFFIX}"))
        snapshot_download(name, revision=revision, allow_patterns=f"*{SUFFIX}")  # which raises, if some are missing
        raise


def _refuse_gguf(name: str, names: list[str]) -> None:
    """Raise FetchError for a repository with GGUF files, of which the user has named none."""
    if found := quantisations(names):
        raise FetchError(
            f"has GGUF files and no safetensors: expected the quantisation of one of them after a colon, such as "
            f"{name}:{found[0]}; found {', '.join(map(shown, found))}. Choose one."
        )


def _expect(missing: list[DryRunFileInfo]) -> None:
    """Note how much is to come. Raises FetchError if there is no room for it."""
    _Bar.total_bytes = sum(file.file_size or 0 for file in missing)
    _check_space(_Bar.total_bytes)


def _fetch_headers(
    name: str, files: list[DryRunFileInfo], headers: Path, events: Events, more: Mapping[str, Any]
) -> Path:
    """A folder with the small files and the header of each shard, below ``headers``."""
    shards = [file for file in files if file.filename.endswith(WEIGHTS)]
    small = _small_files(name, more)
    folder = headers / small.name
    fetch_headers(name, shards, small, folder, lambda done: events.send("headers", done=done, total=len(shards)))
    return folder


def _small_files(name: str, more: Mapping[str, Any]) -> Path:
    """The folder of a snapshot, with all wanted files but the weights; its name is the commit."""
    return Path(
        snapshot_download(name, allow_patterns=WANTED, **{**more, "ignore_patterns": [*UNWANTED, f"*{WEIGHTS}"]})
    )


def _cached(name: str, headers: Path, more: Mapping[str, Any], *, weights: bool) -> Path:
    """What an earlier run has fetched. Raises the library's error, which says why the hub was not asked."""
    try:
        return _checked(name, Path(snapshot_download(name, allow_patterns=WANTED, **more)), weights=weights)
    except (errors.LocalEntryNotFoundError, FetchError):
        if not weights and (folder := headers / _small_files(name, more).name).joinpath(SIZES).exists():
            return folder
        raise


def _checked(name: str, folder: Path, *, weights: bool) -> Path:
    """The folder, if it holds weights; for a plan, a configuration is enough. Raises FetchError."""
    if any(folder.glob(f"*{WEIGHTS}")) or (not weights and (folder / "config.json").exists()):
        return folder
    _refuse_gguf(name, [entry.name for entry in folder.glob(f"*{SUFFIX}")])
    found = listing(sorted(entry.name for entry in folder.glob("*")))
    raise FetchError(
        f"has no weights that can be read: expected *.safetensors at the top of the repository; found {found} "
        f"in {folder}. Choose a repository with safetensors, or, if the local copy is incomplete, run again with a "
        f"network."
    )


def _check_space(nbytes: int) -> None:
    """Raise FetchError if the disk of the cache cannot hold ``nbytes`` more."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if nbytes and nbytes + SPARE_BYTES > free:
        raise FetchError(
            f"does not fit on the disk of the hub cache {cache}: expected {format_bytes(nbytes)} for the files that "
            f"are not there yet, found {format_bytes(free)} free. Free some space, or set HF_HOME to a larger disk."
        )


def explain(error: Exception) -> str:
    """The problem and its remedy, to follow the model's name."""
    if isinstance(error, FetchError | CheckpointError):
        return str(error)
    if isinstance(error, BadHeaderError):
        return f"cannot be read: {error}. Choose another repository, or tell its owner."
    if isinstance(error, errors.GatedRepoError):
        return (
            "is gated: expected an account that may read it. Accept its licence on the hub's page of the model, then "
            "set HF_TOKEN or run `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            "has no such revision: expected a branch, a tag or a commit of the repository after the @. Check the "
            "spelling, or leave it out for the main branch."
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
        return (
            f"cannot be stored: {error.filename} may not be written. Set HF_HOME (for headers, XDG_CACHE_HOME) to a "
            f"folder that may be written."
        )
    reason = " ".join(str(error).split())[:300].rstrip(".: ")
    return (
        f"could not be fetched from the hub ({type(error).__name__}: {reason}). Try again (whole files are kept), or "
        f"give a local folder."
    )


def _status(error: Exception) -> object:
    return getattr(getattr(error, "response", None), "status_code", None)
