"""Trees of nodes after the committed tokens of rows, and the slots that each node sees: for ``kv_cache.py``."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aspec.io.pinned import upload
from aspec.models.exact.paths import MaskKind


@dataclass(frozen=True, slots=True)
class TreeNodes:
    """The trees of a step: their starts, the depths of their nodes, and the nodes on each token's path."""

    starts: torch.Tensor  # [B, 1] int64: number of committed tokens
    depths: torch.Tensor  # [B, N] int64
    seen: torch.Tensor  # [B, T, N] bool: the nodes on the token's path, its own node included

    def slot_positions(self, length: int) -> torch.Tensor:
        """[B, S] int64: the position of what is in each of the first S = ``length`` slots."""
        slot = torch.arange(length, device=self.starts.device)[None]
        node = (slot - self.starts).clamp(0, self.depths.shape[1] - 1)
        return torch.where(slot < self.starts, slot, self.starts + self.depths.gather(1, node))


def visible_slots(kind: MaskKind, positions: torch.Tensor, length: int, tree: TreeNodes | None) -> torch.Tensor:
    """Bool [B, T, S] over the first S = ``length`` slots: those that tokens at ``positions`` [B, T] may see."""
    query = positions[:, :, None]
    slot = torch.arange(length, device=query.device)[None, None]
    if tree is None:
        return kind.visible(query, slot)
    depths, seen = tree.depths, tree.seen
    offset = slot - tree.starts[:, :, None]  # [B, 1, S]: the node in a slot, negative where committed
    node = offset.clamp(0, depths.shape[1] - 1)
    key = tree.slot_positions(length)[:, None]
    own = seen.gather(2, node.expand(-1, seen.shape[1], -1)) & (offset < depths.shape[1])
    return kind.narrow(query, key, (offset < 0) | own)


@dataclass(frozen=True, slots=True)
class Tree:
    """The nodes of every row. ``paths`` [B, N, D] int64 lists the nodes from the root to a node, which is repeated up
    to D; ``depths`` is [B, N] int64. N and D are the largest numbers of nodes and levels of a row. In a row with fewer
    than N nodes the remaining ones are roots."""

    paths: torch.Tensor
    depths: torch.Tensor
    is_chain: tuple[bool, ...]  # per row: every node continues the node before it

    @staticmethod
    def of(parents: Sequence[Sequence[int]], device: torch.device) -> "Tree":
        """The trees of ``parents``. Raises ValueError for a parent that is neither an earlier node nor -1."""
        size = max(len(links) for links in parents)
        last_committed = size  # a node for the last committed token; it is its own parent
        above = np.full((len(parents), size + 1), last_committed)
        is_chain = []
        for row, links in zip(above, parents, strict=True):
            given, nodes = np.asarray(links), np.arange(len(links))
            if (wrong := (given < -1) | (given >= nodes)).any():
                bad = int(wrong.argmax())
                raise ValueError(f"node {bad} continues node {links[bad]}: expected an earlier node or -1")
            row[: len(links)] = np.where(given < 0, last_committed, given)
            is_chain.append(bool((given == nodes - 1).all()))
        row_at = np.arange(len(parents))[:, None] * (size + 1)
        flat = (above + row_at).ravel()
        node = np.arange(size) + row_at
        climbed = []  # the node, its parent, the parent's parent: one operation per level, not per node
        while (node - row_at != last_committed).any():
            climbed.append(node - row_at)
            node = flat[node]
        ancestors = np.stack(climbed, -1)  # [B, N, D]
        depths = (ancestors != last_committed).sum(-1) - 1
        levels = np.maximum(depths[:, :, None] - np.arange(len(climbed)), 0)
        paths = np.take_along_axis(ancestors, levels, -1)
        return Tree(upload(torch.from_numpy(paths), device), upload(torch.from_numpy(depths), device), tuple(is_chain))
