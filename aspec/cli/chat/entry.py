"""What an entry at the prompt means: a message, a command, or the beginning of more lines."""

import re
from dataclasses import dataclass

PROMPT, MORE = "> ", ". "  # before the first line of an entry, and before the others
QUOTES = '"""'
OPENING = re.compile(r'\s*(?:/[A-Za-z]+\s+(?:\w+\s+)?)?"""')  # of a message, or of the text of a command
COMMAND = re.compile(r"/([A-Za-z]+!?|\?)(?:\s+|$)")  # a path such as /etc/hosts is no command


@dataclass(frozen=True, slots=True)
class Entry:
    """A text from the prompt; ``verbatim``: several pasted lines, a message as it is."""

    text: str
    verbatim: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """A text for the model."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A command and the text after its name."""

    name: str
    argument: str


def is_open(text: str) -> bool:
    """Whether triple quotes are open: they close at the end of a line."""
    opening = OPENING.match(text)
    return opening is not None and not text[opening.end() :].rstrip().endswith(QUOTES)


def continued(text: str) -> str | None:
    """The text, ready for its next line; None if it is complete.

    A backslash at the end continues a line, an escaped one does not: an even number of them stays as it is.
    """
    if is_open(text):
        return text + "\n"
    backslashes = len(text) - len(text.rstrip("\\"))
    return text[:-1] + "\n" if backslashes % 2 else None


def parse(entry: Entry) -> Message | Call:
    """Read an entry. Two slashes before the name of a command make a message that begins with one slash."""
    if entry.verbatim:
        return Message(entry.text.strip("\n"))
    text = entry.text.strip()
    if named := COMMAND.match(text):
        return Call(f"/{named[1].lower()}", unquoted(text[named.end() :]))
    if text.startswith("//") and COMMAND.match(text[1:]):
        return Message(text[1:])
    return Message(unquoted(text) if OPENING.match(text) else entry.text)


def unquoted(text: str) -> str:
    """A text without triple quotes around it, and without the line breaks next to them."""
    quoted = text.startswith(QUOTES) and text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES)
    return text[len(QUOTES) : -len(QUOTES)].removeprefix("\n").removesuffix("\n") if quoted else text
