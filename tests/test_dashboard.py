"""The dashboard on a real pseudo-terminal: it comes, follows the window, goes, and leaves text and errors whole."""

import asyncio
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from aspec.io.ticker import OnLoop, Ticker
from tests import tiny

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
FLAGS = ["-p", "hello", "--ignore-eos", "--device-memory", "1650KiB", "--threads", "1"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("dashboard") / "target", "llama")


class Terminal:
    """A process whose stderr is a terminal of our own; everything it draws is kept."""

    def __init__(self, target, *flags, columns=100, rows=30, **environment):
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        self.drawn = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aspec", "generate", "--target", str(target), *FLAGS, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **environment},
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

    def wait_for(self, wanted):
        deadline = time.monotonic() + 60
        while wanted not in self.drawn:
            assert time.monotonic() < deadline, self.drawn[-2000:]
            assert self.process.poll() is None or wanted in self.drawn, self.drawn[-2000:]
            time.sleep(0.02)

    def end(self):
        out, _ = self.process.communicate(timeout=60)
        self.reader.join(10)
        os.close(self.master)
        return self.process.returncode, out.decode()


def test_it_comes_follows_the_window_and_goes(target):
    terminal = Terminal(target, "-n", "120", "--link-rate", "4MB/s")
    terminal.wait_for(b"decode")
    for columns, rows in ((60, 16), (200, 50), (41, 8)):
        terminal.resize(columns, rows)
        terminal.process.send_signal(signal.SIGWINCH)
        time.sleep(0.4)
    code, out = terminal.end()
    assert code == 0, terminal.drawn[-3000:]
    assert len(out.strip("\n")) > 20  # stdout is a pipe: the text went there
    assert terminal.drawn.count(ENTER) == terminal.drawn.count(LEAVE) == 1
    behind = terminal.drawn.partition(LEAVE)[2]
    assert b"tokens/s" in behind  # the summary stays on the terminal
    assert b"Traceback" not in terminal.drawn


def test_ctrl_c_gives_the_terminal_back(target):
    terminal = Terminal(target, "-n", "120", "--link-rate", "1MB/s")
    terminal.wait_for(b"decode")
    terminal.process.send_signal(signal.SIGINT)
    code, out = terminal.end()
    assert code == 130
    assert out
    assert b"interrupted" in terminal.drawn.partition(LEAVE)[2]


def test_an_error_is_read_on_the_terminal_not_under_the_dashboard(target):
    terminal = Terminal(target, "-n", "4", "--device-memory", "100KiB")
    code, out = terminal.end()
    assert (code, out) == (1, "")
    assert b"too small" in terminal.drawn.partition(LEAVE)[2] or ENTER not in terminal.drawn


@pytest.mark.parametrize(
    ("flags", "environment"), [(["--no-dashboard"], {}), (["--quiet"], {}), ([], {"TERM": "dumb"})], ids=str
)
def test_it_stays_away_where_it_is_not_wanted(target, flags, environment):
    terminal = Terminal(target, "-n", "8", *flags, **environment)
    assert terminal.end()[0] == 0
    assert ENTER not in terminal.drawn
    assert (b"aspec:" in terminal.drawn) == (flags != ["--quiet"])


def test_no_color_is_honoured(target):
    plain = Terminal(target, "-n", "120", "--link-rate", "8MB/s", NO_COLOR="1")
    assert plain.end()[0] == 0
    assert not any(re.search(rb"[;\[](3[0-7]|4[0-7]|9[0-7]|38|48)[;m]", code) for code in COLOUR.findall(plain.drawn))
    assert b"disk" in plain.drawn


async def test_a_ticker_surfaces_its_error_and_a_busy_loop_leaves_the_last_answer():
    def fail():
        raise RuntimeError("drawing failed")

    ticker = Ticker(0.001, fail)
    await asyncio.sleep(0.05)
    with pytest.raises(RuntimeError, match="drawing failed"):
        ticker.close()
    ticker.close()
    answers = iter(range(10))
    asked = OnLoop(asyncio.get_running_loop(), lambda: next(answers))
    got = []
    thread = threading.Thread(target=lambda: got.append(asked.get(0.01)), name="asks")
    thread.start()
    thread.join()  # the loop is busy here: it cannot answer
    assert got == [0]
    await asyncio.sleep(0)
    assert await asyncio.to_thread(asked.get, 5.0) == 2
