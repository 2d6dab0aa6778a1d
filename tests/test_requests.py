"""Bodies in OpenAI's form: what is taken, what is refused by which name, what an answer looks like."""

import json

import pytest

from aspec.errors import PromptError, UserError
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import TokenLogprob
from aspec.generation.tokenizer import Tokenizer
from aspec.options import DEMO
from aspec.serving.batch_input import BatchFile, parse_row
from aspec.serving.openai_requests import CHAT, COMPLETION, Request, parse_json, parse_request
from aspec.serving.openai_responses import Generated, Label, answer_body

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
    with pytest.raises(PromptError, match="min_new_tokens must be a whole number"):
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
    (CHAT, {"messages": [*ASK, {"role": "tool", "content": ""}]}, r"messages\[1\].role"),
    (CHAT, {"messages": [{"role": "user"}]}, r"messages\[0\].content"),
    (CHAT, {"messages": [{"role": "user", "content": "", "tool_calls": []}]}, r"messages\[0\].tool_calls"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"content\[0\] is .* type image_url"),
    (CHAT, {"messages": [{"role": "user", "content": "", "name": 3}]}, "name"),
    (CHAT, {"messages": None}, "messages is missing"),
    (CHAT, {"prompt": "x"}, "prompt is not supported"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"top_logprobs": 3}, "needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"tools": []}, "tools is not supported"),
    (COMPLETION, {"prompt": ""}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": ["a", "b"]}, "one prompt per request"),
    (COMPLETION, {"prompt": [1, -1]}, "prompt"),
    (COMPLETION, {"prompt": [1, True]}, "prompt"),
    (COMPLETION, {"messages": ASK}, "messages is not supported"),
    (COMPLETION, {"top_logprobs": 3}, "top_logprobs is not supported"),
    (COMPLETION, {"logprobs": True}, "logprobs"),
    (COMPLETION, {"logprobs": 21}, "logprobs"),
    (COMPLETION, {"echo": True}, "echo is not supported"),
    *((url, body, next(iter(body))) for url in (CHAT, COMPLETION) for body in (
        {"model": 3},
        {"n": 2},
        {"n": True},
        {"stream": True},
        {"best_of": 1},
        {"max_tokens": -1},
        {"max_tokens": "5"},
        {"max_tokens": 5.0},
        {"max_completion_tokens": True},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
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
    assert answer_body(Request(CHAT, tuple(ASK), {}), made, label, tokenizer) == {
        **head,
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "choices": [{**choice, "message": {"role": "assistant", "content": "hello"}}],
    }
    assert answer_body(Request(COMPLETION, "a", {}), made, label, tokenizer) == {
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

    (chat,) = answer_body(Request(CHAT, tuple(ASK), {"logprobs": 2}), made, label, tokenizer)["choices"]
    assert chat["logprobs"]["content"] == [
        {**entry(first, -0.5), "top_logprobs": [entry(first, -0.5), entry(second, -1.0)]},
        {**entry(second, -9999.0), "top_logprobs": []},
    ]
    (text,) = answer_body(Request(COMPLETION, "a", {"logprobs": 2}), made, label, tokenizer)["choices"]
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
    (choice,) = answer_body(Request(CHAT, (), {"logprobs": 0}), made, Label("a", 1, "m"), tokenizer)["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["<|endoftext|>", "\N{REPLACEMENT CHARACTER}"]
    assert content[1]["bytes"] is None


# -- files ---------------------------------------------------------------------------------------------------


def line(custom_id="a", url=COMPLETION, method="POST", body=None, **more):
    body = {"prompt": "Why"} if body is None else body
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body, **more})


def scan(path, text, check=lambda row: None):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with BatchFile(path) as rows:
        rows.scan(check)
        return [rows.read(index) for index in range(len(rows.custom_ids))]


def test_rows_are_read_where_they_stand(tmp_path):
    text = "\ufeff" + line("é") + "\r\n\n  \n" + line("b", CHAT, body={"messages": ASK}) + "\n" + line("c")
    rows = scan(tmp_path / "in.jsonl", text)
    assert [row.custom_id for row in rows] == ["é", "b", "c"]
    assert [row.request.is_chat for row in rows] == [False, True, False]


BAD_LINES = {
    "JSON": "{",
    "a JSON object": "[]",
    "custom_id must": line(custom_id=None),
    "custom_id 'first' is already used in line 1": line("first"),
    "method must be POST": line(method="GET"),
    "url must be": line(url="/v1/embeddings"),
    "body must be an object": line(body=[]),
    "more is not supported": line(more=1),
    "temperature must be": line(body={"prompt": "a", "temperature": "hot"}),
}


@pytest.mark.parametrize("expected", BAD_LINES)
def test_a_bad_line_is_told_by_its_number(tmp_path, expected):
    with pytest.raises(UserError) as error:
        scan(tmp_path / "in.jsonl", "\n".join([line("first"), "", BAD_LINES[expected], line("last")]))
    assert "one problem. No row was served" in str(error.value)
    assert "\n  line 3: " in str(error.value)
    assert expected in str(error.value)


def test_all_problems_are_counted_and_the_first_ten_told(tmp_path):
    def check(row):
        if row.custom_id in ("3", "13"):
            raise PromptError("too\nlong")

    text = "\n".join(line(str(i), method="POST" if i % 2 else "PUT") for i in range(30))
    with pytest.raises(UserError) as error:
        scan(tmp_path / "in.jsonl", text, check)
    first, *listed = str(error.value).split("\n")
    assert "17 problems; the first 10 are listed" in first
    assert [int(one.split()[1].rstrip(":")) for one in listed] == [1, 3, 4, 5, 7, 9, 11, 13, 14, 15]
    assert listed[2].endswith("too long")


def test_an_input_without_rows_or_that_is_no_file_is_refused(tmp_path):
    for text in ("", "\n \n"):
        with pytest.raises(UserError, match="is empty"):
            scan(tmp_path / "in.jsonl", text)
    with pytest.raises(UserError, match="cannot be read"):
        BatchFile(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a regular file"):
        BatchFile(tmp_path)


def test_a_row_that_has_changed_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(line("a") + "\n" + line("b") + "\n")
    with BatchFile(path) as rows:
        rows.scan(lambda row: None)
        path.write_text(line("a") + "\n" + line("c") + "\n")
        assert rows.read(0).custom_id == "a"
        with pytest.raises(UserError, match="was changed while"):
            rows.read(1)


def test_the_digest_is_that_of_the_content(tmp_path):
    import hashlib

    path = tmp_path / "in.jsonl"
    path.write_text(line("a") + "\n\n" + line("b"))
    with BatchFile(path) as rows:
        rows.scan(lambda row: None)
        assert rows.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_unknown_urls_are_refused_for_a_server_too():
    with pytest.raises(PromptError, match="url must be"):
        parse_request("/v1/embeddings", {})
    assert parse_row(line().encode()).request == Request(COMPLETION, "Why", {})
