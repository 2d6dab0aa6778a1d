"""Prompts in the forms that people have them: texts, token ids and conversations, of Python, numpy, torch or libraries.

What can be converted without a guess is converted, all else is refused; nothing is left out. Arrays and tensors are
recognised by their ``tolist``, so this file imports neither.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, TypeGuard

from aspec.errors import PromptError

Message = dict[str, Any]
"""A message: role, content (a text or a list of parts), and the keys that a chat template may know."""

Prompt = str | list[int] | list[Message]
"""A text, token ids, or a conversation."""

PromptLike = object
"""A prompt as people have it: a text, token ids (also of numpy, torch or a tokenizer), or messages (also objects)."""

EXPECTED = "a text, token ids or a conversation (messages with role and content)"


def as_prompt(given: object) -> Prompt:
    """One prompt in its plain form. Raises PromptError if it cannot be converted."""
    return given if isinstance(given, str) else _listed(given)


def as_prompts(given: object) -> tuple[list[Prompt], bool]:
    """Prompts in their plain form, and whether one prompt was given rather than a sequence. Raises PromptError."""
    given = _unwrapped(given)
    if (
        isinstance(given, Iterable)
        and not isinstance(given, (str, bytes, bytearray, Mapping))
        and not _is_message(given)
    ):
        given = list(given)
        if all(_is_prompt(one) for one in given):
            return [_indexed(number, one) for number, one in enumerate(given)], False
    return [as_prompt(given)], True


def conversation(text: str, system: str | None = None) -> list[Message]:
    """A text as the conversation that asks it."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def templated(prompt: Prompt, raw: bool, system: str | None = None) -> Prompt:
    """A text as a conversation, with the system message; unchanged if ``raw``, or if it is no text.

    Raises PromptError for a system message that has no place.
    """
    if isinstance(prompt, str) and prompt and not raw:
        return conversation(prompt, system)
    if system:
        raise PromptError(
            "a system message needs a text as prompt, and a model with a chat template. Put it into the messages, or "
            "into the text."
        )
    return prompt


def is_chat(prompt: Prompt) -> TypeGuard[list[Message]]:
    """Whether a plain prompt is a conversation."""
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)


def _indexed(number: int, given: object) -> Prompt:
    try:
        return as_prompt(given)
    except PromptError as error:
        raise PromptError(f"prompt {number}: {error}") from error


def _is_prompt(one: object) -> bool:
    """Whether a member of a sequence is a prompt of its own, rather than a token or a message."""
    if isinstance(one, Mapping):
        return "input_ids" in one
    return isinstance(one, (str, list, tuple)) or (hasattr(one, "tolist") and bool(getattr(one, "ndim", 0)))


def _listed(given: object) -> list[int] | list[Message]:
    """Token ids or messages in a list."""
    given = _unwrapped(given)
    if _is_message(given):
        return [_message(given, 0)]
    if isinstance(given, (bytes, bytearray)):
        raise PromptError(f"the prompt is made of bytes: expected {EXPECTED}. Decode it first, as UTF-8 for example.")
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise PromptError(f"the prompt is {_named(given)}: expected {EXPECTED}.")
    members = list(given)
    if members and _is_message(members[0]):
        return [_message(one, index) for index, one in enumerate(members)]
    return [_token(one, index) for index, one in enumerate(members)]


def _unwrapped(given: object) -> object:
    """The ids of a tokenizer's output; the list of an array or a tensor, without a batch dimension of one."""
    if isinstance(given, Mapping) and "input_ids" in given:
        mask = given.get("attention_mask")
        if mask is not None and not all(map(all, _rows(mask))):
            raise PromptError(
                "the prompt has padding: expected an attention_mask of ones, found zeros. Give the ids without padding."
            )
        given = given["input_ids"]
        given = given if hasattr(given, "tolist") else list(given) if isinstance(given, Iterable) else given
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], (list, tuple)):
            return given[0]
    if hasattr(given, "tolist"):
        listed = given.tolist()
        return listed[0] if getattr(given, "ndim", 1) == 2 and len(listed) == 1 else listed
    return given


def _rows(mask: Any) -> list[list[object]]:
    listed = mask.tolist() if hasattr(mask, "tolist") else list(mask)
    return listed if listed and isinstance(listed[0], list) else [listed]


def _token(one: object, index: int) -> int:
    try:
        if isinstance(one, bool) or "bool" in str(getattr(one, "dtype", "")):
            raise TypeError
        return operator.index(one)  # type: ignore[arg-type]  # it raises TypeError
    except (TypeError, ValueError) as error:  # ValueError: a tensor of several elements
        raise PromptError(
            f"the prompt's element {index} is {_named(one)}: expected a token id (a whole number). A prompt is "
            f"{EXPECTED}."
        ) from error


def _is_message(one: object) -> bool:
    if isinstance(one, Mapping):
        return "role" in one
    return hasattr(one, "role") and not isinstance(one, type)


def _message(one: object, index: int) -> Message:
    """A message as a dict: of a mapping, a pydantic model, a dataclass, or any object with role and content."""
    if not _is_message(one):
        raise PromptError(f"message {index} is {_named(one)}: expected an object with role and content.")
    if isinstance(one, Mapping):
        message = dict(one)
    elif callable(dump := getattr(one, "model_dump", None)):
        message = dict(dump(exclude_none=True))
    elif is_dataclass(one) and not isinstance(one, type):
        message = {name: value for name, value in asdict(one).items() if value is not None}
    else:
        message = {"role": getattr(one, "role", None), "content": getattr(one, "content", None)}
    role = message.get("role")
    if not isinstance(role, str):
        raise PromptError(f"message {index} has the role {role!r}: expected a text such as user, system or assistant.")
    if message.get("content") is None and not set(message) - {"role", "content"}:
        raise PromptError(f"message {index} ({role}) has no content: expected a text.")
    return {**message, "role": str(role)}


def _named(one: object) -> str:
    """A value in a message: its type, and the value where it is short."""
    said = repr(one) if isinstance(one, (int, float, bool, type(None), str)) else ""
    kind = "None" if one is None else f"{type(one).__name__}"
    return kind if one is None or not said else f"{kind} {said[:40]}"


def first_bad(tokens: Sequence[int], vocab_size: int) -> tuple[int, int] | None:
    """The index and the id of the first token outside 0 .. ``vocab_size`` - 1; None if all are inside."""
    return next(((index, token) for index, token in enumerate(tokens) if not 0 <= token < vocab_size), None)
