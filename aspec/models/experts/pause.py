"""Pauses a layer at its experts and lets it go on when they have run; no code per family.

The layer's own forward runs in a greenlet: it gives control back where the experts are called, its frames stay as they
are, and their result is what that call returns. Where the package is missing, the forward runs twice (``replay.py``).
"""

import threading
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from weakref import WeakSet

import torch

from aspec.errors import InternalError
from aspec.models.experts.replay import Call, Forward, call_recorded, record

try:
    from greenlet import getcurrent, greenlet
except ImportError:
    greenlet = None


@dataclass(frozen=True, slots=True)
class Pause:
    """A layer that has reached its experts."""

    hidden: torch.Tensor  # [N, H]: the experts' input
    index: torch.Tensor  # [N, k] int64: the experts of each token
    weights: torch.Tensor  # [N, k]: their weights
    resume: Callable[[torch.Tensor], torch.Tensor]
    """Runs the rest of the layer with the experts' result [N, H], once, on the same thread: its hidden state."""


def call_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The call of a module whose experts are read on demand: only a paused layer may make it."""
    if greenlet is not None and isinstance(own := getcurrent(), _Layer):
        made: torch.Tensor = own.parent.switch((hidden, index, weights))
        return made
    return call_recorded(hidden, index, weights)


def run_to_experts(forward: Forward) -> Pause:
    """Run a layer up to its experts. Raises InternalError if it does not call them."""
    call, resume = record(forward) if greenlet is None else _start(forward)
    return Pause(*call, resume)


_thread = threading.local()  # .layers: those that wait on this thread


def abandon() -> None:
    """Give up the layers that wait on this thread, when it ends: no other one can free what their frames hold."""
    for layer in list(getattr(_thread, "layers", ())):
        layer.throw()


if greenlet is not None:

    class _Layer(greenlet):  # type: ignore[misc]
        """The forward of a layer while it runs."""

    def _start(forward: Forward) -> tuple[Call, Callable[[torch.Tensor], torch.Tensor]]:
        layer = _Layer(forward)
        layer.gr_context = copy_context()
        call: Call = layer.switch()
        if layer.dead:
            raise InternalError("a layer has ended without a call of its experts")
        if not hasattr(_thread, "layers"):
            _thread.layers = WeakSet()
        _thread.layers.add(layer)

        def resume(output: torch.Tensor) -> torch.Tensor:
            layer.parent = getcurrent()
            made: torch.Tensor = layer.switch(output)
            if not layer.dead:
                raise InternalError("a layer calls its experts twice")
            return made

        return call, resume
