"""The grammar of an answer that may call tools, or must: the calls in the model's own format, arguments by schema.

Lark rules of llguidance; each tool's parameters are a JSON schema inside. Standard library only.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aspec.generation.grammar.grammar import WHITESPACE, Grammar
from aspec.generation.text.tool_format import ToolFormat

ANYTHING = "(?s:.*)"
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def calls_only(tools: Sequence[Mapping[str, Any]], form: ToolFormat, *, several: bool) -> Grammar:
    """One call of one of ``tools``; with ``several`` one or more, if the format has them."""
    more = f" ({_literal(form.between)} call)*" if several and form.between is not None else ""
    return Grammar("lark", "\n".join([f"start: call{more}", f"call: {_any(tools)}", *_rules(tools, form, form.begin)]))


def text_or_calls(tools: Sequence[Mapping[str, Any]], form: ToolFormat, *, several: bool) -> Grammar:
    """Any text; what begins like a call is one of ``tools``. Without tags an answer is a text, or one call."""
    if not form.tag:
        begins = _regex(form.begin)
        rules = [f"start: call | FREE\nFREE: /{ANYTHING}/ & ~/{begins}{ANYTHING}/", f"call: {_any(tools)}"]
        return Grammar("lark", "\n".join([*rules, *_rules(tools, form, form.begin)]))
    start = "start: call* FREE" if several and form.between is not None else "start: call | FREE"
    free = f"FREE: /{ANYTHING}/" if several else f"FREE: /{ANYTHING}/ & ~/{ANYTHING}{_regex(form.tag)}{ANYTHING}/"
    rules = [start, free, f"head[lazy]: /{ANYTHING}{_regex(form.tag)}/", f"call: head ({_any(tools)})"]
    return Grammar("lark", "\n".join([*rules, *_rules(tools, form, form.begin.removeprefix(form.tag))]))


def _any(tools: Sequence[Mapping[str, Any]]) -> str:
    return " | ".join(f"call_{number}" for number in range(len(tools)))


def _rules(tools: Sequence[Mapping[str, Any]], form: ToolFormat, begin: str) -> list[str]:
    """A rule for the call of each tool, from ``begin`` on."""
    rules = []
    for number, tool in enumerate(tools):
        own = tool["function"]
        schema = {**own.get("parameters", NO_PARAMETERS), "x-guidance": {"whitespace_pattern": WHITESPACE}}
        head = _literal(f"{begin}{own['name']}{form.middle}")
        rules.append(f"call_{number}: {head} %json {json.dumps(schema)} {_literal(form.end)}")
    return rules


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    """A regular expression for a text, between slashes."""
    return "".join(f"\\{one}" if not one.isalnum() and one not in ' _"<>\n' else one for one in text)
