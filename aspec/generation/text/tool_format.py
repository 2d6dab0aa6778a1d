"""How a model writes a call of a tool: as its chat template writes one that an earlier answer has made.

Two forms are known: a JSON object between ``<tool_call>`` tags (Hermes, Qwen), and a JSON object alone, with
``parameters`` (Llama 3). Standard library only.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROBES = ("aspecprobe1", "aspecprobe2")  # names of tools that no request has
ANSWER = "aspecanswer"  # that calls no tool
ARGUMENTS = {"aspeckey": "aspecvalue"}
CALL = re.compile(
    r'(?P<tag><tool_call>\s*)?(?P<begin>\{"name": ")aspecprobe1(?P<middle>", "(?:arguments|parameters)": )'
    r'\{"aspeckey": "aspecvalue"\}(?P<end>\}(?(tag)\s*</tool_call>))'
)

PROBE_TOOLS = [
    {"type": "function", "function": {"name": name, "description": "A probe.", "parameters": {"type": "object"}}}
    for name in PROBES
]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A call is ``begin``, the tool's name, ``middle``, its arguments as a JSON object, ``end``."""

    begin: str
    middle: str
    end: str
    between: str | None  # of two calls in one answer; None: an answer has one call
    tag: str  # where a call begins in the midst of a text; empty: a call is the whole answer

    def call(self, name: str, arguments: str) -> str:
        """The text of a call."""
        return f"{self.begin}{name}{self.middle}{arguments}{self.end}"


def probe_messages(num_calls: int) -> list[dict[str, Any]]:
    """A conversation whose answer has called one tool or two; with none the answer is a text."""
    ask = {"role": "user", "content": "Hi"}
    if not num_calls:
        return [ask, {"role": "assistant", "content": ANSWER}]
    calls = [
        {"type": "function", "id": f"call0000{number}", "function": {"name": name, "arguments": ARGUMENTS}}
        for number, name in enumerate(PROBES[:num_calls], 1)
    ]
    return [ask, {"role": "assistant", "content": "", "tool_calls": calls}]


def format_of(plain: str, one: str, two: str | None) -> ToolFormat | None:
    """The format in the texts of conversations with no call, with one and with two; None if it is not known."""
    if (found := CALL.search(one)) is None:
        return None
    tag = found["tag"] or ""
    if not tag and one[: found.start()] != plain.partition(ANSWER)[0]:
        return None  # something is written in front of it, that a text does not have
    made = ToolFormat(tag + found["begin"], found["middle"], found["end"], None, tag.rstrip())
    written = json.dumps(ARGUMENTS)
    first, second = (made.call(name, written) for name in PROBES)
    between = None if two is None else re.search(f"{re.escape(first)}(.*?){re.escape(second)}", two, re.DOTALL)
    if between is None or not tag:
        return made
    return ToolFormat(made.begin, made.middle, made.end, between[1], made.tag)


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of tools as OpenAI's form has them."""
    return [str(tool["function"]["name"]) for tool in tools]
