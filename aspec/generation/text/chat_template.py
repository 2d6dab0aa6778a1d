"""A checkpoint's chat template: which form of messages it takes, and the text that it makes of a conversation.

A message holds a text, or a list of parts, ``{"type": "text", "text": "..."}``. Some templates print the content as a
text, some loop over its parts, some take both, and a template that gets the wrong form drops the text without a word.
So each role is tried once, with a text and with parts, and messages are given in a form whose text is printed.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aspec.errors import PromptError, reason_of, shown
from aspec.generation.text.template_trial import TemplateTrial, TrialError
from aspec.generation.text.time_limit import TimeLimit, TimeLimitError
from aspec.generation.text.tool_format import PROBE_TOOLS, ToolFormat, format_of, probe_messages

Message = Mapping[str, Any]

WORDS = ("aspecword1", "aspecword2")  # of a conversation that is tried
AS_DATA = re.compile(r"""["']text["']\s*:\s*["']aspecword""")  # a list that was printed as it is
DAMAGED = "Send fewer or shorter messages, or give plain text (--raw); if none helps, the template is damaged."


@dataclass(frozen=True, slots=True)
class Takes:
    """Which content of a role's messages the template prints; None: it refused to be tried."""

    text: bool | None
    parts: bool | None  # any number of them
    part: bool | None  # one

    def form(self, content: str | list[dict[str, str]]) -> str | list[dict[str, str]] | None:
        """The content in a form that is printed; None if none is."""
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        whole = "\n".join(texts)
        if isinstance(content, list) and self.parts:
            return content
        if self.text:
            return whole
        if self.parts or self.part:
            return [{"type": "text", "text": whole}]
        return None if False in (self.text, self.parts, self.part) else whole  # refused: the template will say why


class ChatTemplate:
    """The chat template of a tokenizer of transformers; mutable: it remembers the forms that roles take."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self._inner, self._folder = inner, folder
        self._trial = TemplateTrial()
        self._takes: dict[tuple[str, str], Takes] = {}  # by template and role

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return bool(getattr(self._inner, "chat_template", None))

    def uses(self, name: str) -> bool:
        """Whether the template names a variable."""
        return self.exists and re.search(rf"\b{re.escape(name)}\b", str(self._inner.chat_template)) is not None

    def render(self, messages: Sequence[Message], limit: TimeLimit, variables: Mapping[str, Any] | None = None) -> str:
        """The text of a conversation, up to the start of the model's answer; the template reads ``variables``.

        Raises PromptError if there is no template, if it refuses, if it would leave a text out, if it takes longer than
        ``limit`` or too much memory, or if a message holds something other than text.
        """
        if not self.exists:
            raise PromptError(f"{self._folder} has no chat template: give plain text (--raw) or choose a chat model.")
        variables = dict(variables or {})
        parameters = set(inspect.signature(self._inner.apply_chat_template).parameters) - {"tools"}
        if taken := parameters & variables.keys():
            raise PromptError(f"the chat template's variable {min(taken)} cannot be given: remove it.")
        conversation = [_checked(f"message {number}", message) for number, message in enumerate(messages, 1)]
        try:
            return self._text([self._formed(message, limit) for message in conversation], limit, variables)
        except (Warning, PromptError):  # a warning that the user turned into an error
            raise
        except TimeLimitError as error:
            raise PromptError(
                f"the chat template of {self._folder} did not end within {limit.seconds:g} s of processor time. "
                f"{DAMAGED}"
            ) from error
        except TrialError as error:
            raise PromptError(f"the chat template of {self._folder} {error}. {DAMAGED}") from error
        except Exception as error:  # a template is the checkpoint's code and may raise anything
            raise PromptError(
                f"the chat template of {self._folder} refuses the conversation ({reason_of(error)}). Change the "
                f"messages' roles or order to what the model expects, or give plain text (--raw)."
            ) from error

    def tool_format(self, limit: TimeLimit) -> ToolFormat:
        """How the model writes calls of tools, as the template writes them. Raises PromptError if it is not known."""
        if not self.uses("tools"):
            raise PromptError(
                f"the chat template of {self._folder} takes no tools: the model would not see them. Leave them out, or "
                f"choose a model that was trained to call tools."
            )
        texts: list[str | None] = []
        for num_calls in (0, 1, 2):
            try:
                texts.append(self._text(probe_messages(num_calls), limit, {"tools": PROBE_TOOLS}))
            except (Warning, TimeLimitError, TrialError):
                raise
            except Exception:  # a template may refuse two calls
                texts.append(None)
        plain, one, two = texts
        found = None if plain is None or one is None else format_of(plain, one, two)
        if found is None:
            raise PromptError(
                f"the calls of tools of {self._folder} cannot be read: expected JSON between <tool_call> tags (Hermes, "
                f"Qwen) or a JSON object with name and parameters (Llama 3), as its chat template writes them. Leave "
                f"the tools out."
            )
        return found

    def _text(
        self, conversation: Sequence[Message], limit: TimeLimit, variables: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        template = self._inner.get_chat_template()
        common = {"messages": conversation, "tools": None, "documents": None, "add_generation_prompt": True}
        self._trial.run(template, {**self._inner.special_tokens_map, **common, **variables}, limit)
        with limit:
            rendered = self._inner.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False, **variables
            )
            return str(rendered)

    def _formed(self, message: dict[str, Any], limit: TimeLimit) -> dict[str, Any]:
        """A message with its content in a form that the template prints. Raises PromptError if it prints none."""
        content, role = message.get("content"), message["role"]
        if not content:
            return message
        formed = self._takes_of(role, limit).form(content)
        if formed is None:
            raise PromptError(
                f"the chat template of {self._folder} leaves out the text of messages whose role is {role}. Give it to "
                f"another role, such as user, or give plain text (--raw)."
            )
        return {**message, "content": formed}

    def _takes_of(self, role: str, limit: TimeLimit) -> Takes:
        key = str(self._inner.get_chat_template()), role
        if key not in self._takes:
            parts = [{"type": "text", "text": word} for word in WORDS]
            several = self._prints(role, parts, limit)
            one = several or self._prints(role, parts[:1], limit)
            self._takes[key] = Takes(self._prints(role, WORDS[0], limit), several, one)
        return self._takes[key]

    def _prints(self, role: str, content: Any, limit: TimeLimit) -> bool | None:
        """Whether the template prints the words of a content as text; None if it refuses the conversation."""
        message = {"role": role, "content": content}
        other = message if role == "user" else self._formed({"role": "user", "content": "Hi"}, limit)
        conversation = {"user": [message], "assistant": [other, message, other]}.get(role, [message, other])
        try:
            text = self._text(conversation, limit).lower()
        except (Warning, TimeLimitError, TrialError):
            raise
        except Exception:  # what a template raises is its way to refuse
            return None
        words = WORDS[: 1 if isinstance(content, str) else len(content)]
        return all(word in text for word in words) and not AS_DATA.search(text)


def _checked(name: str, message: Any) -> dict[str, Any]:
    """A message as a dictionary. Raises PromptError unless it has a role, and no content or one that is text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f"{name} must be an object with role and content; found {shown(message)}.")
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = [_part(f"{name}.content[{index}]", part) for index, part in enumerate(content)]
        texts = [part["text"] for part in content]
    elif isinstance(content, str) or content is None:
        texts = [content or ""]
    else:
        raise PromptError(f"{name}.content must be a text or a list of text parts; found {shown(content)}.")
    for text in texts:
        check_unicode(text, f"the text of {name} ({message['role']})")
    return dict(message) if content is None else {**message, "content": content}


def _part(name: str, part: Any) -> dict[str, str]:
    """A part of type text. Raises a PromptError that names its type if it is another one."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise PromptError(
            f"{name} is a part of type {shown(kind)!r}: expected parts of type text, because aspec reads no images "
            f"and no sounds. Remove it."
        )
    if not isinstance(part.get("text"), str):
        raise PromptError(f"{name}.text must be a text; found {shown(part.get('text'))}.")
    return {"type": "text", "text": part["text"]}


def check_unicode(text: str, what: str) -> None:
    """Raise PromptError if ``text`` holds half a surrogate pair, as text that was no UTF-8 does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} is not valid Unicode at character {error.start}: expected UTF-8 text, found "
            f"{text[error.start]!r}. Convert the input to UTF-8."
        ) from error
