"""Processes of the command line that start at once: forked from one that has imported everything and done nothing."""

import functools
import gc
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIPE = subprocess.PIPE


class ForkServer:
    """Starts ``aspec`` with arguments, and tells how it ended."""

    def __init__(self):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT)

    def start(self, args, log, **more):
        """The id of a new process; what it says goes to the file ``log``."""
        with open(log, "ab") as file, open(os.devnull) as nothing:
            return self.fork(args, (nothing.fileno(), file.fileno(), file.fileno()), **more)

    def fork(self, args, streams, **more):
        """The id of a new process with these files as its standard input, output and error."""
        return self.ask(streams, args=[str(arg) for arg in args], **more)

    def wait(self, pid):
        """Its exit code, negative for a signal."""
        return self.ask(wait=pid)

    def ask(self, streams=(), **order):
        socket.send_fds(self.socket, [json.dumps(order).encode()], streams)
        return int(self.socket.recv(64))

    def close(self):
        self.socket.close()
        assert self.process.wait() == 0


@functools.cache
def shared_server():
    """The one of this process, started when the first test wants it; conftest closes it."""
    return ForkServer()


class Command:
    """A running ``aspec``, as ``subprocess.Popen`` would show it; what is not a pipe is a file, or nothing at all.

    ``closed``: numbers of standard streams that it finds closed. ``encoding``: of the streams, as Python made them.
    """

    def __init__(self, args, stdin=None, stdout=PIPE, stderr=PIPE, closed=(), encoding="utf-8", **environment):
        self.server, self.returncode = shared_server(), None
        ours, theirs = {}, []
        for name, stream in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            if stream is PIPE:
                reads, writes = os.pipe()
                theirs.append(reads if name == "stdin" else writes)
                ours[name] = os.fdopen(writes, "wb") if name == "stdin" else os.fdopen(reads, "rb")
            else:
                theirs.append(os.open(os.devnull, os.O_RDWR) if stream is None else os.dup(stream))
        self.stdin, self.stdout, self.stderr = (ours.get(name) for name in ("stdin", "stdout", "stderr"))
        self.pid = self.server.fork(args, theirs, environment=environment, closed=closed, encoding=encoding)
        for stream in theirs:
            os.close(stream)
        self.ended = os.pidfd_open(self.pid)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self):
        """Its exit code, if it has one yet."""
        return self.wait() if self.returncode is not None or select.select([self.ended], [], [], 0)[0] else None

    def wait(self, seconds=60.0):
        """Its exit code; a process that does not end in that time is killed."""
        if self.returncode is None:
            if not select.select([self.ended], [], [], seconds)[0]:
                self.send_signal(signal.SIGKILL)
            self.returncode = self.server.wait(self.pid)
            os.close(self.ended)
        return self.returncode

    def communicate(self):
        """What it has said and not been read, to its end; errors are few: they fit into a pipe."""
        if self.stdin is not None:
            self.stdin.close()
        said = tuple(stream.read() if stream is not None else b"" for stream in (self.stdout, self.stderr))
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()
        return said


def wait_until(condition, seconds=120.0):
    """Poll, every millisecond."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(1e-3)


def become(args, streams, largest_file=None, environment=None, closed=(), encoding="utf-8"):
    """The rest of a forked child's life."""
    from aspec.cli.main import main

    os.setpgid(0, 0)  # of the same session: only then can it be stopped
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, encoding=encoding) for n, mode in enumerate("rww"))
    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    os.environ.update(environment or {})
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    code = 70
    try:
        main(args)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(code)


def main():
    import uvloop  # noqa: F401

    import aspec.cli.batch
    import aspec.cli.chat.chat
    import aspec.cli.chat.prompt
    import aspec.cli.generate
    import aspec.cli.trace  # noqa: F401
    from tests.quick import SHORT

    for place, name, value in SHORT:
        setattr(place, name, value)
    gc.collect()
    gc.freeze()  # or each fork would go through, and so copy, all that was imported
    orders = socket.socket(fileno=int(sys.argv[1]))
    while True:
        data, streams, *_ = socket.recv_fds(orders, 1 << 16, 3)
        if not data:
            return
        order = json.loads(data)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        elif not (answer := os.fork()):
            orders.close()
            become(streams=streams, **order)
        for stream in streams:
            os.close(stream)
        orders.send(str(answer).encode())


if __name__ == "__main__":
    main()
