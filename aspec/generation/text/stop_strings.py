"""Stop strings in streamed text: the text before the first of them that is complete, held back where one may begin.

Names of special tokens are hidden: they are not returned. A stop string is searched in the text with these names and
in the text without them. So it may hold a special token, alone or beside other text; it never begins or ends inside
a name.
"""

import sys
from collections.abc import Iterator, Sequence

Hidden = tuple[int, int]
"""From and to: a part of the held text that is the name of a special token."""


class StopStrings:
    """Searches one text; mutable, because the text grows."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""  # text that may begin a stop string
        self._hidden: list[Hidden] = []  # in the order of the text
        self.found = False  # nothing after it is returned

    def __bool__(self) -> bool:
        return bool(self._stop)

    def push(self, text: str, final: bool = False) -> str:
        """The text that may be returned after new ``text``; ``final``: no more will come."""
        self._held += text
        count = len(self._held)
        if self._stop:
            views = list(self._views())
            matches = [match for view in views for stop in self._stop for match in self._matches(stop, *view)]
            self.found = bool(matches)
            begins = [_begin(stop, *view) for view in views for stop in self._stop]
            count = min(matches)[1] if matches else count if final else min(count, *begins)
        return self._release(count)

    def push_hidden(self, name: str, before: str) -> str:
        """Likewise after the name of a special token; ``before``: text in front of it that is not final yet.

        That text is returned only if the name completes a stop string; otherwise it must be pushed when it is final.
        """
        held, hidden, text = self._held, self._hidden, ""
        for pending in (before, "") if before else ("",):
            if not self.found:
                self._held = held + pending
                self._hidden = [*hidden, (len(self._held), len(self._held) + len(name))]
                text = self.push(name)
        return text

    def _views(self) -> Iterator[tuple[str, Sequence[int]]]:
        """The held text with and without hidden names, and the place of every character in the held text."""
        yield self._held, range(len(self._held))
        if self._hidden:
            shown = [at for at in range(len(self._held)) if not any(a <= at < b for a, b in self._hidden)]
            yield "".join(self._held[at] for at in shown), shown

    def _matches(self, stop: str, text: str, places: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The end and the begin, in the held text, of the first occurrence of a stop string that cuts no name."""
        at = text.find(stop)
        while at >= 0:
            begin, end = places[at], places[at + len(stop) - 1] + 1
            if not any(a < edge < b for edge in (begin, end) for a, b in self._hidden):
                yield end, begin
                return
            at = text.find(stop, at + 1)

    def _release(self, count: int) -> str:
        """Take ``count`` characters from the held text; returns them without the hidden ones."""
        text, at = "", 0
        for start, end in self._hidden:
            text += self._held[at : max(at, min(start, count))]
            at = max(at, min(end, count))
        text += self._held[at:count]
        self._held = self._held[count:]
        self._hidden = [(start - count, end - count) for start, end in self._hidden if end > count]
        return text


def _begin(stop: str, text: str, places: Sequence[int]) -> int:
    """Where the longest end of ``text`` that begins ``stop`` stands in the held text; maxsize: nowhere."""
    most = min(len(text), len(stop) - 1)
    count = next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)
    return places[-count] if count else sys.maxsize
