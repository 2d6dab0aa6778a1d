"""Signals: whatever ends or stops a command gives the terminal back and prints the text so far."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from aspec.cli.interrupts import Interrupts
from aspec.observe.console import Console
from aspec.observe.dashboard import LEAVE_SCREEN
from aspec.observe.timeline import Round, Slice, Stops, Timeline
from tests import tiny
from tests.fork_server import PIPE, Command, wait_until
from tests.terminal import Terminal

ROOT = Path(__file__).resolve().parent.parent
ENTER, LEAVE, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
SLOW = ["--device-memory", "1850KiB", "--threads", "1", "--link-rate", "1MB/s", "--ignore-eos", "-n", "120"]
ENDS = {signal.SIGTERM: 143, signal.SIGHUP: 129}
INSTALLED = """
import asyncio, os, sys, time
from contextlib import suppress
from aspec.cli.interrupts import Interrupts
interrupts = Interrupts().install()
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    made = tiny.build(tmp_path_factory.mktemp("interrupts") / "target", "llama", varied=True)
    (made / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    return made


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_that_ends_restores_the_screen_and_prints_the_text(target, number):
    terminal = Terminal("generate", "--target", target, "-p", "hello", *SLOW, whole=True)
    terminal.wait_for(b"decode")
    wait_until(lambda: b"1 of 120 tokens" in terminal.drawn or b"2 of 120 tokens" in terminal.drawn)
    terminal.process.send_signal(number)
    code, _ = terminal.end()
    assert code == ENDS[number]
    screen, _, behind = terminal.drawn.partition(LEAVE)
    assert screen.count(ENTER) == 1
    assert CURSOR in screen.rpartition(ENTER)[2]
    text = behind.partition(b"aspec:")[0].strip()
    assert text, "the text so far"
    assert f"stopped by {number.name}".encode() in behind
    assert re.search(rb"stopped after \d+ tokens", behind)


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("command", ["generate", "trace", "bench", "several"])
def test_the_exit_code_names_the_signal_without_a_terminal_too(target, tmp_path, command, number):
    more = {"trace": ["-o", tmp_path / "t.json"], "several": ["-p", "there", "--device-memory", "2300KiB"]}.get(
        command, []
    )
    name = "generate" if command == "several" else command
    flags = [flag for flag in SLOW if command != "bench" or flag != "--ignore-eos"]
    process = Command([name, "--target", target, "-p", "hello", *flags, *more])
    if command == "generate":
        assert os.read(process.stdout.fileno(), 1)
    else:
        line = process.stderr.readline()
        assert line.startswith(b"aspec: "), line
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == ENDS[number], errors.decode()
    assert f"stopped by {number.name}".encode() in errors
    assert b"Traceback" not in errors


def test_the_text_so_far_of_every_prompt_is_printed(target):
    args = ["generate", "--target", target, *SLOW, "--device-memory", "2600KiB"]
    terminal = Terminal(*args, "-p", "hello", "-p", "there", "-p", "you", whole=True)
    terminal.wait_for(b"tokens per pass")
    terminal.interrupt()
    assert terminal.end()[0] == 130
    behind = terminal.drawn.partition(LEAVE)[2]
    assert [re.search(rb"\[%d\] [^\r\n]" % row, behind) is not None for row in range(4)] == [True, True, True, False]
    assert re.search(rb"stopped after \d+ tokens, [\d.]+ tokens/s", behind)


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("moment", ["prompt", "answer"])
def test_a_chat_ends_at_the_prompt_and_within_an_answer(target, number, moment):
    process = Command(["chat", "--target", target, *SLOW], stdin=PIPE)
    process.stdin.write(b"hello\n" if moment == "answer" else b"")
    process.stdin.flush()
    if moment == "answer":
        assert os.read(process.stdout.fileno(), 1)
    else:
        assert process.stderr.readline().startswith(b"aspec: ")
    process.send_signal(number)
    process.wait()
    _, errors = process.communicate()
    assert process.returncode == ENDS[number], errors.decode()
    assert b"Traceback" not in errors


def test_a_batch_that_is_terminated_stops_at_once_and_goes_on_later(target, tmp_path):
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi", "max_tokens": 30}}
        for i in range(40)
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["batch", "-i", source, "-o", output, "--target", target, "--device-memory", "4MiB", "--threads", "1"]
    process = Command([*args, "--link-rate", "3MB/s", "--batch-size", "2"])
    wait_until(lambda: output.exists() and output.read_text().count("\n") > 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143, errors.decode()
    assert b"run the same command again" in errors
    again = Command(args)
    again.communicate()
    assert again.returncode == 0
    assert output.read_text().count("\n") == 40


def test_a_batch_on_a_terminal_gives_its_line_and_the_cursor_back(target, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "hi", "max_tokens": 60}
    source.write_text(json.dumps({"custom_id": "r", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    args = ["batch", "-i", source, "-o", output, "--target", target, "--device-memory", "4MiB", "--threads", "1"]
    terminal = Terminal(*args, "--link-rate", "1MB/s")
    terminal.wait_for(b"0 of 1 rows")
    terminal.process.send_signal(signal.SIGTERM)
    code, _ = terminal.end()
    assert code == 143
    assert terminal.drawn.rindex(CURSOR) > terminal.drawn.rindex(b"\x1b[?25l")
    assert ENTER not in terminal.drawn


def state_of(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_ctrl_z_gives_the_screen_back_and_fg_takes_it_again(target):
    begun = time.monotonic()
    terminal = Terminal("generate", "--target", target, "-p", "hello", "--json", *SLOW, "--link-rate", "6MB/s")
    terminal.wait_for(b"decode")
    terminal.process.send_signal(signal.SIGTSTP)
    wait_until(lambda: state_of(terminal.process) == "T")
    wait_until(lambda: LEAVE in terminal.drawn)
    assert CURSOR in terminal.drawn.rpartition(ENTER)[2]
    seen, stopped = len(terminal.drawn), time.monotonic()
    time.sleep(2.0)
    assert len(terminal.drawn) == seen, "nothing is drawn into the shell"
    stopped = time.monotonic() - stopped
    terminal.process.send_signal(signal.SIGCONT)
    terminal.wait_for(ENTER, times=2)
    code, out = terminal.end()
    assert code == 0
    assert terminal.drawn.count(ENTER) == terminal.drawn.count(LEAVE) == 2
    stats = json.loads(out)["stats"]
    assert stats["prefill_s"] + stats["decode_s"] <= time.monotonic() - begun - stopped


def test_a_clock_without_stops():
    stops = Stops()
    assert stops.running_s(7.0) == 7.0
    stops.add(10.0, 12.0)
    stops.add(20.0, 25.0)
    assert [stops.running_s(at) for at in (9.0, 10.0, 11.0, 12.0, 15.0, 30.0)] == [9.0, 10.0, 10.0, 10.0, 13.0, 23.0]
    run = Timeline((Slice(1, "disk", "read", 9.0, 13.0),), (Round(0, 9.0, 30.0, 0, 0, 1),))
    moved = stops.left_out(run)
    assert (moved.slices[0].start_s, moved.slices[0].stop_s) == (9.0, 11.0)
    assert (moved.rounds[0].start_s, moved.rounds[0].stop_s) == (9.0, 23.0)


def started(code, **streams):
    """A process that has installed the handlers and said so."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", INSTALLED + code], env=environment, stdout=subprocess.PIPE, **streams
    )
    assert process.stdout.readline() == b"ready\n"
    return process


HANGING = {
    "python code": """
while True:
    with suppress(KeyboardInterrupt):
        print("ready", flush=True)
        while True:
            time.sleep(60)
""",
    "a loop": """
async def work():
    print("ready", flush=True)
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
interrupts.run(asyncio.Runner(), work())
""",
    "a read that never comes": """
reads, writes = os.pipe()
while True:
    with suppress(KeyboardInterrupt):
        print("ready", flush=True)
        os.read(reads, 1)
""",
}


@pytest.mark.parametrize("kind", HANGING)
def test_three_ctrl_c_end_the_process_whatever_hangs(kind):
    with started(HANGING[kind], stderr=subprocess.DEVNULL) as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(10) == 130


def test_the_last_signal_restores_the_terminal_and_prints_the_text():
    master, slave = pty.openpty()
    code = """
from types import SimpleNamespace
from aspec.observe.console import Console
from aspec.observe.dashboard import ENTER_SCREEN, TerminalDisplay
import termios, tty
interrupts.console = console = Console()
tty.setraw(0)
display = TerminalDisplay(lambda: "frame", covers=True)
with console.shown(display):
    console.write("the text so far")
    os.write(2, b"ready")
    while True:
        with suppress(KeyboardInterrupt):
            time.sleep(60)
"""
    import termios

    before = termios.tcgetattr(slave)
    with subprocess.Popen(
        [sys.executable, "-c", INSTALLED + code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        drawn = b""
        while b"frame" not in drawn or b"ready" not in drawn:
            drawn += os.read(master, 4096)
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert process.wait(10) == 143
        while b"the text so far" not in drawn:
            drawn += os.read(master, 4096)
        assert LEAVE_SCREEN.encode() in drawn.partition(b"frame")[2]
        assert termios.tcgetattr(slave)[3] == before[3], "echo and lines are on again"
    os.close(slave)
    os.close(master)


def test_ctrl_c_that_was_dealt_with_does_not_count():
    code = """
async def answer():
    with suppress(asyncio.CancelledError):
        print("ready", flush=True)
        await asyncio.sleep(60)
with asyncio.Runner() as runner:
    for _ in range(5):
        interrupts.run(runner, answer())
sys.exit(7)
"""
    with started(code) as process:
        for _ in range(4):
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 7


def test_no_signal_breaks_the_closing_off():
    code = """
from aspec.cli.interrupts import present
async def close():
    print("ready", flush=True)
    await asyncio.sleep(1.5)
    print("closed", flush=True)
with asyncio.Runner() as runner, present().finishing():
    runner.run(close())
"""
    with started(code) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"closed\n"
        assert process.wait(10) == 0


def test_a_signal_before_the_work_begins_cancels_it():
    code = """
async def work():
    try:
        await asyncio.sleep(60)
    finally:
        print("cancelled", flush=True)
print("ready", flush=True)
sys.stdin.readline()
coroutine = interrupts._cancellable(work(), interrupts._count)
with interrupts.finishing():
    os.kill(os.getpid(), 15)
with asyncio.Runner() as runner, suppress(asyncio.CancelledError):
    runner.run(coroutine)
"""
    with started(code, stdin=subprocess.PIPE) as process:
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"cancelled\n"
        assert process.wait(10) == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_that_the_parent_ignores_stays_ignored(name):
    code = f"import signal; signal.signal(signal.{name}, signal.SIG_IGN)\n" + INSTALLED
    code += f"os.kill(os.getpid(), signal.{name}); print('alive')"
    made = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert made.stdout == b"alive\n", made.stderr


def test_a_command_within_another_program_leaves_its_handlers():
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP)}
    with Interrupts.watching(Console()) as interrupts:
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        with Interrupts.watching(Console()) as same:
            assert same is interrupts
    assert before == {name: signal.getsignal(name) for name in before}


def test_ctrl_c_before_the_command_has_begun_is_130():
    process = Command(["generate"], stdin=PIPE)  # it waits for its prompt
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.wait()
    _, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert b"Traceback" not in errors


MUTED = """
import termios
from aspec.cli.interrupts import restore_terminal_modes, terminal_modes
before = terminal_modes()
quiet = terminal_modes()
quiet[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, quiet)
restore_terminal_modes(before)
"""


def test_the_modes_are_restored_of_a_terminal_that_does_not_control_the_session():
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", MUTED], stdin=slave, env=environment, start_new_session=True, check=True)
    assert termios.tcgetattr(master)[3] & termios.ECHO
    os.close(slave)
    os.close(master)
