"""Products with weights of 4 bits in whole numbers: rows become 15 bits, in blocks of 32 inputs that share a scale.

A row's numbers are 128 h + l times the scale of their block, h and l of 8 bits: closer to a row in bf16 than its own
rounding. Processors multiply bytes several at a time: the codes of a weight, 0 to 15, with h and with l, both summed
exactly. So only the sums of blocks are rounded, in an order that this text fixes: a row has the same bits beside any
other rows, and with any number of threads. As llama.cpp's products it needs no weights in fp32; those have rows of 8
bits.
"""

from dataclasses import dataclass

from llvmlite import ir

from aspec.models.compiled.emit import F32, I8, I16, I32, Kernel, Value, number
from aspec.models.compiled.shapes import QUANTISED
from aspec.models.formats.int4.form import ZERO

LANES, BYTES, SIDE = 8, 32, 16  # of a vector of 256 bits: numbers of 32 bits, bytes; and the bytes of one half
MOST = 127 * 128.0  # the largest number of a row
LEAST = 1e-30  # blocks of smaller numbers count as zeros
NIBBLES = (0, 4)
PLANES = 2
TILES = ((2, ((0,), (1,))), (1, ((0, 1),)), (1, ((0,), (1,))))
"""Rows of a tile, and the halves of a block's outputs that are computed together, the largest tile first; the last is
for processors with half the registers."""


def quantise_kernel(*, parallel: bool) -> str:
    """``run(rows, planes, scales, sums, blocks, threads)``: rows of whole blocks, one after another.

    ``rows`` bf16 [blocks, 32]; made are ``planes`` int8 [blocks, 2, 32], h and l, ``scales`` and ``sums`` fp32
    [blocks]: what l is multiplied by, and the sum of the numbers that h and l stand for.
    """
    kernel = Kernel((I16, I8, F32, F32), 1, LANES, parallel=parallel)
    build, (rows, planes, scales, sums) = kernel.builder, kernel.pointers
    whole = ir.VectorType(I32, LANES)
    with kernel.loop(kernel.first, kernel.last, 1) as blocks:
        start = build.mul(blocks.index, number(QUANTISED))
        places = [build.add(start, number(at)) for at in range(0, QUANTISED, LANES)]
        values = [kernel.widened(kernel.load(kernel.at(rows, at), I16, LANES)) for at in places]
        most, spoilt = kernel.numbers(LEAST), kernel.zeros()
        for value in values:
            most = kernel.greater(most, kernel.greater(value, build.fneg(value)))
            spoilt = kernel.fma(value, kernel.zeros(), spoilt)  # NaN if a number is not finite
        most = kernel.spread(kernel.greatest(most))
        scale = build.fadd(build.fmul(most, kernel.numbers(1 / MOST)), kernel.spread(kernel.total(spoilt)))
        inverse = build.fdiv(kernel.numbers(MOST), most)
        total = ir.Constant(whole, [0] * LANES)
        for at, value in enumerate(values):
            near = build.fptosi(kernel.nearest(build.fmul(value, inverse)), whole)
            total = build.add(total, near)
            high = build.ashr(build.add(near, kernel.whole_numbers(64)), kernel.whole_numbers(7))
            low = build.sub(near, build.shl(high, kernel.whole_numbers(7)))
            for plane, own in enumerate((high, low)):
                to = build.mul(build.add(build.mul(blocks.index, number(PLANES)), number(plane)), number(QUANTISED))
                narrow = build.trunc(own, ir.VectorType(I8, LANES))
                kernel.store(narrow, kernel.at(planes, to, number(at * LANES)))
        first = build.extract_element(scale, I32(0))
        build.store(first, kernel.at(scales, blocks.index))
        summed = kernel.total(build.sitofp(total, kernel.vector))
        build.store(build.fmul(first, summed), kernel.at(sums, blocks.index))
    build.ret_void()
    return str(kernel)


def integer_kernel(block: int, *, multiplies_bytes: bool, parallel: bool) -> str:
    """``run(codes, pairs, planes, scales, sums, made, blocks, inputs, count, group, threads)``.

    ``codes`` and ``pairs`` (scales): as ``Int4`` says, ``block`` outputs in a block, 32 or 64; of the rows what
    ``quantise_kernel`` makes; ``made`` bf16 [count, outputs]. ``multiplies_bytes``: the processor adds products of
    four bytes to numbers of 32 bits at once; others add those of two to numbers of 16.
    """
    kernel = Kernel((I8, I32, I8, F32, F32, I16), 4, LANES, parallel=parallel)
    with kernel.loop(kernel.first, kernel.last, 1) as blocks:
        start: Value = number(0)
        for num_rows, together in TILES[:-1] if multiplies_bytes else TILES[-1:]:
            stop = kernel.whole(start, kernel.counts[2], num_rows)
            with kernel.loop(start, stop, num_rows) as rows:
                for halves in together:
                    _Tile(kernel, block, blocks.index, rows.index, num_rows, halves, multiplies_bytes).write()
            start = stop
    kernel.builder.ret_void()
    return str(kernel)


@dataclass(frozen=True)
class _Tile:
    """Some rows and halves of a block's outputs, while the kernel is written.

    Codes are read BYTES inputs' worth at a time and put in order: four inputs of an output lie together. A block of 64
    outputs has one input in a vector, one of 32 has two, and then the two halves of a vector are of other inputs.
    """

    kernel: Kernel
    block: int
    index: Value  # of the block
    row: Value
    num_rows: int
    halves: tuple[int, ...]
    multiplies_bytes: bool

    @property
    def width(self) -> int:
        """Vectors of outputs: of each half both nibbles, of each nibble both sides."""
        return len(self.halves) * len(NIBBLES) * 2

    @property
    def inputs(self) -> int:
        """Inputs of four vectors of codes."""
        return 4 * BYTES // (self.block // 2)

    def write(self) -> None:
        """Sum over all groups, round, and store."""
        kernel, build = self.kernel, self.kernel.builder
        _, inputs, _, group = kernel.counts
        width = self.width
        with kernel.loop(number(0), inputs, group, [kernel.zeros()] * (self.num_rows * width)) as groups:
            sums, added = self._group(groups.index)
            pairs = [self._pair(build.sdiv(groups.index, group), place) for place in range(width)]
            groups.values = [
                kernel.fma(own, pairs[at % width][0], kernel.fma(added[at // width], pairs[at % width][1], total))
                for at, (own, total) in enumerate(zip(sums, groups.values, strict=True))
            ]
        outputs = build.mul(kernel.counts[0], number(self.block))
        for at, total in enumerate(groups.values):
            row = build.mul(self._row(at // width), outputs)
            for first, count, part in self._outputs(at % width):
                made = kernel.some(kernel.narrowed(total), range(part, part + count))
                kernel.store(made, kernel.at(kernel.pointers[5], row, first))

    def _row(self, at: int) -> Value:
        return self.kernel.builder.add(self.row, number(at))

    def _outputs(self, place: int) -> "list[tuple[Value, int, int]]":
        """Where the outputs of a vector begin, how many lie together, and their first lane."""
        build, (own, nibble, upper) = self.kernel.builder, (place // 4, place // 2 % 2, place % 2)
        first = nibble * (self.block // 2) + 4 * (2 * self.halves[own] + upper)
        start = build.mul(self.index, number(self.block))
        sides = (0, SIDE) if self.block == 2 * BYTES else (0,)
        return [(build.add(start, number(first + side)), 4, 4 * at) for at, side in enumerate(sides)]

    def _group(self, first: Value) -> "tuple[list[Value], list[Value]]":
        """By row and vector the sum over one group with the codes as they are; by row the sum of its numbers."""
        kernel, build = self.kernel, self.kernel.builder
        _, inputs, _, group = kernel.counts
        width = self.width
        zeros = [kernel.zeros()] * (self.num_rows * width) + [F32(0.0)] * self.num_rows
        with kernel.loop(first, build.add(first, group), QUANTISED, zeros) as each:
            sums, values = self._block(each.index), list(each.values)
            for row in range(self.num_rows):
                place = build.sdiv(build.add(build.mul(self._row(row), inputs), each.index), number(QUANTISED))
                scale = kernel.spread(build.load(kernel.at(kernel.pointers[3], place)))
                for at in range(row * width, (row + 1) * width):
                    values[at] = kernel.fma(build.sitofp(sums[at], kernel.vector), scale, values[at])
                total = self.num_rows * width + row
                values[total] = build.fadd(values[total], build.load(kernel.at(kernel.pointers[4], place)))
            each.values = values
        made = list(each.values)
        return made[: -self.num_rows], [kernel.spread(total) for total in made[-self.num_rows :]]

    def _block(self, first: Value) -> "list[Value]":
        """By row and vector: the sum over the inputs of one block, in 32 bits."""
        kernel, build, inputs = self.kernel, self.kernel.builder, self.kernel.counts[1]
        codes = kernel.at(kernel.pointers[0], build.mul(build.mul(self.index, inputs), number(self.block // 2)))
        planes = [
            kernel.at(
                kernel.pointers[2], build.mul(build.add(build.mul(self._row(row), inputs), first), number(PLANES))
            )
            for row in range(self.num_rows)
        ]
        kind = ir.VectorType(I32, 8) if self.multiplies_bytes else ir.VectorType(I16, 16)
        sums = [[ir.Constant(kind, [0] * kind.count)] * self.width for _ in range(self.num_rows * PLANES)]
        for step in range(0, QUANTISED, self.inputs):
            place = kernel.at(codes, build.mul(build.add(first, number(step)), number(self.block // 2)))
            factors = self._codes(place)
            for at in range(self.num_rows * PLANES):
                value = self._numbers(planes[at // PLANES], at % PLANES * QUANTISED + step)
                sums[at] = [self._add(own, code, value) for own, code in zip(sums[at], factors, strict=True)]
        whole = [[self._whole(own) for own in several] for several in sums]
        shift = kernel.whole_numbers(7)
        return [
            build.add(build.shl(high, shift), low)
            for row in range(0, len(whole), PLANES)
            for high, low in zip(whole[row], whole[row + 1], strict=True)
        ]

    def _codes(self, place: Value) -> "list[Value]":
        """By nibble and vector: the codes of some inputs, those of four inputs of an output in 32 bits."""
        kernel, build = self.kernel, self.kernel.builder
        read = [kernel.load(kernel.at(place, number(at * BYTES)), I8, BYTES) for at in range(4)]
        if self.block == BYTES:  # two inputs in each: the halves of a vector become those of inputs 4 apart
            low, high = [*range(SIDE), *range(BYTES, BYTES + SIDE)], [*range(SIDE, BYTES), *range(BYTES + SIDE, 64)]
            read = [kernel.picked(read[at], read[at + 2], side) for at in (0, 1) for side in (low, high)]
        mask = ir.Constant(ir.VectorType(I8, BYTES), [15] * BYTES)
        shift = ir.Constant(ir.VectorType(I8, BYTES), [4] * BYTES)
        found = []
        for half in self.halves:
            pairs = [self._interleaved(read[at], read[at + 1], 1, half) for at in (0, 2)]
            mixed = [self._interleaved(pairs[0], pairs[1], 2, upper) for upper in range(2)]
            found += [
                build.lshr(own, shift) if nibble else build.and_(own, mask) for nibble in NIBBLES for own in mixed
            ]
        return found

    def _interleaved(self, one: Value, other: Value, size: int, upper: int) -> Value:
        """Runs of ``size`` bytes in turns of both, from the lower or the upper parts of both sides of a vector."""
        half = SIDE // 2
        places = []
        for side in (0, SIDE):
            for run in range(side + upper * half, side + (upper + 1) * half, size):
                places += [*range(run, run + size), *range(BYTES + run, BYTES + run + size)]
        return self.kernel.picked(one, other, places)

    def _numbers(self, plane: Value, first: int) -> Value:
        """Four numbers of a row for every output, or four for each half of a vector: bytes."""
        kernel, build = self.kernel, self.kernel.builder
        sides = [
            build.load(build.bitcast(kernel.at(plane, number(first + side)), I32.as_pointer()), align=1)
            for side in range(0, self.inputs, 4)
        ]
        vector = kernel.joined([sides[at * len(sides) // LANES] for at in range(LANES)])
        return build.bitcast(vector, ir.VectorType(I8, BYTES))

    def _add(self, total: Value, codes: Value, values: Value) -> Value:
        kernel, build = self.kernel, self.kernel.builder
        if self.multiplies_bytes:
            return kernel.add_bytes(total, codes, values)
        return build.add(total, kernel.byte_pairs(codes, values))

    def _whole(self, total: Value) -> Value:
        """A sum in 32 bits; where two halves are of other inputs, both together in both."""
        kernel, build = self.kernel, self.kernel.builder
        made = total if self.multiplies_bytes else kernel.neighbours(total)
        if self.block == BYTES:
            made = build.add(made, kernel.some(made, [4, 5, 6, 7, 0, 1, 2, 3]))
        return made

    def _pair(self, group: Value, place: int) -> tuple[Value, Value]:
        """Scales, and offsets less the scaled zero, of one vector of outputs."""
        kernel, build = self.kernel, self.kernel.builder
        start = kernel.at(kernel.pointers[1], build.mul(group, build.mul(kernel.counts[0], number(self.block))))
        parts = [kernel.load(kernel.at(start, first), I32, count) for first, count, _ in self._outputs(place)]
        both = kernel.picked(parts[0], parts[-1], range(LANES))
        scale = build.bitcast(build.shl(both, kernel.whole_numbers(16)), kernel.vector)
        offset = build.bitcast(build.and_(both, kernel.whole_numbers(0xFFFF0000)), kernel.vector)
        return scale, kernel.fma(scale, kernel.numbers(-float(ZERO)), offset)
