"""The dashboard on a real pseudo-terminal: it comes, follows the window, goes, and leaves text and errors whole."""

import asyncio
import re
import signal
import threading

import pytest

from aspec.observe.ticker import OnLoop, Ticker
from tests import tiny
from tests.fork_server import wait_until
from tests.terminal import Terminal

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
FLAGS = ["-p", "hello", "--ignore-eos", "--device-memory", "1650KiB", "--threads", "1"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("dashboard") / "target", "llama")


def on_terminal(target, *flags, **ends):
    return Terminal("generate", "--target", target, *FLAGS, *flags, **{"columns": 100, **ends})


def test_it_comes_follows_the_window_and_goes(target):
    terminal = on_terminal(target, "-n", "40", "--link-rate", "4MB/s", "--device-memory", "700KiB")
    terminal.wait_for(b"decode")
    for columns, rows in ((60, 16), (200, 50), (41, 8)):
        seen = len(terminal.drawn)
        terminal.resize(columns, rows)
        terminal.process.send_signal(signal.SIGWINCH)
        if rows > 8:  # into fewer nothing is drawn
            wait_until(lambda seen=seen: len(terminal.drawn) > seen or terminal.process.poll() is not None)
    code, out = terminal.end()
    assert code == 0, terminal.drawn[-3000:]
    assert len(out.strip("\n")) > 20  # stdout is a pipe: the text went there
    assert terminal.drawn.count(ENTER) == terminal.drawn.count(LEAVE) == 1
    behind = terminal.drawn.partition(LEAVE)[2]
    assert b"tokens/s" in behind  # the summary stays on the terminal
    assert b"Traceback" not in terminal.drawn


def test_ctrl_c_gives_the_terminal_back(target):
    terminal = on_terminal(target, "-n", "40", "--link-rate", "1MB/s", "--device-memory", "700KiB")
    terminal.wait_for(b"decode")
    terminal.process.send_signal(signal.SIGINT)
    code, out = terminal.end()
    assert code == 130
    assert out
    assert b"interrupted" in terminal.drawn.partition(LEAVE)[2]


def test_an_error_is_read_on_the_terminal_not_under_the_dashboard(target):
    terminal = on_terminal(target, "-n", "4", "--device-memory", "100KiB")
    code, out = terminal.end()
    assert (code, out) == (1, "")
    assert b"too small" in terminal.drawn.partition(LEAVE)[2] or ENTER not in terminal.drawn


@pytest.mark.parametrize(
    ("flags", "environment"), [(["--no-dashboard"], {}), (["--quiet"], {}), ([], {"TERM": "dumb"})], ids=str
)
def test_it_stays_away_where_it_is_not_wanted(target, flags, environment):
    terminal = on_terminal(target, "-n", "8", *flags, **environment)
    assert terminal.end()[0] == 0
    assert ENTER not in terminal.drawn
    assert (b"aspec:" in terminal.drawn) == (flags != ["--quiet"])


def test_no_color_is_honoured(target):
    plain = on_terminal(target, "-n", "120", "--link-rate", "1MB/s", "--device-memory", "1200KiB", NO_COLOR="1")
    plain.wait_for(b"disk")
    plain.interrupt()
    assert plain.end()[0] == 130
    assert not any(re.search(rb"[;\[](3[0-7]|4[0-7]|9[0-7]|38|48)[;m]", code) for code in COLOUR.findall(plain.drawn))
    assert b"disk" in plain.drawn


async def test_a_ticker_surfaces_its_error_and_a_busy_loop_leaves_the_last_answer():
    ticked = threading.Event()

    def fail():
        ticked.set()
        raise RuntimeError("drawing failed")

    ticker = Ticker(0.001, fail)
    assert await asyncio.to_thread(ticked.wait, 30)
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
