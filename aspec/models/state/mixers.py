"""Binds the mixers of recurrent layers to aspec's own functions, without a change of transformers.

A mixer's forward names the functions that hold its recurrence as globals of its module. A bound mixer runs the same
code over a copy of these globals, in which the names mean the functions of one layer of one step. Its cache says that
it has no state yet, so all steps, of one token or of many, take one way.
"""

import inspect
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from aspec.errors import InternalError
from aspec.models.experts.replay import once
from aspec.models.hf_compat import RECURRENT_FORWARDS, RECURRENT_FUNCTIONS, Cache
from aspec.models.state.kernels import FORWARDS, KERNELS


class MixerCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The cache of one mixer in one step; ``convolution`` is the number of the convolution that runs next."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.convolution = 0

    def get_conv_state(self, *_: object, **__: object) -> None:
        """No state: the functions take it from the step."""

    def get_recurrent_state(self, *_: object, **__: object) -> None:
        """No state, likewise."""

    def has_previous_state(self, *_: object, **__: object) -> bool:
        """No state, likewise."""
        return False

    def is_recording_past(self, *_: object, **__: object) -> bool:
        """Whether a mixer must not update its state in place."""
        return True

    def update_conv_state(self, inputs: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: object) -> torch.Tensor:
        """The inputs [B, C, T], without those before them."""
        self.convolution = state_idx
        return inputs

    def update_recurrent_state(self, state: object, *_: object, **__: object) -> object:
        """Nothing to store: the functions have stored it."""
        return state


class BoundMixer:
    """The forward of one mixer whose own forward names the functions of its recurrence."""

    def __init__(self, module: nn.Module, plain: Any, names: list[str]) -> None:
        self._module, self._plain, self._names = module, plain, names
        reads_weights = any(RECURRENT_FUNCTIONS[name] == "selective scan" for name in names)
        self._owner = _WeightReader(module) if reads_weights else module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, which moves the state on: it runs once per step."""
        return once(partial(self._run, *args, **kwargs), self)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The cache among the arguments gives the layer's step."""
        given_cache = _cache_among(self._module, args, kwargs)
        cache, step = given_cache.mixer(self._module.layer_idx)
        own = {name: partial(KERNELS[RECURRENT_FUNCTIONS[name]], step) for name in self._names}
        plain = self._plain
        bound = FunctionType(
            plain.__code__, {**plain.__globals__, **own}, plain.__name__, plain.__defaults__, plain.__closure__
        )
        bound.__kwdefaults__ = plain.__kwdefaults__
        args = tuple(cache if given is given_cache else given for given in args)
        kwargs = {name: cache if given is given_cache else given for name, given in kwargs.items()}
        return MethodType(bound, self._owner)(*args, **kwargs)


class RewrittenMixer:
    """The forward of one mixer that holds its recurrence in its own lines: aspec's code in its place."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        self._module, self._forward = module, FORWARDS[kind]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward would compute; see ``BoundMixer``."""
        return once(partial(self._run, *args, **kwargs), self)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        _, step = _cache_among(self._module, args, kwargs).mixer(self._module.layer_idx)
        return self._forward(step, self._module, *args, **kwargs)


def _cache_among(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one cache among the arguments of a mixer."""
    caches = [given for given in (*args, *kwargs.values()) if isinstance(given, Cache)]
    if len(caches) != 1:
        raise InternalError(f"{type(module).__name__} was called with {len(caches)} caches, expected one")
    return caches[0]


class _WeightReader:
    """A mixer of Mamba 1: it multiplies by the weight of its linear module ``dt_proj``, without the module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return _ReadWeight(found) if name == READ_MODULE else found


class _ReadWeight:
    """A linear module and its weight, whose product with [B, in, T] is the one of a linear module."""

    def __init__(self, module: nn.Module) -> None:
        self.weight, self.bias, self._module = self, module.bias, module

    def __matmul__(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states.transpose(1, 2), self._module.weight).transpose(1, 2)  # type: ignore[arg-type]


READ_MODULE = "dt_proj"


def bind_mixers(model: nn.Module) -> frozenset[str]:
    """Bind the mixers of ``model``, once after it is built; returns the names of weights that they read themselves."""
    read = set()
    for path, module in model.named_modules():
        plain = inspect.unwrap(type(module).forward)
        named = plain.__code__.co_names if isinstance(plain, FunctionType) else ()
        if kind := next((RECURRENT_FORWARDS[name] for name in named if name in RECURRENT_FORWARDS), None):
            module.forward = RewrittenMixer(module, kind)
        elif names := [name for name in named if name in RECURRENT_FUNCTIONS]:
            module.forward = BoundMixer(module, plain, names)
            if hasattr(module, READ_MODULE):
                read.add(f"{path}.{READ_MODULE}.weight")
    return frozenset(read)
