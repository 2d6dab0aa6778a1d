"""A conversation in the terminal: turns from a pipe and from a real terminal, what is kept of them, how it ends."""

import io
import json
import os
import re
import shutil
import signal
import stat
from pathlib import Path

import pytest
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output.vt100 import Vt100_Output
from typer.testing import CliRunner

import aspec
from aspec.cli.chat import prompt
from aspec.cli.chat.commands import COMMANDS
from aspec.cli.chat.conversation import Conversation, Turn
from aspec.cli.chat.prompt import History, PromptReader
from aspec.cli.main import app
from aspec.generation.text.tokenizer import Tokenizer
from tests import tiny
from tests.fork_server import wait_until
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
    talk, tokenizer, said = Conversation("be brief"), Tokenizer.load(pair[0]), ""
    for line in ("hello", "and now?"):
        prompt = talk.prompt(line, tokenizer.encode_chat)
        (result,) = aspec.generate([prompt], **options)
        talk = talk.with_turn(Turn(line, result.text, (*prompt, *result.token_ids)))
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
    lines = "/help\n/quit\n/tempurature 0.5\n/new talk\n/save\n"
    made = chat("--target", pair[0], *SMALL, "-q", stdin=lines)
    assert (made.exit_code, made.stdout) == (1, ""), "a pipe learns that lines were refused"
    assert all(word in made.stderr for word in (*COMMANDS, "Ctrl-C", "Ctrl-D", '"""', "pasted", "FILE"))
    assert "/quit is not a command (did you mean /exit?)" in made.stderr
    assert "/tempurature is not a command" in made.stderr
    assert "/new takes nothing after its name, found 'talk'" in made.stderr
    assert "/save needs FILE" in made.stderr
    assert made.stderr.count("error: ") == 4


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ('"""\none\ntwo\n"""\n', "one\ntwo"),
        ("one\\\ntwo\n", "one\ntwo"),
        ("//help\n", "/help"),
        ("/etc/hosts is a file\n", "/etc/hosts is a file"),
        ("\ufeffhello\r\n", "hello"),
        ("ends in a backslash\\", "ends in a backslash"),
    ],
)
def test_what_several_lines_and_slashes_say(pair, dressed, lines, text):
    made = chat("--target", pair[0], "-n", 2, *SMALL, stdin=lines)
    assert made.exit_code == 0, made.output
    assert [new for _, new, _ in footers(made)] == [rendered(("user", text))]


def test_an_input_that_ends_inside_quotes_is_refused(pair):
    made = chat("--target", pair[0], "-n", 2, *SMALL, "-q", stdin='"""\nhello\n')
    assert (made.exit_code, made.stdout) == (1, "")
    assert "the input ends inside" in made.stderr


def test_a_full_context_drops_the_oldest_turns_and_an_over_long_message_is_refused_alone(pair, dressed):
    flags = ["--target", pair[0], "-n", 20, *SMALL, "--max-context", 120, "--system", "s"]
    made = chat(*flags, stdin="first\nsecond\nthird\n" + "more " * 30 + "\nfourth\n")
    assert made.exit_code == 1, "a line was refused"
    assert COLOUR.sub("", made.stderr).count("error: this message alone, with the system message, has ") == 1
    assert "2 oldest turns are dropped" in made.stderr
    assert [count for count, *_ in footers(made)] == [20] * 4, "each answer has room"
    totals = [new + reused for _, new, reused in footers(made)]
    assert totals[2] == rendered(("system", "s"), ("user", "third")), "the system message stays"


def test_an_answer_that_fills_the_context_ends_there_and_the_talk_goes_on(pair, dressed):
    made = chat("--target", pair[0], "-n", 500, *SMALL, "--max-context", 60, stdin="first\nsecond\n")
    assert made.exit_code == 0, made.output
    first, second = footers(made)
    assert sum(first) == sum(second) == 60
    assert made.stderr.count("it is full: the next message drops the oldest turns") == 2
    assert "the oldest turn is dropped" in COLOUR.sub("", made.stderr)
    assert second[1] + second[2] == rendered(("user", "second"))


def test_settings_change_the_answers_and_regen_takes_another_seed(pair):
    lines = ["hello", "/regen", "/set temperature 1", "/regen", "/regen", "/set seed 5", "/undo", "hello"]
    made = chat("--target", pair[0], "-n", 20, "--temperature", 0, *SMALL, stdin="\n".join(lines) + "\n")
    assert made.exit_code == 1
    assert made.stderr.count("error: the answer would be the same: with temperature 0") == 1
    seeds = [int(seed) for seed in re.findall(r"another answer, with seed (\d+)", made.stderr)]
    assert len(set(seeds)) == 2
    alone = [
        chat("--target", pair[0], "-n", 20, *SMALL, "-q", *flags, stdin="hello\n").stdout
        for flags in (["--temperature", 0], *(["--temperature", 1, "--seed", seed] for seed in (*seeds, 5)))
    ]
    assert made.stdout == "".join(alone)
    assert len(set(alone)) == 4


def test_a_setting_that_is_wrong_changes_nothing(pair):
    lines = "/set temprature 1\n/set top_p 7\n/set\n/set top-k=4\n/set top_k\n/show\n"
    made = chat("--target", pair[0], *SMALL, "--device-memory", "8MiB", "--temperature", 0.25, "-q", stdin=lines)
    assert made.exit_code == 1
    assert "did you mean temperature?" in made.stderr
    assert "top_p must be above 0" in made.stderr
    assert re.search(r"^temperature +0.25$", made.stderr, re.MULTILINE)
    assert "\ntop_k 4\n" in made.stderr
    shown = made.stderr[made.stderr.index("\nmodel") :]
    assert str(pair[0]) in shown
    for words in (
        "draft     the text itself",
        "parts stream",
        "top_k 4",
        "context   0 of ",
        "turns     0",
        "system    none",
    ):
        assert words in shown, words


def test_undo_and_regen_reuse_what_is_cached(pair, dressed):
    lines = "hello\nand now?\n/undo\nand then?\n/set temperature 1\n/regen\n"
    made = chat("--target", pair[0], "-n", 8, *SMALL, stdin=lines)
    first, _, other, again = footers(made)
    turn = first[1] + 8 - 1
    assert other[2] >= turn
    assert again == (8, 1, other[1] + other[2] - 1), "only the token that draws"


def test_a_conversation_is_saved_and_goes_on_with_another_model(pair, dressed, tmp_path):
    file = tmp_path / "my talk.json"
    flags = ["-n", 8, "--temperature", 0, *SMALL]
    made = chat("--target", pair[0], *flags, "--system", "s", "--seed", 3, stdin=f"hello\n/save {file}\n/save {file}\n")
    assert made.exit_code == 1
    assert "exists and is unchanged" in made.stderr
    assert f"/save! {file}" in made.stderr
    content = json.loads(file.read_text())
    assert [message["role"] for message in content["messages"]] == ["system", "user", "assistant"]
    assert content["settings"]["seed"] == 3
    (pair[1] / "chat_template.jinja").write_text(TEMPLATE)
    on = chat("--target", pair[1], *flags, stdin=f"before\n/load '{file}'\n/set seed\nand now?\n/save! {file}\n")
    (pair[1] / "chat_template.jinja").unlink()
    assert on.exit_code == 0, on.output
    assert f"it was with the model {pair[0]}; {pair[1]} continues it" in on.stderr
    assert "seed 3" in on.stderr
    whole = [*content["messages"], {"role": "user", "content": "and now?"}]
    total = len(Tokenizer.load(pair[0]).encode_chat(whole))
    assert sum(footers(on)[1][1:]) == total, "nothing of the talk before"
    assert len(json.loads(file.read_text())["messages"]) == 5


def test_a_damaged_file_leaves_the_conversation_as_it_is(pair, tmp_path):
    (tmp_path / "talk.json").write_text('{"messages": [')
    made = chat("--target", pair[0], "-n", 4, *SMALL, "-q", stdin=f"hello\n/load {tmp_path}/talk.json\n/show\n")
    assert made.exit_code == 1
    assert "talk.json is not a saved conversation: expected JSON" in made.stderr
    assert "turns     1" in made.stderr


def test_a_template_without_a_system_role_is_told_before_weights_are_read_and_in_the_talk(pair, tmp_path):
    shutil.copytree(pair[0], target := tmp_path / "strict")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    (target / "chat_template.jinja").write_text(refusal + TEMPLATE)
    talk = {"messages": [{"role": "system", "content": "s"}]}
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    made = chat("--target", target, "-n", 4, *SMALL, "-q", stdin=f"/system s\n/load {tmp_path}/talk.json\nhello\n")
    assert made.exit_code == 1
    assert made.stderr.count("the system message cannot be used: ") == made.stderr.count("no system here") == 2
    assert made.stdout, "the talk goes on"
    for shard in target.glob("*.safetensors"):
        shard.unlink()
    made = chat("--target", target, *SMALL, "--system", "s", stdin="hello\n")
    assert (made.exit_code, made.stdout) == (1, "")
    assert "no system here" in made.stderr


def test_a_system_message_counts_from_the_next_message_on(pair, dressed):
    lines = 'hello\n/new\n/system """\nbe\nbrief\n"""\nhello\n/system\n/system ""\n/clear\nhello\n'
    made = chat("--target", pair[0], "-n", 2, *SMALL, stdin=lines)
    assert made.exit_code == 0, made.output
    plain = rendered(("user", "hello"))
    with_system = rendered(("system", "be\nbrief"), ("user", "hello"))
    assert [new + reused for _, new, reused in footers(made)] == [plain, with_system, plain]


def test_an_empty_answer_is_a_turn(pair, dressed):
    first = chat("--target", pair[0], "-n", 1, *SMALL, "-q", stdin="hello\n").stdout[0]
    made = chat("--target", pair[0], "-n", 4, *SMALL, "--stop", first, stdin="hello\nagain\n/show\n")
    assert made.exit_code == 0, made.output
    assert "the answer is empty" in made.stderr
    assert "turns     2" in made.stderr


def test_a_line_that_is_no_unicode_is_refused_alone_and_the_exit_code_tells(pair):
    made = chat("--target", pair[0], "-n", 4, *SMALL, "-q", stdin=b"ab\xff\nhello\n")
    assert made.exit_code == 1
    assert made.stderr.count("error: ") == 1
    assert "this entry is not valid Unicode at character 2: expected UTF-8 text, found byte 0xff" in made.stderr
    assert made.stdout


def test_without_a_template_there_is_one_clear_error(pair, tmp_path):
    for flags, name in ((["--target", pair[1]], "draft"), ([], "the embedded demo pair")):
        made = chat(*flags, *SMALL, stdin="hello\n")
        assert made.exit_code == 1
        assert made.stdout == ""
        *_, last = made.stderr.splitlines()
        assert last.startswith("error: ")
        assert f"{name} has no chat template: expected" in made.stderr
        assert "aspec generate" in made.stderr


def test_flags_of_other_commands_are_no_flags_here(pair):
    for flag in ("--prompt", "--json", "--raw", "--batch-size", "--no-dashboard"):
        assert chat(flag, "1").exit_code == 2
    text = chat("--help").stdout
    assert all(word in text for word in ("--system", "--draft", "--temperature", "--max-context", "Ctrl-D", "Examples"))
    assert "--prompt" not in text


# -- a process of its own ------------------------------------------------------------------------------------


def on_terminal(target, *flags, **ends):
    ends = {"typed": True, "COLUMNS": "200", **ends}
    return Terminal("chat", "--target", target, *SMALL, *flags, **ends)


SLOW = ["-n", "30", "--link-rate", "3MB/s", "--device-memory", "1850KiB"]  # 0.15 s a pass


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(pair):
    terminal = on_terminal(pair[0], *SLOW)
    terminal.type(b"hello\n")
    first = b""
    while len(first) < 3:
        more = os.read(terminal.process.stdout.fileno(), 4096)
        assert more, terminal.drawn
        first += more
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


PROMPTED = b"\x1b[?2004h"  # the terminal marks pastes: at each prompt, and during each answer for the next one


def at_prompt(target, *flags, **ends):
    terminal = on_terminal(target, *flags, whole=True, **ends)
    terminal.wait_for(PROMPTED)
    return terminal


def test_pasted_lines_are_one_message_and_ctrl_d_leaves(pair):
    terminal = at_prompt(pair[0], "-n", "6")
    terminal.type(b'\x1b[200~one\r\n"""\n/help\n\x1b[201~\r')
    terminal.wait_for(b"tokens (length)")
    terminal.type(b'"""one\rtwo"""\r')
    terminal.wait_for(b"tokens (length)", times=2)
    terminal.wait_for(PROMPTED, times=5)
    terminal.type(b"\x04")
    code, _ = terminal.end()
    assert code == 0, terminal.drawn
    (_, new, _), (_, more, reused) = FOOTER.findall(COLOUR.sub("", terminal.drawn.decode()))
    assert int(new) == rendered(("user", 'one\n"""\n/help'))
    assert int(more) + int(reused) == int(new) + 6 + len("\n") + rendered(("user", "one\ntwo"))


def test_ctrl_c_at_the_prompt_drops_the_line_and_leaves_at_the_second_time_in_a_row(pair):
    terminal = at_prompt(pair[0], "-n", "6")
    warned = b"press Ctrl-C again to leave"
    terminal.interrupt()
    terminal.wait_for(warned)
    terminal.wait_for(PROMPTED, times=2)
    terminal.type(b"never mind\x03")
    terminal.wait_for(PROMPTED, times=3)
    terminal.type(b"\x03")
    terminal.wait_for(warned, times=2)
    terminal.wait_for(PROMPTED, times=4)
    terminal.type(b"\x03")
    code, _ = terminal.end()
    assert code == 130, terminal.drawn
    assert b"interrupted" in terminal.drawn


def test_keys_typed_during_an_answer_are_the_next_entry_and_never_print_into_it(pair):
    terminal = at_prompt(pair[0], *SLOW, "-n", "10")
    terminal.type(b"hello\r")
    terminal.wait_for(PROMPTED, times=2)
    terminal.type(b"typed early\r/bye\r")
    code, _ = terminal.end()
    assert code == 0, terminal.drawn
    first = terminal.drawn.index(b"tokens (length)")
    assert b"typed early" not in terminal.drawn[:first]
    assert b"typed early" in terminal.drawn[first:]
    assert terminal.drawn.count(b"tokens (length)") == 2


@pytest.mark.slow
def test_ctrl_c_before_the_first_token_keeps_the_message_and_the_terminal_echoes_again(pair):
    terminal = at_prompt(pair[0], "-n", "2", "--link-rate", "200KB/s", "--device-memory", "1850KiB")
    terminal.type(b"hello\r")
    terminal.wait_for(b"reading")
    terminal.interrupt()
    terminal.wait_for(b"stopped before the answer began")
    terminal.type(b"/regen\r")
    terminal.wait_for(b"tokens (length)")
    terminal.type(b"/bye\r")
    terminal.process.wait()
    assert terminal.echoes
    code, _ = terminal.end()
    assert code == 0, terminal.drawn
    assert terminal.drawn.count(b"\x1b[?2004h") == terminal.drawn.count(b"\x1b[?2004l")


@pytest.mark.parametrize("answering", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_ends_a_chat_leaves_a_terminal_that_echoes(pair, number, code, answering):
    terminal = at_prompt(pair[0], *SLOW)
    if answering:
        terminal.type(b"hello\r")
        terminal.wait_for(PROMPTED, times=2)
    terminal.process.send_signal(number)
    terminal.process.wait()
    assert terminal.echoes
    assert terminal.end()[0] == code, terminal.drawn
    assert terminal.drawn.count(b"\x1b[?2004h") == terminal.drawn.count(b"\x1b[?2004l")


def test_a_signal_amid_the_first_drawing_of_the_prompt_ends_the_marking_of_pastes(monkeypatch):
    written = io.StringIO()
    output = Vt100_Output(written, lambda: Size(rows=30, columns=80), term="xterm-256color")
    monkeypatch.setattr(prompt, "create_output", lambda: output)
    reader = PromptReader(["/help"])
    draw = reader._session.app.renderer.render

    def interrupted(*args, **keywords):
        draw(*args, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(reader._session.app.renderer, "render", interrupted)
    with create_pipe_input() as typed:
        reader._session.app.input = typed
        with pytest.raises(KeyboardInterrupt):
            reader.read()
    assert written.getvalue().count("\x1b[?2004h") == written.getvalue().count("\x1b[?2004l") == 1


def test_a_signal_amid_the_history_ends_the_prompt_without_a_traceback(monkeypatch, capfd):
    reader = PromptReader(["/help"])

    async def interrupted():
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(reader._session.default_buffer.history, "load", interrupted)
    with create_pipe_input() as typed:
        reader._session.app.input = typed
        with pytest.raises(KeyboardInterrupt):
            reader.read()
    shown = "".join(capfd.readouterr())
    assert "Traceback" not in shown
    assert "ENTER" not in shown


def state_of(pid):
    """The state of a process, in the kernel's letters."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_chat_that_is_stopped_gives_the_terminal_back_and_holds_the_keys_again(pair):
    terminal = at_prompt(pair[0], *SLOW)
    terminal.type(b"hello\r")
    terminal.wait_for(PROMPTED, times=2)
    terminal.process.send_signal(signal.SIGTSTP)
    wait_until(lambda: terminal.echoes)
    wait_until(lambda: state_of(terminal.process.pid) == "T")
    terminal.process.send_signal(signal.SIGCONT)
    wait_until(lambda: not terminal.echoes)
    terminal.type(b"/bye\r")
    assert terminal.end()[0] == 0, terminal.drawn
    assert b"tokens (length)" in terminal.drawn


def test_earlier_chats_are_in_the_history(pair):
    for keys in (b"a long question\r", b"\x1b[A\x1b[A\r"):  # the newest entry is /bye
        terminal = at_prompt(pair[0], "-n", "2", XDG_STATE_HOME=str(pair[0].parent / "state"))
        terminal.type(keys)
        terminal.wait_for(b"tokens (length)")
        terminal.type(b"/bye\r")
        assert terminal.end()[0] == 0, terminal.drawn
        assert b"a long question" in terminal.drawn
    history = pair[0].parent / "state" / "aspec" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_used_costs_only_the_history(tmp_path):
    (tmp_path / "junk").write_bytes(b"+kept\n\xff\x00\n+\xff\n")
    (tmp_path / "file").write_text("")
    for path, known in (
        ("junk", ["\N{REPLACEMENT CHARACTER}", "kept"]),
        (".", []),
        ("file/below", []),
        ("new/one", []),
    ):
        history = History(tmp_path / path)
        assert list(history.load_history_strings()) == known
        history.append_string("two\nlines, and no text: \udcff")
        history.append_string("x" * 200_000)
    assert list(History(tmp_path / "new" / "one").load_history_strings()) == ["two\nlines, and no text: ?"]


def test_tab_completes_commands_and_alt_enter_begins_a_line(pair):
    terminal = at_prompt(pair[0], "-n", "2")
    terminal.type(b"/sh\t\r")
    terminal.wait_for(b"turns     0")
    terminal.type(b"a\x1b\rb\r")
    terminal.wait_for(b"tokens (length)")
    terminal.type(b"/bye\r")
    assert terminal.end()[0] == 0, terminal.drawn
    assert f"prompt: {rendered(('user', 'a' + chr(10) + 'b'))} tokens new".encode() in terminal.drawn


def test_ctrl_c_pressed_again_and_again_stops_only_the_answer(pair):
    terminal = at_prompt(pair[0], *SLOW)
    terminal.type(b"hello\r")
    terminal.wait_for(PROMPTED, times=2)
    terminal.interrupt()
    terminal.interrupt()
    terminal.wait_for(PROMPTED, times=3)
    terminal.type(b"/show\r")
    terminal.wait_for(b"turns     ")
    terminal.type(b"/bye\r")
    assert terminal.end()[0] == 0, terminal.drawn


def test_a_simple_terminal_reads_lines(pair):
    terminal = on_terminal(pair[0], "-n", "6", whole=True, TERM="dumb")
    terminal.wait_for(b"> ")
    terminal.type(b"one \\\ntwo\n")
    terminal.wait_for(b"tokens (length)")
    terminal.wait_for(b"> ", times=2)
    terminal.interrupt()
    terminal.wait_for(b"press Ctrl-C again to leave")
    terminal.wait_for(b"> ", times=3)
    terminal.type(b"\x04")
    code, _ = terminal.end()
    assert code == 0, terminal.drawn
    assert b"\x1b[?" not in terminal.drawn
    ((_, new, _),) = FOOTER.findall(terminal.drawn.decode())
    assert int(new) == rendered(("user", "one \ntwo"))


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
