"""The server: every answer in OpenAI's form, refusals as errors, clients that leave, wait and come back."""

import asyncio
from itertools import accumulate, chain

import pytest
import torch
from transformers import AutoModelForCausalLM

from aspec.api import collect
from aspec.generation.params import SamplingParams
from aspec.serving.http.errors import HttpError
from aspec.serving.http.guard import LOOPBACK, Guard
from aspec.serving.http.limits import Limits, check_depth
from aspec.serving.http.metrics import Metrics, Present, exposition
from aspec.serving.http.turns import Turns
from aspec.serving.request_fields import CHAT, COMPLETION, RESPONSES
from tests import tiny
from tests.serving import read_answer, served

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
ASK = [{"role": "user", "content": "Why is it so?"}]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tiny.build(tmp_path_factory.mktemp("serve") / "target", "llama", varied=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def draft(target):
    return tiny.noisy_copy(target, target.parent / "draft", 0.1)


async def test_a_whole_answer_and_a_streamed_one_say_the_same(target, draft):
    async with served(target, draft, max_batch=2) as server:
        for path, ask in ((CHAT, {"messages": ASK}), (COMPLETION, {"prompt": "Why is it so?"})):
            body = {**ask, "max_tokens": 12, "temperature": 0.8, "seed": 3, "n": 2, "logprobs": 1}
            body |= {"logprobs": True, "top_logprobs": 1} if path == CHAT else {}
            whole = await server.ask(path, body)
            assert whole.status == 200
            streamed = await server.ask(path, {**body, "stream": True, "stream_options": {"include_usage": True}})
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert streamed.body.endswith(b"data: [DONE]\n\n")
            *chunks, last = streamed.events
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == whole.json["usage"]["completion_tokens"] == 24
            for choice in whole.json["choices"]:
                own = [one["choices"][0] for one in chunks if one["choices"][0]["index"] == choice["index"]]
                if path == CHAT:
                    assert own[0]["delta"] == {"role": "assistant", "content": ""}
                    assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
                    parts = [one["logprobs"]["content"] for one in own if one.get("logprobs")]
                    assert list(chain(*parts)) == choice["logprobs"]["content"]
                else:
                    assert "".join(one["text"] for one in own) == choice["text"]
                    parts = [one["logprobs"] for one in own if one["logprobs"]]
                    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                        assert list(chain(*(part[name] for part in parts))) == choice["logprobs"][name]
                assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"


async def test_many_prompts_of_a_request_are_answered_as_alone(target):
    async with served(target, max_batch=3) as server:
        prompts = ["one", "another one", [5, 6, 7]]
        many = (await server.ask(COMPLETION, {"prompt": prompts, "max_tokens": 5})).json
        alone = [(await server.ask(COMPLETION, {"prompt": one, "max_tokens": 5})).json for one in prompts]
        assert [one["text"] for one in many["choices"]] == [one["choices"][0]["text"] for one in alone]
        assert many["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
        tokens = await collect(server.engine, [5, 6, 7], SamplingParams(max_new_tokens=5))
        assert many["choices"][2]["text"] == tokens.text


async def test_what_cannot_be_served_is_an_error_in_openais_form(target):
    async with served(target, max_batch=1) as server:
        for path, body, status, param in (
            (CHAT, {"messages": ASK, "tempratur": 1}, 400, "tempratur"),
            (CHAT, {"messages": ASK, "stream": "yes"}, 400, "stream"),
            (CHAT, {"messages": ASK, "stream_options": {}}, 400, "stream_options"),
            (CHAT, {"messages": ASK, "model": "other"}, 404, "model"),
            (CHAT, {"messages": ASK, "logit_bias": {"x": 1}}, 400, "logit_bias"),
            (CHAT, {}, 400, "messages"),
            (COMPLETION, {"prompt": "a" * 999}, 400, "prompt"),
            (COMPLETION, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
            (COMPLETION, b"{", 400, None),
            (COMPLETION, b"[1]", 400, None),
            (COMPLETION, b"[" * 5000 + b"]" * 5000, 400, None),
            (COMPLETION, b'{"prompt": 1e999}', 400, "prompt"),
            (COMPLETION, {"prompt": [[1 << 70]], "echo": True, "logprobs": 1}, 400, None),
            ("/v1/nothing", {}, 404, None),
        ):
            answer = await server.ask(path, body)
            assert (answer.status, answer.error["param"]) == (status, param), answer.body
            assert answer.error["type"] == "invalid_request_error"
        assert (await server.ask(CHAT)).status == 405
        assert (await server.ask("/health", long="a" * 40_000)).status == 431
        assert (await server.ask(COMPLETION, {"prompt": "still there", "max_tokens": 1})).status == 200
        assert server.said == []


async def test_a_server_that_loads_stops_or_has_failed_says_so(target):
    async with served(target, opened=False) as server:
        assert (await server.ask("/health")).status == 503
        answer = await server.ask(CHAT, {"messages": ASK})
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "loading", "5")
        assert (await server.ask("/v1/models")).json["data"][0]["id"] == "tiny"
        server.service.fail("the disk is gone")
        assert (await server.ask("/health")).json == {"status": "failed", "reason": "the disk is gone"}
        assert (await server.ask(CHAT, {"messages": ASK})).error["code"] == "failed"
    async with served(target, max_batch=1) as server:
        assert (await server.ask("/health")).json == {"status": "ready"}
        server.service.stop()
        assert (await server.ask(CHAT, {"messages": ASK})).status == 503


async def test_the_key_is_asked_for(target):
    async with served(target, opened=False, key="secret") as server:
        for given in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            answer = await server.ask("/v1/models", **given)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert (await server.ask("/v1/models", authorization="Bearer secret")).status == 200
        assert (await server.ask("/health")).status == 503


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"host": "localhost:80"}, True),
        ({"host": "[::1]:80", "origin": "http://[::1]:80"}, True),
        ({"host": "evil.example"}, False),
        ({"host": "localhost:80", "origin": "http://evil.example"}, False),
        ({"host": "localhost:80", "origin": "null"}, False),
        ({"host": "[:"}, False),
    ],
)
def test_foreign_pages_are_kept_out(headers, allowed):
    scope = {"path": "/v1/models", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    if allowed:
        Guard(None, LOOPBACK).check(scope)
        return
    with pytest.raises(HttpError, match="server"):
        Guard(None, LOOPBACK).check(scope)


def test_depth_counts_lists_and_objects():
    check_depth({"a": [1, {"b": []}]}, 3)
    with pytest.raises(HttpError, match="deeper than 2"):
        check_depth({"a": [1, {"b": []}]}, 2)


def test_a_conversation_is_known_by_all_its_messages():
    turns = Turns(most=2)
    first = [*ASK, {"role": "assistant", "content": "So."}]
    turns.add(first, [1, 2])
    more = [*first, {"role": "user", "content": "And?"}]
    assert turns.said(more) == (1, 2)
    assert turns.said([*more[:1], {"role": "assistant", "content": "No."}, more[2]]) == ()
    assert turns.said([{"role": "user", "content": [{"type": "text", "text": ASK[0]["content"]}]}, *more[1:]]) == (1, 2)
    turns.add(more, [3])
    turns.add([*more, *ASK], [4])
    assert turns.said(first) == ()


async def test_a_full_queue_is_told_when_to_come_back(target):
    async with served(target, max_batch=1, limits=Limits(queued=1)) as server:
        reader, writer = await server.send(COMPLETION, {"prompt": "a", "max_tokens": 200, "stream": True})
        await reader.readuntil(b"data: ")
        waiting = asyncio.create_task(server.ask(COMPLETION, {"prompt": "b", "max_tokens": 1}))
        while server.service.num_open < 2:
            await asyncio.sleep(0.001)
        answer = await server.ask(COMPLETION, {"prompt": "c"})
        assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        assert (await server.ask(COMPLETION, {"prompt": "c", "n": 3})).status == 400, "it would never fit"
        writer.close()
        assert (await waiting).status == 200
        assert server.service.num_open == 0


async def test_a_client_that_leaves_frees_its_row_and_its_prompt_is_kept(target):
    async with served(target, max_batch=1, link_rate=3e6, resident_memory=0) as server:
        body = {"prompt": "x" * 200, "max_tokens": 20, "stream": True}
        reader, writer = await server.send(COMPLETION, body)
        await reader.readuntil(b"\r\n\r\n")
        while not server.service.present().running:
            await asyncio.sleep(0.001)
        writer.close()
        again = await server.ask(COMPLETION, {**body, "stream": False})
        assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 199
        assert server.service.metrics.requests[COMPLETION, 499] == 1


async def test_an_echo_has_the_logprobs_of_transformers(target):
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    prompts = [list(range(40, 80)), list(range(90, 30, -1))]
    async with served(target, max_batch=2, prefill_tokens=16, dtype="float32") as server:
        body = {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 2}
        choices = (await server.ask(COMPLETION, body)).json["choices"]
        for prompt, choice in zip(prompts, choices, strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            own = choice["logprobs"]
            assert own["token_logprobs"][0] is None
            wanted = expected[range(len(prompt) - 1), prompt[1:]].tolist()
            assert own["token_logprobs"][1 : len(prompt)] == pytest.approx(wanted, abs=1e-4)
            best = [max(top.values()) for top in own["top_logprobs"][1 : len(prompt)]]
            assert best == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
            assert choice["text"].startswith(server.engine.tokenizer.decode(prompt))
            assert own["text_offset"] == list(accumulate(map(len, own["tokens"][:-1]), initial=0))
        alone = {**body, "prompt": prompts[0], "max_tokens": 0}
        whole = (await server.ask(COMPLETION, alone)).json
        assert whole["choices"][0]["logprobs"]["token_logprobs"] == choices[0]["logprobs"]["token_logprobs"][:-1]
        assert whole["usage"]["completion_tokens"] == 0
        [echo, _] = (await server.ask(COMPLETION, {**alone, "stream": True})).events
        assert echo["choices"][0]["logprobs"] == whole["choices"][0]["logprobs"]
        said = (await server.ask(COMPLETION, {"prompt": "abc", "echo": True, "max_tokens": 2})).json["choices"][0]
        assert said["text"].startswith("abc")


async def test_responses_continue_by_their_id(target):
    async with served(target, max_batch=1) as server:
        ask = {"input": "Why is it so?", "max_output_tokens": 9, "metadata": {"a": "b"}}
        first = (await server.ask(RESPONSES, ask)).json
        assert (first["status"], first["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        [message] = first["output"]
        said = message["content"][0]["text"]
        assert (await server.ask(f"{RESPONSES}/{first['id']}")).json == first
        whole = (await server.ask(CHAT, {"messages": ASK, "max_tokens": 9})).json
        assert said == whole["choices"][0]["message"]["content"]
        body = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "And?"}]}], "stream": True}
        streamed = await server.ask(
            RESPONSES, {**body, "previous_response_id": first["id"], "instructions": "Be kind."}
        )
        events = streamed.events
        assert [one["sequence_number"] for one in events] == list(range(len(events)))
        deltas = "".join(one["delta"] for one in events if one["type"] == "response.output_text.delta")
        last = events[-1]["response"]
        assert last["output"][0]["content"][0]["text"] == deltas
        talk = [{"role": "system", "content": "Be kind."}, *ASK, whole["choices"][0]["message"]]
        talk.append({"role": "user", "content": "And?"})
        again = (await server.ask(CHAT, {"messages": talk})).json
        assert again["choices"][0]["message"]["content"] == deltas
        gone = await server.ask(f"{RESPONSES}/{first['id']}", method="DELETE")
        assert gone.json["deleted"]
        for wrong in ({"previous_response_id": first["id"]}, {"tools": [{}]}, {"input": [{"type": "x"}]}, {"input": 1}):
            assert (await server.ask(RESPONSES, {**body, **wrong})).status == 400


async def test_the_next_turn_reads_only_its_new_tokens(target):
    async with served(target, max_batch=1) as server:
        first = (await server.ask(CHAT, {"messages": ASK, "max_tokens": 9, "ignore_eos": True})).json
        talk = [*ASK, first["choices"][0]["message"], {"role": "user", "content": "And?"}]
        usage = (await server.ask(CHAT, {"messages": talk, "max_tokens": 1})).json["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1


async def test_silence_is_filled_with_comments_and_spaces(target):
    async with served(target, max_batch=1, link_rate=1e6, resident_memory=0, limits=Limits(comment_s=0.05)) as s:
        body = {"prompt": "x" * 150, "max_tokens": 1}
        streamed = await s.ask(COMPLETION, {**body, "stream": True})
        assert streamed.comments
        assert any(said.startswith("prefill ") for said in streamed.comments)
        whole = await s.ask(COMPLETION, {**body, "prompt": "y" * 150})
        assert whole.body.startswith(b"  ")
        assert whole.json["choices"][0]["finish_reason"] == "length"


async def test_a_stopping_server_ends_every_stream_with_an_event(target):
    async with served(target, max_batch=1, link_rate=1e6, resident_memory=0) as server:
        asked = [server.ask(COMPLETION, {"prompt": "a", "max_tokens": 200, "stream": True}) for _ in range(3)]
        tasks = [asyncio.create_task(one) for one in asked]
        while server.service.num_open < 3:
            await asyncio.sleep(0.001)
        server.service.stop()
        server.service.end_answers()
        for answer in await asyncio.gather(*tasks):
            assert answer.events[-1]["error"]["code"] == "stopping"
        assert server.service.num_open == 0


async def test_slow_heads_and_bodies_are_ended(target):
    async with served(target, opened=False, limits=Limits(header_s=0.1, body_s=0.1, body_bytes=1000)) as server:
        for sent in (b"", b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        assert (await server.ask(COMPLETION, b" " * 1001)).status == 413


async def test_a_client_that_has_closed_its_half_gets_its_answer_if_it_comes_soon(target, monkeypatch):
    async with served(target, max_batch=1) as server:
        for asked, status in (({"prompt": [1 << 70]}, 400), ({"prompt": "abc", "max_tokens": 1}, 200)):
            reader, writer = await server.send(COMPLETION, asked)
            writer.write_eof()
            assert (await read_answer(reader)).status == status
            writer.close()
        monkeypatch.setattr("aspec.serving.http.server.HALF_CLOSED_S", 0.01)
        async with asyncio.timeout(30):
            reader, writer = await server.send(COMPLETION, {"prompt": "abc", "max_tokens": 10_000_000})
            writer.write_eof()
            await reader.read()
            writer.close()
            while server.service.num_open:
                await asyncio.sleep(0.01)


async def test_connections_are_counted(target):
    async with served(target, opened=False, limits=Limits(connections=2)) as server:
        held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert b" 503 " in await asyncio.wait_for(reader.readline(), 5)
        for _, one in [*held, (reader, writer)]:
            one.close()


def test_the_lateness_of_the_loop_is_a_histogram():
    metrics = Metrics()
    for late_s in (0.0, 0.02, 0.0201, 5.0):
        metrics.lag.add(late_s)
    text = exposition(metrics, Present(True, 0, (), None), 0.0)
    for line in ('{le="0.01"} 1', '{le="0.02"} 2', '{le="0.05"} 3', '{le="1"} 3', '{le="+Inf"} 4'):
        assert f"aspec_loop_lag_seconds_bucket{line}\n" in text
    assert "aspec_loop_lag_seconds_count 4\n" in text
