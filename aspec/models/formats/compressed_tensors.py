"""compressed-tensors: packed integers, plain integers and floats, each with a scheme of its own per module.

A module stores ``weight_packed`` int32 [out, in * bits / 32] (pack-quantized) or ``weight`` in int8 or float8, and
``weight_scale`` per group, channel or tensor; where its scheme is not symmetric, ``weight_zero_point``, which is packed
along the outputs; and in old files ``weight_g_idx``, the group of every input. The weight is (q - z) * s. Library:
https://github.com/vllm-project/compressed-tensors (``decompress`` of its compressors).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from aspec.errors import UnsupportedModelError, shown
from aspec.io.checkpoint import TensorRef
from aspec.io.weight_format import REMEDY
from aspec.models.formats import fp8, mxfp4, nvfp4
from aspec.models.formats.compressed_settings import Scheme, Schemes
from aspec.models.formats.gptq import Index, check_groups
from aspec.models.formats.int4.repack import scaled_factor
from aspec.models.formats.integers.fields import FLOATS, Fields, Module, modules_with
from aspec.models.formats.integers.packed_ints import Room, Turn, Unpacker, num_words
from aspec.models.formats.integers.scaled import ScaledDecode, Shared, Sizes
from aspec.models.formats.packed import Format, Kind, Outline, PackedWeight, PlainWeight, outlined

MULTIPLE = 8  # of inputs and outputs of packed weights
PLAIN = (torch.int8, torch.float8_e4m3fn)  # dtypes of weights whose numbers are stored one by one
ENDS = ("weight_packed", "weight_scale")


class CompressedTensors(Format):
    """compressed-tensors with the settings of one checkpoint."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._schemes = Schemes(fields)
        self.remarks = self._schemes.remarks  # texts for the user

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        names = dict.fromkeys(name for end in ENDS for name in modules_with(tensors, end))
        names |= {name: None for name in modules_with(tensors, "weight") if tensors[f"{name}.weight"].dtype in PLAIN}
        for name in self._schemes.named:
            if f"{name}.weight" in tensors and name not in names and self._schemes.of(name) is not None:
                raise Module(name, tensors).misfit("expected scales, as the settings name the module, found none")
        found = [self._weight(Module(name, tensors)) for name in names]
        self._fields.check_found(len(found), "tensors named *.weight_packed or *.weight_scale")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        able = weight.kind in (Kind.LINEAR, Kind.HEAD, Kind.EMBEDDING)
        scheme = self._schemes.of(weight.module) if able else None
        return {} if scheme is None else _outline(weight, scheme)

    def _weight(self, module: Module) -> PackedWeight:
        scheme = self._schemes.of(module.name)
        if scheme is None:
            raise module.misfit("expected a plain weight, as no group of the settings names the module, found scales")
        kind = scheme.format
        if kind == "mixed-precision":  # of the model, where the group names none
            kind = "pack-quantized" if module.find("weight_packed") is not None else "naive-quantized"
        if kind not in LAYOUTS:
            raise unsupported(module, scheme, " or ".join(LAYOUTS))
        return LAYOUTS[kind](module, scheme)


def _outline(weight: PlainWeight, scheme: Scheme) -> Outline:
    """The tensors of a weight with this scheme; those of an unknown layout are refused when they are read."""
    (rows, columns), base = weight.shape, weight.module
    grids = {
        "tensor": (1,),
        "channel": (rows, 1),
        "block": (-(-rows // max(1, scheme.block[0])), -(-columns // max(1, scheme.block[1]))),
    }
    grid = grids.get(scheme.strategy) or (rows, columns // scheme.group_size)
    found: dict[str, torch.Tensor] = {}
    if scheme.format in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        own = torch.uint8 if scheme.format.startswith("mxfp4") else torch.float8_e4m3fn
        found = {"weight_packed": outlined(torch.uint8, rows, columns // 2), "weight_scale": outlined(own, *grid)}
        if own is torch.float8_e4m3fn:
            found["weight_global_scale"] = outlined(torch.float32, 1)
    elif scheme.type == "float":
        own = torch.uint8 if scheme.format.startswith("mxfp8") else weight.dtype
        found = {"weight": outlined(torch.float8_e4m3fn, rows, columns), "weight_scale": outlined(own, *grid)}
    else:
        words = scheme.format in ("pack-quantized", "mixed-precision")
        found = {"weight_scale": outlined(weight.dtype, *grid)}
        if words:
            found["weight_packed"] = outlined(torch.int32, rows, num_words(columns, scheme.bits))
        else:
            found["weight"] = outlined(torch.int8, rows, columns)
        if not scheme.symmetric:
            in_words = words and scheme.strategy != "tensor"
            shape = (num_words(rows, scheme.bits), grid[1]) if in_words else grid
            found["weight_zero_point"] = outlined(torch.int32 if in_words else torch.int8, *shape)
        if words and scheme.reordered:
            found["weight_g_idx"] = outlined(torch.int32, columns)
    return {f"{base}.{end}": tensor for end, tensor in found.items()}


def unsupported(module: Module, scheme: Scheme, expected: str) -> UnsupportedModelError:
    """An error for weights that are quantised in a way that aspec does not decode."""
    return UnsupportedModelError(
        f"{shown(module.name)}: its weight is stored as {scheme.text}, which is not supported: expected {expected}. "
        f"{REMEDY}"
    )


def packed(module: Module, scheme: Scheme) -> PackedWeight:
    """A weight that is pack-quantized."""
    if scheme.type != "int" or scheme.bits > 8 or scheme.strategy not in ("group", "channel", "tensor"):
        raise unsupported(module, scheme, "integers of 1 to 8 bits by group, channel or tensor")
    words = module.get("weight_packed", (torch.int32,))
    rows, columns = words.shape[0], words.shape[1] * 32 // scheme.bits
    scales = _scales(module, scheme, rows, columns)
    if scheme.strategy == "group":
        columns = scales.shape[1] * scheme.group_size
    if not columns or columns % MULTIPLE or num_words(columns, scheme.bits) != words.shape[1]:
        raise module.misfit(
            f"expected inputs in multiples of {MULTIPLE} that fill weight_packed, found weight_packed "
            f"{list(words.shape)} and weight_scale {list(scales.shape)} for {scheme.text}"
        )
    groups = scales.shape[1] if scheme.strategy == "group" else 1
    refs = [words, scales]
    if not scheme.symmetric:
        if scheme.strategy == "tensor":
            refs.append(_flat(module, "weight_zero_point", (torch.int8,)))
        elif rows % MULTIPLE:
            raise unsupported(module, scheme, f"outputs in multiples of {MULTIPLE} with zero points, found {rows}")
        else:
            shape = (num_words(rows, scheme.bits), groups)
            refs.append(module.get("weight_zero_point", (torch.int32,), shape))
    index = scheme.reordered or module.find("weight_g_idx") is not None
    if index:
        refs.append(module.get("weight_g_idx", (torch.int32,), (columns,)))
    sizes = Sizes(rows, columns, groups, scales.dtype, scheme.bits, not scheme.symmetric, index)
    decode = PackedDecode(module.name, sizes)
    return _made(module, scheme, (rows, columns), scales.dtype, refs, decode)


def plain(module: Module, scheme: Scheme) -> PackedWeight:
    """A weight whose numbers are stored one by one, in 8 bits."""
    if scheme.type == "float":
        return _float8(module, scheme)
    if scheme.bits > 8 or scheme.strategy not in ("group", "channel", "tensor"):
        raise unsupported(module, scheme, "integers of up to 8 bits by group, channel or tensor")
    numbers = module.get("weight", (torch.int8,))
    rows, columns = numbers.shape
    if not rows * columns or (scheme.strategy == "group" and columns % scheme.group_size):
        raise module.misfit(f"expected inputs in groups of {scheme.group_size}, found weight {list(numbers.shape)}")
    scales = _scales(module, scheme, rows, columns)
    refs = [numbers, scales]
    if not scheme.symmetric or module.find("weight_zero_point") is not None:  # old files have zeros, too
        refs.append(module.get("weight_zero_point", (torch.int8,), scales.shape))
    groups = columns // scheme.group_size if scheme.strategy == "group" else 1
    decode = PlainDecode(Sizes(rows, columns, groups, scales.dtype, has_zeros=len(refs) == 3))
    return _made(module, scheme, (rows, columns), scales.dtype, refs, decode)


def _float8(module: Module, scheme: Scheme) -> PackedWeight:
    if scheme.bits != 8 or not scheme.symmetric:
        raise unsupported(module, scheme, "symmetric floats of 8 bits")
    weight, scales = module.need("weight"), module.need("weight_scale")
    block = {"group": (1, scheme.group_size), "block": scheme.block}.get(scheme.strategy)
    rounded = scales.dtype if scales.dtype in FLOATS else torch.bfloat16  # of powers of two, in the library
    return fp8.packed(weight.name, weight, scales, block, f"compressed-tensors, {scheme.text}", rounded)


def _float4(module: Module, scheme: Scheme) -> PackedWeight:
    """Floats of 4 bits: mxfp4, or nvfp4, which has a scale of the whole weight, too."""
    if scheme.type != "float" or scheme.bits != 4 or not scheme.symmetric:
        raise unsupported(module, scheme, "symmetric floats of 4 bits")
    name, codes = f"{module.name}.weight", module.need("weight_packed")
    if scheme.format.startswith("mxfp4"):
        return mxfp4.packed(name, codes, module.need("weight_scale"), torch.bfloat16)
    return nvfp4.packed(name, codes, module.need("weight_scale"), module.need("weight_global_scale"))


LAYOUTS: Mapping[str, Callable[[Module, Scheme], PackedWeight]] = MappingProxyType(
    {
        "pack-quantized": packed,
        "int-quantized": plain,
        "float-quantized": plain,
        "naive-quantized": plain,
        "mxfp8-quantized": plain,
        "mxfp4-pack-quantized": _float4,
        "nvfp4-pack-quantized": _float4,
    }
)
"""How the library calls a layout -> the function that finds a module's weight in it."""


def _scales(module: Module, scheme: Scheme, rows: int, columns: int) -> TensorRef:
    """The scales of integers."""
    if scheme.strategy == "tensor":
        return _flat(module, "weight_scale", FLOATS)
    if scheme.strategy == "channel":
        return module.get("weight_scale", FLOATS, (rows, 1))
    known = columns // scheme.group_size if module.find("weight") is not None else -1
    return module.get("weight_scale", FLOATS, (rows, known))


def _flat(module: Module, end: str, dtypes: Sequence[torch.dtype]) -> TensorRef:
    """A tensor of one number, with up to two dimensions."""
    ref = module.find(end)
    return module.get(end, dtypes, (1,) * (1 if ref is None else min(len(ref.shape), 2)))


def _made(
    module: Module,
    scheme: Scheme,
    shape: tuple[int, int],
    dtype: torch.dtype,
    refs: Sequence[TensorRef],
    decode: ScaledDecode,
) -> PackedWeight:
    method = f"compressed-tensors, {scheme.text}"
    words = isinstance(decode, PackedDecode) and not scheme.reordered
    factor = scaled_factor(module.name, decode) if words else None
    return PackedWeight(
        f"{module.name}.weight", shape, dtype, tuple(refs), method, decode, decode.workspace_bytes, factor
    )


class PackedDecode(ScaledDecode):
    """Decodes ``weight_packed``, ``weight_scale`` and, where stored, ``weight_zero_point`` and ``weight_g_idx``."""

    def __init__(self, name: str, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.name = name  # for messages

    @classmethod
    def take_shared(cls, sizes: Sizes, room: Room) -> tuple[Any, ...]:  # noqa: D102
        index = [room.take(torch.int32, sizes.columns if sizes.reordered else 0) for _ in range(2)]
        if not sizes.has_zeros:
            return None, None, *index
        turn = Turn(room, num_words(sizes.rows, sizes.bits), sizes.groups)
        return turn, Unpacker(room, sizes.bits, sizes.groups, -(-sizes.rows // MULTIPLE) * MULTIPLE), *index

    @classmethod
    def unpacker(cls, sizes: Sizes, room: Room, rows: int, columns: int) -> Unpacker:  # noqa: D102
        return Unpacker(room, sizes.bits, rows, columns)

    def share(self, stored: Sequence[torch.Tensor], pieces: tuple[Any, ...]) -> Shared:  # noqa: D102
        turn, unpack, *index = pieces
        sizes = self.sizes
        offset = 1 << sizes.bits - 1  # of numbers and packed zero points
        zeros: torch.Tensor | int = offset
        if sizes.has_zeros and stored[2].dtype is torch.int8:
            zeros = turn.turned[:1, :1].copy_(stored[2].view(1, 1)).add_(offset).expand(sizes.rows, sizes.groups)
        elif sizes.has_zeros:
            turn(stored[2])
            unpack(turn.turned)
            zeros = unpack.values.t()
        found, damaged = self._index(stored[-1], *index) if sizes.reordered else (None, None)
        return Shared(_expanded(stored[1], sizes), zeros, found, damaged)

    def _index(self, stored: torch.Tensor, index: torch.Tensor, adjacent: torch.Tensor) -> Index:
        """The group of every input; if one is -1, groups are adjacent inputs, as in the library."""
        groups = self.sizes.groups
        torch.arange(self.sizes.columns, out=adjacent)
        adjacent.floor_divide_(self.sizes.group)
        damaged = check_groups(self.name, "weight_g_idx", stored, -1, groups)
        if damaged is None:
            return None if torch.equal(stored, adjacent) or int(stored.min()) == -1 else stored, None
        torch.where(torch.amin(stored) == -1, adjacent, stored, out=index)
        return index.clamp_(0, groups - 1), damaged


class PlainDecode(ScaledDecode):
    """Decodes ``weight`` in int8, ``weight_scale`` and, where stored, ``weight_zero_point``."""

    @classmethod
    def take_shared(cls, sizes: Sizes, room: Room) -> tuple[Any, ...]:  # noqa: D102
        return ()

    @classmethod
    def unpacker(cls, sizes: Sizes, room: Room, rows: int, columns: int) -> Unpacker:  # noqa: D102
        return Unpacker(room, 8, rows, columns)  # for its memory only

    def share(self, stored: Sequence[torch.Tensor], pieces: tuple[Any, ...]) -> Shared:  # noqa: D102
        zeros = _expanded(stored[2], self.sizes) if self.sizes.has_zeros else 0
        return Shared(_expanded(stored[1], self.sizes), zeros)


def _expanded(stored: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """One number for the whole weight, or [rows, groups], as [rows, groups]."""
    return stored.view(1, 1).expand(sizes.rows, sizes.groups) if stored.numel() == 1 else stored


def read(values: Mapping[str, object], where: str) -> Format:
    """The method with the settings of a checkpoint."""
    return CompressedTensors(Fields(values, where, "compressed-tensors"))
