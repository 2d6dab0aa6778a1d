"""The product of rows with a weight in bf16, as a kernel: every output is a sum of its own over the inputs.

Tiles of a few rows and outputs are computed together, so that a loaded number serves several sums. How many does not
change a sum: it runs over the inputs vector by vector, in fp32, and its lanes are added at the end. So a row has the
same bits beside any other rows, and with any number of threads.
"""

from aspec.models.compiled.emit import F32, I16, Kernel, Value, number

TILES = ((4, 3), (2, 4), (1, 8))
"""Rows and outputs of a tile, the largest first: as many sums as registers hold, and enough to hide their latency."""

LINE = 32  # numbers in bf16 of a cache line


def dense_kernel(lanes: int, *, parallel: bool) -> str:
    """``run(weight, rows, bias, made, outputs, inputs, count, block, step, threads)``.

    ``weight`` bf16 [outputs, inputs], ``rows`` fp32 [count, inputs], ``made`` bf16 [count, outputs]; inputs are a
    multiple of ``lanes``. ``bias`` fp32: one for every output if ``step`` is 1, one for all if it is 0. ``block``:
    outputs whose weights stay in a cache while all rows pass.
    """
    kernel = Kernel((I16, F32, F32, I16), 5, lanes, parallel=parallel)
    block = kernel.counts[3]
    with kernel.loop(kernel.first, kernel.last, block) as blocks:
        last = kernel.least(kernel.builder.add(blocks.index, block), kernel.last)
        start: Value = number(0)
        for num_rows, width in TILES:
            stop = kernel.whole(start, kernel.counts[2], num_rows)
            with kernel.loop(start, stop, num_rows) as rows:
                _outputs(kernel, rows.index, num_rows, blocks.index, last, width)
            start = stop
    kernel.builder.ret_void()
    return str(kernel)


def _outputs(kernel: Kernel, row: Value, num_rows: int, first: Value, last: Value, width: int) -> None:
    """Some rows of a block of outputs."""
    stop = kernel.whole(first, last, width)
    with kernel.loop(first, stop, width) as whole:
        _tile(kernel, row, num_rows, whole.index, width)
    with kernel.loop(stop, last, 1) as rest:
        _tile(kernel, row, num_rows, rest.index, 1)


def _tile(kernel: Kernel, row: Value, num_rows: int, output: Value, width: int) -> None:
    build, (weight, rows, bias, made) = kernel.builder, kernel.pointers
    outputs, inputs, _, _, step = kernel.counts
    own = [build.add(row, number(at)) for at in range(num_rows)]
    to = [build.add(output, number(at)) for at in range(width)]
    row_starts = [kernel.at(rows, build.mul(at, inputs)) for at in own]
    weight_starts = [kernel.at(weight, build.mul(at, inputs)) for at in to]
    with kernel.loop(number(0), inputs, kernel.lanes, [kernel.zeros()] * (num_rows * width)) as sums:
        weights = [
            kernel.widened(kernel.load(kernel.at(start, sums.index), I16, kernel.lanes)) for start in weight_starts
        ]
        ahead = kernel.at(weight_starts[0], build.mul(inputs, number(width)), build.mul(sums.index, number(width)))
        for line in range(0, width * kernel.lanes, LINE):
            kernel.prefetch(kernel.at(ahead, number(line)))
        values = [kernel.load(kernel.at(start, sums.index), F32, kernel.lanes) for start in row_starts]
        pairs = [(value, factor) for value in values for factor in weights]
        sums.values = [kernel.fma(*pair, total) for pair, total in zip(pairs, sums.values, strict=True)]
    for place, total in enumerate(sums.values):
        at, out = own[place // width], to[place % width]
        added = build.load(kernel.at(bias, build.mul(out, step)))
        value = kernel.narrowed(build.fadd(kernel.total(total), added))
        build.store(value, kernel.at(made, build.mul(at, outputs), out))
