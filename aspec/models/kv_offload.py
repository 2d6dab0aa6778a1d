"""The attention of a split layer beside KV in host memory: what crosses a device's link to it, and what comes back.

The cache hands a layer's new keys and values through (``KVCache.offloaded``), so that keys and values of the new tokens
alone reach the attention, whatever the layer makes of them on the way. As they are attended to, so they are stored: the
host keeps what a layer attends to, not what it gives to its cache.

Lifetimes. Copies run on streams of their own, and the device's allocator knows nothing of that: it gives memory out
again in the order of the stream that it was allocated on. So all device memory here is allocated with the projections,
on the stream of the layers, and is let go when the task behind its copy has run: what crosses is held until the
attention, which begins when it has arrived; what comes back, until the rest of the layer has been launched on that same
stream. Pinned memory is torch's: its allocator waits for the copies that were launched from it.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import nn

from aspec.errors import InternalError
from aspec.models.attention import attend
from aspec.models.kv_cache import KVShape, MaskKind, StepCache

PINNED_ROUNDING = 4
"""Torch gives out pinned memory by powers of two, and keeps what was outgrown: all smaller ones are as much again."""


@dataclass(slots=True, eq=False)
class HostAttention:
    """An attention on its way to the host and back; mutable, because every stage lets go of what it has used."""

    step: StepCache
    mask: MaskKind
    layer: int  # whose keys and values are looked at
    stores: bool  # whether new ones of them come along
    module: nn.Module
    leaving: list[Any]  # in device memory: query, new keys and values if there are any, what else ``attend`` is given
    back: torch.Tensor  # device memory [B, T, H, Dv] for the result
    arrived: list[Any] = field(default_factory=list)  # the same in host memory, once it has been sent
    result: torch.Tensor | None = None  # host memory for the result

    @classmethod
    def of(cls, call: tuple[Any, ...], step: StepCache, layer: int, mask: MaskKind, *, stores: bool) -> "HostAttention":
        """What ``attend`` was called with by a layer that stores keys and values of its own, or by one that does not.

        The latter looks at what another one has attended to in this step. Raises InternalError where that is not so.
        """
        module, query, key, value, _, *rest = call
        if stores:
            step.attended[layer] = ref(key)
        source = next((own for own, keys in step.attended.items() if keys() is key), None)
        if source is None or {key.dtype, value.dtype} != {step.storage.dtype}:
            raise InternalError(f"layer {layer} attends to other keys and values than can be kept in host memory")
        given = [query, *((key, value) if stores else ()), *rest]
        leaving = [_dense(one) if isinstance(one, torch.Tensor) else one for one in given]
        back = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        return cls(step, mask, source, stores, module, leaving, back)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is held in device memory."""
        return [*(one for one in self.leaving if isinstance(one, torch.Tensor)), self.back]

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Bytes per token that cross, and that come back."""
        tokens = self.back.shape[0] * self.back.shape[1]
        out = sum(one.nbytes for one in self.leaving[: 3 if self.stores else 1])
        return out // tokens, self.back.nbytes // tokens

    @property
    def kept(self) -> KVShape | None:
        """What the host keeps of this layer; None where it is another one's."""
        if not self.stores:
            return None
        _, key, value, *_ = self.leaving
        return key.shape[1], key.shape[3], value.shape[3]

    def send(self) -> None:
        """To the host, by copies on the present stream."""
        self.arrived = [_to_host(one) if isinstance(one, torch.Tensor) else one for one in self.leaving]
        self.result = _host_like(self.back)

    def attend(self) -> None:
        """Store what is new and attend, on the host: all has arrived."""
        if self.result is None:
            raise InternalError("an attention begins before its queries were sent")
        query, *rest = self.arrived
        if self.stores:
            self.step.store(self.layer, *rest[:2])
            rest = rest[2:]
        keys, values = self.step.stored(self.layer)
        attend(self.module, query, keys, values, self.step.layer_mask(self.mask), *rest, out=self.result)
        self.leaving, self.arrived = [], []

    def bring_back(self) -> torch.Tensor:
        """The result in device memory, by a copy on the present stream."""
        if self.result is None:
            raise InternalError("an attention comes back that was never sent")
        return self.back.copy_(self.result, non_blocking=True)


def pinned_bytes(tokens: int, token_bytes: int) -> int:
    """Host memory through which so many tokens cross, there and back."""
    return PINNED_ROUNDING * tokens * token_bytes


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return _host_like(tensor).copy_(tensor, non_blocking=True)


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory that a device copies to and from by itself."""
    pinned = tensor.is_cuda
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pinned)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """One stretch of memory without gaps, in any order: what one copy can move."""
    return tensor if torch.empty_like(tensor, device="meta").stride() == tensor.stride() else tensor.contiguous()
