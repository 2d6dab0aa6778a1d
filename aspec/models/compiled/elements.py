"""Kernels of single numbers and rows: the norm by the mean of squares, and the gate of a feed-forward layer.

As transformers writes them they are up to eight calls of torch. Each runs over a few thousand numbers in a microsecond,
and takes ten more where the weights of other layers have pushed everything else out of the caches.
"""

from aspec.models.compiled.emit import F32, I16, I32, Kernel, Value, number

VANISHED = -100.0  # exponentials of smaller numbers count as 0
CHAINS = 4  # sums of squares that run beside each other


def norm_kernel(lanes: int, *, parallel: bool) -> str:
    """``run(rows, weight, made, count, width, eps, rounded, offset, threads)``: x / sqrt(mean(x^2) + eps) * weight.

    ``rows`` bf16 [count, width], ``weight`` bf16 [width], ``made`` as ``rows``; ``width`` in whole vectors. ``eps``:
    the bits of a number in fp32. All is in fp32 and rounded once; if ``rounded``, also before the weight. ``offset``:
    1 where weights are stored less 1, else 0.
    """
    kernel = Kernel((I16, I16, I16), 5, lanes, parallel=parallel)
    build, (rows, weight, made), (_, width, eps, rounded, offset) = kernel.builder, kernel.pointers, kernel.counts
    once = build.icmp_signed("==", rounded, number(0))
    added = kernel.spread(build.sitofp(offset, F32))
    several = kernel.whole(number(0), width, CHAINS * lanes)
    with kernel.loop(kernel.first, kernel.last, 1) as each:
        row, out = (kernel.at(own, build.mul(each.index, width)) for own in (rows, made))
        with kernel.loop(number(0), several, CHAINS * lanes, [kernel.zeros()] * CHAINS) as squares:
            values = [_wide(kernel, row, squares.index, number(at * lanes)) for at in range(CHAINS)]
            squares.values = [kernel.fma(own, own, total) for own, total in zip(values, squares.values, strict=True)]
        total = squares.values[0]
        for other in squares.values[1:]:
            total = build.fadd(total, other)
        with kernel.loop(several, width, lanes, [total]) as rest:
            value = _wide(kernel, row, rest.index)
            rest.values = [kernel.fma(value, value, rest.values[0])]
        mean = build.fdiv(kernel.total(rest.values[0]), build.sitofp(width, F32))
        given = build.bitcast(build.trunc(eps, I32), F32)
        scale = kernel.spread(build.fdiv(F32(1.0), kernel.root(build.fadd(mean, given))))
        with kernel.loop(number(0), width, lanes) as all_:
            normed = build.fmul(_wide(kernel, row, all_.index), scale)
            normed = build.select(once, normed, kernel.widened(kernel.narrowed(normed)))
            product = build.fmul(normed, build.fadd(_wide(kernel, weight, all_.index), added))
            kernel.store(kernel.narrowed(product), kernel.at(out, all_.index))
    build.ret_void()
    return str(kernel)


def gate_kernel(lanes: int, *, parallel: bool) -> str:
    """``run(gate, up, made, count, width, gate_stride, up_stride, threads)``: g / (1 + exp(-g)) rounded, times ``up``.

    bf16 [count, width], whole vectors; strides from row to row. The product is rounded, too.
    """
    kernel = Kernel((I16, I16, I16), 4, lanes, parallel=parallel)
    build, width = kernel.builder, kernel.counts[1]
    strides = (*kernel.counts[2:], width)
    with kernel.loop(kernel.first, kernel.last, 1) as each:
        starts = zip(kernel.pointers, strides, strict=True)
        rows = [kernel.at(own, build.mul(each.index, stride)) for own, stride in starts]
        with kernel.loop(number(0), width, lanes) as vectors:
            _gate(kernel, rows, vectors.index)
    build.ret_void()
    return str(kernel)


def _gate(kernel: Kernel, rows: "list[Value]", place: Value) -> None:
    """One vector of a row: of its gate and its factor, made at the third."""
    build, (gate, up, made) = kernel.builder, rows
    value = _wide(kernel, gate, place)
    negative = build.fcmp_ordered("<", value, kernel.zeros())
    power = kernel.exp(build.select(negative, value, build.fneg(value)))  # of numbers up to 0; NaN stays
    vanished = build.fcmp_ordered("<", value, kernel.numbers(VANISHED))  # minus infinity becomes NaN as in torch
    factor = build.select(vanished, kernel.zeros(), power)
    numerator = build.select(negative, build.fmul(value, factor), value)
    acted = kernel.narrowed(build.fdiv(numerator, build.fadd(kernel.numbers(1.0), power)))
    product = build.fmul(kernel.widened(acted), _wide(kernel, up, place))
    kernel.store(kernel.narrowed(product), kernel.at(made, place))


def _wide(kernel: Kernel, start: Value, *indices: Value) -> Value:
    """A vector of bf16 from memory in fp32."""
    return kernel.widened(kernel.load(kernel.at(start, *indices), I16, kernel.lanes))
