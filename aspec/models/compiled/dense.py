"""The product of rows with a weight in bf16, as a kernel: every output is a sum of its own over the inputs.

Tiles of a few rows and outputs are computed together, so that a loaded number serves several sums. How many does not
change a sum: it runs over the inputs vector by vector, in fp32, and its lanes are added at the end. So a row has the
same bits beside any other rows, and with any number of threads.
Where the processor multiplies pairs of numbers in bf16, rows stay in bf16; elsewhere they are given in fp32.
"""

from collections.abc import Sequence

from aspec.models.compiled.emit import F32, I16, Kernel, Value, number

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
    count, block = kernel.counts[2:4]
    tiles = TILES_OF_PAIRS if pairs else TILES
    with kernel.loop(kernel.first, kernel.last, block) as blocks:
        last = kernel.least(kernel.builder.add(blocks.index, block), kernel.last)
        start: Value = number(0)
        for largest, (num_rows, width) in enumerate(tiles):
            whole = kernel.whole(start, count, num_rows)
            for ahead, stop in _ahead(kernel, start, whole, num_rows) if largest == 0 else ((NEXT, whole),):
                with kernel.loop(start, stop, num_rows) as rows:
                    _Tile(kernel, rows.index, num_rows, pairs=pairs, ahead=ahead).write(blocks.index, last, width)
                start = stop
    kernel.builder.ret_void()
    return str(kernel)


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

    def __init__(self, kernel: Kernel, row: Value, num_rows: int, *, pairs: bool, ahead: int) -> None:
        self.kernel, self.pairs, self.ahead = kernel, pairs, ahead
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
        kernel, build, bias = self.kernel, self.kernel.builder, self.kernel.pointers[2]
        outputs, step = kernel.counts[0], kernel.counts[4]
        sums = self._sums(block, first, width)
        together = min(width, kernel.lanes)
        for start in range(0, width, together):
            at = build.add(first, number(start))
            places = [build.add(at, number(own)) for own in range(together)]
            added = kernel.joined([build.load(kernel.at(bias, build.mul(own, step))) for own in places])
            for rows in _runs(range(len(self.rows)), kernel.lanes // together):
                totals = kernel.totals([sums[row * width + start + own] for row in rows for own in range(together)])
                for place, row in enumerate(rows):
                    own = kernel.some(totals, range(place * together, (place + 1) * together))
                    made = kernel.at(kernel.pointers[3], build.mul(self.rows[row], outputs), at)
                    kernel.store(kernel.narrowed(build.fadd(own, added)), made)

    def _sums(self, block: Value, first: Value, width: int) -> "list[Value]":
        """Vectors that add up to the outputs: of the first row, then of the second one."""
        kernel, build, (weight, rows, *_) = self.kernel, self.kernel.builder, self.kernel.pointers
        inputs, loaded = kernel.counts[1], kernel.lanes * (2 if self.pairs else 1)
        row_starts = [kernel.at(rows, build.mul(row, inputs)) for row in self.rows]
        starts = [kernel.at(weight, build.mul(build.add(first, number(own)), inputs)) for own in range(width)]
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
        kernel, build, weight, inputs = self.kernel, self.kernel.builder, self.kernel.pointers[0], self.kernel.counts[1]
        if self.ahead == NOTHING:
            return
        start, parts = kernel.at(weight, build.mul(build.add(first, number(width)), inputs), place), 1
        if self.ahead == BLOCK:
            size, parts = kernel.counts[3], PARTS
            tile = build.sdiv(self.rows[0], number(len(self.rows)))
            before = build.mul(build.add(build.mul(tile, size), build.sub(first, block)), inputs)
            share = build.sdiv(build.add(before, place), number(parts))
            start = kernel.at(weight, build.mul(build.add(block, size), inputs), share)
        for line in range(0, count // parts, LINE):
            kernel.prefetch(kernel.at(start, number(line)))


def _runs(items: Sequence[int], size: int) -> "list[Sequence[int]]":
    """``items`` in runs of ``size``."""
    return [items[at : at + size] for at in range(0, len(items), size)]
