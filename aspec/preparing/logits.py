"""Logits of a checkpoint, layer by layer, to hold two of them against each other: one layer is in memory at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from aspec.io.memory import allocate
from aspec.models.kv_cache import KVCache
from aspec.models.model import Activation, Model
from aspec.models.weights.parts import REST, Part, as_tensor
from aspec.preparing.pieces import CHUNK_BYTES, Reader

NUM_TOKENS = 32
MOST_PART_BYTES = 1 << 40  # a layer is one part


class LogitReader:
    """A model whose layers are read one after another; mutable, because they share a buffer."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.model = Model(folder, dtype=dtype)
        self._parts = self.model.parts(MOST_PART_BYTES)
        self._reader = Reader(self.model.files)
        self._rest = allocate(max((part.size for part in self._parts if part.layer == REST), default=1))
        self._slot = allocate(max(part.size for part in self._parts))
        self._scratch = torch.empty(
            max((p.scratch_at + p.scratch_bytes for p in self._parts), default=0), dtype=torch.uint8
        )

    @torch.inference_mode()
    def logits(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """For each row of token ids the logits [T, V] at all its positions."""
        model = self.model
        caches = [KVCache(model.kv_shapes(), 1, len(row), model.dtype, states=model.state_shapes) for row in rows]
        self._bind(REST, self._rest.view)
        items: list[Activation] = []
        for row, cache in zip(rows, caches, strict=True):
            items.append(model.embed(torch.tensor([list(row)]), cache.step([0], [0], [len(row)])))
        for layer in range(model.num_layers):
            self._bind(layer, self._slot.view)
            for item in items:
                model.layer(layer, item)
        return [model.head(item)[0] for item in items]

    def _bind(self, layer: int, view: memoryview) -> None:
        for part in (own for own in self._parts if own.layer == layer):
            self._read(part, view)
            own = part if layer != REST else replace(part, scratch_at=0)
            scratch = self._scratch if layer != REST else torch.empty(part.scratch_bytes, dtype=torch.uint8)
            self.model.bind(own, as_tensor(view), scratch)

    def _read(self, part: Part, view: memoryview) -> None:
        for segment in part.segments:
            at = segment.at
            for chunk in self._reader.chunks(segment.file, segment.offset, segment.nbytes, CHUNK_BYTES):
                view[at : at + len(chunk)] = chunk
                at += len(chunk)

    def once(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The logits of these rows; then the memory is freed."""
        try:
            return self.logits(rows)
        finally:
            self.close()

    def close(self) -> None:
        """Free the memory."""
        self.model.forget(self._parts)
        self._reader.close()
        for memory in (self._rest, self._slot):
            memory.close()
