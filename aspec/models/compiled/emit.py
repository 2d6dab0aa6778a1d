"""Writes a kernel in LLVM's intermediate language: loops, vectors of fp32, and the division of work among threads.

A kernel is a function ``run`` of pointers and counts. It has ``part`` compute pieces of the outputs, on the threads of
``team.py`` or on its own. Fused multiply-adds stand where they are written, and nothing allows LLVM to change the order
of a sum, so the bits follow from this text alone.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

I8, I16, I32, I64, F32, VOID = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType(), ir.VoidType())

EXP_TERMS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
LOG2_E, LN2_HIGH, LN2_LOW, LEAST_EXPONENT = 1.44269504088896341, 0.693145751953125, 1.42860682030941723e-6, -87.0


class _BF16(ir.Type):  # type: ignore[misc]  # the package is untyped
    """bfloat, which the package does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BF16)

    def __hash__(self) -> int:
        return hash(_BF16)


SHARE = "aspec_share"
"""The function of ``team.py``: ``(part, record, count, threads)``, has ``part(record, first, last)`` compute it all."""

Value = Any
"""A value of LLVM, which has no types for Python."""


class Kernel:
    """One kernel while it is written; ``builder`` writes at the end of ``part``."""

    def __init__(self, pointers: Sequence[Value], counts: int, lanes: int, *, parallel: bool) -> None:
        """``pointers``: their element types; ``counts``: numbers of 64 bits after them; the first is divided.

        ``lanes``: numbers of a vector. ``parallel``: there is a team of threads that calls ``part``.
        """
        self.lanes, self._module = lanes, ir.Module()
        kinds = [*(kind.as_pointer() for kind in pointers), *(I64,) * counts]
        self._arguments = ir.LiteralStructType(kinds)
        self._part = self._function("part", VOID, [self._arguments.as_pointer(), I64, I64])
        self.builder = ir.IRBuilder(self._part.append_basic_block())
        self.vector = ir.VectorType(F32, lanes)
        record, self.first, self.last = self._part.args
        values = [self.builder.load(_field(self.builder, record, at)) for at in range(len(kinds))]
        self.pointers, self.counts = values[: len(pointers)], values[len(pointers) :]
        self._finish(kinds, parallel)

    def __str__(self) -> str:
        return str(self._module)

    def _function(self, name: str, result: Value, arguments: Sequence[Value]) -> Value:
        return ir.Function(self._module, ir.FunctionType(result, arguments), name)

    def _finish(self, kinds: Sequence[Value], parallel: bool) -> None:
        """Write ``run``: it puts its arguments into a record and has all of the first count computed."""
        run = self._function("run", VOID, [*kinds, I32])
        builder = ir.IRBuilder(run.append_basic_block())
        record = builder.alloca(self._arguments)
        for at, value in enumerate(run.args[:-1]):
            builder.store(value, _field(builder, record, at))
        count = run.args[len(self.pointers)]
        if parallel:
            several = builder.icmp_signed(">", run.args[-1], I32(1))
            with builder.if_else(several) as (team, alone):
                with team:
                    share = self._function(SHARE, VOID, [self._part.type, self._arguments.as_pointer(), I64, I32])
                    builder.call(share, [self._part, record, count, run.args[-1]])
                with alone:
                    builder.call(self._part, [record, number(0), count])
        else:
            builder.call(self._part, [record, number(0), count])
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
        kind = ir.VectorType(value.type, self.lanes)
        return self.some(self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0)), [0] * self.lanes)

    def joined(self, values: Sequence[Value]) -> Value:
        """Some numbers as a vector."""
        vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
        for at, value in enumerate(values):
            vector = self.builder.insert_element(vector, value, I32(at))
        return vector

    def counting(self, first: int) -> Value:
        """A vector of ``first`` and the numbers of 32 bits after it."""
        return ir.Constant(ir.VectorType(I32, self.lanes), list(range(first, first + self.lanes)))

    def fma(self, one: Value, other: Value, added: Value) -> Value:
        """``one * other + added``, rounded once; vectors."""
        return self._call(f"llvm.fma.v{self.lanes}f32", self.vector, [one, other, added])

    def fma_pairs(self, one: Value, other: Value, added: Value) -> Value:
        """``added`` plus the products of two neighbours each: vectors of twice as many numbers in bf16, given as I16.

        Each lane is rounded twice, and numbers next to 0 count as 0: an instruction of its own (AVX512-BF16).
        """
        wide = ir.VectorType(_BF16(), 2 * self.lanes)
        given = [added, *(self.builder.bitcast(own, wide) for own in (one, other))]
        return self._call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", self.vector, given)

    def byte_pairs(self, codes: Value, values: Value) -> Value:
        """The sums of two neighbouring products each, in 16 bits: bytes without a sign times those with one (AVX2)."""
        made = ir.VectorType(I16, codes.type.count // 2)
        return self._call("llvm.x86.avx2.pmadd.ub.sw", made, [codes, values])

    def neighbours(self, values: Value) -> Value:
        """The sums of two neighbours each: of 16 bits in 32 (AVX2)."""
        count = values.type.count
        made = ir.VectorType(I32, count // 2)
        return self._call("llvm.x86.avx2.pmadd.wd", made, [values, ir.Constant(values.type, [1] * count)])

    def add_bytes(self, total: Value, codes: Value, values: Value) -> Value:
        """``total`` plus the sums of four products each: bytes without a sign times those with one (AVX512-VNNI)."""
        given = [total, *(self.builder.bitcast(own, total.type) for own in (codes, values))]
        return self._call("llvm.x86.avx512.vpdpbusd.256", total.type, given)

    def nearest(self, values: Value) -> Value:
        """Numbers rounded to whole ones, of two as near to the even one."""
        return self._call(f"llvm.nearbyint.v{self.lanes}f32", self.vector, [values])

    def root(self, value: Value) -> Value:
        """The square root of a number."""
        return self._call("llvm.sqrt.f32", F32, [value])

    def _call(self, name: str, result: Value, given: Sequence[Value]) -> Value:
        """Call a function of LLVM, which is declared when it is first called."""
        known = self._module.globals.get(name)
        return self.builder.call(known or self._function(name, result, [own.type for own in given]), given)

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

    def store(self, values: Value, pointer: Value) -> None:
        """A vector to memory of any alignment."""
        self.builder.store(values, self.builder.bitcast(pointer, values.type.as_pointer())).align = 1

    def prefetch(self, pointer: Value) -> None:
        """Have a cache line read that will be used soon; any address will do."""
        address = self.builder.bitcast(pointer, I8.as_pointer())
        self._call("llvm.prefetch.p0", VOID, [address, I32(0), I32(3), I32(1)])

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
            halves = [self.some(values, range(start, start + width)) for start in (0, width)]
            values = self.builder.fadd(*halves)
        return self.builder.extract_element(values, I32(0))

    def totals(self, several: Sequence[Value]) -> Value:
        """The sums of some vectors, at most as many as a vector has lanes, as a vector with zeros at its end.

        The halves of each are added until one number is left, as in ``total``; two vectors share the additions.
        """
        places = 1 << (len(several) - 1).bit_length()
        vectors, width = [*several, *[self.zeros()] * (places - len(several))], self.lanes
        while width > 1:
            width //= 2
            pairs = list(zip(vectors[::2], vectors[1::2] or vectors, strict=True))
            count = self.lanes if len(vectors) > 1 else vectors[0].type.count // 2
            lower = [at // width * 2 * width + at % width for at in range(count)]
            halves = [[self.picked(*pair, [at + up for at in lower]) for up in (0, width)] for pair in pairs]
            vectors = [self.builder.fadd(*own) for own in halves]
        return vectors[0]

    def greater(self, one: Value, other: Value) -> Value:
        """The greater of two numbers, or of each two of two vectors."""
        return self.builder.select(self.builder.fcmp_ordered(">", one, other), one, other)

    def greatest(self, values: Value) -> Value:
        """The greatest number of a vector."""
        width = self.lanes
        while width > 1:
            width //= 2
            values = self.greater(*(self.some(values, range(start, start + width)) for start in (0, width)))
        return self.builder.extract_element(values, I32(0))

    def exp(self, values: Value) -> Value:
        """The exponentials of numbers up to 0; exactly 1 of 0. 2^n e^r, r at most half of log 2: a series of e^r."""
        build = self.builder
        values = self.greater(values, self.numbers(LEAST_EXPONENT))
        turns = self.nearest(build.fmul(values, self.numbers(LOG2_E)))
        rest = self.fma(turns, self.numbers(-LN2_HIGH), values)
        rest = self.fma(turns, self.numbers(-LN2_LOW), rest)
        series = self.numbers(EXP_TERMS[0])
        for term in EXP_TERMS[1:]:
            series = self.fma(series, rest, self.numbers(term))
        kind = ir.VectorType(I32, self.lanes)
        power = build.shl(build.add(build.fptosi(turns, kind), self.whole_numbers(127)), self.whole_numbers(23))
        return build.fmul(series, build.bitcast(power, self.vector))

    def some(self, values: Value, places: Sequence[int]) -> Value:
        """The numbers at some places of a vector."""
        return self.picked(values, values, places)

    def picked(self, one: Value, other: Value, places: Sequence[int]) -> Value:
        """The numbers at some places of two vectors, those of the second one counted on."""
        return self.builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(places)), list(places)))

    def least(self, one: Value, other: Value) -> Value:
        """The smaller count."""
        return self.builder.select(self.builder.icmp_signed("<", one, other), one, other)

    def most(self, one: Value, other: Value) -> Value:
        """The larger count."""
        return self.builder.select(self.builder.icmp_signed(">", one, other), one, other)

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
