"""Pauses a layer at its experts without greenlets: its own forward runs twice; no code per family.

The first run is recorded, call by call, and stops where the experts are called. In the second run the same calls return
what they returned before, without any work; the experts return their result, and the rest runs as usual. At the pause
only those results are kept that the layer's own variables still hold: no other one can be used behind it. A torch
function mode sees the calls, so nothing is patched, and several threads can pause layers at the same time. A function
that changes what it will find the next time is called ``once``. Every call costs some microseconds twice.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from aspec.errors import InternalError

Forward = Callable[[], torch.Tensor]
"""A layer's forward with its arguments bound; returns the hidden state [B, T, H]."""

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What experts are called with: their input [N, H], the experts of each token [N, k] int64, their weights [N, k]."""


def call_recorded(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The call of a module whose experts are read on demand: only a paused layer may make it."""
    if has_torch_function_unary(hidden):
        made: torch.Tensor = handle_torch_function(call_recorded, (hidden,), hidden, index, weights)
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
        if func is call_recorded:
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
        if func is call_recorded:
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


def record(forward: Forward) -> tuple[Call, Callable[[torch.Tensor], torch.Tensor]]:
    """Run a layer up to its experts; returns their call, and what runs the rest with their result [N, H].

    Raises InternalError if it does not call them.
    """
    recorder = _Recorder()
    _thread.mode = recorder
    try:
        with recorder:
            forward()
    except _ExpertsCalled as reached:
        hidden, index, weights = reached.call
        return (hidden, index, weights), partial(_run_again, forward, recorder.calls)
    finally:
        _thread.mode = None
    raise InternalError("a layer has ended without a call of its experts")


def _run_again(forward: Forward, calls: list[tuple[object, Any]], output: torch.Tensor) -> torch.Tensor:
    replay = _Replay(calls, output)
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
