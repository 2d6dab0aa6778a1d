"""The slot KV cache: one storage per layer for all rows, and a window of it for each work item.

Rows are ragged: every row has its own length and positions, nothing is padded on the left. Committed slot ``j`` of
a row holds position ``j``; what a pass writes behind the committed tokens is either committed or overwritten.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

KVShape = tuple[int, int, int]
"""Heads, key width and value width of one layer."""


@dataclass(frozen=True, slots=True)
class MaskKind:
    """Which of the earlier positions a query may see, besides causality."""

    window: int | None = None  # the last ``window`` positions
    chunk: int | None = None  # positions of the same chunk


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
        """Bytes that one position of one row takes over all layers."""
        item = torch.empty(0, dtype=dtype).element_size()
        return sum(shape[0] * (shape[1] + shape[2]) * item for shape in shapes if shape)

    def step(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> "StepCache":
        """A work item's window: row ``rows[i]`` runs positions ``starts[i] .. starts[i] + counts[i] - 1``.

        Raises ValueError where a row would pass the capacity.
        """
        if max(start + count for start, count in zip(starts, counts, strict=True)) > self.capacity:
            raise ValueError(f"rows {rows} at {starts} with {counts} tokens pass the capacity of {self.capacity}")
        return StepCache(self, rows, starts, counts)


class StepCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """What transformers' layers see as their cache while one work item goes through them."""

    def __init__(self, storage: KVCache, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        super().__init__(layers=[_StepLayer(self, i) for i in range(len(storage.keys))])
        device = storage.device
        width = max(counts)
        offsets = torch.arange(width, device=device)
        first = torch.tensor(starts, device=device)[:, None]
        real = offsets < torch.tensor(counts, device=device)[:, None]
        self.storage = storage
        self.high = max(start + count for start, count in zip(starts, counts, strict=True))
        self.position_ids = (first + offsets).clamp(max=storage.capacity - 1)  # [B, T] int64
        self.slots = torch.where(real, first + offsets, storage.capacity)  # [B, T] int64
        consecutive = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self.row_slice = slice(rows[0], rows[0] + len(rows)) if consecutive else None
        self.rows = torch.tensor(rows, device=device)
        uniform = len(set(starts)) == 1 and len(set(counts)) == 1
        self.span = (starts[0], starts[0] + width) if uniform else None
        self._masks: dict[MaskKind, torch.Tensor] = {}

    def mask(self, kind: MaskKind) -> torch.Tensor:
        """Bool [B, 1, T, S] over the first S slots of every row: True where a query may look."""
        if kind not in self._masks:
            query = self.position_ids[:, :, None]
            key = torch.arange(self.high, device=query.device)[None, None, :]
            visible = key <= query
            if kind.window is not None:
                visible &= query - key < kind.window
            if kind.chunk is not None:
                visible &= query // kind.chunk == key // kind.chunk
            padding = self.position_ids >= self.high  # a padded query sees slot 0, so that its softmax is defined
            visible[..., 0] |= padding
            self._masks[kind] = visible[:, None]
        return self._masks[kind]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, H, T, D] of the new tokens; returns keys and values [B, H, S, D] of the rows so far."""
        all_keys, all_values = self.storage.keys[layer], self.storage.values[layer]
        assert all_keys is not None
        assert all_values is not None
        return self._store(all_keys, keys), self._store(all_values, values)

    def _store(self, storage: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.row_slice is not None and self.span is not None:
            storage[self.row_slice, :, self.span[0] : self.span[1]] = new
        else:
            storage[self.rows[:, None], :, self.slots] = new.transpose(1, 2)
        if self.row_slice is not None:
            return storage[self.row_slice, :, : self.high]
        return storage[self.rows, :, : self.high]


class _StepLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer of a window."""

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, step: StepCache, index: int) -> None:
        super().__init__()
        self._step, self._index = step, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the storage exists."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store and return, see ``StepCache.write``."""
        return self._step.write(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens before this item's, for models that ask; positions are always given explicitly."""
        return int(self._step.position_ids[:, 0].max())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of a mask; masks are always given explicitly."""
        return self._step.high, 0

    def get_max_length(self) -> int:
        """Slots per row."""
        return self._step.storage.capacity
