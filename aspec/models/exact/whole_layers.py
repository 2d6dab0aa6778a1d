"""Whole decoder layers in one call of kernels, where modules would run the same kernels one by one.

A layer of a few rows takes as long in the interpreter as in its products. So layers that do what Llama's or Qwen3's do
(``layer_code.py``) run as a program (``layer_program.py``). Its kernels are those of the modules, so the bits are the
same; and of each kind of step a layer's first one is computed both ways and compared, bit for bit.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from aspec.io.host_info import compiler
from aspec.models.compiled.products import threads_for
from aspec.models.compiled.shapes import ROWS
from aspec.models.exact.compiled_attention import Layout, attention_kind, told
from aspec.models.exact.known_recipes import recipe_for
from aspec.models.exact.layer_code import LayerParts, parts_of
from aspec.models.exact.modes import bare_step
from aspec.models.exact.paths import Paths, Seen
from aspec.models.kv_cache import StepCache

if TYPE_CHECKING:
    from aspec.models.exact.products import Operand

MOST_ROWS = 256  # of a step: in larger ones modules take little of the time


class Step(NamedTuple):
    """One layer's step."""

    number: int  # of the layer
    hidden: torch.Tensor  # bf16 [B, T, H]
    arguments: dict[str, Any]  # of the layer's forward
    cache: StepCache

    @property
    def kind(self) -> tuple[bool, bool]:
        """Kinds are proven on their own: exact or not, of one token or of several."""
        return self.cache.exact, self.hidden.shape[1] == 1


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
        seen, angles = (step.arguments.get(name) for name in ("attention_mask", "position_embeddings"))
        count, places = step.hidden.shape[:2].numel(), step.cache.places(step.number)
        if count > MOST_ROWS or places is None or not isinstance(seen, Seen) or not isinstance(angles, tuple):
            return None
        operands = [linear.operand(count) for linear in self._parts.linears]
        if None in operands or not self._fits(step, seen, (step.hidden, *angles)):
            return None
        return self._run(step, angles, places, seen.paths(), operands)  # type: ignore[arg-type]

    def _fits(self, step: Step, seen: Seen, given: tuple[torch.Tensor, ...]) -> bool:
        """Whether the kernel of attention computes the step, and the other operands are such as kernels take."""
        (batch, tokens, _), shape = step.hidden.shape, self._parts.shape
        recipe = recipe_for(attention_kind(*step.cache.storages(step.number)))
        attends = recipe.compiled and (seen.exact or tokens <= recipe.highest)
        widths = shape.hidden, shape.width, shape.width
        return attends and all(
            own.shape == (batch, tokens, width) and own.dtype == torch.bfloat16 and own.is_contiguous() and own.is_cpu
            for own, width in zip(given, widths, strict=True)
        )

    def _run(
        self,
        step: Step,
        angles: tuple[torch.Tensor, torch.Tensor],
        places: tuple[int, torch.Tensor],
        paths: tuple[Paths, ...],
        operands: "list[Operand]",
    ) -> torch.Tensor:
        from aspec.models.exact.layer_program import layer_program  # its package may not be there

        shape, (batch, tokens, _), threads = self._parts.shape, step.hidden.shape, torch.get_num_threads()
        key, value = step.cache.storages(step.number)
        strides, factors = (key.stride(1), key.stride(2), value.stride(2)), tuple(own.factor for own in operands)
        start, nbytes = layer_program(shape, strides, batch * tokens, threads, factors)
        inner = shape.heads * shape.width
        query, made = (tokens * inner, shape.width, inner, 1), (tokens * inner, inner, shape.width, 1)
        layout = Layout(query, key.stride(), value.stride(), made, shape.heads, shape.groups, 0, tokens, False, threads)
        records, slots = told(paths, layout)
        out, scratch = torch.empty_like(step.hidden), torch.empty(nbytes, dtype=torch.uint8)
        first, offsets = places
        rows = [own[first:].data_ptr() for own in (key, value)]
        addresses = [own.data_ptr() for own in (step.hidden, out, *angles)]
        addresses += [*rows, *(own.data_ptr() for own in (offsets, slots, records))]
        num_threads = threads_for(len(records) * ROWS * step.cache.high * 2 * shape.width)
        weights = [address for own in operands for address in (own.first, own.second)]
        norms = [own["weight"].data_ptr() for own in self._parts.norms]  # type: ignore[union-attr]
        start((*addresses, len(records), num_threads, scratch.data_ptr(), *weights, *norms))
        return out
