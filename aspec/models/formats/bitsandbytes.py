"""bitsandbytes: 4-bit codes (nf4, fp4) in blocks of the flat weight, and rows of int8 (LLM.int8).

A 4-bit weight has its shape and its block size in a JSON text among its tensors, so that text is read with the headers.
The scales of blocks may be quantised themselves (double quantisation). int8: LLM.int8 also rounds activations to int8,
but for outliers above ``llm_int8_threshold``; aspec computes with activations as they are, with the weights that
``model.dequantize()`` of transformers makes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.checkpoint import FETCH_AGAIN, TensorRef
from aspec.io.json_file import NotJson, parse_json
from aspec.io.weight_format import REMEDY
from aspec.models.formats.packed import Format, Kind, Outline, PackedWeight, PlainWeight, outlined
from aspec.models.formats.settings import Settings, check_shape, misfit, missing
from aspec.models.formats.workspace import Workspace, room

TILE = 1 << 17  # weights that are decoded at once, in float32: they stay in the second-level cache
BLOCKS = tuple(1 << power for power in range(5, 13))  # sizes that bitsandbytes has
USUAL_BLOCK, USUAL_NESTED_BLOCK = 64, 256  # that transformers asks for
STATE = ".quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
INVERSE_OF_127 = 7.874015718698502e-3  # the library's constant
ROW = 0  # the only layout of int8 weights that current versions write
MOST_STATE_BYTES = 1 << 16
KNOWN = (
    "quant_method",
    "load_in_4bit",
    "load_in_8bit",
    "_load_in_4bit",
    "_load_in_8bit",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
)


@dataclass(frozen=True, slots=True)
class Blocks4Bit:
    """Decodes codes (the high one of a byte first), scales of blocks, and the values of codes, float32 [16].

    With double quantisation the scales are uint8, and two more tensors decode them: scales of blocks of scales, and
    the values of their codes, float32 [256].
    """

    block: int
    rounded: torch.dtype  # in which the library makes the weight
    nested_block: int = 0  # scales; 0: no double quantisation
    offset: float = 0.0  # of the scales, with double quantisation

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """See ``Decode``."""
        space, out = Workspace(workspace), out.view(-1)
        codes = stored[0].view(-1).view(torch.uint8)
        pairs = space.take(torch.float32, 16, 16, 2)  # high code, low code
        pairs[..., 0].copy_(stored[2][:, None])
        pairs[..., 1].copy_(stored[2])
        table = pairs.view(torch.int64).view(-1)
        tile, index = space.take(torch.float32, TILE), space.take(torch.int32, TILE // 2)
        scales, rounded = space.take(torch.float32, TILE // self.block), space.take(self.rounded, TILE)
        for first in range(0, out.numel(), TILE):
            count = min(TILE, out.numel() - first)
            own, half = tile[:count], -(-count // 2)
            index[:half].copy_(codes[first // 2 : first // 2 + half])
            torch.index_select(table, 0, index[:half], out=tile[: 2 * half].view(torch.int64))
            _scale(own, self._scales(stored, first // self.block, -(-count // self.block), scales, index), self.block)
            if self.rounded not in (torch.float32, out.dtype):
                own.copy_(rounded[:count].copy_(own))
            out[first : first + count].copy_(own)

    def _scales(
        self, stored: Sequence[torch.Tensor], first: int, count: int, scales: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """The scales of some blocks, float32."""
        if not self.nested_block:
            return stored[1][first : first + count]
        own = index[:count].copy_(stored[1][first : first + count])
        scales = torch.index_select(stored[4], 0, own, out=scales[:count])
        _scale(scales, stored[3][first // self.nested_block :], self.nested_block)
        return scales.add_(self.offset)


def _scale(values: torch.Tensor, scales: torch.Tensor, size: int) -> None:
    """Multiply blocks of ``size`` values by their scales; the last block may be shorter."""
    whole = values.numel() // size
    if whole:
        values[: whole * size].view(whole, size).mul_(scales[:whole, None])
    if whole * size < values.numel():
        values[whole * size :].mul_(scales[whole])


@dataclass(frozen=True, slots=True)
class Rows8Bit:
    """Decodes int8 [N, K] with the largest absolute value of each row, float32 [N]."""

    def __call__(self, stored: Sequence[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor) -> None:
        """See ``Decode``."""
        height, width = out.shape
        step = max(1, TILE // width)
        for first in range(0, height, step):
            own = out[first : first + step]
            tile = own if out.dtype == torch.float32 else Workspace(workspace).take(torch.float32, *own.shape)
            tile.copy_(stored[0][first : first + step])
            tile.mul_(stored[1][first : first + step, None]).mul_(INVERSE_OF_127)
            if tile is not own:
                own.copy_(tile)


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON text of a 4-bit weight states."""

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_blocksize: int = 0  # 0: no double quantisation
    nested_offset: float = 0.0


class BitsAndBytes(Format):
    """The method ``bitsandbytes``: the stored tensors of a weight say whether it has 4 or 8 bits."""

    def __init__(self, settings: Settings) -> None:
        settings.check_known(KNOWN)
        bits = [settings.flag(key) or settings.flag("_" + key) for key in ("load_in_4bit", "load_in_8bit")]
        if bits[0] and bits[1]:
            settings.refuse("load_in_8bit", "false beside load_in_4bit")
        settings.choice("bnb_4bit_quant_type", TYPES, "fp4")
        settings.names("llm_int8_skip_modules")  # their weights are stored plainly
        self._settings = settings

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        found = []
        for name, ref in tensors.items():
            states = [own for kind in TYPES if (own := tensors.get(f"{name}{STATE}{kind}")) is not None]
            base = name.removesuffix("weight")
            if len(states) > 1:
                raise misfit(states[1], f"one state of {shown(name)}", "a second one")
            if states:
                found.append(_packed_4bit(name, ref, states[0], tensors))
            elif name + ".absmax" in tensors:
                raise missing(tensors[name + ".absmax"], f"{name}{STATE}nf4")
            elif base != name and ref.dtype == torch.int8:
                found.append(_packed_8bit(name, ref, base, tensors))
            self._check_alone(name, ref, tensors)
        self._settings.check_found(len(found), f"tensors named *{STATE}nf4 or *.SCB")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        if weight.kind is not Kind.LINEAR or self._settings.excludes(weight.module, "llm_int8_skip_modules"):
            return {}
        values, base = self._settings.values, weight.name.removesuffix("weight")
        if values.get("load_in_8bit") or values.get("_load_in_8bit"):
            return {
                weight.name: outlined(torch.int8, *weight.shape),
                f"{base}SCB": outlined(torch.float32, weight.shape[0]),
                f"{base}weight_format": torch.tensor(ROW, dtype=torch.uint8),
            }
        kind, nested = values.get("bnb_4bit_quant_type", "fp4"), bool(values.get("bnb_4bit_use_double_quant"))
        count = -(-math.prod(weight.shape) // USUAL_BLOCK)
        dtype = str(weight.dtype).removeprefix("torch.")
        state = {"quant_type": kind, "blocksize": USUAL_BLOCK, "dtype": dtype, "shape": list(weight.shape)}
        tensors = {"absmax": outlined(torch.uint8 if nested else torch.float32, count)}
        if nested:
            state |= {"nested_blocksize": USUAL_NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.1}
            tensors["nested_absmax"] = outlined(torch.float32, -(-count // USUAL_NESTED_BLOCK))
            tensors["nested_quant_map"] = outlined(torch.float32, 256)
        tensors["quant_map"] = outlined(torch.float32, 16)
        tensors[f"quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        stored = {f"{weight.name}.{end}": tensor for end, tensor in tensors.items()}
        return {weight.name: _codes(weight, str(values.get("bnb_4bit_quant_storage") or "uint8")), **stored}

    def _check_alone(self, name: str, ref: TensorRef, tensors: Mapping[str, TensorRef]) -> None:
        """Raise CheckpointError for the scales of a weight that isn't stored."""
        for end, weight in ((".SCB", ".weight"), (".weight.absmax", ".weight")):
            if name.endswith(end) and (expected := name.removesuffix(end) + weight) not in tensors:
                raise missing(ref, expected)


def _codes(weight: PlainWeight, storage: str) -> torch.Tensor:
    """The outline of the codes of a 4-bit weight, in the dtype that the settings have them stored in."""
    dtype = getattr(torch, storage, None)
    dtype = dtype if dtype in STORAGES else torch.uint8
    return outlined(dtype, -(-math.prod(weight.shape) // (2 * dtype.itemsize)), 1)


def _packed_4bit(name: str, weight: TensorRef, ref: TensorRef, tensors: Mapping[str, TensorRef]) -> PackedWeight:
    state = _read_state(ref)
    numel, block, nested = math.prod(state.shape), state.blocksize, state.nested_blocksize
    count = -(-numel // block)
    rules = {"absmax": (torch.uint8 if nested else torch.float32, count), "quant_map": (torch.float32, 16)}
    if nested:
        rules |= {"nested_absmax": (torch.float32, -(-count // nested)), "nested_quant_map": (torch.float32, 256)}
    refs = [weight]
    for end, (dtype, length) in rules.items():
        if (own := tensors.get(f"{name}.{end}")) is None:
            raise missing(weight, f"{name}.{end}")
        if own.dtype != dtype:
            raise misfit(own, str(dtype).removeprefix("torch."))
        check_shape(own, (length,), f"for {list(state.shape)} in blocks of {block}")
        refs.append(own)
    if weight.dtype not in STORAGES or weight.nbytes != -(-numel // 2):
        raise misfit(weight, f"{-(-numel // 2)} bytes for the {list(state.shape)} codes that its state promises")
    decode = Blocks4Bit(block, state.dtype, nested, state.nested_offset)
    needed = room(2 * 4 * 256, 4 * TILE, 2 * TILE, 4 * (TILE // block), 4 * TILE)
    method = f"bitsandbytes {state.quant_type}" + (", double quantised" if nested else "")
    return PackedWeight(name, state.shape, state.dtype, (*refs, ref), method, decode, needed)


def _packed_8bit(name: str, weight: TensorRef, base: str, tensors: Mapping[str, TensorRef]) -> PackedWeight:
    scale = tensors.get(base + "SCB")
    if scale is None:
        raise missing(weight, base + "SCB")
    if len(weight.shape) != 2 or weight.nbytes == 0:
        raise misfit(weight, "an int8 matrix")
    if scale.dtype != torch.float32:
        raise misfit(scale, "float32")
    check_shape(scale, weight.shape[:1], f"a scale for each row of {shown(name)}")
    refs = [weight, scale]
    if (layout := tensors.get(base + "weight_format")) is not None:
        if layout.nbytes != 1 or (code := _read(layout)) != bytes([ROW]):
            found = f"uint8 {list(layout.shape)}" if layout.nbytes != 1 else str(code[0])
            raise misfit(layout, f"{ROW} (rows, as they are)", found)
        refs.append(layout)
    needed = room(4 * max(TILE, weight.shape[1]))
    return PackedWeight(name, weight.shape, torch.float32, tuple(refs), "bitsandbytes int8", Rows8Bit(), needed)


def _read_state(ref: TensorRef) -> _State:
    """The JSON text of a 4-bit weight. Raises CheckpointError if it is damaged, UnsupportedModelError if unknown."""
    if ref.dtype != torch.uint8 or not 0 < ref.nbytes <= MOST_STATE_BYTES:
        raise misfit(ref, f"a JSON text of at most {MOST_STATE_BYTES} bytes as uint8")
    try:
        values = parse_json(_read(ref), unique=True)
    except NotJson as error:
        raise CheckpointError(
            f"{ref.file}: tensor {shown(ref.name)}: expected JSON, found none: {error}. {FETCH_AGAIN}"
        ) from error
    if not isinstance(values, dict):
        raise misfit(ref, "a JSON object", type(values).__name__)
    rules: dict[str, Callable[[Any], bool]] = {
        "quant_type": lambda value: bool(value == ref.name.rpartition("__")[2]),
        "blocksize": _is_size,
        "dtype": lambda value: type(value) is str and value in DTYPES,
        "shape": _is_shape,
        "nested_blocksize": _is_size,
        "nested_dtype": lambda value: bool(value == "float32"),
        "nested_offset": lambda value: type(value) in (int, float) and math.isfinite(value),
    }
    nested = any(key.startswith("nested_") for key in values)
    for key in (key for key in rules if nested or not key.startswith("nested_")):
        if key not in values or not rules[key](values[key]):
            raise misfit(ref, f"a {key} that bitsandbytes has", f"{key} = {shown(values.get(key))}")
    if other := values.keys() - rules.keys():
        raise UnsupportedModelError(
            f"{ref.file}: tensor {shown(ref.name)}: expected the fields {', '.join(rules)}, found "
            f"{shown(min(other))}, which aspec does not know. {REMEDY}"
        )
    inner = (values["nested_blocksize"], float(values["nested_offset"])) if nested else ()
    return _State(values["quant_type"], values["blocksize"], DTYPES[values["dtype"]], tuple(values["shape"]), *inner)


def _is_size(value: object) -> bool:
    return type(value) is int and value in BLOCKS


def _is_shape(value: object) -> bool:
    if not isinstance(value, list) or not 0 < len(value) <= 8:
        return False
    return all(type(own) is int and 0 < own < 1 << 40 for own in value) and math.prod(value) < 1 << 62


def _read(ref: TensorRef) -> bytes:
    """The bytes of a small tensor. Raises CheckpointError if the file does not have them."""
    if ref.data is not None:
        return ref.data
    try:
        with open(ref.file, "rb") as file:
            file.seek(ref.offset)
            data = file.read(ref.nbytes)
    except OSError as error:
        raise CheckpointError(f"{ref.file} cannot be read: {error.strerror}. Check the path.") from error
    if len(data) != ref.nbytes:
        raise CheckpointError(
            f"{ref.file}: bitsandbytes keeps the shapes of weights in tensors such as {shown(ref.name)}: expected its "
            f"{ref.nbytes} bytes, found a file that ends before. If only the headers of this model were fetched, "
            f"fetch the whole model."
        )
    return data


def read(values: Mapping[str, object], where: str) -> Format:
    """The method with the settings of a checkpoint."""
    return BitsAndBytes(Settings(values, where, "bitsandbytes"))
