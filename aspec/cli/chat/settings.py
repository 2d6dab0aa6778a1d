"""The sampling parameters that ``/set`` changes and a saved conversation keeps: names, values as text and as JSON."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from aspec.errors import PromptError, UserError
from aspec.generation.params import SamplingParams
from aspec.io.json_file import NotJson, parse_json

SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
DEFAULT = "default"
ALWAYS = ("max_new_tokens", "temperature", "seed")  # in a description, also where they have their default values


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise PromptError(f"expected a whole number, found {text!r:.60}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PromptError(f"expected a number such as 0.5, found {text!r:.60}") from None


def _switch(text: str) -> bool:
    if text.lower() not in SWITCHES:
        raise PromptError(f"expected on or off, found {text!r:.60}")
    return SWITCHES[text.lower()]


def _texts(text: str) -> tuple[str, ...]:
    """One text as it is, or as JSON one text or a list: "\\n\\n" has line breaks, [] is none."""
    if not text.startswith(('"', "[")):
        return (text,)
    try:
        value = parse_json(text.encode())
    except NotJson as error:
        raise PromptError(str(error)) from error
    return tuple(value) if isinstance(value, list) else (value,)


PARSERS: dict[Any, Callable[[str], Any]] = {int: _whole, float: _number, bool: _switch, tuple[str, ...]: _texts}
SETTABLE = {field.name: PARSERS[field.type] for field in fields(SamplingParams) if field.type in PARSERS}
"""Each settable parameter and the parser of its value."""


def changed(params: SamplingParams, name: str, text: str, start: SamplingParams) -> SamplingParams:
    """The parameters with a new value; ``default``: the value of ``start``. Raises PromptError for anything unknown."""
    name = known_name(name)
    try:
        return replace(params, **{name: getattr(start, name) if text == DEFAULT else SETTABLE[name](text)})
    except (PromptError, OverflowError) as error:
        reason = str(error).partition(". Change it")[0]
        raise PromptError(f"{reason if reason.startswith(name) else f'{name}: {reason}'}. It is unchanged.") from error


def known_name(name: str) -> str:
    """The name of a setting as it is spelt here. Raises PromptError if there is none."""
    spelt = name.lower().replace("-", "_")
    if spelt not in SETTABLE:
        raise PromptError(
            f"{name:.60} is not a setting{did_you_mean(spelt, SETTABLE)}: expected system or one of "
            f"{', '.join(SETTABLE)}."
        )
    return spelt


def listed(params: SamplingParams) -> str:
    """One line for each setting."""
    width = max(map(len, SETTABLE))
    return "\n".join(f"{name:{width}}  {shown(getattr(params, name))}" for name in SETTABLE)


def described(params: SamplingParams) -> str:
    """The settings that matter, in one line: without those that are off."""
    off = SamplingParams()
    return ", ".join(
        f"{name} {shown(value)}"
        for name, value in as_object(params).items()
        if name in ALWAYS or value != getattr(off, name)
    )


def shown(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(repr, value)) or "none" if isinstance(value, tuple) else f"{value}"


def as_object(params: SamplingParams) -> dict[str, Any]:
    """The settings as the JSON of a saved conversation."""
    return {name: getattr(params, name) for name in SETTABLE}


def from_object(params: SamplingParams, saved: Mapping[str, Any]) -> SamplingParams:
    """The parameters with saved values. Raises UserError for an unknown name or an invalid value."""
    if unknown := [name for name in saved if name not in SETTABLE]:
        raise UserError(f"settings has {unknown[0]!r:.60}: expected only {', '.join(SETTABLE)}")
    try:
        return replace(params, **saved)
    except (PromptError, TypeError, OverflowError) as error:
        raise UserError(str(error).partition(". Change it")[0]) from error


def did_you_mean(name: str, known: Mapping[str, object]) -> str:
    """A suggestion in brackets; empty if nothing known is similar."""
    near = get_close_matches(name[:60], known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
