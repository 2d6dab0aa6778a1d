"""The nodes of one row that the target verifies in one pass, and what its draws make of them.

May not go in: asyncio, clocks, randomness, tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = -1  # the last committed token: the parent of the first nodes


@dataclass(frozen=True, slots=True)
class Proposal:
    """The N nodes that the target verifies, best first, parents before children; any prefix is a tree as well."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]  # places in this proposal, ROOT for the last committed token
    depths: tuple[int, ...]  # 1 for the children of the root: the position behind the last committed token
    scores: tuple[float, ...]  # log path probabilities, descending
    draft_score: tuple[float | None, ...]  # as in Node, of each node given its parent
    ngram_score: tuple[float | None, ...]  # likewise

    def first(self, num_nodes: int) -> "Proposal":
        """The best ``num_nodes`` nodes: a tree as well, because parents come before their children."""
        cut = slice(num_nodes)
        return Proposal(
            self.tokens[cut],
            self.parents[cut],
            self.depths[cut],
            self.scores[cut],
            self.draft_score[cut],
            self.ngram_score[cut],
        )

    def follow(self, draws: Sequence[int]) -> tuple[list[int], list[int]]:
        """The accepted path (places in this proposal), and the emitted tokens: those of the path and the draw after it.

        ``draws[0]`` is the target's token after the last committed one, ``draws[1 + i]`` the one after node ``i``.
        Every emitted token is the target's own draw at its own prefix, for any tree. Raises ValueError for another
        number of draws.
        """
        if len(draws) != len(self.tokens) + 1:
            raise ValueError(f"expected a draw at the root and at each of {len(self.tokens)} nodes, found {len(draws)}")
        children = {(parent, self.tokens[place]): place for place, parent in enumerate(self.parents)}
        at, path, emitted = ROOT, [], [draws[0]]
        while (child := children.get((at, draws[at + 1]))) is not None:
            at = child
            path.append(child)
            emitted.append(draws[child + 1])
        return path, emitted

    def verdicts(self, path: Sequence[int]) -> list[tuple[int, bool]]:
        """(place, accepted) of each node whose parent was accepted; the path tells nothing of the other nodes."""
        accepted = {ROOT, *path}
        return [(place, place in accepted) for place, parent in enumerate(self.parents) if parent in accepted]
