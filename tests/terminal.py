"""A command in a terminal of our own: what it draws is read as it comes."""

import fcntl
import os
import pty
import signal
import struct
import termios
import threading
import time

from tests.fork_server import PIPE, Command


class Terminal:
    """``aspec`` with stderr on a terminal; ``asked`` and ``whole``: standard input, and output too, are there as well.

    Standard input is a pipe otherwise, if it is to be typed into at all.
    """

    def __init__(self, *args, columns=200, rows=30, typed=False, asked=False, whole=False, **environment):
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        self.drawn = b""
        self.process = Command(
            args,
            stdin=slave if asked or whole else PIPE if typed else None,
            stdout=slave if whole else PIPE,
            stderr=slave,
            **{"TERM": "xterm-256color", **environment},
        )
        os.close(slave)
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        try:
            while data := os.read(self.master, 65536):
                self.drawn += data
        except OSError:
            pass  # the other end has closed

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def echoes(self):
        """Whether the terminal prints what is typed."""
        return bool(termios.tcgetattr(self.master)[3] & termios.ECHO)

    def type(self, text):
        if self.process.stdin is not None:
            self.process.stdin.write(text)
            self.process.stdin.flush()
        else:
            os.write(self.master, text)

    def wait_for(self, wanted, times=1):
        deadline = time.monotonic() + 60
        while self.drawn.count(wanted) < times:
            assert time.monotonic() < deadline, self.drawn[-2000:]
            assert self.process.poll() is None or self.drawn.count(wanted) >= times, self.drawn[-2000:]
            time.sleep(0.02)

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def end(self):
        out, _ = self.process.communicate()
        self.reader.join(10)
        os.close(self.master)
        assert b"Traceback" not in self.drawn, self.drawn
        return self.process.returncode, out.decode()
