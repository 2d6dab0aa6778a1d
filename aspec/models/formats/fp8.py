"""Eight-bit floats with a scale for each block of rows and columns: FP8 of DeepSeek, Qwen, FBGEMM and others.

The size of a block is the settings', never derived from the grid of scales: the last block of a row or column may be
ragged. Products are made in float32 and rounded once, as transformers does. A scale of activations (``input_scale``,
``activation_scale``: static quantisation of the inputs) is not applied: that is transformers' way where it dequantises.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from aspec.errors import shown
from aspec.io.checkpoint import TensorRef
from aspec.models.formats import grouped
from aspec.models.formats.grouped import CODES, POWERS, SMALLEST, Grouped
from aspec.models.formats.packed import Format, Kind, Outline, PackedWeight, PlainWeight, by_matrix, outlined
from aspec.models.formats.settings import Settings, check_shape, misfit, missing
from aspec.models.formats.workspace import Workspace, room

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.bfloat16, torch.float16, *POWERS)
DEFAULT_BLOCK = (128, 128)  # transformers', where the settings have no weight_block_size
TILE = 1 << 17  # weights that are decoded at once: their indices stay in the second-level cache
COMPANIONS = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
ALONE = {"_scale_inv": "", ".weight_scale": ".weight", ".qscale_weight": ".weight"}  # ends of scales -> of weights
KNOWN = (
    "quant_method",
    "activation_scheme",
    "weight_block_size",
    "modules_to_not_convert",
    "ignored_layers",
    "modules_to_convert",
    "scale_fmt",
    "fmt",
    "expert_dtype",
    "dequantize",
    "is_checkpoint_fp8_serialized",
    "weight_per_tensor",
    "act_per_tensor",
    "kv_cache_scheme",
    "kv_cache_quant_targets",
)


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """Decodes weights [..., N, K] with scales [..., ceil(N / rows), ceil(K / columns)].

    A block of many weights has one table of all its 256 weights, so that decoding is one look-up; its products are
    rounded in the table. Other blocks are looked up in float32, and multiplied.
    """

    rows: int  # of a block
    columns: int
    grid: tuple[int, int]  # blocks of a matrix
    rounded: torch.dtype | None = None  # the dtype of the library's product, if that is not float32

    @property
    def has_tables(self) -> bool:
        """Whether blocks have tables of their own: those that are much larger than a table."""
        return self.rows * self.columns >= 16 * CODES and self.grid[1] <= CODES

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """See ``Decode``."""
        height, width = out.shape[-2:]
        codes, scales = stored[0].view(torch.uint8).view(-1, height, width), stored[1].view(-1, *self.grid)
        outs, space, step = out.view(-1, height, width), Workspace(workspace), _step(height, width)
        values = space.take(torch.float32, CODES)
        values.copy_(torch.arange(CODES, out=space.take(torch.uint8, CODES)).view(stored[0].dtype))
        index, wide = space.take(torch.int32, step, width), space.take(torch.float32, step, self.grid[1])
        results = space.take(torch.float32, *((self._tables(step), CODES) if self.has_tables else (step, width)))
        narrow = space.take(torch.int16, *results.shape)
        offsets = torch.arange(self._tables(step), out=space.take(torch.int32, self._tables(step))).mul_(CODES)
        tables, made = results, None
        for matrix in range(codes.shape[0]):
            for rows, blocks in _tiles(height, self.rows, step):
                own, indices = outs[matrix, rows], index[: rows.stop - rows.start]
                indices.copy_(codes[matrix, rows])
                if self.has_tables:
                    if made != (matrix, blocks):  # tiles of the same blocks have the same tables
                        scale, made = _widened(scales[matrix, blocks], wide), (matrix, blocks)
                        products = torch.mul(scale.view(-1, 1), values, out=results[: scale.numel()])
                        tables = self._result(products, narrow, out.dtype)
                    _on_blocks(torch.Tensor.add_, indices, self.columns, offsets[: len(tables)].view(-1, self.grid[1]))
                    _look_up(tables, indices, own)
                else:
                    tile = results[: rows.stop - rows.start]
                    _look_up(values, indices, tile)
                    _on_blocks(torch.Tensor.mul_, tile, self.columns, _widened(scales[matrix, blocks], wide))
                    own.copy_(self._result(tile, narrow, out.dtype))

    def _tables(self, step: int) -> int:
        """The most blocks that a tile has parts of."""
        return max(1, step // self.rows) * self.grid[1]

    def _result(self, products: torch.Tensor, narrow: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
        """Products as the library rounds them, in the dtype of the weight."""
        other = narrow[: products.shape[0]]
        if self.rounded not in (None, torch.float32, wanted):
            products.copy_(other.view(self.rounded).copy_(products))
        return products if wanted == torch.float32 else other.view(wanted).copy_(products)


def _step(height: int, width: int) -> int:
    """Rows of a tile."""
    return min(height, max(1, TILE // width))


def _look_up(table: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Write numbers of a table, as the integers that their bits are."""
    whole = torch.int32 if out.dtype == torch.float32 else torch.int16
    torch.index_select(table.view(whole).view(-1), 0, index.view(-1), out=out.view(whole).view(-1))


def _on_blocks(
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tile: torch.Tensor,
    columns: int,
    values: torch.Tensor,
) -> None:
    """Add or multiply a value [blocks, blocks of a row] to whole blocks of rows, or to rows of one block."""
    height, width = tile.shape
    blocks, whole = values.shape[0], width // columns
    values = values.view(blocks, 1, -1, 1)
    if whole:
        inner = tile[:, : whole * columns].view(blocks, height // blocks, whole, columns)
        operation(inner, values[:, :, :whole])
    if whole < values.shape[2]:  # the ragged block at the end of the rows
        operation(tile[:, whole * columns :].view(blocks, height // blocks, 1, -1), values[:, :, whole:])


def _tiles(height: int, block: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Rows to decode at once, and the rows of scales that they have: whole blocks, or rows of one block."""
    step = most // block * block
    if step:
        whole = height // block * block
        for first in range(0, whole, step):
            yield slice(first, min(first + step, whole)), slice(first // block, min(first + step, whole) // block)
        if whole < height:
            yield slice(whole, height), slice(whole // block, whole // block + 1)
        return
    for first in range(0, height, block):
        end = min(first + block, height)
        for row in range(first, end, most):
            yield slice(row, min(row + most, end)), slice(first // block, first // block + 1)


def _widened(scales: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Scales as float32."""
    own = wide[: scales.shape[0]]
    if scales.dtype != torch.uint8:
        return own.copy_(scales)
    own.view(torch.int32).copy_(scales).bitwise_left_shift_(23).clamp_min_(SMALLEST)
    return own


class Fp8(Format):
    """The method ``fp8``: the stored tensors say which weights are packed."""

    def __init__(self, settings: Settings) -> None:
        settings.check_known(KNOWN)
        settings.choice("activation_scheme", ("dynamic", "static"), "dynamic")
        settings.choice("scale_fmt", ("float", "ue8m0", None), None)
        settings.choice("fmt", ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2", None), None)
        settings.choice("expert_dtype", ("fp8", "fp4"), "fp8")
        for key in ("dequantize", "is_checkpoint_fp8_serialized", "weight_per_tensor", "act_per_tensor"):
            settings.flag(key)
        for key in ("modules_to_not_convert", "ignored_layers", "modules_to_convert"):
            settings.names(key)  # the weights that they name are stored plainly, or with scales as all others
        given = "weight_block_size" in settings.values
        self._block = settings.sizes("weight_block_size", 2) if given else DEFAULT_BLOCK
        self._settings = settings

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        found, used = [], set()
        for name, ref in tensors.items():
            scale = _companion(name, ref, tensors)
            if scale is not None:
                used.add(scale.name)
                found.append(self._packed(name, ref, scale))
            elif ref.dtype in FP8:
                raise missing(ref, name + "_scale_inv")
        for name in (name for name in tensors if name not in used):
            for end in (end for end in ALONE if name.endswith(end)):
                weight = name.removesuffix(end) + ALONE[end]
                known = weight in tensors
                raise misfit(tensors[weight], "float8_e4m3fn") if known else missing(tensors[name], weight)
        self._settings.check_found(len(found), "tensors of float8_e4m3fn with scales")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        settings, matrices = self._settings, weight.kind in (Kind.LINEAR, Kind.EXPERTS)
        if not matrices or settings.excludes(weight.module, "modules_to_not_convert", "ignored_layers"):
            return {}
        *experts, height, width = weight.shape
        grid = () if self._block is None else (-(-height // self._block[0]), -(-width // self._block[1]))
        return {
            weight.name: outlined(FP8[0], *weight.shape),
            f"{weight.name}_scale_inv": outlined(torch.float32, *experts, *grid),
        }

    def _packed(self, name: str, weight: TensorRef, scale: TensorRef) -> PackedWeight:
        if weight.dtype == torch.int8:  # experts of DeepSeek-V4
            return grouped.packed(name, weight, scale, None, Grouped(32), "FP4")
        block = self._block
        if len(scale.shape) < 2 and torch.Size(scale.shape).numel() == 1:
            block = None
        return packed(name, weight, scale, block, "FP8")


def _companion(name: str, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> TensorRef | None:
    """The scales of a stored weight; None if it isn't a packed one."""
    if weight.dtype not in (*FP8, torch.int8) or name.endswith(COMPANIONS):
        return None
    base = name.removesuffix("weight")
    names = [base + own for own in COMPANIONS] if base != name else [name + "_scale_inv", name + "_scale"]
    return next((tensors[own] for own in names if own in tensors), None)


class Fbgemm(Format):
    """The method ``fbgemm_fp8``: a scale for each output; Llama 4's fused experts [E, input, output] too."""

    def __init__(self, settings: Settings) -> None:
        settings.check_known(("quant_method", "activation_scale_ub", "modules_to_not_convert"))
        settings.names("modules_to_not_convert")
        self._settings = settings

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        found = []
        for name, ref in tensors.items():
            scale = tensors.get(name + "_scale")
            if scale is None:
                if ref.dtype in FP8:
                    raise missing(ref, name + "_scale")
            elif len(ref.shape) == 3:
                check_shape(scale, *_of_experts(ref, scale))
                found.append(packed(name, ref, scale, (ref.shape[1], 1), "FP8 of FBGEMM"))
            else:
                found.append(packed(name, ref, scale, None, "FP8 of FBGEMM"))
        self._settings.check_found(len(found), "tensors of float8_e4m3fn with a *_scale")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        matrices = weight.kind in (Kind.LINEAR, Kind.EXPERTS)
        if not matrices or self._settings.excludes(weight.module, "modules_to_not_convert"):
            return {}
        fused = weight.kind is Kind.EXPERTS
        shape = (weight.shape[0], 1, weight.shape[2]) if fused else (weight.shape[0], 1)
        return {
            weight.name: outlined(FP8[0], *weight.shape),
            f"{weight.name}_scale": outlined(torch.float32, *shape),
        }


def _of_experts(weight: TensorRef, scale: TensorRef) -> tuple[tuple[int, ...], str]:
    """The shape that the scales of fused experts have: one for each expert and output, in one of two orders."""
    experts, _, outputs = weight.shape
    shape = (experts, outputs, 1) if scale.shape[-1:] == (1,) else (experts, 1, outputs)
    return shape, f"a scale for each output of {shown(weight.name)}"


def packed(
    name: str,
    weight: TensorRef,
    scale: TensorRef,
    block: tuple[int, ...] | None,
    method: str,
    rounded: torch.dtype | None = None,
) -> PackedWeight:
    """A weight [..., N, K] of codes and scales. Raises CheckpointError if they do not fit each other.

    ``block``: rows and columns with one scale; None: one scale for a matrix, or for each of its rows, as the scales
    are. ``rounded``: the dtype in which the library multiplies, if its result is rounded to it before any cast.
    """
    if weight.dtype not in FP8 or len(weight.shape) < 2 or not weight.nbytes:
        raise misfit(weight, f"a matrix of float8_e4m3fn or float8_e5m2, as {shown(scale.name)} scales it")
    if scale.dtype not in SCALES:
        raise misfit(scale, "scales of float32, bfloat16, float16, float8_e8m0fnu or uint8")
    *matrices, height, width = weight.shape
    count, given = torch.Size(matrices).numel(), torch.Size(scale.shape).numel()
    if block is None:
        block = (height, width) if given == count else (1, width)
        if given not in (count, count * height):
            raise misfit(scale, f"one scale, or {height} for the rows of {shown(name)}", list(scale.shape))
    rows, columns = min(block[0], height), min(block[1], width)
    grid = (-(-height // rows), -(-width // columns))
    expected = (*matrices, *grid)
    if given != count * grid[0] * grid[1] or not _alike(scale.shape, expected):
        raise misfit(scale, f"{list(expected)} (blocks of {rows} x {columns} of {shown(name)})", list(scale.shape))
    decode = BlockFp8(rows, columns, grid, rounded)
    mx = rows == 1 and scale.dtype in POWERS and tuple(scale.shape) == expected  # MXFP8, groups of a row
    if mx and not width % columns and not decode.has_tables:
        return grouped.packed(name, weight, scale, None, Grouped(columns, weight.dtype, rounded=rounded), method)
    step, tables = _step(height, width), decode._tables(_step(height, width))
    results = tables * CODES if decode.has_tables else step * width
    needed = room(4 * CODES, CODES, 4 * step * width, 4 * step * grid[1], 4 * results, 2 * results, 4 * tables)
    dtype = rounded or torch.bfloat16
    return by_matrix(PackedWeight(name, tuple(weight.shape), dtype, (weight, scale), method, decode, needed))


def _alike(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes are equal but for dimensions of one."""
    return [own for own in shape if own != 1] == [own for own in expected if own != 1]


def read(values: Mapping[str, object], where: str) -> Format:
    """The method ``fp8`` with the settings of a checkpoint."""
    return Fp8(Settings(values, where, "FP8"))


def read_fbgemm(values: Mapping[str, object], where: str) -> Format:
    """The method ``fbgemm_fp8`` with the settings of a checkpoint."""
    return Fbgemm(Settings(values, where, "FP8 of FBGEMM"))
