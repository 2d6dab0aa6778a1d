"""What layers store, noted from one run of their model on meta tensors."""

from typing import NoReturn

import torch

from aspec.models.families import STATEFUL
from aspec.models.hf_compat import Cache
from aspec.models.state.mixers import MixerCache
from aspec.models.state.recurrence import Inputs
from aspec.models.state.shapes import RecurrenceShape, StateShape


class UnfitError(Exception):
    """The reason why the driver cannot run the model, or not with this type of layer result."""


class NotedState:
    """A layer's step that notes shapes and computes nothing: see ``MixerStep``."""

    def __init__(self) -> None:
        self.cache = MixerCache()
        self._convolutions: dict[int, tuple[int, int]] = {}
        self._recurrence: RecurrenceShape | None = None

    @property
    def shape(self) -> StateShape:
        """What the layer keeps."""
        return StateShape(tuple(own for _, own in sorted(self._convolutions.items())), self._recurrence)

    def convolve(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Note a convolution of [B, T, C] with ``weight`` [C, K]."""
        self._convolutions[self.cache.convolution] = (weight.shape[0], weight.shape[1])
        return torch.empty_like(inputs)

    def recur(self, given: Inputs) -> torch.Tensor:
        """Note a recurrence. Raises UnfitError for a second one of the layer."""
        if self._recurrence is not None:
            raise UnfitError("a layer has several recurrent states")
        groups, key = given.key.shape[1:]
        heads, value = given.value.shape[1:]
        rate = given.rate.shape[2], given.rate.shape[3]
        self._recurrence = RecurrenceShape(groups, heads // groups, key, value, rate)
        return torch.empty_like(given.value)


class NoLayers(list[object]):
    """The layers of a cache that has none. Families ask them for what they store beside keys and values."""

    def __getitem__(self, index: object) -> NoReturn:
        raise UnfitError("its layers store something beside keys and values")


class ShapeCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """An empty cache that records the shapes that layers store."""

    def __init__(self) -> None:
        super().__init__(layers=NoLayers())
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.states: dict[int, NotedState] = {}
        self.index_widths: dict[int, int] = {}

    def mixer(self, layer_idx: int) -> tuple[MixerCache, NotedState]:
        """What a recurrent layer's mixer runs on: it notes shapes and computes nothing."""
        state = self.states.setdefault(layer_idx, NotedState())
        return state.cache, state

    def update_indexer(self, index_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Record the width of the keys [B, T, D] by which a layer selects slots, and return them."""
        self.index_widths[layer_idx] = index_states.shape[2]
        return index_states

    def get_conv_state(self, *_: object, **__: object) -> NoReturn:
        """Only mixers that aspec has bound may ask for a state."""
        raise UnfitError(STATEFUL)

    def has_previous_state(self, *_: object, **__: object) -> bool:
        """Nothing was stored."""
        return False

    get_recurrent_state = update_conv_state = update_recurrent_state = get_conv_state

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the shapes and return the arguments."""
        if not key_states.dim() == value_states.dim() == 4:
            raise UnfitError("its layers store something other than keys and values per head")
        self.shapes[layer_idx] = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return key_states, value_states
