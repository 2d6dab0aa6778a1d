"""The form that a request asks of its answer: a JSON schema, a pattern, a choice, tools that may or must be called.

``response_format`` and ``tools`` are OpenAI's; ``structured_outputs`` and ``guided_*`` are vLLM's. Standard library
only: whether a grammar is valid, ``dispatch`` asks.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from aspec.generation.grammar.grammar import ANY_OBJECT, Grammar
from aspec.serving.refusals import RequestError
from aspec.serving.request_fields import as_json

GUIDED = {"json": "guided_json", "regex": "guided_regex", "choice": "guided_choice", "grammar": "guided_grammar"}
MOST_TOOLS = 128  # of a request, as in OpenAI's interface
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
FREE = ("auto", "none", "required")  # choices that name no tool


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request, as its chat template takes them."""

    tools: tuple[Mapping[str, Any], ...]
    choice: str = "auto"  # auto, required, or the name of the one tool to call
    parallel: bool = True  # an answer may have several calls


def read_grammar(given: Mapping[str, Any]) -> Grammar | None:
    """The grammar of the answer's text; None if any text will do. Raises RequestError."""
    asked = {name: _response_format(given[name]) for name in ("response_format",) if given.get(name)}
    nested = given.get("structured_outputs") or {}
    if not isinstance(nested, dict):
        refuse("structured_outputs", "an object", nested)
    for name, value in nested.items():
        if name not in GUIDED and name != "json_object" and value is not None:
            raise RequestError(f"structured_outputs.{as_json(name)} is not supported: remove it", "structured_outputs")
    for kind, old_name in GUIDED.items():
        for name, value in ((f"structured_outputs.{kind}", nested.get(kind)), (old_name, given.get(old_name))):
            if value not in (None, "", []):
                asked[name] = READERS[kind](name, value)
    if nested.get("json_object"):
        asked["structured_outputs.json_object"] = ANY_OBJECT
    found = {name: grammar for name, grammar in asked.items() if grammar is not None}
    if len(found) > 1:
        raise RequestError(f"{' and '.join(found)} ask for different forms: give one of them", next(iter(found)))
    return next(iter(found.values()), None)


def _response_format(value: object) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        refuse("response_format", "an object of type text, json_object or json_schema", value)
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    inside = value.get("json_schema")
    if not isinstance(inside, dict) or not isinstance(inside.get("schema"), dict):
        refuse("response_format.json_schema", "an object with a name and a schema, which is an object", inside)
    return Grammar("json_schema", json.dumps(inside["schema"]))


def _json(name: str, value: object) -> Grammar:
    if isinstance(value, str):
        return Grammar("json_schema", value)
    if not isinstance(value, dict):
        refuse(name, "a JSON schema: an object", value)
    return Grammar("json_schema", json.dumps(value))


def _regex(name: str, value: object) -> Grammar:
    if not isinstance(value, str):
        refuse(name, "a regular expression", value)
    return Grammar("regex", value)


def _choice(name: str, value: object) -> Grammar:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        refuse(name, "a list of texts, none of them empty", value)
    return Grammar("lark", "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in value))


def _lark(name: str, value: object) -> Grammar:
    if not isinstance(value, str):
        refuse(name, "a grammar in Lark's form", value)
    return Grammar("lark", value)


READERS: Mapping[str, Callable[[str, object], Grammar]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
}


# -- tools -----------------------------------------------------------------------------------------------------


def read_tools(given: Mapping[str, Any]) -> Tools | None:
    """The tools that the answer may call; None if there are none, or ``tool_choice`` is none. Raises RequestError."""
    tools, parallel = given.get("tools", []), given.get("parallel_tool_calls", True)
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        refuse("tools", f"a list of at most {MOST_TOOLS} functions", tools)
    if not isinstance(parallel, bool):
        refuse("parallel_tool_calls", "true or false", parallel)
    read = tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in read]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise RequestError(f"tools have the same name, {min(repeated)}: give each its own", "tools")
    choice = _tool_choice(given.get("tool_choice", "auto"), names)
    return Tools(read, choice, parallel) if read and choice != "none" else None


def _tool(name: str, value: object) -> dict[str, Any]:
    own = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(own, dict):
        refuse(name, 'an object {"type": "function", "function": {"name": ...}}', value)
    own = {key: one for key, one in own.items() if one is not None}
    for key in own:
        if key not in FUNCTION_FIELDS:
            raise RequestError(f"{name}.function.{as_json(key)} is not supported: remove it", name)
    if not isinstance(own.get("name"), str) or not TOOL_NAME.fullmatch(own["name"]):
        refuse(f"{name}.function.name", "letters, digits, _ and -, at most 64", own.get("name"))
    if not isinstance(own.get("description", ""), str):
        refuse(f"{name}.function.description", "a text", own["description"])
    if not isinstance(own.get("parameters", {}), dict):
        refuse(f"{name}.function.parameters", "a JSON schema: an object", own["parameters"])
    if not isinstance(own.get("strict", False), bool):
        refuse(f"{name}.function.strict", "true or false", own["strict"])
    shown = {key: one for key, one in own.items() if key != "strict"}  # arguments match their schema in any case
    return {"type": "function", "function": {"description": "", **shown}}


def _tool_choice(value: object, names: list[str]) -> str:
    if isinstance(value, dict):
        own = value.get("function")
        named = own.get("name") if isinstance(own, dict) and value.get("type") == "function" else None
        if named not in names:
            refuse("tool_choice", f"auto, none, required, or a function of tools ({', '.join(names) or 'none'})", value)
        return str(named)
    if value not in FREE:
        refuse("tool_choice", "auto, none, required, or one of tools", value)
    if value == "required" and not names:
        raise RequestError("tool_choice is required, but there are no tools: give some", "tool_choice")
    return str(value)


def read_calls(name: str, value: object) -> list[dict[str, Any]]:
    """The ``tool_calls`` of an earlier answer, arguments as objects: so templates take them. Raises RequestError."""
    if not isinstance(value, list):
        refuse(name, "a list of calls of functions", value)
    return [_call(f"{name}[{index}]", call) for index, call in enumerate(value)]


def _call(name: str, value: object) -> dict[str, Any]:
    own = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or value.get("type", "function") != "function" or not isinstance(own, dict):
        refuse(name, 'an object {"id": ..., "type": "function", "function": {...}}', value)
    number, arguments = value.get("id", ""), own.get("arguments", "{}")
    if not isinstance(number, str):
        refuse(f"{name}.id", "a text", number)
    if not isinstance(own.get("name"), str):
        refuse(f"{name}.function.name", "a text", own.get("name"))
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        refuse(f"{name}.function.arguments", "a JSON object, as a text", arguments)
    return {"type": "function", "id": number, "function": {"name": own["name"], "arguments": parsed}}


def refuse(name: str, expected: str, found: object) -> NoReturn:
    """Raise a RequestError that names a field."""
    raise RequestError(f"{name} must be {expected}; found {as_json(found)}", name)
