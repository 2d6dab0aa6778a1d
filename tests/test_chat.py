"""A conversation in the terminal: turns from a pipe and from a real terminal, what is kept of them, how it ends."""

import os
import re

import pytest
from typer.testing import CliRunner

import aspec
from aspec.cli.chat import Conversation
from aspec.cli.main import app
from aspec.errors import PromptError
from aspec.generation.tokenizer import Tokenizer
from tests import tiny
from tests.terminal import Terminal

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
SMALL = ["--device-memory", "4MiB", "--threads", "1", "--ignore-eos"]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FOOTER = re.compile(r"(\d+) tokens \(length\), .*prompt: (\d+) tokens new, (\d+) reused")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("chat") / "target", "llama", varied=True)
    draft = tiny.noisy_copy(target, target.parent / "draft", 0.1)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target, draft


@pytest.fixture
def dressed(monkeypatch):
    """What rich takes for a terminal, so that remarks are made."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def chat(*args, stdin=""):
    return CliRunner().invoke(app, ["chat", *map(str, args)], input=stdin)


def footers(result):
    return [tuple(map(int, found)) for found in FOOTER.findall(COLOUR.sub("", result.stderr))]


def rendered(*messages):
    return sum(len(f"[{role}]{content}\n") for role, content in messages) + len("[assistant]")


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_a_second_turn_prefills_its_new_tokens_only(pair, dressed, draft):
    flags = {"model": ["--draft", pair[1]], None: []}.get(draft, ["--draft", draft])
    made = chat("--target", pair[0], "-n", 12, *flags, *SMALL, stdin="hello\nand now?\n")
    assert made.exit_code == 0, made.output
    first, second = footers(made)
    assert first == (12, rendered(("user", "hello")), 0)
    assert second[2] == first[1] + 12 - 1, "all but the token that is not in the KV"
    assert second[1] < len("\n[user]and now?\n[assistant]") + 6


def test_the_answers_are_those_of_an_engine_that_was_given_everything(pair):
    made = chat("--target", pair[0], "-n", 10, *SMALL, "--system", "be brief", "-q", stdin="hello\nand now?\n")
    assert made.exit_code == 0, made.output
    options = dict(target=pair[0], device_memory=4 << 20, threads=1, max_new_tokens=10, ignore_eos=True)
    conversation = Conversation(Tokenizer.load(pair[0]), "be brief")
    said = ""
    for line in ("hello", "and now?"):
        prompt = conversation.prompt(line)
        (result,) = aspec.generate([prompt], **options)
        conversation.add(line, result.text, [*prompt, *result.token_ids])
        said += result.text + "\n"
    assert made.stdout == said
    assert made.stderr == ""


def test_new_starts_afresh(pair):
    made = chat("--target", pair[0], "-n", 8, *SMALL, "-q", stdin="hello\n/new\nhello\n\n/exit\nhello\n")
    assert made.exit_code == 0, made.output
    half = len(made.stdout) // 2
    assert made.stdout[:half] == made.stdout[half:]
    on = chat("--target", pair[0], "-n", 8, *SMALL, "-q", stdin="hello\nhello\n")
    assert on.stdout[:half] == made.stdout[:half]
    assert on.stdout != made.stdout, "without /new the second answer knows the first"


def test_help_and_what_is_no_command(pair):
    made = chat("--target", pair[0], *SMALL, "-q", stdin="/help\n/quit\n")
    assert (made.exit_code, made.stdout) == (0, "")
    assert all(word in made.stderr for word in ("/new", "/exit", "Ctrl-C"))
    assert "/quit is not a command" in made.stderr


def test_beyond_the_context_there_is_a_message_and_a_way_on(pair, dressed):
    flags = ["--target", pair[0], "-n", 20, *SMALL, "--max-context", 80]
    made = chat(*flags, stdin="hello\n" + "more " * 9 + "\nhi\n/new\nhello\n")
    assert made.exit_code == 0, made.output
    assert made.stderr.count("tokens; the context holds 80") == 1
    assert "/new" in made.stderr
    first, short, again = footers(made)
    assert first[0] == again[0] == 20
    assert sum(short) == 80, "the line that did not fit was forgotten; the next is cut at the end"
    assert "the context is full" in made.stderr


def test_a_line_that_is_no_unicode_is_refused_alone(pair):
    made = chat("--target", pair[0], "-n", 4, *SMALL, "-q", stdin=b"ab\xff\nhello\n")
    assert made.exit_code == 0, made.output
    assert made.stderr.count("error: ") == 1
    assert "not valid Unicode" in made.stderr
    assert made.stdout


def test_without_a_template_there_is_one_clear_error(pair, tmp_path):
    for flags, name in ((["--target", pair[1]], "draft"), ([], "the embedded demo pair")):
        made = chat(*flags, *SMALL, stdin="hello\n")
        assert made.exit_code == 1
        assert made.stdout == ""
        assert made.stderr.startswith("error: ")
        assert made.stderr.count("\n") == 1
        assert f"{name} has no chat template: expected" in made.stderr
        assert "aspec generate" in made.stderr


def test_flags_of_other_commands_are_no_flags_here(pair):
    for flag in ("--prompt", "--json", "--raw", "--batch-size", "--no-dashboard"):
        assert chat(flag, "1").exit_code == 2
    text = chat("--help").stdout
    assert all(word in text for word in ("--system", "--draft", "--temperature", "--max-context", "Ctrl-D", "Examples"))
    assert "--prompt" not in text


def test_a_turn_that_was_refused_leaves_no_trace(pair):
    conversation = Conversation(Tokenizer.load(pair[0]))
    before = conversation.prompt("hi")
    with pytest.raises(PromptError, match="Unicode"):
        conversation.prompt("ab\udcff")
    assert conversation.prompt("hi") == before


# -- a process of its own ------------------------------------------------------------------------------------


def on_terminal(target, *flags, **ends):
    ends = {"typed": True, "COLUMNS": "200", **ends}
    return Terminal("chat", "--target", target, *SMALL, *flags, **ends)


SLOW = ["-n", "30", "--link-rate", "3MB/s", "--device-memory", "1800KiB"]  # 0.15 s a pass


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(pair):
    terminal = on_terminal(pair[0], *SLOW)
    terminal.type(b"hello\n")
    first = b""
    while len(first) < 3:
        first += os.read(terminal.process.stdout.fileno(), 4096)
    terminal.interrupt()
    terminal.wait_for(b"aspec: stopped")
    assert terminal.process.poll() is None, "the conversation goes on"
    terminal.process.stdin.write(b"go on\n")
    terminal.process.stdin.close()
    terminal.process.stdin = None
    code, rest = terminal.end()
    assert code == 0, terminal.drawn
    assert first
    assert rest.count("\n") >= 2, "a line ends the first answer, too"
    ((_, new, reused),) = FOOTER.findall(COLOUR.sub("", terminal.drawn.decode()))
    spoken = rendered(("user", "hello"))
    assert spoken < int(reused) < spoken + 50, "more than the first prompt: what was said of the answer"
    assert int(new) < 50


def test_a_terminal_is_asked_and_ctrl_d_leaves(pair):
    terminal = on_terminal(pair[0], "-n", "6", whole=True)
    terminal.wait_for(b"> ")
    terminal.type(b"hello\n")
    terminal.wait_for(b"tokens (length)")
    terminal.wait_for(b"> ", times=2)
    terminal.type(b"\x04")
    code, _ = terminal.end()
    assert code == 0, terminal.drawn


def test_ctrl_c_at_the_prompt_drops_the_line_and_leaves_with_130_where_it_is_empty(pair):
    terminal = on_terminal(pair[0], "-n", "6", whole=True)
    terminal.wait_for(b"> ")
    terminal.type(b"/new\n")
    terminal.wait_for(b"a new conversation")
    terminal.wait_for(b"> ", times=2)
    terminal.type(b"never mind")
    terminal.wait_for(b"never mind")
    terminal.interrupt()
    terminal.wait_for(b"> ", times=3)
    terminal.interrupt()
    code, _ = terminal.end()
    assert code == 130, terminal.drawn
    assert b"interrupted" in terminal.drawn


def test_answers_that_go_elsewhere_hold_no_prompt(pair):
    terminal = on_terminal(pair[0], "-n", "6", asked=True)
    terminal.wait_for(b"> ")
    terminal.type(b"hello\n")
    terminal.wait_for(b"> ", times=2)
    terminal.type(b"/exit\n")
    code, out = terminal.end()
    assert code == 0, terminal.drawn
    assert out
    assert "> " not in out
