"""A layer in two halves around its attention, so that the attention may run elsewhere; without code per family.

The layer's own forward runs twice. The first time it is left where it calls its attention, and what its products and
its cache returned until then is kept. The second time they return that at once, so does the attention, and the rest
runs as ever. What else stands before the attention, norms and rotations, is computed twice, by the same operations on
the same numbers: no bit differs from a layer in one piece. A torch function mode is how products, cache and attention
are met on their way, so nothing is patched, and layers may be split on several threads at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from aspec.errors import InternalError
from aspec.models.attention import attend
from aspec.models.exact import PRODUCTS
from aspec.models.kv_cache import MaskKind, StepCache
from aspec.models.kv_offload import HostAttention

KEPT = PRODUCTS | {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, StepCache.update}
"""Functions that run in the first half only: the dear ones, those whose bits may depend on where their operands are in
memory, and the one that stores."""

IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})
"""Besides those whose names end in one underscore."""

Forward = Callable[[], torch.Tensor]
"""A layer's forward on its arguments; returns the hidden state."""


@dataclass(slots=True)
class Split:
    """A layer that has come to its attention; mutable, because every stage lets go of what it has used."""

    kept: list[tuple[object, Any]]  # functions and what they returned, in the order of the calls
    memory: set[int]  # of what was kept and of the hidden state: what alters it must run in the first half only
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the attention's arguments, until it has run
    output: torch.Tensor | None = None  # what it returned
    crossing: HostAttention | None = None  # of an attention beside KV in host memory, in place of ``call``

    @property
    def nbytes(self) -> int:
        """Bytes behind what is held: what was kept, what the attention is called with, what it returned."""
        kept = [one for _, result in self.kept for one in (result if isinstance(result, tuple) else (result,))]
        call = [] if self.call is None else self.call[0][1:4]  # query, key, value
        crossing = [] if self.crossing is None else self.crossing.tensors
        tensors = [*kept, *call, *crossing, *([] if self.output is None else [self.output])]
        return sum({_memory(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())

    def keeps(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Whether a call runs in the first half only."""
        if func in KEPT:
            return True
        name = getattr(func, "__name__", "")
        alters = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        return alters and _memory(args[0]) in self.memory


class _Reached(Exception):
    """Not an error: a layer has come to its attention."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("a layer has come to its attention")
        self.call = args, kwargs


class _FirstHalf(TorchFunctionMode):
    """Keeps what was computed and leaves the layer at its attention."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is attend:
            raise _Reached(args, kwargs or {})
        result = func(*args, **kwargs or {})
        if self._split.keeps(func, args):
            self._split.kept.append((func, result))
            if isinstance(result, torch.Tensor):
                self._split.memory.add(_memory(result))
        return result


class _SecondHalf(TorchFunctionMode):
    """Hands out what was kept up to the attention, then its output, then nothing any more."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split
        self._used = 0  # of what was kept; all of it is held up to the attention, so that no memory is used again

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        split = self._split
        if func is attend:
            if split.output is None or self._used < len(split.kept):
                raise InternalError("a split layer calls its attention twice, or otherwise than the first time")
            output, split.output = split.output, None
            split.kept.clear()
            return output, None
        if split.output is not None and split.keeps(func, args):
            was, result = split.kept[self._used] if self._used < len(split.kept) else (None, None)
            if was is not func:
                raise InternalError(f"a split layer calls {func} where it did not the first time")
            self._used += 1
            return result
        return func(*args, **kwargs or {})


def project(forward: Forward, hidden: torch.Tensor) -> Split:
    """Run a layer up to its attention; ``hidden`` is the state that ``forward`` hands to it."""
    split = Split([], {_memory(hidden)})
    try:
        with _FirstHalf(split):
            forward()
    except _Reached as reached:
        split.call = reached.call
        return split
    raise InternalError("a split layer has ended without its attention")


def to_host(split: Split, step: StepCache, layer: int, mask: MaskKind, *, stores: bool) -> None:
    """Make ready the way to KV in host memory; ``stores``: the layer has keys and values of its own."""
    assert split.call is not None, "what is attended to comes from the projections"
    args, _ = split.call
    split.call, split.crossing = None, HostAttention.of(args, step, layer, mask, stores=stores)


def attend_to(split: Split) -> None:
    """Run the attention. Needs none of the layer's weights but its sinks; any thread will do, once at a time."""
    if split.crossing is not None:
        split.crossing.attend()
        return
    assert split.call is not None, "a layer attends once, behind its projections"
    args, kwargs = split.call
    split.output, split.call = attend(*args, **kwargs)[0], None


def finish(forward: Forward, split: Split) -> torch.Tensor:
    """Run the rest of a layer; ``forward`` is that of ``project``, its arguments the same."""
    with _SecondHalf(split):
        hidden = forward()
    if split.output is not None:
        raise InternalError("a split layer has ended without its attention")
    return hidden


def _memory(tensor: torch.Tensor) -> int:
    """What tells a tensor's memory from all other in use."""
    memory: int = tensor.untyped_storage()._cdata
    return memory
