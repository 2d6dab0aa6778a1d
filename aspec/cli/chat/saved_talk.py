"""A conversation in a file: OpenAI's messages and the sampling settings as JSON, written as a whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aspec.cli.chat.conversation import Conversation, Turn
from aspec.errors import UserError
from aspec.io.json_file import read_json

MAX_BYTES = 256 << 20  # of a file; a conversation of a million tokens has a few megabytes
ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class SavedTalk:
    """The content of a file."""

    talk: Conversation
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None  # that the conversation was with


def save(path: Path, saved: SavedTalk, *, overwrite: bool) -> None:
    """Write a file, synced to the disk. Raises UserError if that fails, and if it exists unless ``overwrite``."""
    messages = [*_all_messages(saved.talk)]
    content = {"model": saved.model, "messages": messages, "settings": dict(saved.settings)}
    try:
        _write(path.resolve(), json.dumps(content, ensure_ascii=False, indent=1) + "\n", overwrite)
    except FileExistsError:
        raise UserError(
            f"{path} exists and is unchanged: choose another name, or replace it with /save! {path}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. The conversation goes on; save it elsewhere."
        ) from error


def load(path: Path) -> SavedTalk:
    """Read a file. Raises UserError if it is no conversation of system, user and assistant in turns."""
    if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
        raise UserError(f"{path} is not a saved conversation: expected a file of at most {MAX_BYTES >> 20} MiB.")
    content = read_json(path, "a saved conversation")
    try:
        return _parse(content)
    except UserError as error:
        raise UserError(
            f"{path} is not a saved conversation: {error}. The conversation is unchanged; correct the file, or load "
            f"another one."
        ) from error


def _write(path: Path, text: str, overwrite: bool) -> None:
    """Write a file beside ``path``, then give it the name in one step. Raises OSError."""
    if not overwrite and path.exists():
        raise FileExistsError
    if path.exists() and not path.is_file():
        raise OSError(None, "it is no regular file")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_new(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _rename_new(temporary: str, path: Path) -> None:
    """Give a file a name that no file has: a link fails if one appeared meanwhile. Some file systems have no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        os.replace(temporary, path)


def _all_messages(talk: Conversation) -> list[dict[str, str]]:
    """The messages, also those that the model no longer sees."""
    everything = Conversation(talk.system, talk.turns)
    return everything.messages(talk.unanswered)


def _parse(content: object) -> SavedTalk:
    if isinstance(content, list):  # messages alone, as other programs write them
        content = {"messages": content}
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise UserError("expected an object with a list of messages")
    settings, model = content.get("settings", {}), content.get("model")
    if not isinstance(settings, dict):
        raise UserError("settings must be an object")
    if not isinstance(model, str | None):
        raise UserError("model must be a text")
    return SavedTalk(_conversation(content["messages"]), settings, model)


def _conversation(messages: list[Any]) -> Conversation:
    texts = [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    system = texts.pop(0)[1] if texts and texts[0][0] == "system" else None
    for index, (role, _) in enumerate(texts):
        if role != ROLES[index % 2]:
            where = f"messages[{index + len(messages) - len(texts)}]"
            raise UserError(
                f"{where} is from {role!r}: expected {ROLES[index % 2]!r}, after an optional first 'system'"
            )
    spoken = [text for _, text in texts]
    unanswered = spoken.pop() if len(spoken) % 2 else None
    turns = tuple(Turn(user, answer) for user, answer in zip(spoken[::2], spoken[1::2], strict=True))
    return Conversation(system or None, turns, unanswered=unanswered)


def _message(name: str, message: object) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise UserError(f"{name} is not an object")
    role, text = message.get("role"), message.get("content")
    if role not in ("system", *ROLES):
        raise UserError(f"the role of {name} must be system, user or assistant, found {role!r:.100}")
    if not isinstance(text, str):
        raise UserError(f"the content of {name} must be a text, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the content of {name} is not valid Unicode at character {error.start}") from error
    return role, text
