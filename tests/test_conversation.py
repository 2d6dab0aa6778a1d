"""A conversation as a value: what a full context drops, entries, settings, files. No model is there."""

import json
import os
import re
import threading

import pytest

from aspec.cli.chat import settings
from aspec.cli.chat.conversation import Conversation, Turn, check_system, fit
from aspec.cli.chat.entry import Call, Entry, Message, continued, parse
from aspec.cli.chat.saved_talk import SavedTalk, load, save
from aspec.errors import PromptError, UserError
from aspec.generation.params import SamplingParams


def encode(messages, said=()):
    """One token per character, and one that begins each message."""
    return [token for message in messages for token in (0, *message["content"].encode())]


def alternating(messages, said=()):
    """A strict template: roles alternate and begin with the user."""
    roles = [message["role"] for message in messages]
    if "system" in roles:
        raise PromptError("the chat template of x refuses the conversation (System role not supported). Change it")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise PromptError("Conversation roles must alternate")
    return encode(messages)


def talked(count, size=8, **more):
    return Conversation(turns=tuple(Turn(f"{n:0{size}}", "y" * size) for n in range(count)), **more)


# -- the context ---------------------------------------------------------------------------------------------


def test_a_conversation_that_fits_stays_whole():
    talk = talked(3)
    assert fit(talk, "hi", encode, 100, 20) == (talk, encode(talk.messages("hi")))


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_newest_and_the_system_message():
    talk = talked(10, system="be brief")
    fitting, prompt = fit(talk, "hello", encode, 120, 1000)
    assert fitting.turns == talk.turns, "a saved conversation has all turns"
    assert 0 < fitting.num_left_out < 10
    kept = talk.turns[fitting.num_left_out :]
    texts = ["be brief", *(text for turn in kept for text in (turn.user, turn.answer)), "hello"]
    assert [message["content"] for message in fitting.messages("hello")] == texts
    assert len(prompt) <= 60, "half of the context is free for the next turns"
    assert len(prompt) + 18 > 60, "and no turn more than that is dropped"


def test_an_answer_has_room_before_the_context_is_quite_full():
    talk = talked(4)  # 72 tokens, and 3 of the message
    assert fit(talk, "hi", encode, 100, 25)[0].num_left_out == 0
    assert fit(talk, "hi", encode, 98, 25)[0].num_left_out > 0
    assert fit(talk, "hi", encode, 98, 4)[0].num_left_out == 0, "a short answer needs less"


def test_what_was_dropped_stays_dropped_and_more_follows():
    talk = fit(talked(10), "hello", encode, 120, 50)[0]
    longer = talk.with_turn(Turn("x" * 40, "y" * 40))
    again = fit(longer, "hello", encode, 120, 50)[0]
    assert again.num_left_out > talk.num_left_out
    assert fit(again, "hello", encode, 120, 50)[0] == again


@pytest.mark.parametrize("turns", [0, 1, 5])
def test_a_message_longer_than_the_context_is_refused_and_one_that_just_fits_is_not(turns):
    talk = talked(turns, system="s")
    with pytest.raises(PromptError, match=r"this message alone, .* has 100 tokens; the context holds 100"):
        fit(talk, "x" * 97, encode, 100, 10)
    fitting, prompt = fit(talk, "x" * 96, encode, 100, 10)
    assert (fitting.num_left_out, len(prompt)) == (turns, 99)


def test_roles_alternate_whatever_is_dropped():
    talk = talked(10)
    for context in range(20, 200, 7):
        fit(talk, "hello", alternating, context, 5)


def test_a_prompt_begins_with_the_tokens_of_the_last_turn_where_they_are_known():
    said = []
    talk = Conversation().with_turn(Turn("a", "b", (1, 2, 3))).with_turn(Turn("c", "d", (1, 2, 3, 4)))
    for state in (talk, talk.without_last(), Conversation(turns=(Turn("a", "b"),)), Conversation()):
        state.prompt("e", lambda messages, tokens: said.append(tokens) or [1])
    assert said == [(1, 2, 3, 4), (1, 2, 3), (), ()]


def test_the_last_message_goes_first_if_it_has_no_answer():
    talk = talked(1)
    waiting = Conversation(turns=talk.turns, unanswered="why?")
    assert (waiting.last_user, waiting.without_last()) == ("why?", talk)
    assert talk.without_last() == Conversation()
    assert Conversation().last_user is None
    assert waiting.with_turn(Turn("so", "")).unanswered is None, "another message replaces it"
    assert talked(3, num_left_out=3).without_last().num_left_out == 2


def test_a_system_message_that_a_template_refuses_or_ignores_is_told():
    check_system("be brief", encode)
    check_system(None, alternating)
    with pytest.raises(PromptError, match=r"cannot be used: .*System role not supported.*first message"):
        check_system("be brief", alternating)
    with pytest.raises(PromptError, match="ignores system messages"):
        check_system("be brief", lambda messages, said: encode(messages[-1:]))


# -- entries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("hello", Message("hello")),
        ("  indented", Message("  indented")),
        ("/set temperature 0.5", Call("/set", "temperature 0.5")),
        ("  /Help ", Call("/help", "")),
        ("/save! a file.json", Call("/save!", "a file.json")),
        ("/?", Call("/?", "")),
        ("/tempurature 0.5", Call("/tempurature", "0.5")),
        ("/etc/hosts is a file", Message("/etc/hosts is a file")),
        ("/home/me", Message("/home/me")),
        ("/2 of them", Message("/2 of them")),
        ("/ alone", Message("/ alone")),
        ("/*comment*/", Message("/*comment*/")),
        ("//help", Message("/help")),
        ("//etc is a folder", Message("/etc is a folder")),
        ("// a comment", Message("// a comment")),
        ("//server/share", Message("//server/share")),
        ('"""one line"""', Message("one line")),
        ('"""\nfirst\nsecond\n"""', Message("first\nsecond")),
        ('"""first\n\nlast"""', Message("first\n\nlast")),
        ('"""/help"""', Message("/help")),
        ('/system """\nbe\nbrief\n"""', Call("/system", "be\nbrief")),
        ("a /help b", Message("a /help b")),
        ("", Message("")),
    ],
)
def test_what_an_entry_means(text, meaning):
    assert parse(Entry(text)) == meaning


def test_several_pasted_lines_are_a_message_as_they_are():
    for text in ('"""A module."""\nimport os', "/help\nis a command", "a \\\nb", "//x\ny"):
        assert parse(Entry(text, verbatim=True)) == Message(text)


@pytest.mark.parametrize(
    ("text", "begun"),
    [
        ("hello", None),
        ("hello\\", "hello\n"),
        ("C:\\\\", None),
        ("\\\\\\", "\\\\\n"),
        ("\\", "\n"),
        ('"""', '"""\n'),
        ('"""begun', '"""begun\n'),
        ('"""begun\\', '"""begun\\\n'),
        ('"""begun\nended"""  ', None),
        ('""""""', None),
        ('/system """be', '/system """be\n'),
        ('/set system """be', '/set system """be\n'),
        ('say """ in the middle', None),
        ("/help", None),
    ],
)
def test_what_goes_on_in_the_next_line(text, begun):
    assert continued(text) == begun


# -- settings ------------------------------------------------------------------------------------------------

START = SamplingParams(temperature=0.6, top_p=0.9, seed=7)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("Top-K", "40", 40),
        ("seed", "-3", -3),
        ("ignore_eos", "on", True),
        ("stop", "###", ("###",)),
        ("stop", '"\\n\\n"', ("\n\n",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", "[]", ()),
    ],
)
def test_a_setting_is_changed_and_set_back(name, text, value):
    params = settings.changed(START, name, text, START)
    name = settings.known_name(name)
    assert getattr(params, name) == value
    assert settings.changed(params, name, "default", START) == START


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("temprature", "1", r"did you mean temperature\?"),
        ("nothing", "1", "expected system or one of max_new_tokens, .*temperature, top_k"),
        ("logprobs", "1", "is not a setting"),
        ("temperature", "warm", "temperature: expected a number such as 0.5, found 'warm'"),
        ("temperature", "-1", "temperature must be finite and at least 0"),
        ("temperature", "nan", "temperature must be finite"),
        ("temperature", "1e999", "temperature must be finite"),
        ("top_p", "0", "top_p must be above 0"),
        ("top_k", "1.5", "top_k: expected a whole number"),
        ("top_k", "9" * 5000, "top_k: expected a whole number"),
        ("ignore_eos", "perhaps", "ignore_eos: expected on or off"),
        ("stop", '"', "stop: expected JSON"),
        ("stop", "[1]", "stop must be made of texts"),
        ("stop", '""', "stop must be made of texts that are not empty"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_in_one_sentence(name, text, said):
    with pytest.raises(PromptError, match=said) as caught:
        settings.changed(START, name, text, START)
    assert len(str(caught.value)) < 500


def test_settings_are_listed_and_survive_json():
    assert re.search("^temperature +0.6$", settings.listed(START), re.MULTILINE)
    assert settings.described(START) == "max_new_tokens 128, temperature 0.6, top_p 0.9, seed 7"
    kept = settings.from_object(SamplingParams(), json.loads(json.dumps(settings.as_object(START))))
    assert kept == START


# -- files ---------------------------------------------------------------------------------------------------


def test_a_conversation_is_saved_whole_and_loaded_again(tmp_path):
    talk = Conversation("be brief", (Turn('a\n"é漢', "b", (1, 2)), Turn("c", "")), num_left_out=1, unanswered="and?")
    path = tmp_path / "a talk.json"
    save(path, SavedTalk(talk, settings.as_object(START), "org/model"), overwrite=False)
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2, "user"]
    saved = load(path)
    assert saved.talk == Conversation("be brief", (Turn('a\n"é漢', "b"), Turn("c", "")), unanswered="and?")
    assert settings.from_object(SamplingParams(), saved.settings) == START
    assert saved.model == "org/model"
    assert os.listdir(tmp_path) == [path.name], "no other file is left"


def test_messages_alone_are_a_conversation(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]))
    assert load(path).talk == Conversation(turns=(Turn("a", "b"),))


def test_a_file_that_exists_is_not_replaced_unless_asked(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text("precious")
    saved = SavedTalk(talked(1))
    with pytest.raises(UserError, match=r"exists and is unchanged: .*/save! "):
        save(path, saved, overwrite=False)
    assert path.read_text() == "precious"
    link = tmp_path / "link.json"
    link.symlink_to(path)
    with pytest.raises(UserError, match="exists"):
        save(link, saved, overwrite=False)
    save(link, saved, overwrite=True)
    assert link.is_symlink()
    assert load(path).talk == talked(1)


def test_of_two_that_save_at_once_one_wins(tmp_path):
    path, outcomes = tmp_path / "talk.json", []

    def run(number):
        try:
            save(path, SavedTalk(talked(number)), overwrite=False)
            outcomes.append(number)
        except UserError:
            pass

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert load(path).talk == talked(outcomes[0])
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    save(path, SavedTalk(talked(1)), overwrite=False)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device\. The conversation goes on"):
        save(path, SavedTalk(talked(2)), overwrite=True)
    assert load(path).talk == talked(1)
    assert os.listdir(tmp_path) == [path.name]


def test_what_cannot_be_written_is_told_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path, "exists"),
        (tmp_path / "pipe", "exists"),
        (tmp_path / "none" / "talk.json", "No such file"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="no regular file" if overwrite and said == "exists" else said):
                save(path, SavedTalk(talked(1)), overwrite=overwrite)
    assert (tmp_path / "pipe").is_fifo(), "a device or a pipe is not replaced by a file"


DAMAGED = {
    "": "expected JSON",
    "{": "expected JSON",
    "7": "expected an object with a list of messages",
    "{}": "expected an object with a list of messages",
    '{"messages": {}}': "expected an object with a list of messages",
    '{"messages": [7]}': r"messages\[0\] is not an object",
    '{"messages": [{"role": "user"}]}': r"the content of messages\[0\] must be a text, found NoneType",
    '{"messages": [{"role": "user", "content": ["a"]}]}': r"the content of messages\[0\] must be a text, found list",
    '{"messages": [{"role": "tool", "content": "a"}]}': r"the role of messages\[0\] must be .*, found 'tool'",
    '{"messages": [{"role": [1], "content": "a"}]}': r"the role of messages\[0\] must be",
    '{"messages": [{"role": "assistant", "content": "a"}]}': r"messages\[0\] is from 'assistant': expected 'user'",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': r"messages\[1\] is from 'us",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]}': r"messages\[1\]",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "not valid Unicode at character 0",
    '{"messages": [], "settings": []}': "settings must be an object",
    '{"messages": [], "model": 7}': "model must be a text",
    "[" * 100_000: "nested too deeply",
    '{"messages": [' + '{"role": "user", "content": "a"}': "expected JSON",
    "\xff": "expected UTF-8",
}


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:60])
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, text):
    path = tmp_path / "talk.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=DAMAGED[text]) as caught:
        load(path)
    assert "talk.json" in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"temprature": 1}, "settings has 'temprature'"),
        ({"temperature": "hot"}, "temperature must be finite"),
        ({"temperature": None}, "temperature must be finite"),
        ({"stop": 7}, "stop must be made of texts"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"temperature": 10**400}, "too large"),
    ],
)
def test_saved_settings_that_are_wrong_are_refused(saved, said):
    with pytest.raises(UserError, match=said):
        settings.from_object(START, saved)


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path, "expected a file"),
        (tmp_path / "pipe", "expected a file"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(UserError, match=said):
            load(path)
