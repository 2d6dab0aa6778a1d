"""Which tokens a grammar allows after a text, and after proposals that follow it.

A mask is a function of the grammar and of the tokens before a position. What is remembered here only saves time: the
masks that the draft has asked for serve the target, which verifies the same paths, and a cursor moves from one path to
the next by the tokens in which they differ.
"""

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch

from aspec.errors import InternalError, NoTokenError, printable

if TYPE_CHECKING:
    import llguidance

Path = tuple[int, ...]

MOST_MASKS = 1024  # that are remembered: V / 8 bytes each
MOST_REASON = 300  # characters of the library's reason in a message


class GrammarMasks:
    """The masks of one request; mutable: it remembers them. Threads of the target and of the draft ask at once."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int, end_ids: frozenset[int]) -> None:
        """``matcher`` has consumed nothing and stays so; ``end_ids`` are below ``vocab_size``."""
        self.end_ids = end_ids
        self._fresh, self._nbytes = matcher, -(-vocab_size // 8)
        self._idle: deque[_Cursor] = deque()  # a thread takes one out, so no two move the same
        self._found: tuple[list[int], dict[Path, bytes]] = [], {}  # a generated text, and the masks of paths after it

    def masks(self, generated: Sequence[int], paths: Sequence[Sequence[int]]) -> torch.Tensor:
        """Bits [N, ceil(V / 8)] uint8, low bit first: 1 for each token allowed after ``generated`` and a path.

        All tokens are allowed after a path that has ended or that the grammar does not allow: no draw there counts.
        Raises NoTokenError if the library gives up, because the grammar is too complex.
        """
        text, wanted = list(generated), [tuple(path) for path in paths]
        found = self._known(text)
        missing = sorted({path for path in wanted if path not in found})  # neighbours share the most tokens
        made: dict[Path, bytes] = {}
        if missing:
            cursor = self._take(text)
            made = {path: self._mask(cursor, len(text), path) for path in missing}
            self._idle.append(cursor)  # not after an error: the library does not recover
        rows = b"".join(made[path] if path in made else found[path] for path in wanted)
        if len(found) + len(made) <= MOST_MASKS:
            found.update(made)
        return torch.from_numpy(np.frombuffer(rows, np.uint8).reshape(-1, self._nbytes).copy())

    def num_allowed(self, generated: Sequence[int], path: Sequence[int]) -> int:
        """How many leading tokens of ``path`` the grammar allows after ``generated``, none of them an end token."""
        cursor = self._take(list(generated))
        count = cursor.seek(len(generated), path)
        self._idle.append(cursor)
        return count

    def _known(self, text: list[int]) -> dict[Path, bytes]:
        """The masks that are known of paths after a text; paths that began with its last tokens count from there."""
        before, found = self._found
        if before != text:
            new = tuple(text[len(before) :])
            grown = text[: len(before)] == before
            own = {path[len(new) :]: mask for path, mask in list(found.items()) if grown and path[: len(new)] == new}
            self._found = text, (found := own)
        return found

    def _mask(self, cursor: "_Cursor", start: int, path: Path) -> bytes:
        if cursor.seek(start, path) < len(path):
            return b"\xff" * self._nbytes
        return cursor.mask()[: self._nbytes]

    def _take(self, text: list[int]) -> "_Cursor":
        """A cursor after a text; only the caller moves it."""
        try:
            cursor = self._idle.pop()
        except IndexError:
            cursor = _Cursor(self._fresh.deep_copy(), self.end_ids)
        taken = cursor.seek(0, text)
        if taken < len(text) and text[taken] not in self.end_ids:
            raise InternalError(f"token {text[taken]} was committed: expected one that the grammar allows")
        return cursor


class _Cursor:
    """A state of the grammar that moves along tokens; mutable. End tokens are no part of a text: it takes none."""

    def __init__(self, matcher: "llguidance.LLMatcher", end_ids: frozenset[int]) -> None:
        self._matcher, self._end_ids = matcher, end_ids
        self._tokens: list[int] = []  # that the matcher has consumed

    def seek(self, start: int, tokens: Sequence[int]) -> int:
        """Move to ``tokens`` after the first ``start`` tokens of this text; returns how many the grammar allows."""
        wanted = list(takewhile(lambda token: token not in self._end_ids, tokens))
        own = self._tokens[start : start + len(wanted)]
        pairs = enumerate(zip(own, wanted, strict=False))
        same = len(own) if own == wanted[: len(own)] else next(at for at, (one, other) in pairs if one != other)
        beyond = len(self._tokens) - start - same
        if beyond and not self._matcher.rollback(beyond):
            raise self._given_up()
        taken = self._matcher.try_consume_tokens(wanted[same:]) if same < len(wanted) else 0
        self._tokens[start + same :] = wanted[same : same + taken]
        if self._matcher.is_error():
            raise self._given_up()
        return same + taken

    def mask(self) -> bytes:
        """The bits of the allowed tokens."""
        found = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._given_up()
        return found

    def _given_up(self) -> NoTokenError:
        said = printable(" ".join(self._matcher.get_error().split()), MOST_REASON)
        return NoTokenError(
            f"the request's grammar cannot be followed any further: expected one of ordinary size; llguidance says: "
            f"{said}. Make the schema or the grammar simpler."
        )
