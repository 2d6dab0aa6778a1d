"""The devices that layers may run on: each is a row of this table, and a file that offers what ``device.py`` asks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aspec.backends.cuda import WORKSPACES, TorchDevice, free_bytes, name
from aspec.backends.device import DeviceLayer
from aspec.errors import UserError

ALIGNMENT = 256  # bytes, of tensors on a device: what its allocator grants, and its fastest kernels expect


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of device behind a link."""

    place: torch.device  # of its tensors
    available: Callable[[], bool]
    free_bytes: Callable[[], int]  # that nobody uses at present
    open: Callable[[], DeviceLayer[Any, Any]]  # raises DeviceError
    name: Callable[[], str]  # of the one that is here
    workspace_bytes: int = 0  # that its libraries hold beside what a plan knows of
    captures: bool = False  # whether draft steps are captured, which holds memory


KINDS = {
    "cuda": Kind(
        torch.device("cuda"), torch.cuda.is_available, free_bytes, TorchDevice, name, WORKSPACES, captures=True
    ),
}
"""By the name that a user gives."""

HOST = "cpu"


def kind_of(name: str) -> Kind | None:
    """The device that a user means, None for the host's own memory; ``auto``: whichever is there.

    Raises UserError where it is not.
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
