"""Calls of tools, read from an answer while it is generated: the text around them, each call's name and arguments.

The grammar of the request holds every call to the model's format, so it is searched to the letter. Arguments are passed
on as they are written. Standard library only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from aspec.generation.text.tool_format import ToolFormat


@dataclass(frozen=True, slots=True)
class Said:
    """New text of an answer, or the next part of one of its calls."""

    text: str = ""
    call: int | None = None  # the number of the call; None: it is text
    name: str | None = None  # in the first part of a call
    arguments: str = ""  # the next characters of a JSON object


class Place(Enum):
    """Where the end of the text read so far is."""

    TEXT = "outside of a call"
    NAME = "in the name of a tool"
    ARGUMENTS = "in the arguments"
    END = "behind the arguments"


class CallReader:
    """Reads one answer; mutable, because the text grows. Text is held back where a call may begin."""

    def __init__(self, form: ToolFormat) -> None:
        self.num_calls = 0
        self._form, self._place = form, Place.TEXT
        self._held = ""  # neither passed on nor dropped yet
        self._spoken = False  # some text was passed on
        self._depth, self._quoted, self._escaped = 0, False, False  # of the arguments so far

    def push(self, text: str, *, final: bool = False) -> list[Said]:
        """What is known after new ``text``; ``final``: no more will come, and what is held back is text."""
        self._held += text
        steps = {Place.TEXT: self._text, Place.NAME: self._name, Place.ARGUMENTS: self._arguments, Place.END: self._end}
        found: list[Said] = []
        while True:
            place, before = self._place, self._held
            found += steps[place]()
            if (self._place, self._held) == (place, before):
                break
        if final and self._held and self._place is not Place.END:
            begin = self._form.begin if self._place is Place.NAME else ""
            found += self._say(begin + self._held)
            self._held = ""
        return found

    def _text(self) -> Iterator[Said]:
        begin, whole = self._form.begin, not self._form.tag
        at = self._held.find(begin)
        if at > 0 and whole:
            at = -1  # a call without a tag is the whole answer
        if whole and (self._spoken or self.num_calls):
            at, begin = -1, ""
        if at >= 0:
            yield from self._say(self._held[:at])
            self._held, self._place = self._held[at + len(begin) :], Place.NAME
            return
        most = min(len(begin) - 1, len(self._held))
        kept = next(
            (n for n in range(most, 0, -1) if self._held.endswith(begin[:n]) and not (whole and n < len(self._held))), 0
        )
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        yield from self._say(text)

    def _name(self) -> Iterator[Said]:
        name, middle, rest = self._held.partition(self._form.middle)
        if middle:
            self._held, self._place, self._depth = rest, Place.ARGUMENTS, 0
            self.num_calls += 1
            yield Said(call=self.num_calls - 1, name=name)

    def _arguments(self) -> Iterator[Said]:
        """The next characters; after the brace that closes the object the arguments are complete."""
        count = 0
        for character in self._held:
            count += 1
            self._depth += 0 if self._quoted else (character in "{[") - (character in "}]")
            if self._escaped:
                self._escaped = False
            elif character == '"':
                self._quoted = not self._quoted
            else:
                self._escaped = self._quoted and character == "\\"
            if not self._depth:
                self._place = Place.END
                break
        text, self._held = self._held[:count], self._held[count:]
        if text:
            yield Said(call=self.num_calls - 1, arguments=text)

    def _end(self) -> Iterator[Said]:
        end = self._form.end
        if len(self._held) >= len(end):
            self._held, self._place = self._held.removeprefix(end), Place.TEXT
        yield from ()

    def _say(self, text: str) -> Iterator[Said]:
        """Text; spaces beside calls are none."""
        if text and (not self.num_calls or text.strip()):
            self._spoken = True
            yield Said(text)
