"""The attention of a split layer with KV in host memory: copies to the host, attention there, copy of the result back.

The cache returns a layer's new keys and values without storing them (``KVCache.offloaded``), so only keys and values of
the new tokens reach the attention. The layer may change them on the way. The host stores the tensors that a layer
attends to, not those that it gives to its cache.

Lifetimes. Copies run on their own streams. The device's allocator does not know this: it reuses memory in the order of
the stream on which the memory was allocated. So all device memory here is allocated with the projections, on the stream
of the layers, and is released after the task that follows its copy. The arguments are held until the attention, which
begins after they have arrived; the result is held until the rest of the layer has been launched on the same stream.
Torch manages the pinned memory: its allocator waits for the copies that use it.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import nn

from aspec.errors import InternalError
from aspec.models.attention import attend
from aspec.models.exact.paths import MaskKind
from aspec.models.kv_cache import KVShape, StepCache

PINNED_ROUNDING = 4
"""Factor of pinned memory over the bytes in use. Torch allocates it in powers of two (up to twice the bytes) and keeps
smaller blocks that became too small (together as much again)."""


@dataclass(slots=True, eq=False)
class HostAttention:
    """One attention call that runs on the host; mutable, because every stage releases the tensors it has used."""

    step: StepCache
    mask: MaskKind
    layer: int  # the layer whose keys and values it attends to
    stores: bool  # whether the call brings new keys and values
    module: nn.Module
    device_arguments: list[Any]  # query, new keys and values if any, other arguments of ``attend``
    device_result: torch.Tensor  # [B, T, H, Dv]
    host_arguments: list[Any] = field(default_factory=list)  # the same in host memory, after ``send``
    host_result: torch.Tensor | None = None  # in host memory, from ``send`` on

    @classmethod
    def of(cls, call: tuple[Any, ...], step: StepCache, layer: int, mask: MaskKind, *, stores: bool) -> "HostAttention":
        """The host attention for ``call``, the arguments of ``attend``; ``stores``: the layer has its own KV.

        Otherwise the layer must attend to keys and values of another layer in this step. Raises InternalError if it
        attends to anything else.
        """
        module, query, key, value, _, *rest = call
        if stores:
            step.attended[layer] = ref(key)
        source = next((own for own, keys in step.attended.items() if keys() is key), None)
        if source is None or {key.dtype, value.dtype} != {step.storage.dtype}:
            raise InternalError(f"layer {layer} attends to keys and values that cannot be stored in host memory")
        given = [query, *((key, value) if stores else ()), *rest]
        device_arguments = [_dense(one) if isinstance(one, torch.Tensor) else one for one in given]
        device_result = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        return cls(step, mask, source, stores, module, device_arguments, device_result)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors in device memory."""
        return [*(one for one in self.device_arguments if isinstance(one, torch.Tensor)), self.device_result]

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Bytes per token that are copied to the host, and back to the device."""
        tokens = self.device_result.shape[0] * self.device_result.shape[1]
        out = sum(one.nbytes for one in self.device_arguments[: 3 if self.stores else 1])
        return out // tokens, self.device_result.nbytes // tokens

    @property
    def kv_shape(self) -> KVShape | None:
        """The shape of this layer's KV on the host; None if it uses another layer's KV."""
        if not self.stores:
            return None
        _, key, value, *_ = self.device_arguments
        return key.shape[1], key.shape[3], value.shape[3]

    def send(self) -> None:
        """Copy the arguments to the host, on the current stream."""
        self.host_arguments = [_to_host(one) if isinstance(one, torch.Tensor) else one for one in self.device_arguments]
        self.host_result = _host_like(self.device_result)

    def attend(self) -> None:
        """Store the new keys and values and attend, on the host. The copies of ``send`` must have finished."""
        if self.host_result is None:
            raise InternalError("an attention begins before its queries were sent")
        query, *rest = self.host_arguments
        if self.stores:
            self.step.store(self.layer, *rest[:2])
            rest = rest[2:]
        keys, values = self.step.stored(self.layer)
        attend(self.module, query, keys, values, self.step.seen(self.mask), *rest, out=self.host_result)
        self.device_arguments, self.host_arguments = [], []

    def bring_back(self) -> torch.Tensor:
        """Copy the result to device memory on the current stream; returns it [B, T, H, Dv]."""
        if self.host_result is None:
            raise InternalError("the result of an attention is copied back, but its queries were never sent")
        return self.device_result.copy_(self.host_result, non_blocking=True)


def pinned_bytes(tokens: int, token_bytes: int) -> int:
    """Bytes of pinned host memory for ``tokens`` tokens of ``token_bytes`` bytes each, both directions together."""
    return PINNED_ROUNDING * tokens * token_bytes


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return _host_like(tensor).copy_(tensor, non_blocking=True)


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory like ``tensor``; pinned for a CUDA tensor, so that copies are asynchronous."""
    pinned = tensor.is_cuda
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pinned)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without gaps in memory, in any order of dimensions, so that one copy can move it."""
    return tensor if torch.empty_like(tensor, device="meta").stride() == tensor.stride() else tensor.contiguous()
