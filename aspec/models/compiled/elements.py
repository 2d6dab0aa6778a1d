"""Kernels of single numbers and rows: norms by the mean of squares, gates, sums, and keys and queries that are turned.

As transformers writes them they are up to eight calls of torch. Each runs over a few thousand numbers in a microsecond,
and takes ten more where the weights of other layers have pushed everything else out of the caches.
"""

from aspec.models.compiled.emit import F32, I16, I32, I64, Kernel, Loop, Value, number

VANISHED = -100.0  # exponentials of smaller numbers count as 0
VECTOR, TURNED = 16, 8  # numbers that are counted together; numbers of a head that are turned together
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


def add_kernel(lanes: int, *, parallel: bool) -> str:
    """``run(one, other, made, vectors, threads)``: sums of bf16 in so many vectors of 16 numbers, rounded."""
    kernel = Kernel((I16, I16, I16), 1, lanes, parallel=parallel)
    build, (one, other, made) = kernel.builder, kernel.pointers
    with _vectors(kernel) as numbers:
        total = build.fadd(_wide(kernel, one, numbers.index), _wide(kernel, other, numbers.index))
        kernel.store(kernel.narrowed(total), kernel.at(made, numbers.index))
    build.ret_void()
    return str(kernel)


def widen_kernel(lanes: int, *, parallel: bool) -> str:
    """``run(rows, made, vectors, threads)``: bf16 as fp32, so many vectors of 16 numbers."""
    kernel = Kernel((I16, F32), 1, lanes, parallel=parallel)
    with _vectors(kernel) as numbers:
        kernel.store(_wide(kernel, kernel.pointers[0], numbers.index), kernel.at(kernel.pointers[1], numbers.index))
    kernel.builder.ret_void()
    return str(kernel)


def rotary_kernel(*, parallel: bool) -> str:
    """``run(query, key, value, cos, sin, keys, values, places, tokens, heads, groups, width, stride, threads)``.

    bf16: ``query`` [tokens, heads, width] is turned in place; ``key`` and ``value`` [tokens, groups, width] are put
    into a cache, keys turned, where ``places`` int64 [tokens, 2] say; its heads are ``stride`` apart. ``cos`` and
    ``sin`` [tokens, width]. x cos + rotate_half(x) sin, every result rounded (Su et al., arXiv 2104.09864); half of
    ``width`` is a multiple of TURNED.
    """
    kernel = Kernel((I16,) * 7 + (I64,), 5, TURNED, parallel=parallel)
    build, (query, key, value, cos, sin, keys, values, places) = kernel.builder, kernel.pointers
    _, heads, groups, width, stride = kernel.counts
    with kernel.loop(kernel.first, kernel.last, 1) as tokens:
        angles = [kernel.at(own, build.mul(tokens.index, width)) for own in (cos, sin)]
        with kernel.loop(number(0), heads, 1) as each:
            own = kernel.at(query, build.mul(build.add(build.mul(tokens.index, heads), each.index), width))
            _turn(kernel, own, own, angles, width)
        pair = build.mul(tokens.index, number(2))
        at_key, at_value = (build.load(kernel.at(places, pair, number(side))) for side in range(2))
        with kernel.loop(number(0), groups, 1) as each:
            start = build.mul(build.add(build.mul(tokens.index, groups), each.index), width)
            head = build.mul(each.index, stride)
            _turn(kernel, kernel.at(key, start), kernel.at(keys, at_key, head), angles, width)
            with kernel.loop(number(0), width, TURNED) as numbers:
                own = kernel.load(kernel.at(value, start, numbers.index), I16, TURNED)
                kernel.store(own, kernel.at(values, at_value, head, numbers.index))
    build.ret_void()
    return str(kernel)


def _turn(kernel: Kernel, row: Value, made: Value, angles: "list[Value]", width: Value) -> None:
    """One head: the halves of its numbers are the sides of the planes that turn."""
    build = kernel.builder
    half = build.sdiv(width, number(2))
    with kernel.loop(number(0), half, TURNED) as numbers:
        sides = [numbers.index, build.add(numbers.index, half)]
        one, other = (_wide(kernel, row, side) for side in sides)
        for side, own, turned in ((sides[0], one, build.fneg(other)), (sides[1], other, one)):
            parts = [
                kernel.widened(kernel.narrowed(build.fmul(factor, _wide(kernel, angle, side))))
                for factor, angle in zip((own, turned), angles, strict=True)
            ]
            kernel.store(kernel.narrowed(build.fadd(*parts)), kernel.at(made, side))


def _vectors(kernel: Kernel) -> Loop:
    """A loop over the numbers of vectors of 16, which are counted."""
    first, last = (kernel.builder.mul(own, number(VECTOR)) for own in (kernel.first, kernel.last))
    return kernel.loop(first, last, kernel.lanes)


def _wide(kernel: Kernel, start: Value, *indices: Value) -> Value:
    """A vector of bf16 from memory in fp32."""
    return kernel.widened(kernel.load(kernel.at(start, *indices), I16, kernel.lanes))
