"""Standard streams that are closed, full, deaf or of few characters: results raise one error, progress is dropped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.compat import few
from tests.fork_server import Command

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device-memory", "4MiB", "--threads", "1"]
BEGIN = "from aspec.observe.terminal.standard_streams import prepare_streams; prepare_streams()\n"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    made = tiny.build(tmp_path_factory.mktemp("streams") / "target", "llama", varied=True)
    (made / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    return made


@pytest.fixture
def full():
    with open("/dev/full", "wb") as file:
        yield file.fileno()


def script(code, *python, **streams):
    """A process of Python after it has prepared its streams."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **streams.pop("env", {})}
    command = [sys.executable, *python, "-c", BEGIN + code]
    return subprocess.run(command, env=environment, timeout=60, **{"capture_output": True, **streams})


def commands(target, tmp_path):
    """Every command that prints a result."""
    model, few = ["--target", str(target), *SMALL], ["-p", "hello", "-n", "4"]
    return {
        "generate": ["generate", *model, *few],
        "generate --json": ["generate", *model, *few, "--json"],
        "several": ["generate", *model, *few, "-p", "there"],
        "verify": ["generate", *model, *few, "--draft", "ngram", "--verify"],
        "plan": ["plan", *model],
        "trace": ["trace", "-o", str(tmp_path / "t.json"), "--summary", *model, *few],
        "profile": ["profile", "--target", str(target), "--threads", "1"],
        "bench": ["bench", *model, *few, "--rounds", "1"],
        "chat": ["chat", *model, "-n", "4"],
        "help": ["--help"],
    }


NAMES = list(commands("", Path()))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_standard_output_is_one_error_in_every_command(target, tmp_path, full, name):
    chat = name == "chat"
    process = Command(commands(target, tmp_path)[name], stdout=full, **({"stdin": -1} if chat else {}))
    if chat:
        process.stdin.write(b"hello\n")
    _, errors = process.communicate()
    said = errors.decode()
    assert process.returncode == 1, said
    assert said.count("error: ") == 1
    assert "error: standard output cannot be written: No space left on device." in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["generate", "several", "plan"])
@pytest.mark.parametrize("kind", few(["full", "closed", "deaf"], 1))
def test_an_answer_needs_no_standard_error(target, tmp_path, full, name, kind):
    args = commands(target, tmp_path)[name]
    usual, _ = Command(args).communicate()
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    while kind == "deaf":  # fill the pipe: nobody reads it
        try:
            os.write(writes, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writes, True)
    streams = {"full": {"stderr": full}, "closed": {"closed": (2,)}, "deaf": {"stderr": writes}}[kind]
    process = Command(args, **streams)
    said, _ = process.communicate()
    os.close(reads)
    os.close(writes)
    assert process.returncode == 0
    assert said
    assert name == "plan" or said == usual  # a plan tells measured rates


def test_a_batch_needs_no_standard_error(target, tmp_path, full):
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi", "max_tokens": 3}}
        for i in range(5)
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = Command(["batch", "-i", source, "-o", output, "--target", target, *SMALL], stderr=full)
    process.communicate()
    assert process.returncode == 0
    assert len(output.read_text().splitlines()) == 5


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_closed_descriptors_are_not_taken_by_the_event_loop(target, closed):
    process = Command(["generate", "--target", target, "-p", "hello", "-n", "4", *SMALL], closed=closed)
    said, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert bool(said) == (1 not in closed)
    assert (b"tokens/s" in errors) == (2 not in closed)


@pytest.mark.parametrize("args", [["generate"], ["chat"], ["trace", "-o", "x.json"]], ids=lambda args: args[0])
def test_a_standard_input_that_cannot_be_read_is_one_error(target, tmp_path, args):
    with (tmp_path / "written").open("wb") as file:
        process = Command([*args, "--target", target, *SMALL], stdin=file.fileno())
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.decode().count("error: ") == 1
    assert "standard input cannot be read: Bad file descriptor." in errors.decode()
    assert b"Traceback" not in errors


def test_a_closed_standard_input_is_an_empty_one(target):
    process = Command(["generate", "--target", target, *SMALL], closed=(0,))
    _, errors = process.communicate()
    assert process.returncode != 0
    assert b"prompt" in errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", rb"caf\xe9 \u6f22\u5b57 \U0001f600 \ud800"),
        ("latin-1", b"caf\xe9 \\u6f22\\u5b57 \\U0001f600 \\ud800"),
        ("cp1252", b"caf\xe9 \\u6f22\\u5b57 \\U0001f600 \\ud800"),
        ("cp437", b"caf\x82 \\u6f22\\u5b57 \\U0001f600 \\ud800"),
        ("utf-8", "café 漢字 😀 \\ud800".encode()),
    ],
)
def test_a_character_that_the_encoding_lacks_is_an_escape(encoding, expected):
    made = script(r"print('caf\xe9 \u6f22\u5b57 \U0001f600 \ud800')", env={"PYTHONIOENCODING": encoding})
    assert (made.returncode, made.stderr) == (0, b"")
    assert made.stdout == expected + b"\n"


def test_an_answer_in_a_narrow_encoding_is_whole_and_says_so(target):
    args = ["generate", "--target", target, "-n", "24", "--ignore-eos", "-p", "hello", *SMALL]
    usual, _ = Command(args).communicate()
    process = Command(args, encoding="ascii")
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said == usual.decode().encode("ascii", "backslashreplace")
    assert (b"standard output is ascii" in errors) == (not usual.isascii())


def test_an_unbuffered_python_has_the_same_streams():
    code = "import sys; print('é'); print('x', file=sys.stderr)"
    made = script(code, "-u", env={"PYTHONIOENCODING": "ascii"})
    assert (made.returncode, made.stdout, made.stderr) == (0, b"\\xe9\n", b"x\n")


def test_a_failed_write_is_raised_once_and_the_process_ends_in_peace(full):
    code = """
import sys
from aspec.errors import WriteError
try:
    print("x" * 100000, flush=True)
except WriteError as error:
    print(error, file=sys.stderr)
print("more", flush=True)
"""
    made = script(code, stdout=full, capture_output=False, stderr=subprocess.PIPE)
    assert made.returncode == 0
    assert made.stderr.decode().count("cannot be written") == 1
    assert made.stderr.count(b"\n") == 1


def test_a_pipe_that_does_not_block_gets_everything():
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    command = [sys.executable, "-c", BEGIN + "print('x' * 1_000_000)"]
    with subprocess.Popen(command, stdout=writes, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        os.close(writes)
        with os.fdopen(reads, "rb") as pipe:
            assert len(pipe.read()) == 1_000_001
    assert process.returncode == 0


def test_a_reader_that_leaves_ends_the_command_without_a_word(target):
    reads, writes = os.pipe()
    os.close(reads)
    process = Command(["generate", "--target", target, "-p", "hello", "-n", "4", "-q", *SMALL], stdout=writes)
    os.close(writes)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (1, b"")
