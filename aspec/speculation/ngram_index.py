"""The index of a text's n-grams: it finds the tokens that followed earlier occurrences of the last few tokens.

Source: prompt lookup decoding (Saxena, 2023) and LLMA (Yang et al., arXiv 2304.04487). Positions of equal n-grams
form chains, newest first, as in LZ77's hash chains: a new token costs one step per n, for any length of the text.
Pure: no tensors, no clock, no randomness.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

Continuation = tuple[tuple[int, ...], tuple[float, ...]]
"""Tokens, and the confidence in each of them, in (0, 1), if all tokens before it are right."""

NOWHERE = -1
WINDOW = 8192  # latest tokens of a text that the index covers
TOKEN_BYTES = 512  # maximum bytes of an index per token, measured with random tokens; 300 when it is full


def index_bytes(num_tokens: int) -> int:
    """Maximum bytes of the index of a text of ``num_tokens`` tokens."""
    return TOKEN_BYTES * min(num_tokens, WINDOW)


class BranchTree(Protocol):
    """The tree that receives branches: ``aspec.speculation.tree.Tree``."""

    def add_branch(self, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Add a path from the root with its log scores."""


class NgramIndex:
    """The positions of every n-gram in the latest ``window`` tokens, and so the tokens after each of them.

    Memory grows with the text up to the window: at most one dictionary entry and one chain link per token and n.
    """

    def __init__(self, longest: int = 4, shortest: int = 2, window: int = WINDOW, recent: int = 8) -> None:
        """Match n-grams of ``longest`` down to ``shortest`` tokens, at their ``recent`` latest positions.

        Raises ValueError unless 1 <= shortest <= longest < window and recent >= 1.
        """
        if not 1 <= shortest <= longest < window or recent < 1:
            raise ValueError(
                f"expected 1 <= shortest <= longest < window and recent >= 1, found "
                f"{shortest=} {longest=} {window=} {recent=}"
            )
        self.length = 0  # tokens appended so far; the index keeps the latest ``window`` of them
        self._sizes = range(longest, shortest - 1, -1)
        self._window, self._recent = window, recent
        self._tokens: list[int] = []  # the token at position p has index p modulo window
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
        """Continuations of the longest known suffix: at most ``most`` distinct ones, most recent first.

        Each has ``num_tokens`` tokens; one that reaches the end of the text goes on with its own tokens, so it
        continues a period. A token's confidence is a / (b + 1) * n / (n + 1): b is the number of earlier occurrences
        that agree with all tokens before it, a the number of those that agree with it as well, and n the number of
        tokens that match before it. It is a rough estimate: calibrate it by acceptance.
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
        """Store a token at its place modulo the window; the list grows with the text up to the window."""
        if len(self._tokens) == self._window:
            self._tokens[self.length % self._window] = token
            return
        self._tokens.append(token)
        if len(self._tokens) < self._window:  # else the next end has place 0
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
        """Drop the n-grams that begin at a position about to be overwritten, unless they occurred again later."""
        if start < 0:
            return
        leaving = self._read(start, self._sizes[0])
        for n in self._sizes:
            if self._latest[n].get(leaving[:n]) == start + n:
                del self._latest[n][leaving[:n]]

    def _ends(self, n: int) -> list[int]:
        """Ends of the earlier occurrences of the text's last n tokens, newest first."""
        if self.length < n:
            return []
        ends: list[int] = []
        end = self._previous[n][self.length % self._window]  # the newest occurrence is the suffix itself
        while end - n >= max(0, self.length - self._window) and len(ends) < self._recent:
            ends.append(end)
            end = self._previous[n][end % self._window]
        return ends

    def _read(self, start: int, num_tokens: int) -> tuple[int, ...]:
        """``num_tokens`` tokens from position ``start``; past the text's end, those from ``start`` on repeat."""
        period, place = self.length - start, start % self._window
        if num_tokens <= period and place + num_tokens <= self._window:
            return tuple(self._tokens[place : place + num_tokens])
        return tuple(self._tokens[(start + i % period) % self._window] for i in range(num_tokens))


def merge_into(tree: BranchTree, tokens: Sequence[int], scores: Sequence[float]) -> None:
    """Add a continuation to a tree as a branch from its root; it shares the nodes that exist already.

    ``scores`` are log probabilities of each token given those before it. ``Tree.prune`` decides which nodes remain.
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
