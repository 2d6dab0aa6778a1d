"""What a capture cannot hold, found before one is tried: a refused capture would leave torch's allocator astray.

A captured graph repeats kernels over the same memory and never asks the host. So nothing in it may read a value back,
have a shape that depends on one, bring something from another device, or hide its work inside a foreign operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

ASKS_THE_HOST = frozenset({torch.Tag.data_dependent_output, torch.Tag.cudagraph_unsafe})
"""torch's own marks of operators that read values."""

INDEXING = frozenset({aten.index.Tensor, aten.index_put.default, aten.index_put_.default})
"""These ask only where an index is a mask."""

MOVES = frozenset({aten.copy_.default, aten._to_copy.default})


class RefusedError(Exception):
    """Why some work cannot be captured."""


class Screen(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """While this is entered, on this thread, work for ``device`` raises RefusedError at what no capture would take."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # what it is made of, where it is made of others
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        reason = refusal(func, args, kwargs, self._device)
        if reason is not None:
            raise RefusedError(f"{func} {reason}")
        return func(*args, **kwargs)


def refusal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> str | None:
    """Why an operator cannot be captured with these arguments; None if it can."""
    if func.namespace not in ("aten", "prims", "prim"):
        return "is a foreign operator, whose inside cannot be seen"
    if ASKS_THE_HOST & set(func.tags):
        return "reads a value back to the host"
    if func in INDEXING:
        return "selects by a mask, so its shape depends on values" if _selects(func, args) else None
    if torch.Tag.dynamic_output_shape in func.tags:
        return "makes a tensor whose shape depends on values"
    if func is aten.lift_fresh.default and args[0].device.type == device.type:
        return "brings data from Python"
    if func in MOVES and _moves(func, args, kwargs):
        return "copies between devices"
    return None


def _selects(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether one of the indices is a mask; one value for all that a mask selects needs no shape."""
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masks and (func is aten.index.Tensor or args[2].numel() != 1)


def _moves(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy ends on another device than it begins."""
    there = args[1].device if func is aten.copy_.default else torch.device(kwargs.get("device") or args[0].device)
    return bool(args[0].device.type != there.type)


def warm_up(work: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Do the work once, so that what is made at first use is there. Raises RefusedError."""
    with Screen(device):
        return work()
