"""Processes of the command line that start at once: forked from one that has imported everything and done nothing."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ForkServer:
    """Starts ``aspec`` with arguments, and tells how it ended."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, args, log, largest_file=None):
        """The id of a new process; what it says goes to the file ``log``."""
        return self.ask(args=[str(arg) for arg in args], log=str(log), largest_file=largest_file)

    def wait(self, pid):
        """Its exit code, negative for a signal."""
        return self.ask(wait=pid)

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        self.process.communicate()
        assert self.process.returncode == 0


def wait_until(condition, seconds=120.0):
    """Poll, every millisecond."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(1e-3)


def become(args, log, largest_file):
    """The rest of a forked child's life."""
    from aspec.cli import app

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w")
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    code = 70
    try:
        app(args)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def main():
    import uvloop  # noqa: F401

    import aspec.batch  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            become(**order)


if __name__ == "__main__":
    main()
