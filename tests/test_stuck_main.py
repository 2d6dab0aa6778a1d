"""Three Ctrl-C end a process, also one whose main thread hangs where Python runs no handler."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PREPARED = """
import sys
from aspec.cli import main as cli
def app(args):
{body}
cli.app = app
cli.main()
"""
HANGS = """import ctypes
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    print("on", flush=True)
    libc.pthread_mutex_lock(lock)"""  # for ever, and no signal interrupts it
ALIVE = {
    "Python that waits": "import time; print('on', flush=True); time.sleep(600)",
    "Python that reads": "print('on', flush=True); sys.stdin.read()",
    "a loop": "import asyncio; print('on', flush=True); asyncio.run(asyncio.sleep(600))",
    "uvloop": "import uvloop, asyncio; print('on', flush=True); uvloop.run(asyncio.sleep(600))",
    "a thread that never ends": "import threading, time; print('on', flush=True); "
    "threading.Thread(target=time.sleep, args=(600,), daemon=True).start(); threading.Event().wait()",
}


@contextlib.contextmanager
def started(body):
    """A process whose main thread is inside of this code."""
    command = [sys.executable, "-c", PREPARED.format(body=f"    {body}")]
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, **streams)
    assert process.stdout.readline() == b"on\n", process.stderr.read()
    time.sleep(0.1)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_third_ctrl_c_ends_a_process_that_hangs_in_a_library():
    with started(HANGS) as process:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.parametrize("kind", ALIVE)
def test_one_ctrl_c_interrupts_python(kind):
    with started(ALIVE[kind]) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
        assert b"KeyboardInterrupt" in process.stderr.read()


def test_one_ctrl_c_ends_a_process_whose_command_is_done():
    body = "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); print('on', flush=True)"
    with started(body) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
