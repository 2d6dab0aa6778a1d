"""Splits a layer into two halves around its attention, so that the attention can run elsewhere; no code per family.

The layer's own forward runs twice. The first run stops at the call of the attention, and the results of its products
and of its cache are recorded. In the second run these calls return the recorded results, the attention returns its
output, and the rest runs as usual. Other operations before the attention, such as norms and rotations, run twice on the
same numbers, so all bits equal those of a layer in one piece. A torch function mode intercepts products, cache and
attention. So nothing is patched, and several threads can split layers at the same time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from aspec.errors import InternalError
from aspec.models.attention import attend
from aspec.models.exact.paths import MaskKind
from aspec.models.exact.products import PRODUCTS, multiply
from aspec.models.kv_cache import StepCache
from aspec.models.kv_offload import HostAttention

RECORDED = {*PRODUCTS, multiply, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, StepCache.update}
RECORDED |= {StepCache.update_indexer}
"""Functions that run in the first half only: the expensive ones, those whose bits may depend on the memory address of
their operands, and the one that stores keys and values."""

IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})
"""In-place functions, in addition to those whose names end in one underscore."""

Forward = Callable[[], torch.Tensor]
"""A layer's forward with its arguments bound; returns the hidden state [B, T, H]."""


@dataclass(slots=True)
class Split:
    """A layer that has reached its attention; mutable, because every stage releases the tensors it has used."""

    recorded: list[tuple[object, Any]]  # functions and their results, in the order of the calls
    memory: set[int]  # of recorded results and hidden state: functions that change it run in the first half only
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the attention's arguments, until it has run
    output: torch.Tensor | None = None  # the attention's result [B, T, H, Dv]
    host_attention: HostAttention | None = None  # with KV in host memory, in place of ``call``

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: recorded results, query, key and value, and the attention's result."""
        results = [one for _, result in self.recorded for one in (result if isinstance(result, tuple) else (result,))]
        call = [] if self.call is None else self.call[0][1:4]  # query, key, value
        on_device = [] if self.host_attention is None else self.host_attention.tensors
        tensors = [*results, *call, *on_device, *([] if self.output is None else [self.output])]
        return sum({_memory(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())

    def is_recorded(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Whether a call runs in the first half only, so that its result is recorded."""
        if func in RECORDED:
            return True
        name = getattr(func, "__name__", "")
        alters = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        return alters and _memory(args[0]) in self.memory


class _AttentionCalled(Exception):
    """Not an error: stops a layer at its attention."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("a layer has reached its attention")
        self.call = args, kwargs


class _FirstHalf(TorchFunctionMode):
    """Records results and stops the layer at its attention."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is attend:
            raise _AttentionCalled(args, kwargs or {})
        result = func(*args, **kwargs or {})
        if self._split.is_recorded(func, args):
            self._split.recorded.append((func, result))
            if isinstance(result, torch.Tensor):
                self._split.memory.add(_memory(result))
        return result


class _SecondHalf(TorchFunctionMode):
    """Returns the recorded results and the attention's output; computes everything after that."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split
        self._used = 0  # results returned so far; all are held until the attention, so that no memory is reused

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        split = self._split
        if func is attend:
            if split.output is None or self._used < len(split.recorded):
                raise InternalError("a split layer calls its attention twice, or not where the first half called it")
            output, split.output = split.output, None
            split.recorded.clear()
            return output, None
        if split.output is not None and split.is_recorded(func, args):
            was, result = split.recorded[self._used] if self._used < len(split.recorded) else (None, None)
            if was is not func:
                raise InternalError(f"a split layer calls {func}, where the first half did not call it")
            self._used += 1
            return result
        return func(*args, **kwargs or {})


def project(forward: Forward, hidden: torch.Tensor) -> Split:
    """Run a layer up to its attention; ``hidden`` [B, T, H] is the state that ``forward`` gives to it.

    Raises InternalError if the layer does not call its attention.
    """
    split = Split([], {_memory(hidden)})
    try:
        with _FirstHalf(split):
            forward()
    except _AttentionCalled as attention:
        split.call = attention.call
        return split
    raise InternalError("a split layer has ended without its attention")


def to_host(split: Split, step: StepCache, layer: int, mask: MaskKind, *, stores: bool) -> None:
    """Prepare the attention for KV in host memory; ``stores``: the layer has its own keys and values."""
    assert split.call is not None, "a split layer goes to the host after its projections"
    args, _ = split.call
    split.call, split.host_attention = None, HostAttention.of(args, step, layer, mask, stores=stores)


def host_attention_of(split: Split | None) -> HostAttention:
    """The attention on the host of a layer that has reached it. Raises InternalError if it attends elsewhere."""
    if split is None or split.host_attention is None:
        raise InternalError("nothing to copy to the host: the KV cache is on the device of the layers")
    return split.host_attention


def attend_to(split: Split) -> None:
    """Run the attention, on any thread. It needs no weights of the layer except its sinks."""
    if split.host_attention is not None:
        split.host_attention.attend()
        return
    assert split.call is not None, "a layer attends once, after its projections"
    args, kwargs = split.call
    split.output, split.call = attend(*args, **kwargs)[0], None


def finish(forward: Forward, split: Split) -> torch.Tensor:
    """Run the rest of a layer with the same ``forward`` as ``project``; returns the hidden state [B, T, H].

    Raises InternalError if the calls differ from those of the first half.
    """
    with _SecondHalf(split):
        hidden = forward()
    if split.output is not None:
        raise InternalError("a split layer has ended without its attention")
    return hidden


def _memory(tensor: torch.Tensor) -> int:
    """An identifier of a tensor's memory; unique among memory in use."""
    memory: int = tensor.untyped_storage()._cdata
    return memory
