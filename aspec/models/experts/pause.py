"""Pauses a layer at its experts and lets it go on when they have run; no code per family.

The layer's own forward runs twice. The first run is recorded, call by call, and stops where the experts are called. In
the second run the same calls return what they returned before, without any work; the experts return their result, and
the rest runs as usual. At the pause only those results are kept that the layer's own variables still hold: no other one
can be used behind it. A torch function mode sees the calls, so nothing is patched, and several threads can pause
layers at the same time. A function that changes what it will find the next time is called ``once``.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from aspec.errors import InternalError

Forward = Callable[[], torch.Tensor]
"""A layer's forward with its arguments bound; returns the hidden state [B, T, H]."""


@dataclass(slots=True)
class Pause:
    """A layer that has reached its experts; the calls are released when it goes on."""

    calls: list[tuple[object, Any]]  # functions and their results, in order
    hidden: torch.Tensor  # [N, H]: the experts' input
    index: torch.Tensor  # [N, k] int64: the experts of each token
    weights: torch.Tensor  # [N, k]: their weights


def call_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The call of a module whose experts are read on demand: only a paused layer may make it."""
    if has_torch_function_unary(hidden):
        made: torch.Tensor = handle_torch_function(call_experts, (hidden,), hidden, index, weights)
        return made
    raise InternalError("a layer whose experts are read on demand ran as a whole")


class _ExpertsCalled(Exception):
    """Not an error: stops a layer at its experts."""

    def __init__(self, call: tuple[torch.Tensor, ...]) -> None:
        super().__init__("a layer has reached its experts")
        self.call = call


class _Recorder(TorchFunctionMode):
    """Records every call, and stops the layer at its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, Any]] = []
        self._inside = False  # a function that is called once: its own calls are not recorded

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is call_experts:
            self.calls = [(called, _map(result, _strong)) for called, result in self.calls]
            raise _ExpertsCalled(args)
        result = func(*args, **kwargs or {})
        if not self._inside:
            self.calls.append((func, _map(result, _weak)))
        return result

    def once(self, function: Callable[[], Any], name: object) -> Any:
        """Call a function now; the second run will return its result."""
        self._inside = True
        try:
            result = function()
        finally:
            self._inside = False
        self.calls.append((name, _map(result, _weak)))
        return result


class _Replay(TorchFunctionMode):
    """Returns recorded results up to the experts, then theirs; computes everything after that."""

    def __init__(self, calls: list[tuple[object, Any]], output: torch.Tensor) -> None:
        super().__init__()
        self._calls, self._used = calls, 0
        self._output: torch.Tensor | None = output

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is call_experts:
            if self._output is None or self._used < len(self._calls):
                raise InternalError("a layer calls its experts twice, or not where it was paused")
            output, self._output = self._output, None
            self._calls.clear()
            return output
        return func(*args, **kwargs or {}) if self._output is None else self._recorded(func)

    def once(self, function: Callable[[], Any], name: object) -> Any:
        """The result of the first run."""
        return function() if self._output is None else self._recorded(name)

    def _recorded(self, func: object) -> Any:
        was, result = self._calls[self._used] if self._used < len(self._calls) else (None, None)
        if was != func:
            raise InternalError(f"a paused layer calls {func}, where it called {was} before")
        self._used += 1
        return result


_thread = threading.local()  # .mode: the mode of the layer that runs on this thread, if it is one with a pause


def once(function: Callable[[], Any], name: object) -> Any:
    """Call a function of a layer that may be called only once per step: see ``Pause``."""
    mode: _Recorder | _Replay | None = getattr(_thread, "mode", None)
    return function() if mode is None else mode.once(function, name)


def run_to_experts(forward: Forward) -> Pause:
    """Run a layer up to its experts. Raises InternalError if it does not call them."""
    recorder = _Recorder()
    _thread.mode = recorder
    try:
        with recorder:
            forward()
    except _ExpertsCalled as reached:
        hidden, index, weights = reached.call
        return Pause(recorder.calls, hidden, index, weights)
    finally:
        _thread.mode = None
    raise InternalError("a layer has ended without a call of its experts")


def run_from_experts(forward: Forward, pause: Pause, output: torch.Tensor) -> torch.Tensor:
    """Run the rest of a layer with the same ``forward``; ``output`` [N, H] is what its experts have computed."""
    replay = _Replay(pause.calls, output)
    _thread.mode = replay
    try:
        with replay:
            return forward()
    finally:
        _thread.mode = None


_GONE = torch.empty(0, device="meta")
"""In place of a tensor that no variable holds at the pause: calls with it return recorded results."""


def _map(result: Any, function: Callable[[Any], Any]) -> Any:
    """A result with ``function`` of every tensor in it, or of what stands for one."""
    if isinstance(result, torch.Tensor | weakref.ref):  # nearly all
        return function(result)
    if isinstance(result, tuple | list) and not isinstance(result, torch.Size):
        parts = [_map(part, function) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return function(result)


def _weak(result: Any) -> Any:
    return weakref.ref(result) if isinstance(result, torch.Tensor) else result


def _strong(result: Any) -> Any:
    if not isinstance(result, weakref.ref):
        return result
    found = result()
    return _GONE if found is None else found
