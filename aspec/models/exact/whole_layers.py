"""Whole decoder layers in one call of kernels, where modules would run the same kernels one by one.

A layer of a few rows takes as long in the interpreter as in its products. So layers that do what Llama's or Qwen3's do
(``layer_code.py``) run as a program (``layer_program.py``). Its kernels are those of the modules, so the bits are the
same; and of each kind of step a layer's first one is computed both ways and compared, bit for bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from aspec.io.host_info import compiler
from aspec.models.compiled.products import threads_for
from aspec.models.compiled.shapes import ROWS
from aspec.models.exact.compiled_attention import Layout, attention_kind, told
from aspec.models.exact.known_recipes import recipe_for
from aspec.models.exact.layer_code import OF_LAYER, OF_STEP, LayerParts, parts_of
from aspec.models.exact.modes import bare_step
from aspec.models.exact.paths import Paths, Seen
from aspec.models.kv_cache import StepCache

STEP_VALUES = slice(1, 1 + len(OF_STEP))
LAYER_VALUES = slice(STEP_VALUES.stop, STEP_VALUES.stop + len(OF_LAYER))
MOST_ROWS = 256  # of a step: in larger ones modules take little of the time


class Step(NamedTuple):
    """One layer's step."""

    number: int  # of the layer
    hidden: torch.Tensor  # bf16 [B, T, H]
    arguments: dict[str, Any]  # of the layer's forward
    cache: StepCache
    version: int  # of the layer's weights

    @property
    def kind(self) -> tuple[bool, bool]:
        """Kinds are proven on their own: exact or not, of one token or of several."""
        return self.cache.exact, self.hidden.shape[1] == 1


Values = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class _Bound:
    """A layer with its weights and its cache, for steps of one size."""

    start: Callable[[int], None]
    nbytes: int  # of scratch
    values: Values  # see ``layer_program.NAMES``; those of a step are written before each run
    address: int  # of the values
    states: tuple[torch.Tensor, torch.Tensor]  # keys and values of all rows


@dataclass(frozen=True, slots=True)
class _Told:
    """What all layers of a step are given: values of OF_STEP, and the hidden states that they make in turns."""

    values: Values
    made: tuple[torch.Tensor, torch.Tensor]
    held: tuple[object, ...]  # whose memory is read


class WholeLayers:
    """The layers of a model that run in one call."""

    def __init__(self) -> None:
        self._layers: dict[int, _WholeLayer] = {}  # by number

    def find(self, layers: Iterable[nn.Module]) -> None:
        """Look for them, once the kernels of their modules are known."""
        found = ((index, parts_of(layer)) for index, layer in enumerate(layers) if compiler())
        self._layers = {index: _WholeLayer(parts) for index, parts in found if parts is not None}

    def run(self, step: Step, by_modules: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The hidden state after a layer; ``by_modules`` runs its modules."""
        layer = self._layers.get(step.number)
        if layer is None:
            return by_modules()
        proven = layer.proven.get(step.kind)
        if proven:
            with bare_step(step.cache):
                made = layer.compute(step)
            if made is not None:
                return made
        made = by_modules()
        if proven is None:
            with bare_step(step.cache):
                layer.prove(step, made)
        return made


class _WholeLayer:
    """One layer. ``proven``: by kind of step, whether its bits are those of the modules; others are not known yet."""

    def __init__(self, parts: LayerParts) -> None:
        self._parts = parts
        self.proven: dict[tuple[bool, bool], bool] = {}
        self._bound: dict[object, _Bound | None] = {}  # by the sizes of steps, for the present weights and cache
        self._bound_for: object = None

    def prove(self, step: Step, made: torch.Tensor) -> None:
        """Compare: the modules have ``made`` the hidden state, and put keys and values into the cache."""
        stored = step.cache.written(step.number)
        found = self.compute(step)
        if found is None:
            return
        pairs = zip((found, *step.cache.written(step.number)), (made, *stored), strict=True)
        self.proven[step.kind] = all(torch.equal(*pair) for pair in pairs)
        if not self.proven[step.kind]:
            step.cache.store(step.number, *stored)

    def compute(self, step: Step) -> torch.Tensor | None:
        """The hidden state after the layer; None if there are no kernels for some part of such a step."""
        hidden, threads, seen = step.hidden, torch.get_num_threads(), step.arguments.get("attention_mask")
        present, key = (step.version, threads, step.cache.storage), (hidden.shape, step.cache.exact)
        if self._bound_for != present:
            self._bound, self._bound_for = {}, present
        if key not in self._bound:
            self._bound[key] = self._bind(step, threads)
        bound = self._bound[key]
        if bound is None or not isinstance(seen, Seen):
            return None
        given = self._told(step, bound, seen.paths(), threads)
        if given is None:
            return None
        out = given.made[hidden is given.made[0]]
        bound.values[STEP_VALUES] = given.values
        bound.values[LAYER_VALUES] = [own.data_ptr() for own in (hidden, out, *bound.states)]
        bound.start(bound.address)
        return out

    def _bind(self, step: Step, threads: int) -> _Bound | None:
        """The program with the addresses of weights; None if there are no kernels for some of them."""
        (batch, tokens, _), parts, states = step.hidden.shape, self._parts, step.cache.storages(step.number)
        count, recipe = batch * tokens, recipe_for(attention_kind(*states))
        operands = [linear.operand(count) for linear in parts.linears] if count <= MOST_ROWS else [None]
        found = [own for own in operands if own is not None]
        attends = recipe.compiled and (step.cache.exact or tokens <= recipe.highest)
        if not attends or len(found) < len(operands):
            return None
        from aspec.models.exact.layer_program import layer_program  # its package is there, as kernels are

        factors = tuple(own.factor for own in found)
        start, nbytes = layer_program(parts.shape, _strides(*states), count, threads, factors)
        weights = [address for own in found for address in (own.first, own.second)]
        norms = [own["weight"].data_ptr() for own in parts.norms]  # type: ignore[union-attr]
        values = np.array([0] * LAYER_VALUES.stop + weights + norms, dtype=np.int64)
        return _Bound(start, nbytes, values, values.ctypes.data, states)

    def _told(self, step: Step, bound: _Bound, paths: tuple[Paths, ...], threads: int) -> _Told | None:
        """What is made once for a step's layers of one shape; None if kernels cannot take something of it."""
        angles, known = step.arguments.get("position_embeddings"), step.cache.told
        key = id(paths), id(angles), self._parts.shape, bound.nbytes
        if key not in known:
            known[key] = self._tell(step, bound, paths, threads, angles) if self._fits(step.hidden, angles) else None
        found: _Told | None = known[key]
        return found if step.hidden.is_contiguous() else None

    def _fits(self, hidden: torch.Tensor, angles: object) -> bool:
        if not isinstance(angles, tuple):
            return False
        (batch, tokens, _), shape = hidden.shape, self._parts.shape
        return all(
            own.shape == (batch, tokens, width) and own.dtype == torch.bfloat16 and own.is_contiguous() and own.is_cpu
            for own, width in ((hidden, shape.hidden), *((angle, shape.width) for angle in angles))
        )

    def _tell(self, step: Step, bound: _Bound, paths: tuple[Paths, ...], threads: int, angles: Any) -> _Told | None:
        """The same, made now; None if kernels do not fit the cache."""
        places, states = step.cache.places(step.number), bound.states
        shape, tokens = self._parts.shape, step.hidden.shape[1]
        if places is None:
            return None
        inner = shape.heads * shape.width
        query, made = (tokens * inner, shape.width, inner, 1), (tokens * inner, inner, shape.width, 1)
        strides = query, states[0].stride(), states[1].stride(), made
        layout = Layout(*strides, shape.heads, shape.groups, 0, tokens, False, threads, step.cache.rows)
        records, slots = told(paths, layout)
        scratch = torch.empty(bound.nbytes, dtype=torch.uint8)
        tensors = *angles, places, slots, records
        attending = threads_for(len(records) * ROWS * step.cache.high * 2 * shape.width)
        values = [*(own.data_ptr() for own in tensors), len(records), attending, scratch.data_ptr()]
        both = torch.empty_like(step.hidden), torch.empty_like(step.hidden)
        held = paths, angles, tensors, scratch
        return _Told(np.array(values, dtype=np.int64), both, held)


def _strides(key: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int]:
    """From head to head, and from slot to slot of keys and of values."""
    return key.stride(1), key.stride(2), value.stride(2)
