"""The product of rows with a weight of 4 bits (``formats/int4/form.py``), as a kernel: outputs lie in the lanes.

A group of inputs that share a scale is summed with its codes as they are, and the scale and the offset are put in at
the end of the group: sum x (c - 8) s + x o = s sum x c + (o - 8 s) sum x. Every output is a sum of its own over the
inputs one after another, in fp32, so a row has the same bits beside any other rows, and with any number of threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from aspec.models.compiled.emit import F32, I8, I16, I32, Kernel, Value, number
from aspec.models.formats.int4.form import ZERO

NIBBLES = (0, 4)
"""Shifts of a byte: its low bits are of an output in the first half of a block, its high ones of one in the second."""

TILES = ((4, ((0,), (4,))), (1, (NIBBLES,)))
"""Rows of a tile, the largest first, and the nibbles that are computed together: as many sums as registers hold."""


def int4_kernel(lanes: int, block: int, *, parallel: bool) -> str:
    """``run(codes, pairs, rows, made, blocks, inputs, count, group, threads)``, with ``block`` outputs in a block.

    ``codes`` and ``pairs`` (scales): as ``Int4`` says; ``rows`` fp32 [count, inputs], ``made`` bf16 [count, outputs].
    """
    kernel = Kernel((I8, I32, F32, I16), 4, lanes, parallel=parallel)
    with kernel.loop(kernel.first, kernel.last, 1) as blocks:
        start: Value = number(0)
        for num_rows, parts in TILES:
            stop = kernel.whole(start, kernel.counts[2], num_rows)
            with kernel.loop(start, stop, num_rows) as rows:
                for shifts in parts:
                    _Tile(kernel, block, blocks.index, rows.index, num_rows, shifts).write()
            start = stop
    kernel.builder.ret_void()
    return str(kernel)


@dataclass(frozen=True)
class _Tile:
    """Some rows of a block: the outputs of some nibbles."""

    kernel: Kernel
    block: int
    index: Value  # of the block
    row: Value
    num_rows: int
    shifts: Sequence[int]

    def write(self) -> None:
        """Sum over all groups, round, and store."""
        kernel, build = self.kernel, self.kernel.builder
        _, inputs, _, group = kernel.counts
        width = len(self.shifts) * self.vectors
        with kernel.loop(number(0), inputs, group, [kernel.zeros()] * (self.num_rows * width)) as groups:
            sums = self._group(groups.index)
            pairs = [self._pair(build.sdiv(groups.index, group), place) for place in range(width)]
            added = [self._sum(row, groups.index) for row in range(self.num_rows)]
            groups.values = [
                kernel.fma(own, pairs[at % width][0], kernel.fma(added[at // width], pairs[at % width][1], total))
                for at, (own, total) in enumerate(zip(sums, groups.values, strict=True))
            ]
        outputs = build.mul(kernel.counts[0], number(self.block))
        for at, total in enumerate(groups.values):
            place = kernel.at(kernel.pointers[3], build.mul(self._row(at // width), outputs), self._output(at % width))
            kernel.store(kernel.narrowed(total), place)

    @property
    def vectors(self) -> int:
        """Vectors of one half of a block."""
        return self.block // 2 // self.kernel.lanes

    def _row(self, at: int) -> Value:
        return self.kernel.builder.add(self.row, number(at))

    def _output(self, place: int) -> Value:
        """The first output of a vector."""
        half, vector = divmod(place, self.vectors)
        own = self.shifts[half] // 4 * self.block // 2 + vector * self.kernel.lanes
        return self.kernel.builder.add(self.kernel.builder.mul(self.index, number(self.block)), number(own))

    def _group(self, first: Value) -> list[Value]:
        """By row and vector: the sum over one group of inputs, with the codes as they are."""
        kernel, build = self.kernel, self.kernel.builder
        _, inputs, _, group = kernel.counts
        rows = [kernel.at(kernel.pointers[2], build.mul(self._row(at), inputs)) for at in range(self.num_rows)]
        block = kernel.at(kernel.pointers[0], build.mul(build.mul(self.index, inputs), number(self.block // 2)))
        zeros = [kernel.zeros()] * (self.num_rows * len(self.shifts) * self.vectors)
        with kernel.loop(first, build.add(first, group), 1, zeros) as each:
            codes = self._codes(kernel.at(block, build.mul(each.index, number(self.block // 2))))
            values = [kernel.spread(build.load(kernel.at(start, each.index))) for start in rows]
            terms = [(value, code) for value in values for code in codes]
            each.values = [kernel.fma(*term, total) for term, total in zip(terms, each.values, strict=True)]
        return list(each.values)

    def _codes(self, place: Value) -> list[Value]:
        """The codes of one input in fp32, those of high bits 16 times as large."""
        kernel, build = self.kernel, self.kernel.builder
        kind = ir.VectorType(I32, kernel.lanes)
        stored = [
            kernel.load(kernel.at(place, number(at * kernel.lanes)), I8, kernel.lanes) for at in range(self.vectors)
        ]
        whole = [build.zext(own, kind) for own in stored]
        masks = [kernel.whole_numbers(15 << shift) for shift in self.shifts]
        return [build.sitofp(build.and_(own, mask), kernel.vector) for mask in masks for own in whole]

    def _pair(self, group: Value, place: int) -> tuple[Value, Value]:
        """Scales, and offsets less the scaled zero, of one vector of outputs."""
        kernel, build = self.kernel, self.kernel.builder
        outputs = build.mul(kernel.counts[0], number(self.block))
        at = kernel.at(kernel.pointers[1], build.mul(group, outputs), self._output(place))
        both = kernel.load(at, I32, kernel.lanes)
        scale = build.bitcast(build.shl(both, kernel.whole_numbers(16)), kernel.vector)
        offset = build.bitcast(build.and_(both, kernel.whole_numbers(0xFFFF0000)), kernel.vector)
        less = kernel.fma(scale, kernel.numbers(-float(ZERO)), offset)
        return build.fmul(scale, kernel.numbers(2.0 ** -self.shifts[place // self.vectors])), less

    def _sum(self, row: int, first: Value) -> Value:
        """The sum of one row over one group, in all lanes."""
        kernel, build = self.kernel, self.kernel.builder
        _, inputs, _, group = kernel.counts
        start = kernel.at(kernel.pointers[2], build.mul(self._row(row), inputs))
        with kernel.loop(first, build.add(first, group), kernel.lanes, [kernel.zeros()]) as each:
            each.values = [build.fadd(each.values[0], kernel.load(kernel.at(start, each.index), F32, kernel.lanes))]
        return kernel.spread(kernel.total(each.values[0]))
