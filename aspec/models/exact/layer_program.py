"""The kernels of a decoder layer in their order: what ``LlamaDecoderLayer.forward`` computes (``layer_code.py``)."""

from collections.abc import Callable
from functools import lru_cache

from aspec.models.compiled import kernels
from aspec.models.compiled.calls import Calls
from aspec.models.compiled.factor import Factor
from aspec.models.compiled.products import PER_NUMBER, float_bits, threads_for
from aspec.models.compiled.program import Argument, Program
from aspec.models.exact.compiled_attention import NO_SINK
from aspec.models.exact.layer_code import LINEARS, NORMS, OF_LAYER, OF_STEP, Shape

NAMES = (*OF_STEP, *OF_LAYER, *(name + more for name in LINEARS for more in ("", "+")), *NORMS)
"""What a program is given, behind a zero: addresses and counts; those of NORMS as far as there are."""

Strides = tuple[int, int, int]
"""Of a cache, in elements: from head to head, and from slot to slot of keys and of values."""


@lru_cache(1024)
def layer_program(
    shape: Shape, strides: Strides, count: int, threads: int, factors: tuple[Factor, ...]
) -> tuple[Callable[[int], None], int]:
    """A function that computes a layer of ``count`` rows, and the bytes of memory that it needs.

    ``factors``: the weights of LINEARS. ``threads``: those that compute.
    """
    written = _Layer(shape, count, dict(zip(LINEARS, factors, strict=True)))
    written.write(strides)
    return written.program.ready(), written.calls.nbytes


class _Layer:
    """The program while it is written."""

    def __init__(self, shape: Shape, count: int, factors: dict[str, Factor]) -> None:
        self.shape, self.count, self.factors = shape, count, factors
        self.program = Program(NAMES[: len(NAMES) - len(NORMS) + len(shape.formulas)])
        self.calls = Calls(self.program, count, "scratch")

    def write(self, strides: Strides) -> None:
        """All of it."""
        shape, calls, count = self.shape, self.calls, self.count
        hidden, inner = shape.hidden, self.factors["up"].outputs
        rows, summed = calls.area(count * hidden), calls.area(count * hidden)
        self._norm(0, ("in", 0), rows, count, hidden)
        with calls.passing():
            self._attend(rows, strides)
        calls.add(("in", 0), rows, summed, hidden)
        self._norm(1, summed, rows, count, hidden)
        gate, up = calls.area(count * inner), calls.area(count * inner)
        self._multiply(rows, gate=gate, up=up)
        calls.gate(gate, up, inner)
        self._multiply(gate, down=rows)
        calls.add(summed, rows, ("out", 0), hidden)

    def _attend(self, rows: Argument, strides: Strides) -> None:
        """Attention of the normed rows, in their place; new keys and values are put into the cache."""
        shape, calls, count = self.shape, self.calls, self.count
        heads, groups, width = shape.heads, shape.groups, shape.width
        query, mixed = (calls.area(count * heads * width) for _ in range(2))
        key, value = (calls.area(count * groups * width) for _ in range(2))
        self._multiply(rows, q=query, k=key, v=value)
        if len(shape.formulas) == len(NORMS):
            self._norm(2, query, query, count * heads, width)
            self._norm(3, key, key, count * groups, width)
        cos, sin, places, slots, records, items, threads = ((name, 0) for name in OF_STEP[:-1])
        keys, values = ((name, 0) for name in OF_LAYER[2:])
        turned = query, key, value, cos, sin, keys, values, places
        turning = threads_for(count * (heads + groups) * width * PER_NUMBER)
        self.program.call(kernels.rotary(), *turned, count, heads, groups, width, strides[0], turning)
        attended = query, keys, values, slots, NO_SINK.data_ptr(), records, mixed
        scale = float_bits(shape.scale)
        self.program.call(kernels.attention(width, width), *attended, items, *strides[1:], scale, threads)
        self._multiply(mixed, o=rows)

    def _norm(self, place: int, rows: Argument, made: Argument, count: int, width: int) -> None:
        formula = self.shape.formulas[place]
        settings = float_bits(formula.eps), int(formula.rounded), int(formula.offset)
        self.calls.norm(rows, (NORMS[place], 0), made, count, width, settings)

    def _multiply(self, rows: Argument, **made: Argument) -> None:
        """The rows times some of LINEARS, by name: where the results go."""
        factors = [self.factors[name] for name in made]
        with self.calls.passing():
            forms = self.calls.forms(rows, factors[0].inner, factors)
            for (name, place), factor in zip(made.items(), factors, strict=True):
                self.calls.product(forms, factor, name, place)
