"""`aspec serve` as a process: what it says, when it refuses to begin, how it stops, what a failing engine does."""

import http.client
import json
import re
import shutil
import signal

import pytest
from typer.testing import CliRunner

from aspec.cli.front import opening
from aspec.cli.main import app
from tests import tiny
from tests.fork_server import Command, wait_until

COMPLETION = "/v1/completions"
SMALL = ["--threads", "1", "--speculation", "off", "--device-memory", "3MiB", "--max-batch", "2", "--port", "0"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("serve") / "target", "llama", varied=True)


class Served(Command):
    """A server process; a line tells its port."""

    def __init__(self, *args):
        super().__init__(["serve", *args])
        self.lines = []
        while b"is served at" not in (line := self.stderr.readline()):
            assert line, self.lines
            self.lines.append(line)
        self.port = int(re.search(rb":(\d+)/v1", line)[1])

    def ask(self, path, body=None, **headers):
        """The response, whose body is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
        return connection.getresponse()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)]
)
def test_a_signal_lets_running_answers_finish(target, number, code):
    process = Served("--target", target, *SMALL, "--log-requests", "--api-key", "secret", "--link-rate", "3MB/s")
    assert process.ask("/v1/models").status == 401
    key = {"authorization": "Bearer secret"}
    body = {"prompt": "a word", "max_tokens": 12, "ignore_eos": True, "stream": True}
    running = process.ask(COMPLETION, body, **key)
    assert running.status == 200
    process.send_signal(number)
    wait_until(lambda: process.ask("/health").status == 503)
    assert process.ask(COMPLETION, body, **key).status == 503
    assert running.read().endswith(b"data: [DONE]\n\n")
    _, errors = process.communicate()
    said = b"".join(process.lines) + errors
    assert process.returncode == code, errors.decode()
    assert b"POST /v1/completions 200" in said
    assert b"secret" not in said
    assert b"a word" not in said
    assert b"Traceback" not in said


@pytest.mark.slow
def test_a_second_signal_ends_the_answers_with_an_event(target):
    process = Served("--target", target, *SMALL, "--link-rate", "1MB/s", "--stop-after", "60")
    running = process.ask(COMPLETION, {"prompt": "a word", "max_tokens": 200, "ignore_eos": True, "stream": True})
    process.send_signal(signal.SIGINT)
    wait_until(lambda: process.ask("/health").status == 503)
    process.send_signal(signal.SIGINT)
    assert b'"code": "stopping"' in running.read()
    assert process.wait() == 130


@pytest.mark.slow
def test_a_failing_engine_is_told_to_clients_and_once_to_the_console(target, tmp_path):
    folder = shutil.copytree(target, tmp_path / "copy")
    process = Served("--target", folder, *SMALL, "--link-rate", "2MB/s")
    for shard in folder.glob("*.safetensors"):
        with open(shard, "r+b") as file:
            file.truncate(1000)
    answer = process.ask(COMPLETION, {"prompt": "a word", "max_tokens": 50, "ignore_eos": True})
    assert answer.status == 503
    assert json.loads(answer.read())["error"]["code"] in ("engine_failed", "failed")
    wait_until(lambda: json.loads(process.ask("/health").read())["status"] == "failed")
    assert process.ask(COMPLETION, {"prompt": "a"}).status == 503
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert errors.count(b"error: ") == 1, errors.decode()
    assert b"Traceback" not in errors


@pytest.mark.slow
def test_a_port_that_is_taken_is_said_before_anything_is_loaded(target):
    process = Served("--target", target, *SMALL)
    again = CliRunner().invoke(app, ["serve", "--target", str(target), "--port", str(process.port)])
    assert again.exit_code == 1
    assert "cannot be used" in again.output
    process.send_signal(signal.SIGTERM)
    process.communicate()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_others_are_let_in_only_with_a_key_or_aloud(host):
    refused = CliRunner().invoke(app, ["serve", "--host", host])
    assert refused.exit_code == 2
    assert "--no-auth" in refused.output


def test_missing_libraries_are_the_first_word(monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    answer = CliRunner().invoke(app, ["serve", "--target", "nowhere"])
    assert answer.exit_code == 1
    assert "aspec[serve]" in answer.output
