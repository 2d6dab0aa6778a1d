"""Groups of small floats with one 8-bit scale each: MXFP4 and NVFP4 (two e2m1 codes in a byte), MXFP8 (one code).

A byte and the scale of its group decide one weight or two, so a table of 256 scales x 256 bytes has all weights that
there are. It is made with the libraries' own operations, rounded as they round; then every byte is one look-up, which
is several times faster than to decode codes and multiply them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from aspec.errors import shown
from aspec.io.checkpoint import TensorRef
from aspec.models.formats.packed import PackedWeight, by_matrix
from aspec.models.formats.settings import check_shape, misfit
from aspec.models.formats.workspace import Workspace, room

CODES = 256  # values of a byte
INTEGERS: Mapping[int, torch.dtype] = MappingProxyType({2: torch.int16, 4: torch.int32, 8: torch.int64})
TILE = 1 << 16  # bytes of codes that are looked up at once, CODES squared at most: they and the table stay in the cache
ROWS = 128  # that are transposed at once: whole cache lines of the result, and a tile that stays in the cache
POWERS = frozenset({torch.uint8, torch.float8_e8m0fnu})  # scales that are powers of two, in both dtypes that they have
SMALLEST = 0x00400000  # 2 ** -127 as the bits of a float32: the scale of code 0


@dataclass(frozen=True, slots=True)
class Grouped:
    """Decodes codes [..., K / 2] or [..., K], scales [..., K / group], and a global scale if ``divided`` is not None.

    ``transposed``: codes [E, N, K / group, group / 2] make a weight [E, K, N].
    """

    group: int  # weights that share a scale
    code: torch.dtype | None = None  # of one code in a byte; None: two e2m1 codes, the low one first
    divided: bool | None = None  # by the global scale, or multiplied by it; None: there is no global scale
    rounded: torch.dtype | None = None  # the dtype of the library's result, if that is not the one asked for
    transposed: bool = False

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """See ``Decode``."""
        factors = [None] if self.divided is None else list(stored[2].view(-1, 1))
        codes = stored[0].view(torch.uint8).view(len(factors), -1)
        scales = stored[1].view(torch.uint8).view(len(factors), -1)
        parts = out.view(len(factors), -1)
        for own, factor in enumerate(factors):
            space = Workspace(workspace)
            table = self._table(stored[1].dtype, factor, out.dtype, space)
            if self.transposed:
                _decode_transposed(table, codes[own], scales[own], out, self.group, space)
            else:
                table.look_up(codes[own], scales[own], parts[own])

    def _table(
        self, scales: torch.dtype, factor: torch.Tensor | None, wanted: torch.dtype, space: Workspace
    ) -> "_Table":
        """The weights of all scales and bytes."""
        size = self.group // self.per_byte
        groups = space.take(torch.int32, TILE // size)
        values, scale = space.take(torch.float32, 1, self.per_byte * CODES), space.take(torch.float32, CODES, 1)
        exact, other = space.take(torch.float32, CODES, values.numel()), space.take(torch.int32, CODES * CODES)
        if self.code is None:
            _write_pairs(values, exact)
        else:
            _write_values(values.view(-1), self.code, exact)
        _write_values(scale.view(-1), scales, exact)
        if factor is not None:
            (torch.div if self.divided else torch.mul)(scale, factor, out=scale)
        torch.mul(scale, values, out=exact)
        if self.rounded is not None:
            exact.copy_(other.view(self.rounded)[: exact.numel()].view(exact.shape).copy_(exact))
        own, index = exact, other
        if wanted != torch.float32:
            own, index = other.view(wanted)[: exact.numel()].view(exact.shape).copy_(exact), exact.view(torch.int32)
        whole = INTEGERS[own.dtype.itemsize * self.per_byte]
        return _Table(own.view(whole).view(-1), index.view(-1)[:TILE], groups, size)

    @property
    def per_byte(self) -> int:
        """Weights of a byte of codes."""
        return 2 if self.code is None else 1


@dataclass(frozen=True, slots=True)
class _Table:
    """All weights that there are."""

    weights: torch.Tensor  # [256 x 256], by scale and byte, as integers of the size of a byte's weights
    index: torch.Tensor  # int32 [TILE], to work in
    groups: torch.Tensor  # int32 [TILE / size], to work in
    size: int  # bytes of a group

    def look_up(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """Write the weights of codes [n] with the scales of their groups, to ``out``."""
        step, size, found = self.groups.numel(), self.size, out.view(self.weights.dtype)
        for first in range(0, scales.numel(), step):
            count = min(step, scales.numel() - first)
            own = slice(first * size, (first + count) * size)
            groups = self.groups[:count].copy_(scales[first : first + count])
            index = self.index[: count * size]
            index.copy_(codes[own])
            torch.add(index.view(count, size), groups[:, None], alpha=CODES, out=index.view(count, size))
            torch.index_select(self.weights, 0, index, out=found[own])


def _decode_transposed(
    table: _Table, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, group: int, space: Workspace
) -> None:
    """Weights [E, K, N] of codes of [E, N, K]: some rows at a time."""
    experts, width, height = out.shape
    step = min(ROWS, -(-height // 2))  # never all rows: PyTorch takes memory to transpose these
    tile = space.take(out.dtype, step, width)
    codes, scales = codes.view(experts, height, width // 2), scales.view(experts, height, width // group)
    for expert in range(experts):
        for first in range(0, height, step):
            rows = slice(first, min(first + step, height))
            own = tile[: rows.stop - first]
            table.look_up(codes[expert, rows].view(-1), scales[expert, rows].view(-1), own.view(-1))
            out[expert, :, rows].copy_(own.t())


def _write_pairs(pairs: torch.Tensor, scratch: torch.Tensor) -> None:
    """The two values of every byte, the low code first: float32 [1, 512]."""
    values = scratch.view(-1)[:16]
    bits = scratch.view(torch.int16).view(-1)[32:48]  # beside the values
    # A code has a sign, two bits of exponent and one of mantissa; a float16 has the same with more of each.
    torch.arange(16, out=bits)
    bits.mul_(1 << 12).bitwise_right_shift_(3).bitwise_and_(~0x71FF)
    values.copy_(bits.view(torch.float16)).mul_(2.0**14)
    table = pairs.view(16, 16, 2)  # high code, low code
    table[..., 0].copy_(values)
    table[..., 1].copy_(values[:, None])


def _write_values(values: torch.Tensor, stored: torch.dtype, scratch: torch.Tensor) -> None:
    """The value of every byte of a dtype; a plain byte is the exponent of a power of two: float32 [256]."""
    if stored == torch.uint8:
        bits = values.view(torch.int32)
        torch.arange(CODES, out=bits)
        bits.bitwise_left_shift_(23).clamp_min_(SMALLEST)
    else:
        codes = scratch.view(torch.uint8).view(-1)[:CODES]
        values.copy_(torch.arange(CODES, out=codes).view(stored))


def packed(
    name: str, codes: TensorRef, scales: TensorRef, factor: TensorRef | None, decode: Grouped, method: str
) -> PackedWeight:
    """The weight that two or three stored tensors make. Raises CheckpointError if they do not fit one another."""
    group, tail = decode.group, 2 if decode.transposed else 1
    dtypes = (torch.uint8, torch.int8) if decode.code is None else (decode.code,)
    if codes.dtype not in dtypes or len(codes.shape) < tail + 1 or not codes.nbytes:
        raise misfit(codes, f"{str(dtypes[0]).removeprefix('torch.')} with at least {tail + 1} dimensions")
    if decode.transposed:
        check_shape(codes, (*codes.shape[:-1], group // decode.per_byte), f"groups of {group} codes")
    width = torch.Size(codes.shape[-tail:]).numel() * decode.per_byte
    if width % group:
        raise misfit(codes, f"rows of a multiple of {group} codes, {decode.per_byte} in a byte", list(codes.shape))
    known = POWERS if decode.divided is None else {torch.float8_e4m3fn}
    if scales.dtype not in known:
        raise misfit(scales, " or ".join(sorted(str(own).removeprefix("torch.") for own in known)))
    height = codes.shape[:-tail]
    check_shape(scales, (*height, width // group), f"a scale for {group} codes of {shown(name)}")
    refs: tuple[TensorRef, ...] = (codes, scales)
    if factor is not None:
        counts = {1, height[0]} if len(height) > 1 else {1}
        if factor.dtype != torch.float32 or torch.Size(factor.shape).numel() not in counts:
            raise misfit(factor, "one float32")
        refs = (codes, scales, factor)
    shape = (*height[:-1], width, height[-1]) if decode.transposed else (*height, width)
    tile = 4 * min(ROWS, height[-1]) * width if decode.transposed else 0
    values = 4 * decode.per_byte * CODES
    needed = room(4 * TILE * decode.per_byte // group, values, 4 * CODES, CODES * values, 4 * CODES * CODES, tile)
    return by_matrix(PackedWeight(name, shape, decode.rounded or torch.bfloat16, refs, method, decode, needed))
