"""The slot KV cache: one storage per layer for all rows, and a window of it for each work item.

Rows are ragged: every row has its own length and positions, nothing is padded on the left. Committed slot ``j`` of
a row holds position ``j``; what a pass writes behind the committed tokens is either committed or overwritten.
New tokens form a chain unless ``parents`` makes them a tree: then slots follow the order of the nodes, positions
their depth, and ``KVCache.gather`` moves an accepted path to where a chain would have put it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

KVShape = tuple[int, int, int]
"""Heads, key width and value width of one layer."""


KEY_TILE = 64
"""Attention runs over whole tiles of slots: on a CPU every new length costs a product its compiled kernel, which is
kept, so lengths that recur save time and memory."""


@dataclass(frozen=True, slots=True)
class MaskKind:
    """Which of the earlier positions a query may see, besides causality."""

    window: int | None = None  # the last ``window`` positions
    chunk: int | None = None  # positions of the same chunk

    def narrow(self, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Of what is visible, the part of this kind; positions and result broadcast against one another."""
        if self.window is not None:
            visible = visible & (query - key < self.window)
        if self.chunk is not None:
            visible = visible & (query // self.chunk == key // self.chunk)
        return visible

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether a query at one position may look at a key at another."""
        return self.narrow(query, key, key <= query)


class KVCache:
    """Keys [R, H, C + 1, Dk] and values [R, H, C + 1, Dv] per layer; slot C takes the padding, never visible."""

    def __init__(
        self,
        shapes: Sequence[KVShape | None],
        num_rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.device = torch.device(device)
        self.keys: list[torch.Tensor | None] = []
        self.values: list[torch.Tensor | None] = []
        for shape in shapes:
            heads, key_width, value_width = shape or (0, 0, 0)
            common = (num_rows, heads, capacity + 1)
            self.keys.append(torch.zeros(*common, key_width, dtype=dtype, device=device) if shape else None)
            self.values.append(torch.zeros(*common, value_width, dtype=dtype, device=device) if shape else None)

    @staticmethod
    def bytes_per_token(shapes: Sequence[KVShape | None], dtype: torch.dtype) -> int:
        """Bytes that one position of one row takes over all layers; a row holds ``capacity + 1``."""
        return sum(shape[0] * (shape[1] + shape[2]) * dtype.itemsize for shape in shapes if shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values) if tensor is not None)

    def step(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        parents: Sequence[Sequence[int]] | None = None,
    ) -> "StepCache":
        """A work item's window: row ``rows[b]`` writes ``counts[b]`` tokens behind its ``starts[b]`` committed ones.

        ``parents[b][t]`` is the node that node ``t`` of row ``b`` continues, -1 for the last committed token;
        parents come before their children. Without it every token continues the one before.
        Raises ValueError for rows that repeat or do not exist, and where a row would pass the capacity.
        """
        if not len(rows) == len(starts) == len(counts) or min(counts, default=0) < 1 or min(starts) < 0:
            raise ValueError(f"expected a start and at least one token per row, found {rows=} {starts=} {counts=}")
        if len(set(rows)) != len(rows) or not 0 <= min(rows) <= max(rows) < self.num_rows:
            raise ValueError(f"expected distinct rows of {self.num_rows}, found {rows}")
        if max(start + count for start, count in zip(starts, counts, strict=True)) > self.capacity:
            raise ValueError(f"rows {rows} at {starts} with {counts} tokens pass the capacity of {self.capacity}")
        return StepCache(self, rows, starts, counts, parents)

    def gather(self, row: int, start: int, path: Sequence[int]) -> None:
        """Keep of the nodes a row wrote from slot ``start`` on those in ``path``, in its order, from ``start`` on."""
        if list(path) == list(range(len(path))):
            return
        source = start + torch.tensor(path, device=self.device)
        for storage in (*self.keys, *self.values):
            if storage is not None:  # indexing copies before it writes, so overlap is safe
                storage[row, :, start : start + len(path)] = storage[row][:, source]


class StepCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """What transformers' layers see as their cache while one work item goes through them.

    ``position_ids`` [B, T] int64; T is the largest count, shorter rows are padded at their end. A padded token
    writes to the trash slot and sees what the row's last real token sees.
    """

    is_compileable = False

    def __init__(
        self,
        storage: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        parents: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(layers=[])
        device = storage.device
        self.storage = storage
        end = max(start + count for start, count in zip(starts, counts, strict=True))
        self.high = min(-(-end // KEY_TILE) * KEY_TILE, storage.capacity)
        self._start = torch.tensor(starts, device=device)[:, None]  # [B, 1]
        last = torch.tensor(counts, device=device)[:, None] - 1
        offsets = torch.arange(max(counts), device=device)[None]  # [1, T]
        real = offsets <= last
        self._node = torch.minimum(offsets, last)  # [B, T]: the token itself, for padding the row's last
        self._ancestry = None if parents is None else _ancestry(parents, max(counts)).to(device)
        depth = offsets.expand_as(real) if self._ancestry is None else self._ancestry.sum(-1) - 1
        self.position_ids = self._start + depth.gather(1, self._node)
        self.slots = torch.where(real, self._start + offsets, storage.capacity)  # [B, T]
        self._rows = torch.tensor(rows, device=device)
        consecutive = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._row_slice = slice(rows[0], rows[0] + len(rows)) if consecutive else None
        uniform = len(set(starts)) == 1 and len(set(counts)) == 1
        self._slot_slice = slice(starts[0], starts[0] + counts[0]) if uniform else None
        self._masks: dict[MaskKind, torch.Tensor] = {}

    def mask(self, kind: MaskKind | None = None) -> torch.Tensor:
        """Bool [B, 1, T, S] over the first S slots of every row: True where a query may look."""
        kind = kind or MaskKind()
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(kind)[:, None]
        return self._masks[kind]

    def _make_mask(self, kind: MaskKind) -> torch.Tensor:
        query = self.position_ids[:, :, None]
        slot = torch.arange(self.high, device=query.device)[None, None]
        if self._ancestry is None:
            key, visible = slot, slot <= query
        else:
            offset = slot - self._start[:, :, None]  # [B, 1, S]: the node in a slot, negative where committed
            node = offset.clamp(0, self._ancestry.shape[1] - 1)
            depth = (self._ancestry.sum(-1) - 1)[:, None].gather(2, node)
            key = torch.where(offset < 0, slot, self._start[:, :, None] + depth)
            rows = self._ancestry.gather(1, self._node[:, :, None].expand_as(self._ancestry))
            seen = rows.gather(2, node.expand(-1, rows.shape[1], -1)) & (offset < rows.shape[1])
            visible = (offset < 0) | seen
        return kind.narrow(query, key, visible)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, H, T, D] of the new tokens; returns keys and values [B, H, S, D] of the rows so far."""
        keys, values = self.storage.keys[layer_idx], self.storage.values[layer_idx]
        assert keys is not None
        assert values is not None
        return self._store(keys, key_states), self._store(values, value_states)

    def _store(self, storage: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self._row_slice is None:
            storage[self._rows[:, None], :, self.slots] = new.transpose(1, 2)
            return storage[self._rows, :, : self.high]
        own = storage[self._row_slice]
        if self._slot_slice is not None:
            own[:, :, self._slot_slice] = new
        else:
            own.scatter_(2, self.slots[:, None, :, None].expand_as(new), new)
        return own[:, :, : self.high]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this item's, for models that ask; positions are always given explicitly."""
        return int(self._start.max())

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset of a mask; masks are always given explicitly."""
        return self.high, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Slots per row."""
        return self.storage.capacity


def _ancestry(parents: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Bool [B, N, N], N = ``width``: which nodes of a row a node sees, itself included. Raises ValueError."""
    result = torch.eye(width, dtype=torch.bool).repeat(len(parents), 1, 1)
    for row, links in zip(result, parents, strict=True):
        for node, parent in enumerate(links):
            if not -1 <= parent < node:
                raise ValueError(f"node {node} continues node {parent}: expected an earlier node or -1")
            if parent >= 0:
                row[node] |= row[parent]
    return result
