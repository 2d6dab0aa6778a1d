"""The product of rows with a weight in bf16, as a kernel: every output is a sum of its own over the inputs.

Tiles of a few rows and outputs are computed together, so that a loaded number serves several sums. How many does not
change a sum: it runs over the inputs vector by vector, in fp32, and its lanes are added at the end. So a row has the
same bits beside any other rows, and with any number of threads.
Where the processor multiplies pairs of numbers in bf16, rows stay in bf16; elsewhere they are given in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from aspec.models.compiled.emit import F32, I16, I64, Kernel, Value, number

TILES = ((4, 3), (2, 4), (1, 8))
"""Rows and outputs of a tile, the largest first: as many sums as registers hold, and enough to hide their latency."""

TILES_OF_PAIRS = ((4, 4), (2, 8), (1, 8))
"""The same for pairs, which are not widened, and with twice as many registers."""

LINE = 32  # numbers in bf16 of a cache line


def dense_kernel(lanes: int, *, pairs: bool, parallel: bool) -> str:
    """``run(weight, rows, bias, made, outputs, inputs, count, block, step, threads)``.

    ``weight`` bf16 [outputs, inputs], ``rows`` fp32, or bf16 if they are multiplied in ``pairs``, [count, inputs],
    ``made`` bf16 [count, outputs]; inputs are a multiple of the numbers that are loaded at once. ``bias`` fp32: one for
    every output if ``step`` is 1, one for all if it is 0. ``block``: outputs whose weights stay in a cache while all
    rows pass.
    """
    kernel = Kernel((I16, I16 if pairs else F32, F32, I16), 5, lanes, parallel=parallel)
    weight, rows, bias, made = kernel.pointers
    _, inputs, count, block, step = kernel.counts
    one = Operands(weight, rows, made, inputs, kernel.counts[0], block, (bias, step))
    _product(kernel, one, (kernel.first, kernel.last), (number(0), count), pairs=pairs)
    kernel.builder.ret_void()
    return str(kernel)


def several_kernel(lanes: int, *, pairs: bool, parallel: bool) -> str:
    """``run(weights, starts, rows, made, number, outputs, inputs, block, threads)``: rows in groups, a weight for each.

    ``weights``: the addresses of as many weights, bf16 [outputs, inputs]; ``starts``: where the rows of each group
    begin, and where the last ones end; ``number``: of all outputs, those of one weight after those of another. The rest
    as in ``dense_kernel``, without a bias, and with its bits.
    """
    kernel = Kernel((I64, I64, I16 if pairs else F32, I16), 4, lanes, parallel=parallel)
    build, (weights, starts, rows, made), (_, outputs, inputs, block) = kernel.builder, kernel.pointers, kernel.counts
    last_group = build.add(build.sdiv(build.sub(kernel.last, number(1)), outputs), number(1))
    with kernel.loop(build.sdiv(kernel.first, outputs), last_group, 1) as groups:
        before = build.mul(groups.index, outputs)
        first = kernel.most(build.sub(kernel.first, before), number(0))
        last = kernel.least(build.sub(kernel.last, before), outputs)
        weight = build.inttoptr(build.load(kernel.at(weights, groups.index)), I16.as_pointer())
        own = [build.load(kernel.at(starts, groups.index, number(at))) for at in range(2)]
        one = Operands(weight, rows, made, inputs, outputs, block, None)
        _product(kernel, one, (first, last), (own[0], own[1]), pairs=pairs)
    build.ret_void()
    return str(kernel)


@dataclass(frozen=True)
class Operands:
    """What a product is made of: pointers and counts."""

    weight: Value
    rows: Value
    made: Value
    inputs: Value
    outputs: Value  # in a row of what is made
    block: Value
    bias: tuple[Value, Value] | None  # and its step


def _product(
    kernel: Kernel, own: Operands, outputs: tuple[Value, Value], rows: tuple[Value, Value], *, pairs: bool
) -> None:
    """The outputs and rows from the first to before the last ones."""
    tiles = TILES_OF_PAIRS if pairs else TILES
    with kernel.loop(*outputs, own.block) as blocks:
        last = kernel.least(kernel.builder.add(blocks.index, own.block), outputs[1])
        start = rows[0]
        for largest, (num_rows, width) in enumerate(tiles):
            whole = kernel.whole(start, rows[1], num_rows)
            for ahead, stop in _ahead(kernel, start, whole, num_rows) if largest == 0 else ((NEXT, whole),):
                with kernel.loop(start, stop, num_rows) as each:
                    tile = _Tile(kernel, own, rows[0], each.index, num_rows, pairs=pairs, ahead=ahead)
                    tile.write(blocks.index, last, width)
                start = stop


NOTHING, NEXT, BLOCK = range(3)
"""What a tile reads ahead: nothing, the weights of its next outputs, or its part of the next block's."""

PARTS = 4  # of a block's weights, each read ahead by one tile


def _ahead(kernel: Kernel, first: Value, whole: Value, size: int) -> "list[tuple[int, Value]]":
    """What the largest tiles read ahead, and where those that read it end.

    If there are enough, the first ones read the next block together: so it comes while they multiply.
    """
    build = kernel.builder
    stop = build.add(first, number(PARTS * size))
    several = build.select(build.icmp_signed("<=", stop, whole), stop, first)
    one = kernel.least(build.add(first, number(size)), whole)
    alone = build.select(build.icmp_signed("==", several, first), one, several)
    return [(BLOCK, several), (NEXT, alone), (NOTHING, whole)]


class _Tile:
    """Some rows of a block of outputs, while the kernel is written; ``ahead``: what it reads ahead."""

    def __init__(
        self, kernel: Kernel, own: Operands, first_row: Value, row: Value, num_rows: int, *, pairs: bool, ahead: int
    ) -> None:
        self.kernel, self.own, self.pairs, self.ahead = kernel, own, pairs, ahead
        self.number = kernel.builder.sdiv(kernel.builder.sub(row, first_row), number(num_rows))  # of the tile
        self.rows = [kernel.builder.add(row, number(at)) for at in range(num_rows)]

    def write(self, first: Value, last: Value, width: int) -> None:
        """The outputs from ``first`` to before ``last``, ``width`` of them at a time, then one by one."""
        kernel = self.kernel
        stop = kernel.whole(first, last, width)
        with kernel.loop(first, stop, width) as whole:
            self._outputs(first, whole.index, width)
        with kernel.loop(stop, last, 1) as rest:
            self._outputs(first, rest.index, 1)

    def _outputs(self, block: Value, first: Value, width: int) -> None:
        kernel, build = self.kernel, self.kernel.builder
        sums = self._sums(block, first, width)
        together = min(width, kernel.lanes)
        for start in range(0, width, together):
            at = build.add(first, number(start))
            added = None
            if self.own.bias is not None:
                bias, step = self.own.bias
                places = [build.add(at, number(own)) for own in range(together)]
                added = kernel.joined([build.load(kernel.at(bias, build.mul(own, step))) for own in places])
            for rows in _runs(range(len(self.rows)), kernel.lanes // together):
                totals = kernel.totals([sums[row * width + start + own] for row in rows for own in range(together)])
                for place, row in enumerate(rows):
                    own = kernel.some(totals, range(place * together, (place + 1) * together))
                    made = kernel.at(self.own.made, build.mul(self.rows[row], self.own.outputs), at)
                    kernel.store(kernel.narrowed(own if added is None else build.fadd(own, added)), made)

    def _sums(self, block: Value, first: Value, width: int) -> "list[Value]":
        """Vectors that add up to the outputs: of the first row, then of the second one."""
        kernel, build, inputs = self.kernel, self.kernel.builder, self.own.inputs
        loaded = kernel.lanes * (2 if self.pairs else 1)
        row_starts = [kernel.at(self.own.rows, build.mul(row, inputs)) for row in self.rows]
        starts = [kernel.at(self.own.weight, build.mul(build.add(first, number(own)), inputs)) for own in range(width)]
        with kernel.loop(number(0), inputs, loaded, [kernel.zeros()] * (len(self.rows) * width)) as sums:
            weights = [kernel.load(kernel.at(start, sums.index), I16, loaded) for start in starts]
            self._read_ahead(block, first, build.mul(sums.index, number(width)), width, width * loaded)
            kind = I16 if self.pairs else F32
            values = [kernel.load(kernel.at(start, sums.index), kind, loaded) for start in row_starts]
            factors = weights if self.pairs else [kernel.widened(own) for own in weights]
            add = kernel.fma_pairs if self.pairs else kernel.fma
            products = [(value, factor) for value in values for factor in factors]
            sums.values = [add(*pair, total) for pair, total in zip(products, sums.values, strict=True)]
        return list(sums.values)

    def _read_ahead(self, block: Value, first: Value, place: Value, width: int, count: int) -> None:
        """Of what is read ahead the share of one step, ``count`` numbers from ``place`` on of some outputs."""
        kernel, build, weight, inputs = self.kernel, self.kernel.builder, self.own.weight, self.own.inputs
        if self.ahead == NOTHING:
            return
        start, parts = kernel.at(weight, build.mul(build.add(first, number(width)), inputs), place), 1
        if self.ahead == BLOCK:
            size, parts = self.own.block, PARTS
            before = build.mul(build.add(build.mul(self.number, size), build.sub(first, block)), inputs)
            share = build.sdiv(build.add(before, place), number(parts))
            start = kernel.at(weight, build.mul(build.add(block, size), inputs), share)
        for line in range(0, count // parts, LINE):
            kernel.prefetch(kernel.at(start, number(line)))


def _runs(items: Sequence[int], size: int) -> "list[Sequence[int]]":
    """``items`` in runs of ``size``."""
    return [items[at : at + size] for at in range(0, len(items), size)]
