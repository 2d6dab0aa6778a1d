"""How answers are written in OpenAI's form: the bodies of chat and text completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from aspec.generation.sampler import TokenLogprob
from aspec.generation.text.tokenizer import REPLACEMENT, Tokenizer
from aspec.serving.call_reader import CallReader
from aspec.serving.openai_requests import Request

UNREACHABLE = -9999.0  # the logprob of an impossible token, in place of -inf


@dataclass(frozen=True, slots=True)
class Generated:
    """The generated text of a request; ``logprobs`` of its tokens if they were requested."""

    text: str
    num_prompt: int  # tokens
    num_tokens: int  # generated
    finish_reason: str  # "stop" | "length"
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached: int | None = None  # tokens of the prompt whose KV was kept; None: not told


@dataclass(frozen=True, slots=True)
class Label:
    """The identity of an answer."""

    id: str
    created: int  # seconds since the epoch
    model: str


def answer_body(request: Request, choices: Sequence[Generated], label: Label, tokenizer: Tokenizer) -> dict[str, Any]:
    """The body of a ``chat.completion`` or a ``text_completion`` object: the choices of one prompt or of several."""
    return {
        "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{label.id}",
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": label.created,
        "model": label.model,
        "choices": [_choice(request, index, made, label, tokenizer) for index, made in enumerate(choices)],
        "usage": usage_of(choices, request.num_choices),
    }


def usage_of(choices: Sequence[Generated], num_choices: int) -> dict[str, Any]:
    """The ``usage`` object; every prompt has ``num_choices`` choices and counts once."""
    firsts, num_tokens = choices[::num_choices], sum(made.num_tokens for made in choices)
    num_prompt = sum(made.num_prompt for made in firsts)
    usage: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }
    if cached := [made.num_cached for made in firsts if made.num_cached is not None]:
        usage["prompt_tokens_details"] = {"cached_tokens": sum(cached)}
    return usage


def _choice(request: Request, index: int, made: Generated, label: Label, tokenizer: Tokenizer) -> dict[str, Any]:
    asked = request.sampling.get("logprobs") is not None
    form = chat_logprobs if request.is_chat else completion_logprobs
    choice: dict[str, Any] = {"index": index}
    reason = made.finish_reason
    if request.tools is not None:
        choice["message"], reason = _with_calls(index, made, label, tokenizer)
    elif request.is_chat:
        choice["message"] = {"role": "assistant", "content": made.text}
    else:
        choice["text"] = made.text
    choice["logprobs"] = form(made.logprobs, tokenizer) if asked else None
    choice["finish_reason"] = reason
    return choice


def _with_calls(index: int, made: Generated, label: Label, tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """The message of an answer that may have called tools, and why it ended."""
    reader = CallReader(tokenizer.tool_format())
    found = reader.push(made.text, final=True)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(said.text for said in found)}
    if not reader.num_calls:
        return message, made.finish_reason
    calls = []
    for number in range(reader.num_calls):
        own = [said for said in found if said.call == number]
        name = next(said.name for said in own if said.name is not None)
        calls.append(call_object(label, index, number, name, "".join(said.arguments for said in own)))
    message = {**message, "content": message["content"] or None, "tool_calls": calls}
    return message, reason_with_calls(made.finish_reason)


def reason_with_calls(reason: str) -> str:
    """Why an answer ended that has called a tool."""
    return "tool_calls" if reason == "stop" else reason


def call_object(label: Label, index: int, number: int, name: str, arguments: str) -> dict[str, Any]:
    """The call ``number`` of answer ``index``."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{label.id[:24]}_{index}_{number}", "type": "function", "function": function}


def chat_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``logprobs`` object of a chat."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.spell([token])
        # a token that is only part of a character has no text; OpenAI's interface allows null for its bytes
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": None if REPLACEMENT in text else list(text.encode()),
        }

    return {
        "content": [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in logprobs
        ]
    }


def completion_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int = 0) -> dict[str, Any]:
    """The ``logprobs`` object of a plain completion; ``offset``: characters before the first token."""
    tokens = [tokenizer.spell([one.token]) for one in logprobs]
    tops: list[dict[str, float]] = []
    for text, one in zip(tokens, logprobs, strict=True):
        top: dict[str, float] = {}
        for token, logprob in one.top:
            top.setdefault(tokenizer.spell([token]), finite(logprob))  # the likeliest of the tokens with this text
        tops.append(top if text in top else {**top, text: finite(one.logprob)})
    return {
        "tokens": tokens,
        "token_logprobs": [finite(one.logprob) for one in logprobs],
        "top_logprobs": tops,
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else [],
    }


def finite(logprob: float) -> float:
    """Replace -inf by UNREACHABLE: JSON has no infinity, and OpenAI's interface uses this number."""
    return max(logprob, UNREACHABLE)
