"""The kinds of device that can run layers: each is a row of this table, and a file that implements ``device.py``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aspec.backends.cuda import WORKSPACES, TorchDevice, free_bytes, name
from aspec.backends.device import DeviceLayer
from aspec.errors import UserError

ALIGNMENT = 256  # bytes, of tensors on a device: its allocator gives it, and its fastest kernels expect it


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of device behind a link."""

    place: torch.device  # the device of its tensors
    available: Callable[[], bool]
    free_bytes: Callable[[], int]  # bytes that no process uses at present
    open: Callable[[], DeviceLayer[Any, Any]]  # raises DeviceError
    name: Callable[[], str]  # of the device in this machine
    workspace_bytes: int = 0  # held by its libraries, beyond what a plan counts
    captures: bool = False  # whether draft steps are captured, which takes memory
    count: Callable[[], int] = torch.cuda.device_count  # of such devices in this machine


KINDS = {
    "cuda": Kind(
        torch.device("cuda"), torch.cuda.is_available, free_bytes, TorchDevice, name, WORKSPACES, captures=True
    ),
}
"""Kinds by the name of ``--device``."""

HOST = "cpu"


def kind_of(name: str) -> Kind | None:
    """The kind of device that a user names; None for the host's own memory; ``auto``: the first that is available.

    Raises UserError if the named device is not available.
    """
    if name == "auto":
        return next((kind for kind in KINDS.values() if kind.available()), None)
    if name == HOST:
        return None
    kind = KINDS[name]
    if not kind.available():
        raise UserError(
            f"--device {name}: torch finds none here. Install a build of torch for it, or run with --device cpu."
        )
    return kind
