"""Finds operators that no CUDA graph can hold, before a capture: a failed capture leaves torch's allocator broken.

A captured graph repeats kernels over the same memory and never asks the host. So no operator in it may read a value
back, have a shape that depends on a value, copy from another device, or hide its work inside a foreign operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

READS_VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.cudagraph_unsafe})
"""Tags by which torch marks operators that read values."""

INDEXING = frozenset({aten.index.Tensor, aten.index_put.default, aten.index_put_.default})
"""These read values only if an index is a mask."""

COPIES = frozenset({aten.copy_.default, aten._to_copy.default})


class RefusedError(Exception):
    """Some work cannot be captured; the message says why."""


class CaptureCheck(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """While it is entered, an operator on this thread that no capture for ``device`` can hold raises RefusedError."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # check its parts, if it is composed of other operators
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        reason = refusal(func, args, kwargs, self._device)
        if reason is not None:
            raise RefusedError(f"{func} {reason}")
        return func(*args, **kwargs)


def refusal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> str | None:
    """Why an operator cannot be captured with these arguments; None if it can."""
    if func.namespace not in ("aten", "prims", "prim"):
        return "is a foreign operator, whose inside cannot be seen"
    if READS_VALUES & set(func.tags):
        return "reads a value back to the host"
    if func in INDEXING:
        return "selects by a mask, so its shape depends on values" if _has_mask(func, args) else None
    if torch.Tag.dynamic_output_shape in func.tags:
        return "makes a tensor whose shape depends on values"
    if func is aten.lift_fresh.default and args[0].device.type == device.type:
        return "brings data from Python"
    if func in COPIES and _changes_device(func, args, kwargs):
        return "copies between devices"
    return None


def _has_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an index is a mask. Writing one value to all selected places is allowed: it needs no shape."""
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masks and (func is aten.index.Tensor or args[2].numel() != 1)


def _changes_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy goes from one device to another."""
    there = args[1].device if func is aten.copy_.default else torch.device(kwargs.get("device") or args[0].device)
    return bool(args[0].device.type != there.type)


def warm_up(work: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Do the work once, so that everything it creates at first use exists. Raises RefusedError."""
    with CaptureCheck(device):
        return work()
