"""Writes a kernel in LLVM's intermediate language: loops, vectors of fp32, and the division of work among threads.

A kernel is a function ``run`` of pointers and counts. It calls ``part`` on every thread, which computes an equal share
of the outputs. Fused multiply-adds stand where they are written, and nothing allows LLVM to change the order of a sum,
so the bits follow from this text alone.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

I8, I16, I32, I64, F32, VOID = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType(), ir.VoidType())

EXP_TERMS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
LOG2_E, LN2_HIGH, LN2_LOW, LEAST_EXPONENT = 1.44269504088896341, 0.693145751953125, 1.42860682030941723e-6, -87.0

Value = Any
"""A value of LLVM, which has no types for Python."""


class Kernel:
    """One kernel while it is written; ``builder`` writes at the end of ``part``."""

    def __init__(self, pointers: Sequence[Value], counts: int, lanes: int, *, parallel: bool) -> None:
        """``pointers``: their element types; ``counts``: numbers of 64 bits after them; the first is divided.

        ``lanes``: numbers of a vector. ``parallel``: there is an OpenMP runtime that calls ``part`` on its threads.
        """
        self.lanes, self._module = lanes, ir.Module()
        kinds = [*(kind.as_pointer() for kind in pointers), *(I64,) * counts]
        self._arguments = ir.LiteralStructType(kinds)
        self._part = self._function("part", VOID, [self._arguments.as_pointer()])
        self.builder = ir.IRBuilder(self._part.append_basic_block())
        self.vector = ir.VectorType(F32, lanes)
        self._fma = self._function(f"llvm.fma.v{lanes}f32", self.vector, [self.vector] * 3)
        self._nearest = self._function(f"llvm.nearbyint.v{lanes}f32", self.vector, [self.vector])
        self._prefetch = self._function("llvm.prefetch.p0", VOID, [I8.as_pointer(), I32, I32, I32])
        values = [self.builder.load(_field(self.builder, self._part.args[0], at)) for at in range(len(kinds))]
        self.pointers, self.counts = values[: len(pointers)], values[len(pointers) :]
        self.first, self.last = self._share(self.counts[0]) if parallel else (number(0), self.counts[0])
        self._finish(kinds, parallel)

    def __str__(self) -> str:
        return str(self._module)

    def _function(self, name: str, result: Value, arguments: Sequence[Value]) -> Value:
        return ir.Function(self._module, ir.FunctionType(result, arguments), name)

    def _share(self, count: Value) -> tuple[Value, Value]:
        """The first and the number after the last one of this thread's share of ``count``."""
        own, all_ = (
            self.builder.sext(self.builder.call(self._function(f"omp_get_{name}", I32, []), []), I64)
            for name in ("thread_num", "num_threads")
        )
        bounds = (own, self.builder.add(own, number(1)))
        first, last = (self.builder.sdiv(self.builder.mul(count, bound), all_) for bound in bounds)
        return first, last

    def _finish(self, kinds: Sequence[Value], parallel: bool) -> None:
        """Write ``run``: it puts its arguments into a record and has every thread compute its part."""
        run = self._function("run", VOID, [*kinds, I32])
        builder = ir.IRBuilder(run.append_basic_block())
        record = builder.alloca(self._arguments)
        for at, value in enumerate(run.args[:-1]):
            builder.store(value, _field(builder, record, at))
        if parallel:
            kinds = [self._part.type, self._arguments.as_pointer(), I32, I32]
            builder.call(self._function("GOMP_parallel", VOID, kinds), [self._part, record, run.args[-1], I32(0)])
        else:
            builder.call(self._part, [record])
        builder.ret_void()

    # -- values ----------------------------------------------------------------------------------------------

    def zeros(self) -> Value:
        """A vector of zeros."""
        return self.numbers(0.0)

    def numbers(self, value: float) -> Value:
        """A vector of the same number."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def whole_numbers(self, value: int) -> Value:
        """A vector of the same number of 32 bits."""
        return ir.Constant(ir.VectorType(I32, self.lanes), [value] * self.lanes)

    def spread(self, value: Value) -> Value:
        """A number in all lanes of a vector."""
        first = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), value, I32(0))
        return self._lanes(first, [0] * self.lanes)

    def fma(self, one: Value, other: Value, added: Value) -> Value:
        """``one * other + added``, rounded once; vectors."""
        return self.builder.call(self._fma, [one, other, added])

    def at(self, pointer: Value, *indices: Value) -> Value:
        """The pointer that many elements further: the sum of ``indices``."""
        for index in indices:
            pointer = self.builder.gep(pointer, [index])
        return pointer

    def load(self, pointer: Value, kind: Value, lanes: int) -> Value:
        """A vector from memory of any alignment."""
        value = self.builder.load(self.builder.bitcast(pointer, ir.VectorType(kind, lanes).as_pointer()))
        value.align = 1
        return value

    def prefetch(self, pointer: Value) -> None:
        """Have a cache line read that will be used soon; any address will do."""
        address = self.builder.bitcast(pointer, I8.as_pointer())
        self.builder.call(self._prefetch, [address, I32(0), I32(3), I32(1)])

    def widened(self, values: Value) -> Value:
        """A vector of bf16, given as I16, in fp32: their bits are its upper half."""
        bits = self.builder.zext(values, ir.VectorType(I32, self.lanes))
        return self.builder.bitcast(self.builder.shl(bits, self.whole_numbers(16)), self.vector)

    def narrowed(self, value: Value) -> Value:
        """A number in fp32, or a vector, as bf16 (I16): rounded to the nearest, of two as near the even one."""
        build, lanes = self.builder, value.type.count if isinstance(value.type, ir.VectorType) else 0
        kind, narrow = (ir.VectorType(I32, lanes), ir.VectorType(I16, lanes)) if lanes else (I32, I16)

        def whole(own: int) -> Value:
            return ir.Constant(kind, [own] * lanes if lanes else own)

        bits = build.bitcast(value, kind)
        odd = build.and_(build.lshr(bits, whole(16)), whole(1))
        rounded = build.add(bits, build.add(odd, whole(0x7FFF)))
        kept = build.select(build.fcmp_unordered("uno", value, value), whole(0x7FC00000), rounded)
        return build.trunc(build.lshr(kept, whole(16)), narrow)

    def total(self, values: Value) -> Value:
        """The sum of a vector: its halves are added until one number is left."""
        width = self.lanes
        while width > 1:
            width //= 2
            halves = [self._lanes(values, range(start, start + width)) for start in (0, width)]
            values = self.builder.fadd(*halves)
        return self.builder.extract_element(values, I32(0))

    def greater(self, one: Value, other: Value) -> Value:
        """The greater of two numbers, or of each two of two vectors."""
        return self.builder.select(self.builder.fcmp_ordered(">", one, other), one, other)

    def greatest(self, values: Value) -> Value:
        """The greatest number of a vector."""
        width = self.lanes
        while width > 1:
            width //= 2
            values = self.greater(*(self._lanes(values, range(start, start + width)) for start in (0, width)))
        return self.builder.extract_element(values, I32(0))

    def exp(self, values: Value) -> Value:
        """The exponentials of numbers up to 0; exactly 1 of 0. 2^n e^r, r at most half of log 2: a series of e^r."""
        build = self.builder
        values = self.greater(values, self.numbers(LEAST_EXPONENT))
        turns = build.call(self._nearest, [build.fmul(values, self.numbers(LOG2_E))])
        rest = self.fma(turns, self.numbers(-LN2_HIGH), values)
        rest = self.fma(turns, self.numbers(-LN2_LOW), rest)
        series = self.numbers(EXP_TERMS[0])
        for term in EXP_TERMS[1:]:
            series = self.fma(series, rest, self.numbers(term))
        kind = ir.VectorType(I32, self.lanes)
        power = build.shl(build.add(build.fptosi(turns, kind), self.whole_numbers(127)), self.whole_numbers(23))
        return build.fmul(series, build.bitcast(power, self.vector))

    def _lanes(self, values: Value, places: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, len(places)), list(places))
        return self.builder.shuffle_vector(values, values, mask)

    def least(self, one: Value, other: Value) -> Value:
        """The smaller count."""
        return self.builder.select(self.builder.icmp_signed("<", one, other), one, other)

    def whole(self, first: Value, last: Value, size: int) -> Value:
        """Where the whole pieces of ``size`` from ``first`` on end, at most at ``last``."""
        span = self.builder.sub(last, first)
        return self.builder.add(first, self.builder.sub(span, self.builder.srem(span, number(size))))

    def loop(self, first: Value, last: Value, step: Value | int, carried: Sequence[Value] = ()) -> "Loop":
        """A loop over the counts from ``first`` to before ``last``: a context."""
        return Loop(self.builder, first, last, number(step) if isinstance(step, int) else step, carried)


class Loop:
    """A loop while it is written. ``index`` counts; ``values`` are carried: set them to what the next round gets."""

    def __init__(self, builder: Value, first: Value, last: Value, step: Value, carried: Sequence[Value]) -> None:
        self._builder, self._step = builder, step
        before, function = builder.block, builder.function
        self._head, body, self._end = (function.append_basic_block() for _ in range(3))
        builder.branch(self._head)
        builder.position_at_end(self._head)
        self._phis = []
        for start in (first, *carried):
            phi = builder.phi(start.type)
            phi.add_incoming(start, before)
            self._phis.append(phi)
        self.index, *self.values = self._phis
        builder.cbranch(builder.icmp_signed("<", self.index, last), body, self._end)
        builder.position_at_end(body)

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the loop; what follows stands behind it, where ``values`` are those of the last round."""
        builder = self._builder
        following = builder.add(self.index, self._step)
        for phi, value in zip(self._phis, (following, *self.values), strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(self._head)
        builder.position_at_end(self._end)
        self.values = self._phis[1:]


def number(value: int) -> Value:
    """A count."""
    return I64(value)


def _field(builder: Value, record: Value, at: int) -> Value:
    return builder.gep(record, [I32(0), I32(at)])
