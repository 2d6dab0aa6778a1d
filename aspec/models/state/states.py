"""The recurrent states of all layers of a model, and of one step."""

import time
from collections.abc import Sequence

import torch

from aspec.errors import InternalError
from aspec.models.state.layer_state import LoggedState
from aspec.models.state.mixers import MixerCache
from aspec.models.state.nodes import NodePlan, Reach, Window, plan_nodes
from aspec.models.state.recurrence import ConvolutionState, Inputs, RecurrentState
from aspec.models.state.shapes import StateShape


class Watch:
    """Adds up the seconds of what runs inside it; mutable, and used by one thread at a time."""

    def __init__(self) -> None:
        self._seconds = self._start_s = 0.0

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._start_s

    def taken_s(self) -> float:
        """The seconds since the last call. Of a device, those in which the host issues its work."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class LayerStates:
    """What one recurrent layer keeps."""

    def __init__(
        self, shape: StateShape, num_rows: int, log_slots: int, dtype: torch.dtype, device: torch.device, *, saves: bool
    ) -> None:
        sizes = num_rows, log_slots
        self.convolutions = [ConvolutionState(*own, *sizes, dtype, device, saves=saves) for own in shape.convolutions]
        own = shape.recurrence
        self.recurrence = None if own is None else RecurrentState(own, *sizes, device, saves=saves)

    @property
    def all(self) -> list[LoggedState]:
        """All states of the layer."""
        return [*self.convolutions, *(() if self.recurrence is None else (self.recurrence,))]


class RecurrentStates:
    """By layer, what it keeps beside keys and values; None for a layer that keeps no more."""

    def __init__(
        self,
        shapes: Sequence[StateShape | None],
        num_rows: int,
        log_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        saves: bool,
    ) -> None:
        self.num_rows, self.log_slots, self.device, self._saves = num_rows, log_slots, device, saves
        self.layers = [
            None if shape is None else LayerStates(shape, num_rows, log_slots, dtype, device, saves=saves)
            for shape in shapes
        ]
        self.all: list[LoggedState] = [state for layer in self.layers if layer is not None for state in layer.all]
        self.commits = Watch()

    def reusable(self, row: int, length: int) -> int:
        """The most leading tokens of a row, at most ``length``, that a step may continue; alike in all layers."""
        return min(state.reusable(row, length) for state in self.all)

    def save(self, row: int) -> None:
        """Save a row's committed state in all layers, if these states are made for it."""
        with self.commits:
            for state in self.all if self._saves else ():
                state.save(row)

    def keep(self, row: int, start: int, path: Sequence[int]) -> None:
        """Keep the accepted nodes of a row in all layers: see ``LayerState``."""
        with self.commits:
            for state in self.all:
                state.keep(row, start, path)

    def of_step(self, windows: Sequence[Window], width: int, *, exact: bool) -> "StatesOfStep":
        """The states while a step over ``width`` tokens per row runs.

        Raises ValueError if more nodes of a row may be taken back than the log holds.
        """
        for window in windows:
            if (most := window.end - min(window.final, window.end)) > self.log_slots:
                raise ValueError(f"{most} nodes of row {window.row} may be taken back; the log holds {self.log_slots}")
        return StatesOfStep(self, windows, width, exact=exact)


class StatesOfStep:
    """The recurrent layers of one step. Layers with equal reaches share a plan."""

    def __init__(self, states: RecurrentStates, windows: Sequence[Window], width: int, *, exact: bool) -> None:
        self.exact, self.nodes = exact, Watch()
        self._states, self._windows, self._width = states, windows, width
        self._plans: dict[tuple[Reach, ...], NodePlan] = {}

    def of_layer(self, layer: int) -> "tuple[MixerCache, StepOfLayer]":
        """What the layer's mixer runs on."""
        found = self._states.layers[layer] if layer < len(self._states.layers) else None
        if found is None:
            raise InternalError(f"layer {layer} has a recurrent state that the probe has not seen")
        cache = MixerCache()
        return cache, StepOfLayer(self, found, cache)

    def plan(self, state: LoggedState) -> NodePlan:
        """The plan of the step for a state, which counts as run afterwards."""
        reaches = state.begin(self._windows)
        if reaches not in self._plans:
            self._plans[reaches] = plan_nodes(
                self._windows,
                reaches,
                width=self._width,
                num_rows=self._states.num_rows,
                log_slots=self._states.log_slots,
                device=self._states.device,
            )
        state.advance(self._windows)
        return self._plans[reaches]


class StepOfLayer:
    """One layer of one step: see ``MixerStep``."""

    def __init__(self, step: StatesOfStep, states: LayerStates, cache: MixerCache) -> None:
        self._step, self._states, self._cache = step, states, cache

    def convolve(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[B, T, C] -> [B, T, C] with ``weight`` [C, K]."""
        state = self._states.convolutions[self._cache.convolution]
        with self._step.nodes:
            plan = self._step.plan(state)
            return state.run(plan, inputs.flatten(0, 1), weight, bias).view(inputs.shape)

    def recur(self, given: Inputs) -> torch.Tensor:
        """The results [B * T, H, Dv] fp32."""
        state = self._states.recurrence
        assert state is not None, "the probe has seen the layer's state"
        with self._step.nodes:
            return state.run(self._step.plan(state), given, exact=self._step.exact)
