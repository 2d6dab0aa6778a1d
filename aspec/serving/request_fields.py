"""Which fields the body of a request may have, and what becomes of each: one row per field of OpenAI's or vLLM's.

A field that is null counts as absent, whatever its name. The other fields are of three kinds:

READ: its value decides the answer; ``openai_requests`` reads it.
RECORD: it concerns the caller, the service or the speed, never the answer; any value is accepted.
Fixed: the values that change nothing are accepted; any other value is refused with the reason.

A name that is not here is refused, because it may ask for another answer. Standard library only.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aspec.errors import printable
from aspec.serving.refusals import RequestError

CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MOST_SHOWN = 80  # characters of a value or a name in a message
MOST_PROBLEMS = 20  # of one request; the rest is not looked for


@dataclass(frozen=True, slots=True)
class Field:
    """What becomes of a field: read, a record of the caller, or fixed to values that change nothing."""

    is_read: bool = False
    is_record: bool = False
    fixed: tuple[Any, ...] = ()  # the accepted values
    reason: str = ""  # why any other value is refused

    def accepts(self, value: object) -> bool:
        """Whether the value needs no refusal here; True equals no number."""
        return self.is_read or self.is_record or any(value == one and _kind(value) == _kind(one) for one in self.fixed)


READ, RECORD = Field(is_read=True), Field(is_record=True)


def fixed(*values: Any, reason: str) -> Field:
    """A field that must have one of ``values``, or be absent."""
    return Field(fixed=values, reason=reason)


OLD_TOOLS = "give tools and tool_choice, which replace it"
ONLY_THERE = "ask /v1/chat/completions"
NO_BEAMS = "beam search is not supported"
NO_TRANSFER = "KV is not transferred between servers"
ONLY_TEXT = "the model reads and writes text only"

SHARED = {
    # OpenAI's, and they decide the answer
    "model": READ,
    "max_tokens": READ,
    "temperature": READ,
    "top_p": READ,
    "presence_penalty": READ,
    "frequency_penalty": READ,
    "seed": READ,
    "stop": READ,
    "n": READ,
    "logprobs": READ,
    "logit_bias": READ,
    # OpenAI's, and they concern the caller, the service or the speed
    "user": RECORD,
    "safety_identifier": RECORD,
    "metadata": RECORD,
    "store": RECORD,
    "service_tier": RECORD,
    "prompt_cache_key": RECORD,
    "prompt_cache_retention": RECORD,
    "prediction": RECORD,  # a guess of the answer, for speed
    "stream": fixed(False, reason="a row's answer is written whole"),
    "stream_options": RECORD,  # it says how to stream, and nothing is streamed
    # vLLM's, and they decide the answer
    "top_k": READ,
    "min_p": READ,
    "repetition_penalty": READ,
    "ignore_eos": READ,
    "min_tokens": READ,
    "bad_words": READ,
    "stop_token_ids": fixed([], reason="give texts in stop"),
    "allowed_token_ids": fixed([], reason="a choice of tokens is not supported"),
    "use_beam_search": fixed(False, reason=NO_BEAMS),
    "length_penalty": RECORD,  # only beam search has a use for it
    "early_stopping": RECORD,  # likewise
    "skip_special_tokens": fixed(True, reason="special tokens are never part of the text"),
    "spaces_between_special_tokens": RECORD,  # special tokens are never part of the text
    "include_stop_str_in_output": fixed(False, reason="the text ends before the stop text"),
    "truncate_prompt_tokens": fixed(reason="a prompt is never cut"),
    "prompt_logprobs": fixed(reason="only generated tokens have logprobs"),
    "response_format": READ,
    "structured_outputs": READ,
    "guided_json": READ,
    "guided_regex": READ,
    "guided_choice": READ,
    "guided_grammar": READ,
    "structural_tag": fixed("", reason="a form inside of free text is enforced for tools alone"),
    "guided_decoding_backend": RECORD,  # any of them enforces the same form
    "guided_whitespace_pattern": fixed("", reason="spaces between the parts of a JSON text are free"),
    "logits_processors": fixed([], reason="code of a request is not run"),
    "repetition_detection": fixed(reason="a stop at repetitions is not supported"),
    "return_tokens_as_token_ids": fixed(False, reason="tokens are written as text"),
    "return_token_ids": fixed(False, reason="tokens are written as text"),
    "kv_transfer_params": fixed({}, reason=NO_TRANSFER),
    "vllm_xargs": fixed({}, reason="there is no such extension"),
    # of transformers, and they decide the answer
    "min_new_tokens": READ,
    "typical_p": READ,
    "no_repeat_ngram_size": READ,
    "bad_words_ids": READ,
    "suppress_tokens": READ,
    # vLLM's, and they concern the caller, the service or the speed
    "request_id": RECORD,
    "priority": RECORD,
    "cache_salt": RECORD,
}
"""The fields that both forms have."""

ONLY_CHAT = {
    "messages": READ,
    "max_completion_tokens": READ,
    "top_logprobs": READ,
    "modalities": fixed(["text"], [], reason=ONLY_TEXT),
    "audio": fixed(reason=ONLY_TEXT),
    "tools": READ,
    "tool_choice": READ,
    "parallel_tool_calls": READ,
    "functions": fixed([], reason=OLD_TOOLS),
    "function_call": fixed("none", "auto", reason=OLD_TOOLS),
    "web_search_options": fixed(reason="there is no web search"),
    "verbosity": fixed("medium", reason="say in a message how long the answer shall be"),
    "reasoning_effort": READ,
    "chat_template_kwargs": READ,
    "include_reasoning": fixed(True, reason="the text is not taken apart"),
    "thinking_token_budget": fixed(reason="a limit of the reasoning alone is not supported"),
    "echo": fixed(False, reason="only the new text is an answer"),
    "add_generation_prompt": fixed(True, reason="the answer is always a new message"),
    "continue_final_message": fixed(False, reason="the answer is always a new message"),
    "add_special_tokens": fixed(False, reason="the chat template writes the special tokens"),
    "documents": fixed([], reason="write them into a message"),
    "chat_template": fixed(reason="the checkpoint's template is used"),
    "mm_processor_kwargs": fixed({}, reason=ONLY_TEXT),
    "media_io_kwargs": fixed({}, reason=ONLY_TEXT),
}

ONLY_COMPLETION = {
    "prompt": READ,
    "max_completion_tokens": READ,
    "best_of": READ,
    "echo": fixed(False, reason="only the new text is an answer"),
    "suffix": fixed("", reason="text is generated at the end only"),
    "add_special_tokens": fixed(True, reason="the prompt begins as the tokenizer has it; give token ids instead"),
    "prompt_embeds": fixed(reason="give a text or token ids"),
}

RESPONSE = {
    "model": READ,
    "input": READ,
    "instructions": READ,
    "previous_response_id": READ,
    "max_output_tokens": READ,
    "temperature": READ,
    "top_p": READ,
    "reasoning": READ,
    "store": RECORD,
    "user": RECORD,
    "metadata": RECORD,
    "safety_identifier": RECORD,
    "service_tier": RECORD,
    "prompt_cache_key": RECORD,
    "prompt_cache_retention": RECORD,
    "parallel_tool_calls": RECORD,  # there are no tools
    "max_tool_calls": RECORD,  # likewise
    "text": fixed({"format": {"type": "text"}}, {}, reason=ONLY_THERE),
    "tools": fixed([], reason=ONLY_THERE),
    "tool_choice": fixed("none", "auto", reason=ONLY_THERE),
    "include": fixed([], reason="there is nothing to include"),
    "top_logprobs": fixed(0, reason="a response has no logprobs"),
    "truncation": fixed("disabled", reason="a conversation is never cut"),
    "background": fixed(False, reason="an answer is not made after its request has ended"),
    "conversation": fixed(reason="give previous_response_id, or the whole conversation as input"),
    "prompt": fixed(reason="there are no stored prompts"),
    "context_management": fixed([], reason="a conversation is never cut"),
}
"""The fields of the Responses interface."""

FIELDS: Mapping[str, Mapping[str, Field]] = {
    CHAT: SHARED | ONLY_CHAT,
    COMPLETION: SHARED | ONLY_COMPLETION,
    RESPONSES: RESPONSE,
}
"""The fields of each form, by its URL."""


def given_fields(url: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[RequestError]]:
    """The fields that are read, as given, and a problem for each field that cannot be served."""
    known = FIELDS[url]
    read: dict[str, Any] = {}
    problems: list[RequestError] = []
    for name, value in body.items():
        if value is None or len(problems) == MOST_PROBLEMS:
            continue
        field = known.get(name)
        if field is None:
            problems.append(_unknown(name, url))
        elif field.is_read:
            read[name] = value
        elif not field.accepts(value):
            problems.append(_refused(name, field, value))
    return read, problems


def as_json(value: object) -> str:
    """A value as JSON on one short, printable line."""
    try:
        return printable(json.dumps(value, ensure_ascii=False), MOST_SHOWN)
    except RecursionError:
        return "a value that is nested too deeply"


def plain(name: str) -> str:
    """A name as it stands if it is short and printable, otherwise as JSON."""
    return name if name.isidentifier() and name.isascii() and len(name) <= MOST_SHOWN else as_json(name)


def _unknown(name: str, url: str) -> RequestError:
    other = COMPLETION if url == CHAT else CHAT
    close = [] if len(name) > MOST_SHOWN else difflib.get_close_matches(name, FIELDS[url], n=1, cutoff=0.8)
    if name in FIELDS[other]:
        remedy = f"it belongs to {other}: remove it"
    else:
        remedy = f"did you mean {close[0]}?" if close else "remove it"
    return RequestError(
        f"{plain(name)} is not supported in a request to {url}; {remedy}", plain(name), "unknown_parameter"
    )


def _refused(name: str, field: Field, value: object) -> RequestError:
    accepted = " or ".join([*(json.dumps(one) for one in field.fixed[:2]), "absent"])
    return RequestError(
        f"{name} is not supported: {field.reason}; it must be {accepted}, found {as_json(value)}",
        name,
        "unsupported_value",
    )


def _kind(value: object) -> type:
    """The JSON type of a value: 1 and 1.0 are both numbers, True is none."""
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)
