"""Fetches a model in a process of its own, which can be ended at any moment: by Ctrl-C, or by ``Fetches.stop``."""

import builtins
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from aspec.errors import CheckpointError
from aspec.options import Progress, cache_folder
from aspec.units import format_bytes, format_rate

CHILD = "from aspec.io.fetching.process import main; main()"
LINE_S = 5.0  # between two lines on stderr
VERBS = {"fetch": "fetched", "prepare": "written"}
LONGEST_GOODBYE_S = (
    5.0  # for a stopped process to remove its half files, which takes it milliseconds on a quiet machine
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model of the hub; its text is the user's name for it."""

    name: str
    revision: str | None = None  # a branch, a tag or a commit; None: the main branch
    quantisation: str | None = None  # of a GGUF model; None: the safetensors of the repository

    def __str__(self) -> str:
        quantisation = "" if self.quantisation is None else f":{self.quantisation}"
        return f"{self.name}{quantisation}" + ("" if self.revision is None else f"@{self.revision}")


class Words:
    """Puts the state of a fetch, or of other work on bytes, into words.

    Mutable, because it remembers the first state, to estimate the time left.
    """

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None  # when, and the bytes that were done

    def __call__(self, stage: str, done: int, total: int) -> str:
        """Bytes of files, or headers of shards."""
        if stage not in VERBS:
            return f"reading the header of shard {done + 1} of {total}"
        now_s = time.monotonic()
        begun_s, before = self._first = self._first or (now_s, done)
        words = f"{VERBS[stage]} {format_bytes(done)} of {format_bytes(total)}"
        if done > before and now_s - begun_s > 1.0:
            rate = (done - before) / (now_s - begun_s)
            words += f", {format_rate(rate)}, {(total - done) / rate:.0f} s left"
        return words


class Lines:
    """Prints the state of a fetch now and then; mutable, because it remembers when."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._words, self._next_s = stream, Words(), 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        """Print a line, if the last one is old enough."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LINE_S
            print(f"aspec: {self._words(stage, done, total)}", file=self._stream, flush=True)


class Fetches:
    """The fetches of one opening. Mutable: any thread may stop the one under way, and those to come."""

    def __init__(self, progress: Progress | None = None) -> None:
        """Without ``progress``, lines on stderr tell how far the fetch is."""
        self.progress = progress or Lines(sys.stderr).show
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def stop(self) -> None:
        """End the fetch under way, without waiting for its end: its caller gets a CheckpointError."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _ask_to_leave(self._process)
                killer = threading.Timer(LONGEST_GOODBYE_S, self._process.kill)
                killer.daemon = True
                killer.start()

    def fetch(self, wanted: Wanted, *, weights: bool) -> Path:
        """The folder or the first GGUF file of a model, fetched if it is not there.

        Without ``weights``, the headers are enough. Raises CheckpointError; its text follows the name.
        """
        order = {
            "name": wanted.name,
            "revision": wanted.revision,
            "quantisation": wanted.quantisation,
            "weights": weights,
            "headers": str(cache_folder() / "headers" / wanted.name.replace("/", "--")),
        }
        with tempfile.TemporaryFile() as said, self._child(said) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(OSError):  # it has ended already: its last words follow
                child.stdin.write(json.dumps(order).encode() + b"\n")
                child.stdin.flush()
            for line in child.stdout:
                if (folder := self._take(json.loads(line))) is not None:
                    return folder
            said.seek(0)
            tail = " ".join(said.read().decode(errors="replace").split())[-300:]
            raise CheckpointError(f"was not fetched: the process that fetches it has ended ({tail or 'stopped'}).")

    def _take(self, event: dict[str, Any]) -> Path | None:
        """React to an event; the folder, if it is the last one."""
        match event.pop("event"):
            case "folder":
                return Path(event["folder"])
            case "error":
                raise CheckpointError(event["text"])
            case "warning":
                warnings.warn(event["text"], getattr(builtins, event["category"], UserWarning), stacklevel=4)
            case "log":
                logging.getLogger("huggingface_hub").warning(event["text"])
            case stage:
                self.progress(stage, event["done"], event["total"])
        return None

    @contextmanager
    def _child(self, said: Any) -> Iterator[subprocess.Popen[bytes]]:
        """The process; it has ended when the block ends."""
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with self._lock:
            if self._stopped:
                raise CheckpointError("was not fetched: the opening was stopped.")
            self._process = process = subprocess.Popen(
                [sys.executable, "-W", "always", "-c", CHILD],  # the filters of this process decide on warnings
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
            )
        try:
            yield process
        finally:
            with self._lock:
                self._process = None
            _end(process)
            assert process.stdout is not None
            process.stdout.close()


def _ask_to_leave(process: "subprocess.Popen[bytes]") -> None:
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the process to leave, and kill it if it stays."""
    _ask_to_leave(process)
    try:
        process.wait(LONGEST_GOODBYE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
