"""Chat templates: messages in the form that a template prints, and templates that never end or blow up."""

import json
import re
from collections import deque

import psutil
import pytest

from aspec.errors import CheckpointError, PromptError
from aspec.generation.text.template_trial import TemplateTrial
from aspec.generation.text.time_limit import TimeLimit
from aspec.generation.text.tokenizer import Tokenizer
from tests import tiny
from tests.test_text import byte_level, save

TEXT = "{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part.type == 'image' %}<image>{% endif %}"
    "{% endfor %}{% endfor %}"
)
BOTH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %}{% endfor %}"
)
FIRST = "{% for m in messages %}[{{ m.role }}]{{ m.content[0].text }}{% endfor %}"
SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }};{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}{{ strftime_now('')|tojson }}"
)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def user(content):
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(save(tmp_path_factory.mktemp("templates"), byte_level()))


@pytest.fixture
def chat(tokenizer):
    """The text that a template makes of messages."""

    def text(template, *messages):
        tokenizer._inner.chat_template = template
        return tokenizer.decode(tokenizer.encode_chat(messages))

    return text


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (TEXT, "Hi", "[user]Hi"),
        (TEXT, parts("Hi"), "[user]Hi"),
        (TEXT, parts("a", "b"), "[user]a\nb"),
        (PARTS, "Hi", "[user]Hi"),
        (PARTS, parts("a", "b"), "[user]ab"),
        (BOTH, "Hi", "[user]Hi"),
        (BOTH, parts("a", "b"), "[user]a|b|"),
        (FIRST, "Hi", "[user]Hi"),
        (FIRST, parts("a", "b"), "[user]a\nb"),
        (STRICT, parts("a"), '<a>""'),
        (TEXT, "", "[user]"),
        (PARTS, [], "[user]"),
    ],
)
def test_a_template_gets_the_form_that_it_prints(chat, template, content, expected):
    assert chat(template, user(content)) == expected


def test_each_role_has_its_form(chat):
    system, answer = {"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}
    assert chat(SYSTEM_APART, system, user("a"), answer, user(parts("b", "c"))) == "S;aAbc"
    assert chat(STRICT, user("a"), answer, user("b")) == '<a><A><b>""'
    assert chat(PARTS, {**system, "content": parts("x", "y")}, user("a")) == "[system]xy[user]a"


def test_text_is_never_left_out_without_a_word(chat):
    only_users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert chat(only_users, user("a")) == "a"
    with pytest.raises(PromptError, match=r"leaves out the text of messages whose role is developer. .*user"):
        chat(only_users, {"role": "developer", "content": "be brief"}, user("a"))
    with pytest.raises(PromptError, match="whose role is user"):
        chat("always the same", user("a"))
    with pytest.raises(PromptError, match=r"refuses the conversation .*alternate"):
        chat(STRICT, user("a"), user("b"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], r"message 1.content\[0\] is a part of type 'image_url'"),
        (
            [*parts("a"), {"type": "input_audio"}],
            r"content\[1\] is a part of type 'input_audio': expected .* type text",
        ),
        ([{"type": "text"}], r"content\[0\].text must be a text; found None"),
        (["a"], r"content\[0\] is a part of type 'str'"),
        (7, "content must be a text or a list of text parts; found 7"),
        ("ab\udcff", r"the text of message 1 \(user\) is not valid Unicode at character 2"),
        (parts("a", "b\udcff"), r"not valid Unicode at character 1"),
    ],
)
def test_what_is_no_text_is_refused_by_name(chat, content, expected):
    with pytest.raises(PromptError, match=expected):
        chat(TEXT, user(content))


# -- templates that never end or blow up -----------------------------------------------------------------------

GROWING = "{% set ns = namespace(s='ab', l=[1]) %}{% for i in range(60) %}{% set STEP %}{% endfor %}{{ ns.s }}"
HOSTILE = {
    "a power": "{{ 2 ** (10 ** 10) }}",
    "a repetition": "{{ 'a' * 10 ** 10 }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a filter's width": "{{ 'a' | center(1000000000) }}",
    "a method's width": "{{ 'a'.ljust(5000000000) }}",
    "a format": "{{ '{:1000000000}'.format(1) }}",
    "an indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "text that doubles": GROWING.replace("STEP", "ns.s = ns.s ~ ns.s"),
    "text that is replaced": GROWING.replace("STEP", "ns.s = ns.s | replace('a', 'aaaa')"),
    "a list that doubles": GROWING.replace("STEP", "ns.l = ns.l + ns.l"),
    "lists in lists": GROWING.replace("STEP", "ns.s = [ns.s, ns.s]"),
    "loops": "{% for x in range(99999) %}{% for y in range(99999) %}{% set z = x %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "endless macros": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "50 MB": "{{ 'abcdefghij' * 5000000 }}",
    "a batch": "{{ range(99999) | batch(1000000000, 'x') | list }}",
    "brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "a condition": "{% if messages | length > 1 %}{{ 2 ** (10 ** 10) }}{% endif %}{{ messages[-1].content }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(tokenizer, name):
    """In bounded time and memory, wherever it waits; the tokenizer serves the next template."""
    tokenizer._inner.chat_template = HOSTILE[name]
    before = psutil.Process().memory_info().rss
    with pytest.raises(PromptError, match=r"the chat template of .*--raw") as caught:
        tokenizer.encode_chat([user("a"), user("b")], limit=TimeLimit(0.5))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert psutil.Process().memory_info().rss < before + (300 << 20)
    tokenizer._inner.chat_template = TEXT
    assert tokenizer.decode(tokenizer.encode_chat([user("b")])) == "[user]b"


def test_a_template_that_calls_itself_for_ever_does_so_in_the_trial_only(tokenizer):
    tokenizer._inner.chat_template = HOSTILE["endless macros"]
    with pytest.raises(PromptError, match="needs too much memory"):
        tokenizer.encode_chat([user("a")])


def test_nothing_is_left_of_trials():
    known, fds = set(psutil.Process().children()), psutil.Process().num_fds()
    trial = TemplateTrial()
    for _ in range(3):
        trial.run("{{ a }}", {"a": "b"}, TimeLimit(1.0))
    assert len(set(psutil.Process().children()) - known) == 1, "one process serves many trials"
    del trial
    assert set(psutil.Process().children()) <= known
    assert psutil.Process().num_fds() == fds


def test_without_a_process_templates_are_rendered_all_the_same(tokenizer, chat, monkeypatch):
    monkeypatch.setattr("sys.executable", "/usr/bin/application")
    monkeypatch.setattr(tokenizer._template._trial, "_idle", deque())
    assert chat(TEXT, user("a")) == "[user]a"
    tokenizer._inner.chat_template = HOSTILE["loops"]
    with pytest.raises(PromptError, match=r"did not end within 0\.1 s"):
        tokenizer.encode_chat([user("a")], limit=TimeLimit(0.1))


# -- tokenizers that never end or blow up ----------------------------------------------------------------------


def with_pattern(folder, pattern):
    """A tokenizer that splits text at a pattern."""
    tiny.save_tokenizer(folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    stored["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, stored["pre_tokenizer"]]}
    path.write_text(json.dumps(stored))
    return folder


def test_a_pattern_that_backtracks_for_ever_is_an_error_of_the_prompt(tmp_path):
    tokenizer = Tokenizer.load(with_pattern(tmp_path, "(a+)+$"))
    assert tokenizer.encode("b")
    with pytest.raises(PromptError, match=r"cannot encode the prompt \(.*retry-limit.*Change the text"):
        tokenizer.encode("a" * 40 + "!")


def test_a_giant_pattern_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a regular expression of tokenizer\.json is too long"):
        Tokenizer.load(with_pattern(tmp_path, "|".join("a" * 50_000)))
    tokens = Tokenizer.load(with_pattern(tmp_path, "|".join("a" * 500))).encode("a")
    assert re.fullmatch(r"\[\d+\]", str(tokens))
