"""A draft without a model: what followed the last few tokens when they stood in this text before.

Source: prompt lookup decoding (Saxena, 2023) and LLMA (Yang et al., arXiv 2304.04487). Positions of equal n-grams
form chains, newest first, as in LZ77's hash chains: a new token costs one step per n, whatever the text's length.
Pure: no tensors, no clock, no randomness.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

Continuation = tuple[tuple[int, ...], tuple[float, ...]]
"""Tokens, and the confidence in each of them given that those before it are right, in (0, 1)."""

NOWHERE = -1
WINDOW = 8192  # tokens of a text that are looked through
TOKEN_BYTES = 512  # of an index at most, per token that it holds, measured with random tokens; 300 where it is full


def index_bytes(num_tokens: int) -> int:
    """What the index of a text of so many tokens takes at most."""
    return TOKEN_BYTES * min(num_tokens, WINDOW)


class TakesBranches(Protocol):
    """What a branch is merged into: ``aspec.speculation.tree.Tree``."""

    def add_branch(self, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Add a path from the root with its log scores."""


class NgramIndex:
    """Where every n-gram of the latest ``window`` tokens stands, and so what came after it.

    Memory grows with the text up to the window: at most one dictionary entry and one chain link per token and n.
    """

    def __init__(self, longest: int = 4, shortest: int = 2, window: int = WINDOW, recent: int = 8) -> None:
        """Match n-grams from ``longest`` down to ``shortest``, and look at the ``recent`` latest places of one."""
        if not 1 <= shortest <= longest < window or recent < 1:
            raise ValueError(f"expected 1 <= shortest <= longest < window, found {shortest=} {longest=} {window=}")
        self.length = 0  # tokens appended so far; the latest ``window`` of them are kept
        self._sizes = range(longest, shortest - 1, -1)
        self._window, self._recent = window, recent
        self._tokens: list[int] = []  # token at position p in place p modulo window
        self._latest: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in self._sizes}  # n-gram -> newest end
        self._previous = {n: array("q", [NOWHERE]) for n in self._sizes}  # end -> the end before, same n-gram

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        for token in tokens:
            self._forget(self.length - self._window)
            self._store(token)
            self.length += 1
            self._record()

    def propose(self, num_tokens: int, most: int) -> list[Continuation]:
        """What followed the longest known suffix: at most ``most`` distinct continuations, most recent first.

        Each has ``num_tokens`` tokens: where one runs into the end of the text it goes on with itself, which
        continues a period. A token's confidence is the share of the places found that agree with it among those that
        agree with all before it, one dissenter added, times n / (n + 1) for a match of n tokens: a guess that is
        meant to be calibrated by what gets accepted.
        """
        if num_tokens < 1:
            return []
        for n in self._sizes:
            found = [self._read(end, num_tokens) for end in self._ends(n)]
            if found:
                distinct = list(dict.fromkeys(found))[: max(0, most)]
                return [(tokens, _confidences(tokens, found, n)) for tokens in distinct]
        return []

    def _store(self, token: int) -> None:
        """Put a token where it belongs; the window is as large as the text until that is longer."""
        if len(self._tokens) == self._window:
            self._tokens[self.length % self._window] = token
            return
        self._tokens.append(token)
        if len(self._tokens) < self._window:  # else the next end stands in place 0
            for ends in self._previous.values():
                ends.append(NOWHERE)

    def _record(self) -> None:
        suffix = self._read(max(0, self.length - self._sizes[0]), min(self.length, self._sizes[0]))
        for n in self._sizes:
            if n <= self.length:
                key = suffix[-n:]
                self._previous[n][self.length % self._window] = self._latest[n].get(key, NOWHERE)
                self._latest[n][key] = self.length

    def _forget(self, start: int) -> None:
        """Drop the n-grams that begin at a position about to be overwritten, unless they stood again since."""
        if start < 0:
            return
        leaving = self._read(start, self._sizes[0])
        for n in self._sizes:
            if self._latest[n].get(leaving[:n]) == start + n:
                del self._latest[n][leaving[:n]]

    def _ends(self, n: int) -> list[int]:
        """Ends of earlier places where the text's last n tokens stand, newest first."""
        if self.length < n:
            return []
        ends: list[int] = []
        end = self._previous[n][self.length % self._window]  # the newest place is the suffix itself
        while end - n >= max(0, self.length - self._window) and len(ends) < self._recent:
            ends.append(end)
            end = self._previous[n][end % self._window]
        return ends

    def _read(self, start: int, num_tokens: int) -> tuple[int, ...]:
        """Tokens from a position on; past the end of the text they repeat what lies between."""
        period, place = self.length - start, start % self._window
        if num_tokens <= period and place + num_tokens <= self._window:
            return tuple(self._tokens[place : place + num_tokens])
        return tuple(self._tokens[(start + i % period) % self._window] for i in range(num_tokens))


def merge_into(tree: TakesBranches, tokens: Sequence[int], scores: Sequence[float]) -> None:
    """Add a continuation to a tree as a branch from its root, sharing the nodes that stand there already.

    ``scores`` are log probabilities of each token given those before it. ``Tree.prune`` decides what stays.
    """
    tree.add_branch(tokens, scores)


def _confidences(tokens: tuple[int, ...], found: list[tuple[int, ...]], n: int) -> tuple[float, ...]:
    agreeing, confidences = found, []
    for place, token in enumerate(tokens):
        still = [other for other in agreeing if other[place] == token]
        matched = n + place
        confidences.append(len(still) / (len(agreeing) + 1) * matched / (matched + 1))
        agreeing = still
    return tuple(confidences)
