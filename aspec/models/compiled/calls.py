"""The calls of a program on rows in bf16: their arguments, where the rows lie, and the threads that they are worth."""

from collections.abc import Iterator
from contextlib import contextmanager

from aspec.models.compiled import kernels
from aspec.models.compiled.factor import Factor
from aspec.models.compiled.products import BLOCK_BYTES, PER_NUMBER, threads_for, zero
from aspec.models.compiled.program import Argument, Program
from aspec.models.compiled.shapes import QUANTISED

VECTOR = 16  # numbers that ``add`` and ``widen`` count together
LINE = 64  # bytes at whose multiples areas of scratch begin


class Calls:
    """Writes the calls of a program for ``count`` rows; ``scratch`` is the name of the address of its memory."""

    def __init__(self, program: Program, count: int, scratch: str) -> None:
        self._program, self._count, self._scratch = program, count, scratch
        self._used = 0
        self.nbytes = 0  # of scratch

    def area(self, numbers: int, size: int = 2) -> Argument:
        """Memory for so many numbers of ``size`` bytes."""
        start, self._used = self._used, self._used + -(-numbers * size // LINE) * LINE
        self.nbytes = max(self.nbytes, self._used)
        return self._scratch, start

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The memory that is asked for inside serves others after it."""
        used = self._used
        yield
        self._used = used

    def norm(
        self, rows: Argument, weight: Argument, made: Argument, count: int, width: int, settings: tuple[int, int, int]
    ) -> None:
        """See ``norm_kernel``, whose last three counts are ``settings``."""
        threads = threads_for(count * width * PER_NUMBER)
        self._program.call(kernels.norm(), rows, weight, made, count, width, *settings, threads)

    def gate(self, gate: Argument, up: Argument, width: int) -> None:
        """See ``products.gated``; it is made in the place of ``gate``."""
        threads = threads_for(self._count * width * PER_NUMBER)
        self._program.call(kernels.gate(), gate, up, gate, self._count, width, width, width, threads)

    def add(self, one: Argument, other: Argument, made: Argument, width: int) -> None:
        """Sums of bf16."""
        numbers = self._count * width
        self._program.call(kernels.add(), one, other, made, numbers // VECTOR, threads_for(numbers))

    def forms(self, rows: Argument, width: int, factors: "list[Factor]") -> "dict[str, tuple[Argument, ...]]":
        """The rows in the forms in which the factors take them."""
        found: dict[str, tuple[Argument, ...]] = {"plain": (rows,)}
        numbers = self._count * width
        for form in {factor.form for factor in factors} - {"plain"}:
            if form == "wide":
                found[form] = (self.area(numbers, 4),)
                self._program.call(kernels.widen(), rows, *found[form], numbers // VECTOR, threads_for(numbers))
            else:
                blocks = numbers // QUANTISED
                found[form] = (self.area(2 * numbers, 1), self.area(blocks, 4), self.area(blocks, 4))
                self._program.call(kernels.quantise(), rows, *found[form], blocks, threads_for(numbers))
        return found

    def product(self, forms: "dict[str, tuple[Argument, ...]]", factor: Factor, weight: str, made: Argument) -> None:
        """Rows times a weight at the address ``weight``, with scales or a bias at ``weight``+."""
        outputs, inner, sizes = factor.outputs, factor.inner, factor.sizes
        rows, threads = forms[factor.form], threads_for(self._count * outputs * inner)
        first, second = (weight, 0), (f"{weight}+", 0)
        if sizes is not None:
            counts = outputs // sizes.block, inner, self._count, sizes.group, threads
            if factor.integers:
                self._program.call(kernels.integers(sizes.block), first, second, *rows, made, *counts)
            else:
                self._program.call(kernels.int4(sizes.block), first, second, *rows, made, *counts)
            return
        bias: Argument = zero.data_ptr()
        if factor.biased:
            bias = self.area(outputs, 4)
            self._program.call(kernels.widen(), second, bias, outputs // VECTOR, 1)
        block = max(1, BLOCK_BYTES // (2 * inner))
        pairs = factor.form == "plain"
        given = outputs, inner, self._count, block, int(factor.biased), threads
        self._program.call(kernels.dense(pairs), first, *rows, bias, made, *given)
