"""Bodies in OpenAI's form: what is taken, what is refused by which name, what an answer looks like."""

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aspec.errors import PromptError, UserError
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import TokenLogprob
from aspec.generation.text.tokenizer import Tokenizer
from aspec.options import DEMO
from aspec.serving import batch_input
from aspec.serving.batch_input import BatchFile, parse_row
from aspec.serving.openai_requests import Request, parse_json, parse_request
from aspec.serving.openai_responses import Generated, Label, answer_body
from aspec.serving.refusals import Refusal, RequestError
from aspec.serving.request_fields import CHAT, COMPLETION, FIELDS

ASK = [{"role": "user", "content": "Why?"}]


def parse(url, **body):
    source = {"messages": ASK} if url == CHAT else {"prompt": "Why"}
    return parse_request(url, {**source, **body})


def test_every_field_reaches_the_draws():
    given = dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, presence_penalty=-1)
    given |= dict(frequency_penalty=2, seed=9, ignore_eos=True, typical_p=0.5, no_repeat_ngram_size=3, bad_words=["no"])
    given |= dict(logit_bias={"5": -1, "17": 2.5}, suppress_tokens=[3], bad_words_ids=[[1, 2]], min_new_tokens=4)
    for url in (CHAT, COMPLETION):
        request = parse(url, **given, stop=["a", "b"], max_tokens=5, model="m", n=1, stream=False)
        expected = SamplingParams(**given, stop=("a", "b"), max_new_tokens=5)
        assert request.params(SamplingParams(), 1) == expected
        assert request.model == "m"


def test_what_is_not_given_is_the_default_and_null_is_not_given():
    defaults = SamplingParams(temperature=0.7, stop=("x",), max_new_tokens=3)
    for body in ({}, dict.fromkeys(("temperature", "stop", "max_tokens", "seed", "n", "model", "logprobs"))):
        request = parse(COMPLETION, **body)
        assert request.params(defaults, 42) == SamplingParams(temperature=0.7, stop=("x",), max_new_tokens=3, seed=42)
        assert request.max_new_tokens is None
    assert parse(COMPLETION, stop="y", seed=1).params(defaults, 42).stop == ("y",)
    assert parse(COMPLETION, stop=[]).params(defaults, 42).stop == ()


def test_min_tokens_is_the_name_of_vllm():
    assert parse(CHAT, min_tokens=4).params(SamplingParams(), 1).min_new_tokens == 4
    with pytest.raises(PromptError, match="min_tokens must be a whole number"):
        parse(CHAT, min_tokens=-1)


def test_a_limit_of_its_own_replaces_that_of_the_checkpoint():
    defaults = SamplingParams(max_length=20)
    assert parse(CHAT).params(defaults, 1).max_length == 20
    assert parse(CHAT, max_tokens=99).params(defaults, 1).max_length is None


def test_both_names_of_max_tokens():
    assert parse(CHAT, max_completion_tokens=4).max_new_tokens == 4
    assert parse(CHAT, max_completion_tokens=4, max_tokens=4).max_new_tokens == 4
    with pytest.raises(PromptError, match="differ"):
        parse(CHAT, max_completion_tokens=4, max_tokens=5)
    assert parse(CHAT, min_tokens=4.0).sampling["min_new_tokens"] == 4


def test_logprobs_in_both_forms():
    assert "logprobs" not in parse(CHAT, logprobs=False).sampling
    assert parse(CHAT, logprobs=True).sampling["logprobs"] == 0
    assert parse(CHAT, logprobs=True, top_logprobs=3).sampling["logprobs"] == 3
    assert parse(COMPLETION, logprobs=0).sampling["logprobs"] == 0
    assert parse(COMPLETION, logprobs=4).sampling["logprobs"] == 4


def test_prompts_and_messages():
    assert parse(COMPLETION, prompt=[1, 2]).prompt == (1, 2)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "c", "name": "Ann"}]
    assert parse(CHAT, messages=messages).prompt == (
        {"role": "system", "content": parts},
        {"role": "user", "content": "c", "name": "Ann"},
    )


BAD = [
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Why?"}, "messages"),
    (CHAT, {"messages": ["Why?"]}, r"messages\[0\]"),
    (CHAT, {"messages": [*ASK, {"role": "robot", "content": ""}]}, r"messages\[1\].role"),
    (CHAT, {"messages": [{"role": "user"}]}, r"messages\[0\].content"),
    (CHAT, {"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}, r"messages\[0\].tool_calls"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"content\[0\] is .* type image_url"),
    (CHAT, {"messages": [{"role": "user", "content": "", "name": 3}]}, "name"),
    (CHAT, {"messages": None}, "messages is missing"),
    (CHAT, {"prompt": "x"}, "prompt is not supported"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"top_logprobs": 3}, "needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities is not supported"),
    (CHAT, {"add_generation_prompt": False}, "add_generation_prompt is not supported"),
    (CHAT, {"continue_final_message": True}, "continue_final_message is not supported"),
    (CHAT, {"verbosity": "low"}, "verbosity is not supported"),
    (CHAT, {"chat_template_kwargs": []}, "chat_template_kwargs must be an object"),
    (CHAT, {"reasoning_effort": 3}, "reasoning_effort must be a text"),
    (CHAT, {"suffix": ""}, f"suffix is not supported in a request to {CHAT}; it belongs to {COMPLETION}"),
    (COMPLETION, {"prompt": ""}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": ["a", "b"]}, "one prompt per request"),
    (COMPLETION, {"prompt": [1, -1]}, "prompt"),
    (COMPLETION, {"prompt": [1, True]}, "prompt"),
    (COMPLETION, {"messages": ASK}, "messages is not supported"),
    (COMPLETION, {"top_logprobs": 3}, "top_logprobs is not supported"),
    (COMPLETION, {"logprobs": True}, "logprobs"),
    (COMPLETION, {"logprobs": 21}, "logprobs"),
    (COMPLETION, {"best_of": 2}, "best_of must be n = 1"),
    (COMPLETION, {"suffix": "x"}, "suffix is not supported"),
    (COMPLETION, {"tools": []}, "tools is not supported in a request"),
    *((url, body, next(iter(body))) for url in (CHAT, COMPLETION) for body in (
        {"model": 3},
        {"n": 0},
        {"n": 129},
        {"n": True},
        {"n": "1"},
        {"stream": True},
        {"stream": 0},
        {"echo": True},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"structured_outputs": {"xml": "x"}},
        {"min_tokens": -3},
        {"logit_bias": {"a": 1}},
        {"bad_words": [""]},
        {"use_beam_search": True},
        {"skip_special_tokens": False},
        {"guided_json": [3]},
        {"guided_regex": 3},
        {"guided_choice": ["a", ""]},
        {"guided_grammar": 3, "guided_json": {}},
        {"guided_json": {}, "response_format": {"type": "json_object"}},
        {"guided_whitespace_pattern": " "},
        {"foo": 1},
        {"max_new_tokens": 5},
        {"max_tokens": -1},
        {"max_tokens": "5"},
        {"max_tokens": 5.5},
        {"max_completion_tokens": True},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"seed": 1.5},
        {"seed": "1"},
        {"stop": ""},
        {"stop": ["a", 3]},
        {"stop": {"a": 1}},
        {"ignore_eos": 1},
    )),
    (CHAT, {"temperature": 10**400}, "too large"),
]  # fmt: skip


HARMLESS = dict(
    user="me", metadata={"a": "b"}, store=True, service_tier="auto", safety_identifier="x", prompt_cache_key="k",
    prompt_cache_retention="24h", prediction={"type": "content", "content": "x"}, response_format={"type": "text"},
    logit_bias={}, n=1, stream=False, stream_options={"include_usage": True}, seed=3, stop=[], echo=False, min_tokens=0,
    ignore_eos=False, stop_token_ids=[], allowed_token_ids=[], bad_words=[], use_beam_search=False, length_penalty=1.0,
    skip_special_tokens=True, spaces_between_special_tokens=True, include_stop_str_in_output=False, request_id="r",
    structured_outputs={}, logits_processors=[], return_token_ids=False, vllm_xargs={}, priority=0, cache_salt="s",
    temperature=0, top_p=1, top_k=-1, min_p=0, repetition_penalty=1, presence_penalty=0.0, frequency_penalty=0,
)  # fmt: skip
HARMLESS_CHAT = dict(
    tools=[], tool_choice="auto", parallel_tool_calls=True, functions=[], function_call="none", modalities=["text"],
    verbosity="medium", logprobs=False, top_logprobs=0, add_generation_prompt=True, continue_final_message=False,
    add_special_tokens=False, chat_template_kwargs={}, documents=[], include_reasoning=True, mm_processor_kwargs={},
)  # fmt: skip
HARMLESS_COMPLETION = dict(best_of=1, suffix="", add_special_tokens=True, logprobs=False, max_completion_tokens=9)


@pytest.mark.parametrize("url", [CHAT, COMPLETION])
def test_fields_that_change_nothing_are_accepted(url):
    fields = HARMLESS | (HARMLESS_CHAT if url == CHAT else HARMLESS_COMPLETION)
    every = parse(url, **fields).params(SamplingParams(max_new_tokens=9), 3)
    assert every == SamplingParams(max_new_tokens=9, seed=3)
    for name, value in fields.items():
        request = parse(url, **{name: value})
        assert (request.num_choices, request.template) == (1, None), name


@pytest.mark.parametrize("url", [CHAT, COMPLETION])
def test_null_is_as_good_as_absent_whatever_the_name(url):
    names = [*FIELDS[CHAT], *FIELDS[COMPLETION], "foo", "a name\nof another form"]
    names = [name for name in names if name not in ("messages", "prompt")]
    assert parse(url, **dict.fromkeys(names)) == parse(url)
    assert parse_row(line(foo=None).encode()) == parse_row(line().encode())
    message = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    assert parse(CHAT, messages=[message]).prompt == ({"role": "assistant", "content": "x"},)


def test_a_whole_number_may_have_a_point():
    request = parse(COMPLETION, max_tokens=64.0, top_k=5.0, seed=7.0, n=2.0, logprobs=3.0)
    assert (request.max_new_tokens, request.num_choices) == (64, 2)
    assert request.params(SamplingParams(), 0) == SamplingParams(max_new_tokens=64, top_k=5, seed=7, logprobs=3)


def test_the_template_s_variables_are_taken():
    assert parse(CHAT, chat_template_kwargs={"enable_thinking": False}).template == {"enable_thinking": False}
    assert parse(CHAT, reasoning_effort="low").template == {"reasoning_effort": "low"}


def test_a_list_of_one_prompt_is_that_prompt():
    assert parse(COMPLETION, prompt=["a"]).prompt == "a"
    assert parse(COMPLETION, prompt=[[1, 2]]).prompt == (1, 2)


def test_all_problems_of_a_request_are_told_at_once():
    with pytest.raises(RequestError) as error:
        parse(CHAT, tools=[{}], max_token=5, temperature="hot", max_tokens=-1, messages=[{"role": "x"}], foo=1)
    words = (
        "tools[0] must",
        "did you mean max_tokens?",
        "temperature must",
        "max_tokens must",
        "messages[0].role",
        "foo is",
    )
    for word in words:
        assert word in str(error.value)
    assert (error.value.param, error.value.code) == ("max_token", "unknown_parameter")


@pytest.mark.parametrize("body", [{"x" * 5_000_000: 1}, {f"x{i}": 1 for i in range(60_000)}, {"a\x1b[2Jb\u202e": 1}])
def test_what_a_request_says_is_told_in_bounded_and_printable_words(body):
    with pytest.raises(RequestError) as error:
        parse(CHAT, **body, temperature=[[[]]] * 10_000)
    told = Refusal.of(error.value).message
    assert len(told) <= 600
    assert told.isprintable()


@pytest.mark.parametrize(("url", "body", "expected"), BAD)
def test_what_cannot_be_meant_is_refused_by_name(url, body, expected):
    with pytest.raises(PromptError, match=expected) as error:
        parse(url, **body)
    assert "\n" not in str(error.value)
    assert "Change it, or leave it out" not in str(error.value), "the default is not SamplingParams' own here"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"a": NaN}', "no NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', "a is there twice"),
        (b'"\xff"', "UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b"1" * 5000, "JSON"),
        (b'{"a": 1', "at character 8"),
    ],
)
def test_what_is_no_json_is_refused(text, expected):
    with pytest.raises(PromptError, match=expected):
        parse_json(text)


# -- answers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEMO / "target")


def test_an_answer_has_openai_s_form(tokenizer):
    made = Generated("hello", 3, 2, "length")
    label = Label("abc", 17, "m")
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    head = {"created": 17, "model": "m", "usage": usage}
    choice = {"index": 0, "finish_reason": "length", "logprobs": None}
    assert answer_body(Request(CHAT, tuple(ASK), {}), [made], label, tokenizer) == {
        **head,
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "choices": [{**choice, "message": {"role": "assistant", "content": "hello"}}],
    }
    assert answer_body(Request(COMPLETION, "a", {}), [made], label, tokenizer) == {
        **head,
        "id": "cmpl-abc",
        "object": "text_completion",
        "choices": [{**choice, "text": "hello"}],
    }


def test_logprobs_have_openai_s_form(tokenizer):
    one, two = tokenizer.encode("def")[0], tokenizer.encode(" import")[0]
    logprobs = (TokenLogprob(one, -0.5, ((one, -0.5), (two, -1.0))), TokenLogprob(two, float("-inf")))
    made, label = Generated("def import", 1, 2, "stop", logprobs), Label("abc", 17, "m")
    first, second = tokenizer.spell([one]), tokenizer.spell([two])

    def entry(text, logprob):
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    (chat,) = answer_body(Request(CHAT, tuple(ASK), {"logprobs": 2}), [made], label, tokenizer)["choices"]
    assert chat["logprobs"]["content"] == [
        {**entry(first, -0.5), "top_logprobs": [entry(first, -0.5), entry(second, -1.0)]},
        {**entry(second, -9999.0), "top_logprobs": []},
    ]
    (text,) = answer_body(Request(COMPLETION, "a", {"logprobs": 2}), [made], label, tokenizer)["choices"]
    assert text["logprobs"] == {
        "tokens": [first, second],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{first: -0.5, second: -1.0}, {second: -9999.0}],
        "text_offset": [0, len(first)],
    }
    json.dumps(chat, allow_nan=False)


def test_the_end_token_and_half_a_character_have_a_form(tokenizer):
    (end,) = [index for index, name in tokenizer.vocab().items() if name == "<|endoftext|>"]
    half = next(index for index in tokenizer.vocab() if tokenizer.decode([index]) == "\N{REPLACEMENT CHARACTER}")
    made = Generated("", 1, 2, "stop", (TokenLogprob(end, -1.0), TokenLogprob(half, -1.0)))
    (choice,) = answer_body(Request(CHAT, (), {"logprobs": 0}), [made], Label("a", 1, "m"), tokenizer)["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["<|endoftext|>", "\N{REPLACEMENT CHARACTER}"]
    assert content[1]["bytes"] is None


# -- files ---------------------------------------------------------------------------------------------------


def line(custom_id="a", url=COMPLETION, method="POST", body=None, **more):
    body = {"prompt": "Why"} if body is None else body
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body, **more})


def scan(path, text, check=lambda row: None):
    """The rows that can be served, and what is said of the others."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with BatchFile(path) as rows:
        rows.scan(check)
        return [rows.read(index) for index in range(len(rows.ids)) if index not in rows.refused], rows


def test_rows_are_read_where_they_stand(tmp_path):
    text = "\ufeff" + line("é") + "\r\n\n  \n" + line("b", CHAT, body={"messages": ASK}) + "\n" + line("c")
    rows, file = scan(tmp_path / "in.jsonl", text)
    assert [row.custom_id for row in rows] == ["é", "b", "c"] == file.ids
    assert [row.request.is_chat for row in rows] == [False, True, False]
    assert not file.refused


BAD_LINES = {
    "expected JSON (Expecting property name enclosed in double quotes at character 2)": "{\r",
    "expected a JSON object": "[]",
    "custom_id must": line(custom_id=None),
    'custom_id "first" is already used in line 1': line("first"),
    "expected UTF-8": b"\xff",
    "Invalid control character": '{"custom_id": "\0"}',
    "nested too deeply": "[" * 100_000,
}
BAD_ROWS = {
    "method must be POST": line(method="GET"),
    "url must be": line(url="/v1/embeddings"),
    "body must be an object": line(body=[]),
    "more is not supported": line(more=1),
    "temperature must be": line(body={"prompt": "a", "temperature": "hot"}),
    "a is there twice": line(body={"prompt": "Z"}).replace('"Z"', '{"a": 1, "a": 2}'),
}


@pytest.mark.parametrize("expected", [*BAD_LINES, *BAD_ROWS])
def test_a_bad_line_is_told_by_its_number_and_is_the_only_one_refused(tmp_path, expected):
    bad = (BAD_LINES | BAD_ROWS)[expected]
    text = b"\n".join(one if isinstance(one, bytes) else one.encode() for one in (line("first"), "", bad, line("last")))
    rows, file = scan(tmp_path / "in.jsonl", text)
    assert [row.custom_id for row in rows] == ["first", "last"]
    own = expected in BAD_ROWS and "twice" not in expected
    assert file.ids == ["first", "a" if own else 3, "last"], "a row without an id of its own is known by its line"
    assert file.refused.keys() == {1}
    assert expected in file.refused[1].message
    assert file.problems() == f"{file.name}: one row of 3 cannot be served:\n  line 3: {file.refused[1].message}"


def test_all_problems_are_counted_and_the_first_twenty_told(tmp_path):
    def check(row):
        if row.custom_id in ("3", "13"):
            raise PromptError("too\nlong")

    text = "\n".join(line(str(i), method="POST" if i % 2 else "PUT") for i in range(60))
    _, file = scan(tmp_path / "in.jsonl", text, check)
    first, *listed = file.problems().split("\n")
    assert first == f"{file.name}: 32 rows of 60 cannot be served; the first 20 are listed:"
    assert [int(one.split()[1].rstrip(":")) for one in listed[:6]] == [1, 3, 4, 5, 7, 9]
    assert len(listed) == 20
    assert listed[2].endswith("too long")


def test_a_line_that_is_too_long_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_input, "LONGEST_LINE", 200)
    room = 199 - len(line("b", body={"prompt": ""}))
    rows, file = scan(
        tmp_path / "in.jsonl",
        "\n".join(
            [
                line("a"),
                line("long", body={"prompt": "x" * 1000}),
                line("b", body={"prompt": "x" * room}),
                line("c", body={"prompt": "x" * (room + 2)}),
                line("d"),
            ]
        ),
    )
    assert file.ids == ["a", 2, "b", 4, "d"]
    assert "at most 200 are read" in file.refused[1].message
    assert [row.custom_id for row in rows] == ["a", "b", "d"]


def test_an_input_without_rows_or_that_is_no_file_is_refused(tmp_path):
    for text in ("", "\n \n"):
        with pytest.raises(UserError, match="is empty"):
            scan(tmp_path / "in.jsonl", text)
    with pytest.raises(UserError, match="cannot be read"):
        BatchFile(tmp_path / "nowhere")
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            BatchFile(path)


def test_a_pipe_is_an_input(tmp_path, monkeypatch):
    text = (line("a") + "\n" + line("b") + "\n").encode()
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as threads:
        threads.submit((tmp_path / "pipe").write_bytes, text)
        with BatchFile(tmp_path / "pipe") as rows:
            rows.scan(lambda row: None)
            assert rows.read(1).custom_id == "b"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    with BatchFile(Path("-")) as rows:
        rows.scan(lambda row: None)
        assert rows.read(0).custom_id == "a"
        rows.check_unchanged()
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        BatchFile(Path("-"))


def test_a_row_that_has_changed_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(line("a") + "\n" + line("b") + "\n")
    with BatchFile(path) as rows:
        rows.scan(lambda row: None)
        path.write_text(line("a") + "\n" + line("c") + "\n")
        assert rows.read(0).custom_id == "a"
        with pytest.raises(UserError, match="was changed while"):
            rows.read(1)
        with pytest.raises(UserError, match="was changed while"):
            rows.check_unchanged()
        path.write_text(line("a") + "\n" + line("b") + "\n")
        rows.check_unchanged()


def test_the_digest_is_that_of_the_content(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(line("a") + "\n\n" + line("b"))
    with BatchFile(path) as rows:
        rows.scan(lambda row: None)
        assert rows.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_unknown_urls_are_refused_for_a_server_too():
    with pytest.raises(PromptError, match="url must be"):
        parse_request("/v1/embeddings", {})
    assert parse_row(line().encode()).request == Request(COMPLETION, "Why", {})
