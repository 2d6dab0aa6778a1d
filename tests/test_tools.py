"""Calls of tools: the model's own format, what its grammar allows, how calls are read from a text that grows."""

import json
import random
import shutil

import llguidance
import pytest

from aspec.errors import PromptError
from aspec.generation.grammar import compiler
from aspec.generation.grammar.tool_grammar import calls_only, text_or_calls
from aspec.generation.params import SamplingParams
from aspec.generation.text.tokenizer import Tokenizer
from aspec.options import DEMO
from aspec.serving.call_reader import CallReader
from aspec.serving.dispatch import encode, params_of
from aspec.serving.openai_requests import parse_request
from aspec.serving.refusals import RequestError
from tests.serving import served
from tests.tool_templates import LLAMA, MISTRAL, QWEN

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Weather in Paris?"}]
CITY = {
    "$defs": {"City": {"enum": ["Paris", "日本"]}},
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
}
CITY |= {"required": ["city"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]


def folder_with(tmp_path, template):
    shutil.copytree(DEMO / "target", tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text(template)
    return tmp_path / "target"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return folder_with(tmp_path_factory.mktemp("qwen"), QWEN)


@pytest.fixture(scope="module")
def tokenizers(qwen, tmp_path_factory):
    return {"qwen": Tokenizer.load(qwen), "llama": Tokenizer.load(folder_with(tmp_path_factory.mktemp("llama"), LLAMA))}


def taken(grammar, tokenizer, text):
    """How much of a text a grammar takes, and whether the text may end there."""
    own = llguidance.LLTokenizer(tokenizer.as_json(), None, [0])
    matcher = llguidance.LLMatcher(own, compiler._source(grammar))
    tokens = tokenizer.encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens), matcher.is_accepting()


# -- the format ------------------------------------------------------------------------------------------------


def test_the_format_is_what_the_template_writes(tokenizers):
    qwen, llama = (tokenizers[name].tool_format() for name in ("qwen", "llama"))
    assert qwen.call("f", "{}") == '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert (qwen.between, qwen.tag) == ("\n", "<tool_call>")
    assert llama.call("f", "{}") == '{"name": "f", "parameters": {}}'
    assert (llama.between, llama.tag) == (None, "")


@pytest.mark.parametrize(("template", "reason"), [(MISTRAL, "cannot be read"), ("{{ messages }}", "takes no tools")])
def test_another_format_is_refused_by_name(template, reason, tmp_path):
    tokenizer = Tokenizer.load(folder_with(tmp_path, template))
    with pytest.raises(RequestError, match=reason) as found:
        params_of(tokenizer, parse_request(CHAT, {"messages": ASK, "tools": TOOLS}), SamplingParams(), 0)
    assert found.value.param == "tools"
    assert str(tmp_path) in str(found.value)


def test_tools_and_earlier_calls_reach_the_template(tokenizers):
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": '{"x": "é"}'}}
    said = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    said.append({"role": "tool", "tool_call_id": "a", "content": "noon"})
    request = parse_request(CHAT, {"messages": [*ASK, *said], "tools": TOOLS})
    text = tokenizers["qwen"].spell(encode(tokenizers["qwen"], request))
    assert '"name": "weather"' in text
    assert '<tool_call>\n{"name": "now", "arguments": {"x": "é"}}\n</tool_call>' in text
    assert "<tool_response>\nnoon\n" in text
    hidden = parse_request(CHAT, {"messages": ASK, "tools": TOOLS, "tool_choice": "none"})
    assert "weather" not in tokenizers["qwen"].spell(encode(tokenizers["qwen"], hidden))


# -- the grammar -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_what_an_answer_may_be(name, tokenizers):
    tokenizer = tokenizers[name]
    form = tokenizer.tool_format()
    good, bad = form.call("weather", '{"city": "日本"}'), form.call("weather", '{"city": "Rome"}')
    other, unknown = form.call("now", "{}"), form.call("later", "{}")
    for make, text in ((calls_only, False), (text_or_calls, True)):
        for several in (True, False):
            grammar = make(TOOLS, form, several=several)
            assert taken(grammar, tokenizer, good) == (True, True)
            assert taken(grammar, tokenizer, other) == (True, True)
            assert not taken(grammar, tokenizer, bad)[0]
            assert not taken(grammar, tokenizer, unknown)[0]
            assert taken(grammar, tokenizer, "It is <b>fine</b>.\n")[0] == text
            twice = taken(grammar, tokenizer, f"{good}\n{other}")[0]
            assert twice == (several and name == "qwen")
            assert not taken(grammar, tokenizer, good[:-3])[1], "a call that has begun is complete before the end"
    if name == "qwen":
        assert taken(text_or_calls(TOOLS, form, several=True), tokenizer, f"Let me see. {good}") == (True, True)


# -- the reader ------------------------------------------------------------------------------------------------

QUOTES = '{"a": "}\\"{", "b": [{"c": "\\\\"}], "d": "日本"}'


def read(form, text, cuts):
    """Text, and [name, arguments] of each call, of a text that comes in parts."""
    reader, spoken, calls = CallReader(form), "", []
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for number, part in enumerate(parts):
        for said in reader.push(part, final=number == len(parts) - 1):
            spoken += said.text
            if said.call is not None and said.name is not None:
                assert said.call == len(calls)
                calls.append([said.name, ""])
            if said.call is not None:
                calls[said.call][1] += said.arguments
    return spoken, calls


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen", "Hi <b> <tool", ("Hi <b> <tool", [])),
        ("qwen", "So: {0}\n{0}", ("So: ", [["f", QUOTES]] * 2)),
        ("qwen", '<tool_call>\n{{"name": "f', ('<tool_call>\n{"name": "f', [])),
        ("qwen", '<tool_call>\n{{"name": "f", "arguments": {{"a": [1', ("", [["f", '{"a": [1']])),
        ("llama", "{0}", ("", [["f", QUOTES]])),
        ("llama", "Say {0}", (f'Say {{"name": "f", "parameters": {QUOTES}}}', [])),
        ("llama", '{{"nam": 1}}', ('{"nam": 1}', [])),
        ("llama", "", ("", [])),
    ],
)
def test_calls_are_read_however_the_text_is_cut(name, text, expected, tokenizers):
    form, dice = tokenizers[name].tool_format(), random.Random(1)
    whole = text.format(form.call("f", QUOTES))
    for _ in range(30):
        cuts = sorted(dice.randrange(len(whole) + 1) for _ in range(dice.randrange(12)))
        assert read(form, whole, cuts) == expected
    assert read(form, whole, range(1, len(whole))) == expected


def test_arguments_are_passed_on_as_they_come(tokenizers):
    reader = CallReader(tokenizers["qwen"].tool_format())
    found = reader.push('<tool_call>\n{"name": "f", "arguments": {"text": "a lo')
    assert [(said.name, said.arguments) for said in found] == [("f", ""), (None, '{"text": "a lo')]


# -- requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\] must be"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"tools\[0\].function.name"),
        ({"tools": TOOLS + TOOLS}, "the same name"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice must"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "weather, now"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [{}]}, "functions is not supported: give tools"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, r"messages\[0\].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "tool_call_id"),
        ({"chat_template_kwargs": {"tools": []}}, "give tools"),
    ],
)
def test_what_a_request_may_not_ask(body, reason):
    with pytest.raises(RequestError, match=reason):
        parse_request(CHAT, {"messages": ASK, **body})


def test_parameters_that_cannot_be_met_are_refused(tokenizers):
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "wat"}}}
    with pytest.raises(PromptError, match="wat"):
        params_of(tokenizers["qwen"], parse_request(CHAT, {"messages": ASK, "tools": [broken]}), SamplingParams(), 0)


# -- the server ------------------------------------------------------------------------------------------------


async def test_a_server_answers_in_the_form_that_is_asked_for(qwen):
    """The demo model knows no tools: only the grammar makes it call them, whole and streamed alike."""
    named = {"type": "function", "function": {"name": "weather"}}
    async with served(qwen, DEMO / "draft", max_batch=2, device_memory=64 << 20) as server:
        for choice, names in (("required", ("weather", "now")), (named, ("weather",))):
            body = {"messages": ASK, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
            body |= {"max_tokens": 90, "temperature": 1, "seed": 4, "logprobs": True}
            answer = await server.ask(CHAT, body)
            assert answer.status == 200, answer.body
            (choice,) = answer.json["choices"]
            (call,) = choice["message"]["tool_calls"]
            assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
            assert call["function"]["name"] in names
            arguments = json.loads(call["function"]["arguments"])
            assert arguments == {} if call["function"]["name"] == "now" else arguments["city"] in ("Paris", "日本")
            streamed = await server.ask(CHAT, {**body, "stream": True})
            chunks = [event["choices"][0] for event in streamed.events]
            parts = [part for chunk in chunks for part in chunk["delta"].get("tool_calls", ())]
            assert parts[0]["function"]["name"] == call["function"]["name"]
            assert parts[0]["type"] == "function"
            assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
            assert chunks[-1]["finish_reason"] == "tool_calls"
            logprobs = [one for chunk in chunks for one in (chunk.get("logprobs") or {}).get("content", ())]
            assert logprobs == choice["logprobs"]["content"]
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
        for form, check in (
            ({"response_format": schema}, lambda text: json.loads(text)["city"] in ("Paris", "日本")),
            ({"guided_choice": ["yes\n", 'n"o']}, lambda text: text in ("yes\n", 'n"o')),
            ({"structured_outputs": {"regex": "[0-9]{3}"}}, lambda text: len(text) == 3 and text.isdecimal()),
        ):
            answer = await server.ask(CHAT, {"messages": ASK, "max_tokens": 60, **form})
            assert check(answer.json["choices"][0]["message"]["content"])
            assert answer.json["choices"][0]["finish_reason"] == "stop"
        schema["json_schema"]["schema"] = {"enum": []}
        refused = await server.ask(CHAT, {"messages": ASK, "response_format": schema, "stream": True})
        assert (refused.status, refused.error["param"]) == (400, "response_format")
        assert "Unsatisfiable" in refused.error["message"]
