"""A chat template is rendered on trial before it is rendered here: it is the checkpoint's code and may never end.

No thread and no signal can end a step in C (``2 ** 10 ** 9``, ``"a" * 10 ** 10``), so the trial runs in a process of
its own, with limits of processor time and memory, which is ended where it passes one. What passes the trial costs as
little here. The process starts in about 0.1 s, at the first conversation; a trial then takes about a millisecond.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from aspec.generation.text.time_limit import TimeLimit, TimeLimitError
from aspec.units import format_bytes

WORKER = Path(__file__).with_name("template_worker.py")
MEMORY_BYTES = 1 << 30  # of a trial, where the system does not limit its address space
POLL_S = 0.02  # between two looks at a trial
MOST_IDLE = 2  # processes that wait for the next trial
START_S = 20.0  # in which the process must be ready
LONGEST_S = 50.0  # on the clock, on a busy machine too
MOST_CHARACTERS = 4 << 20  # of a text, and
PER_CHARACTER = 16  # more for each character of the conversation


class TrialError(Exception):
    """The template did not pass; the text says why and completes "the chat template ..."."""


class TemplateTrial:
    """Trials of one tokenizer's templates, from any thread; mutable: it keeps the process for the next trial."""

    def __init__(self) -> None:
        self._idle: deque[_Worker] = deque()
        weakref.finalize(self, _close_all, self._idle)

    def run(self, template: str, variables: Mapping[str, Any], limit: TimeLimit) -> None:
        """Render on trial. Raises TrialError, or TimeLimitError as ``limit`` says. Does nothing without a process."""
        body = json.dumps({"template": template, "variables": dict(variables)}, default=str).encode()
        worker = self._take()
        if worker is None:
            return
        try:
            said = worker.ask(body, limit)
        except BaseException:
            worker.close()
            raise
        if len(self._idle) < MOST_IDLE:
            self._idle.append(worker)
        else:
            worker.close()
        if said == "memory":
            raise TrialError("needs too much memory")
        if said.isdecimal() and int(said) > MOST_CHARACTERS + PER_CHARACTER * len(body):
            raise TrialError(f"makes a text of {int(said)} characters of so little")

    def _take(self) -> "_Worker | None":
        """An idle process, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            return _Worker.start()


class _Worker:
    """A process that renders on trial."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._input, self._output = process, process.stdin, process.stdout
        self._seen = psutil.Process(process.pid)

    @classmethod
    def start(cls) -> "_Worker | None":
        """A process that is ready; None where none can be started."""
        if os.name != "posix" or "python" not in Path(sys.executable or "").name:
            return None  # inside another program, which would start itself
        try:
            made = cls(
                subprocess.Popen(
                    [sys.executable, "-S", str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,  # Ctrl-C is not meant for it
                )
            )
        except (OSError, psutil.Error):
            return None
        if select.select([made._output], [], [], START_S)[0] and made._output.readline() == b"ready\n":
            return made
        made.close()
        return None

    def ask(self, body: bytes, limit: TimeLimit) -> str:
        """The answer to a request. Raises TrialError or TimeLimitError; the process must then be closed."""
        deadline_s, may_use_s = time.monotonic() + LONGEST_S, self._used()[0] + limit.left_s
        with contextlib.suppress(BrokenPipeError):
            self._input.write(b"%d\n%s" % (len(body), body))
            self._input.flush()
        while not select.select([self._output], [], [], POLL_S)[0]:
            seconds, nbytes = self._used()
            if limit.stopped or seconds > may_use_s or time.monotonic() > deadline_s:
                raise TimeLimitError
            if nbytes > MEMORY_BYTES + PER_CHARACTER * len(body):
                raise TrialError(f"needs more than {format_bytes(MEMORY_BYTES)} of memory")
        left_s, before_s = may_use_s - self._used()[0], limit.left_s
        limit.left_s = min(before_s, left_s)
        if self._process.poll() is None and before_s - left_s > left_s:  # rendering it here takes as long again
            raise TimeLimitError
        said = self._output.readline().decode().strip()
        if not said:
            raise TrialError("ended the process that renders it")
        return said

    def _used(self) -> tuple[float, int]:
        """Seconds of processor time, and resident bytes."""
        try:
            times = self._seen.cpu_times()
            return times.user + times.system, self._seen.memory_info().rss
        except psutil.Error:  # it has ended: its output says so
            return 0.0, 0

    def close(self) -> None:
        """End the process; nothing of it is left."""
        self._process.kill()
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()


def _close_all(workers: "deque[_Worker]") -> None:
    while workers:
        workers.pop().close()
