"""Attention as a kernel: each query reads the keys of its own path in the order of their positions.

Positions are taken a tile at a time, and tiles begin at the same positions for all queries. The softmax runs along
(Milakov and Gimelshein, arXiv 1805.02867): what was summed before a tile is scaled to the tile's greatest score. A
position that a query does not see adds nothing to the bit. So a query has the same bits beside any other queries.
"""

from collections.abc import Sequence

from aspec.models.compiled.emit import F32, I16, I32, I64, Kernel, Value, number
from aspec.models.compiled.shapes import HIDDEN, LEAST, RECORD, ROWS, TILE


def attention_kernel(lanes: int, width: int, value_width: int, *, parallel: bool) -> str:
    """``run(query, key, value, slots, sinks, records, made, items, key_stride, value_stride, scale, threads)``.

    ``query``, ``key``, ``value`` and ``made`` bf16, strides from slot to slot; ``slots`` int64; ``sinks`` fp32: HIDDEN
    where there is none; ``records`` int64 [items, RECORD]; ``scale``: the bits of a number in fp32.
    """
    kernel = Kernel((I16, I16, I16, I64, F32, I64, I16), 4, lanes, parallel=parallel)
    build = kernel.builder
    sizes = (ROWS * TILE, ROWS * value_width, ROWS, ROWS, ROWS * width)
    memory = [build.alloca(F32, size=I32(size)) for size in sizes]
    with kernel.loop(kernel.first, kernel.last, 1) as items:
        _Item(kernel, items.index, width, value_width, memory).write()
    build.ret_void()
    return str(kernel)


class _Item:
    """ROWS rows that share their keys, while their kernel is written."""

    def __init__(self, kernel: Kernel, index: Value, width: int, value_width: int, memory: Sequence[Value]) -> None:
        self.kernel, self.build = kernel, kernel.builder
        self.width, self.value_width = width, value_width
        self.scores, self.made, self.greatest, self.weight, self.queries = memory
        record = kernel.at(kernel.pointers[5], self.build.mul(index, number(RECORD)))
        numbers = [self.build.load(kernel.at(record, number(at))) for at in range(RECORD)]
        self.query, self.out, self.sink, self.first, self.last = (
            numbers[at * ROWS : (at + 1) * ROWS] for at in range(5)
        )
        self.key, self.value, self.prefix, self.slots = numbers[5 * ROWS :]

    def write(self) -> None:
        """All tiles from the first one that a row sees to the last one, then the results."""
        kernel, build = self.kernel, self.build
        scale = kernel.spread(build.bitcast(build.trunc(kernel.counts[3], I32), F32))
        for row in range(ROWS):
            for at in range(0, self.width, kernel.lanes):
                own = kernel.load(kernel.at(kernel.pointers[0], self.query[row], number(at)), I16, kernel.lanes)
                self._store(self.queries, row * self.width + at, build.fmul(kernel.widened(own), scale))
            sink = build.load(kernel.at(kernel.pointers[4], self.sink[row]))
            build.store(sink, self._of_row(self.greatest, row))
            seen = build.fcmp_ordered(">", sink, F32(LEAST))
            build.store(build.select(seen, F32(1.0), F32(0.0)), self._of_row(self.weight, row))
            for at in range(0, self.value_width, kernel.lanes):
                self._store(self.made, row * self.value_width + at, kernel.zeros())
        begin, end = self.first[0], self.last[0]
        for row in range(1, ROWS):
            begin = kernel.least(begin, self.first[row])
            end = build.select(build.icmp_signed(">", end, self.last[row]), end, self.last[row])
        end = build.add(end, number(1))
        start = build.and_(begin, number(-TILE))
        with kernel.loop(start, end, TILE) as tiles:
            count = kernel.least(number(TILE), build.sub(end, tiles.index))
            self._score(tiles.index, count)
            for row in range(ROWS):
                self._weigh(tiles.index, row)
            chunks, most = self.value_width // kernel.lanes, max(1, kernel.lanes // ROWS)
            for chunk in range(0, chunks, most):
                self._mix(tiles.index, count, range(chunk, min(chunk + most, chunks)))
        for row in range(ROWS):
            with build.if_then(build.icmp_signed(">=", self.out[row], number(0))):
                self._finish(row)

    def _score(self, tile: Value, count: Value) -> None:
        """The scores of a tile, as many at once as a vector has lanes; those beyond ``count`` are anything."""
        kernel, build = self.kernel, self.build
        together = kernel.lanes // ROWS
        last = build.sub(count, number(1))
        with kernel.loop(number(0), count, together) as keys:
            places = [kernel.least(build.add(keys.index, number(at)), last) for at in range(together)]
            slots = [self._slot(build.add(tile, place)) for place in places]
            starts = [kernel.at(kernel.pointers[1], self.key, build.mul(slot, kernel.counts[1])) for slot in slots]
            sums = [kernel.zeros()] * kernel.lanes  # of the first row with every key, then of the second one
            for at in range(0, self.width, kernel.lanes):
                parts = [kernel.widened(kernel.load(kernel.at(own, number(at)), I16, kernel.lanes)) for own in starts]
                queries = [self._load(self.queries, row * self.width + at) for row in range(ROWS)]
                pairs = [(query, part) for query in queries for part in parts]
                sums = [kernel.fma(*pair, total) for pair, total in zip(pairs, sums, strict=True)]
            scores = kernel.totals(sums)
            for row in range(ROWS):
                own = kernel.some(scores, range(row * together, (row + 1) * together))
                kernel.store(own, kernel.at(self.scores, number(row * TILE), keys.index))

    def _weigh(self, tile: Value, row: int) -> None:
        """Scores become weights, those of positions that the row does not see nothing; earlier sums are scaled."""
        kernel, build = self.kernel, self.build
        first, last = (kernel.spread(build.trunc(build.sub(own[row], tile), I32)) for own in (self.first, self.last))
        places = range(row * TILE, (row + 1) * TILE, kernel.lanes)
        scores = []
        for at in places:
            score, position = self._load(self.scores, at), kernel.counting(at - row * TILE)
            late, early = build.icmp_signed(">=", position, first), build.icmp_signed("<=", position, last)
            scores.append(build.select(build.and_(late, early), score, kernel.numbers(HIDDEN)))
        most = scores[0]
        for other in scores[1:]:
            most = kernel.greater(most, other)
        before = build.load(self._of_row(self.greatest, row))
        now = kernel.spread(kernel.greater(before, kernel.greatest(most)))
        build.store(build.extract_element(now, I32(0)), self._of_row(self.greatest, row))
        scale = kernel.exp(build.fsub(kernel.spread(before), now))
        total = kernel.zeros()
        for at, score in zip(places, scores, strict=True):
            seen = build.fcmp_ordered(">", score, kernel.numbers(LEAST))
            weight = build.select(seen, kernel.exp(build.fsub(score, now)), kernel.zeros())
            self._store(self.scores, at, weight)
            total = build.fadd(total, weight)
        place = self._of_row(self.weight, row)
        earlier = build.fmul(build.load(place), build.extract_element(scale, I32(0)))
        build.store(build.fadd(earlier, kernel.total(total)), place)
        for at in range(0, self.value_width, kernel.lanes):
            own = row * self.value_width + at
            self._store(self.made, own, build.fmul(self._load(self.made, own), scale))

    def _mix(self, tile: Value, count: Value, chunks: range) -> None:
        """Add the values of a tile: some vectors of all rows."""
        kernel, build = self.kernel, self.build
        places = [row * self.value_width + chunk * kernel.lanes for row in range(ROWS) for chunk in chunks]
        with kernel.loop(number(0), count, 1, [self._load(self.made, at) for at in places]) as keys:
            slot = self._slot(build.add(tile, keys.index))
            start = kernel.at(kernel.pointers[2], self.value, build.mul(slot, kernel.counts[2]))
            starts = [kernel.at(start, number(chunk * kernel.lanes)) for chunk in chunks]
            parts = [kernel.widened(kernel.load(own, I16, kernel.lanes)) for own in starts]
            weights = [
                kernel.spread(build.load(kernel.at(self.scores, number(row * TILE), keys.index))) for row in range(ROWS)
            ]
            pairs = [(weight, part) for weight in weights for part in parts]
            keys.values = [kernel.fma(*pair, total) for pair, total in zip(pairs, keys.values, strict=True)]
        for at, total in zip(places, keys.values, strict=True):
            self._store(self.made, at, total)

    def _finish(self, row: int) -> None:
        kernel, build = self.kernel, self.build
        weight = kernel.spread(build.load(self._of_row(self.weight, row)))
        for at in range(0, self.value_width, kernel.lanes):
            mean = build.fdiv(self._load(self.made, row * self.value_width + at), weight)
            place = kernel.at(kernel.pointers[6], self.out[row], number(at))
            kernel.store(kernel.narrowed(mean), place)

    def _slot(self, position: Value) -> Value:
        """The slot of a position of the path."""
        build = self.build
        beyond = build.sub(position, self.prefix)
        inside = build.icmp_signed("<", beyond, number(0))
        told = build.load(self.kernel.at(self.kernel.pointers[3], self.slots, build.select(inside, number(0), beyond)))
        return build.select(inside, position, told)

    def _of_row(self, memory: Value, row: int) -> Value:
        return self.kernel.at(memory, number(row))

    def _load(self, memory: Value, at: int) -> Value:
        return self.kernel.load(self.kernel.at(memory, number(at)), F32, self.kernel.lanes)

    def _store(self, memory: Value, at: int, values: Value) -> None:
        self.kernel.store(values, self.kernel.at(memory, number(at)))
