"""GPTQ: integers of 2, 3, 4 or 8 bits that are packed along the input, with scales and zero points by group.

A module stores ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32], ``scales`` [groups,
out] and ``g_idx`` int32 [in], the group of every input; its weight [out, in] is (q - z) * s. Version 1 stores z - 1,
version 2 (``checkpoint_format`` gptq_v2) stores z. Library: https://github.com/ModelCloud/GPTQModel (TorchLinear).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from aspec.errors import CheckpointError, shown
from aspec.io.checkpoint import FETCH_AGAIN, TensorRef
from aspec.models.formats.int4.repack import scaled_factor
from aspec.models.formats.integers.fields import FLOATS, Fields, Module, modules_with
from aspec.models.formats.integers.packed_ints import ColumnUnpacker, Room, Unpacker, num_words
from aspec.models.formats.integers.scaled import Grid, ScaledDecode, Shared, Sizes, on_host, split
from aspec.models.formats.packed import Format, Kind, Outline, PackedWeight, PlainWeight, outlined

BITS = (2, 3, 4, 8)
MULTIPLE = 8  # of inputs and of outputs
VERSIONS = {"gptq": 1, "gptq_v2": 2}

Index = tuple[torch.Tensor | None, torch.Tensor | None]
"""The group of every input, None where groups are adjacent inputs; and whether it is damaged, None on the host."""

OVERRIDES = frozenset({"bits", "group_size", "sym", "desc_act"})
"""Fields that ``dynamic`` may set for some modules."""

LAYOUT = OVERRIDES | {"quant_method", "checkpoint_format", "format", "pack_dtype", "dynamic", "lm_head"}

QUANTISING = frozenset(
    {
        "act_group_aware",
        "autoround_version",
        "backend",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "data_type",
        "dataset",
        "device",
        "disable_exllama",
        "enable_full_range",
        "enable_minmax_tuning",
        "enable_quanted_input",
        "exllama_config",
        "fail_safe",
        "fallback",
        "foem",
        "gptaq",
        "gradient_accumulate_steps",
        "hessian",
        "hyb_act",
        "iters",
        "low_gpu_mem_usage",
        "lr",
        "max_input_length",
        "meta",
        "method",
        "minmax_lr",
        "mock_quantization",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "mse",
        "nsamples",
        "offload_to_disk",
        "offload_to_disk_path",
        "pack_impl",
        "pad_token_id",
        "parallel_packing",
        "quantizer",
        "scale_dtype",
        "seqlen",
        "static_groups",
        "tokenizer",
        "train_bs",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
        "v2",
        "v2_alpha",
        "v2_memory_device",
    }
)
"""Fields of how the model was quantised, or with which kernels it is run: they do not change what is stored."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one module is stored."""

    bits: int
    group_size: int  # -1: one group
    reordered: bool  # desc_act: groups need not be adjacent inputs

    @classmethod
    def of(cls, fields: Fields, default: "Layout | None" = None) -> Self:
        """The layout that the fields name; others are as in ``default``."""
        bits = fields.whole("bits", default.bits if default else 0)
        if bits not in BITS:
            fields.refuse("bits", "2, 3, 4 or 8")
        size = fields.whole("group_size", default.group_size if default else 128, least=-1)
        if size == 0:
            fields.refuse("group_size", "-1 or a whole number from 1 on")
        fields.choice("sym", (True, False, None), None)  # zero points are stored in both cases
        reordered = fields.choice("desc_act", (True, False, None), default.reordered if default else False)
        return cls(bits, size, bool(reordered))


class Gptq(Format):
    """GPTQ with the settings of one checkpoint."""

    def __init__(self, fields: Fields) -> None:
        fields.check_known(LAYOUT | QUANTISING)
        fields.text("pack_dtype", "int32", ("int32", "torch.int32"))
        fields.choice("lm_head", (True, False, None), None)  # what is stored tells
        versions = {fields.text(key, "", VERSIONS) for key in ("checkpoint_format", "format")} - {""}
        if len(versions) > 1:
            fields.refuse("checkpoint_format", "the same as format")
        self._fields = fields
        self._version = VERSIONS[versions.pop() if versions else "gptq"]
        self._layout = Layout.of(fields)
        rules = fields.inner("dynamic")
        self._rules = [(rules.pattern(_pattern(key)), self._rule(rules, key)) for key in rules.values]

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        check_companions(tensors, ("qzeros", "scales", "g_idx"))
        found = [self._weight(Module(name, tensors)) for name in modules_with(tensors, "qweight")]
        self._fields.check_found(len(found), "tensors named *.qweight")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        layout = self._layout_of(weight.module)
        packs_head = self._fields.values.get("lm_head") is True
        if (weight.kind is not Kind.LINEAR and not (weight.kind is Kind.HEAD and packs_head)) or layout is None:
            return {}
        rows, columns = weight.shape
        groups = 1 if layout.group_size == -1 else -(-columns // layout.group_size)
        return {
            f"{weight.module}.qweight": outlined(torch.int32, num_words(columns, layout.bits), rows),
            f"{weight.module}.qzeros": outlined(torch.int32, groups, num_words(rows, layout.bits)),
            f"{weight.module}.scales": outlined(torch.float16, groups, rows),
            f"{weight.module}.g_idx": outlined(torch.int32, columns),  # all writers store it
        }

    def _layout_of(self, module: str) -> Layout | None:
        """The layout of a module; None if ``dynamic`` excludes it."""
        return next((layout for pattern, layout in self._rules if pattern.match(module)), self._layout)

    def _rule(self, rules: Fields, key: str) -> Layout | None:
        """The layout of modules that match a pattern of ``dynamic``; None if they are not quantised."""
        if key.startswith("-:"):
            return None
        fields = rules.inner(key)
        fields.check_known(OVERRIDES | QUANTISING)
        return Layout.of(fields, self._layout)

    def _weight(self, module: Module) -> PackedWeight:
        layout = self._layout_of(module.name)
        if layout is None:
            raise module.misfit("expected no tensor qweight, as dynamic excludes the module, found one")
        words = module.get("qweight", (torch.int32,))
        rows, columns = words.shape[1], words.shape[0] * 32 // layout.bits
        if (
            not rows * columns
            or rows % MULTIPLE
            or columns % MULTIPLE
            or words.shape[0] != num_words(columns, layout.bits)
        ):
            raise module.misfit(
                f"expected inputs and outputs in multiples of {MULTIPLE}, found qweight {list(words.shape)} of "
                f"{layout.bits} bits, which is {columns} inputs and {rows} outputs"
            )
        size = columns if layout.group_size == -1 else layout.group_size
        groups = -(-columns // size)
        zeros = module.get("qzeros", (torch.int32,), (groups, num_words(rows, layout.bits)))
        scales = module.get("scales", FLOATS, (groups, rows))
        refs = [words, zeros, scales]
        if layout.reordered or columns % size or module.find("g_idx") is not None:
            refs.append(module.get("g_idx", (torch.int32,), (columns,)))
        sizes = Sizes(rows, columns, groups, scales.dtype, layout.bits, reordered=len(refs) == 4)
        method = f"GPTQ, {layout.bits} bits, " + ("one group" if groups == 1 else f"groups of {size}")
        decode = GptqDecode(module.name, sizes, self._version)
        name = f"{module.name}.weight"
        factor = None if layout.reordered else scaled_factor(module.name, decode)
        return PackedWeight(
            name, (rows, columns), scales.dtype, tuple(refs), method, decode, decode.workspace_bytes, factor
        )


def _pattern(key: str) -> str:
    """The pattern of a rule: after "-:", which excludes modules, or after "+:", or alone."""
    return key[2:] if key[:2] in ("-:", "+:") else key


def check_companions(tensors: Mapping[str, TensorRef], ends: Sequence[str]) -> None:
    """Raise CheckpointError if a tensor that belongs to a ``qweight`` is stored without it."""
    for name in tensors:
        module, _, end = name.rpartition(".")
        if end in ends and f"{module}.qweight" not in tensors:
            Module(module, tensors).need("qweight")


def read(values: Mapping[str, object], where: str) -> Format:
    """The method with the settings of a checkpoint."""
    return Gptq(Fields(values, where, "GPTQ"))


class GptqDecode(ScaledDecode):
    """Decodes ``qweight``, ``qzeros``, ``scales`` and, where stored, ``g_idx``."""

    narrow = True

    def __init__(self, name: str, sizes: Sizes, version: int) -> None:
        super().__init__(sizes)
        self.name = name  # for messages
        self.version = version

    @classmethod
    def take_shared(cls, sizes: Sizes, room: Room) -> tuple[Any, ...]:  # noqa: D102
        zeros = Unpacker(room, sizes.bits, sizes.groups, sizes.rows)
        words = room.take(torch.int32, sizes.groups, num_words(sizes.rows, sizes.bits))
        return zeros, words, *(room.take(torch.int32, sizes.columns) for _ in range(2))

    @classmethod
    def unpacker(cls, sizes: Sizes, room: Room, rows: int, columns: int) -> Unpacker:  # noqa: D102
        return ColumnUnpacker(room, sizes.bits, rows, columns)

    def numbers(self, stored: torch.Tensor, height: int) -> Grid:  # noqa: D102
        return turned(stored, num_words(self.width, self.sizes.bits), height)

    def share(self, stored: Sequence[torch.Tensor], pieces: tuple[Any, ...]) -> Shared:  # noqa: D102
        zeros, words, *rest = pieces
        bits = self.sizes.bits
        if self.version == 1 and bits != 3:
            one_each = sum(1 << start for start in range(0, 32, bits))
            torch.add(stored[1], one_each, out=words)  # as the library, which carries into the next zero point
            zeros(words)
        else:
            zeros(stored[1])
        if self.version == 1 and bits == 3:
            zeros.values.add_(1).bitwise_and_(7)
        index, damaged = self._index(stored[3], *rest) if self.sizes.reordered else (None, None)
        return Shared(stored[2].t(), zeros.values.t(), index, damaged)

    def _index(self, stored: torch.Tensor, index: torch.Tensor, adjacent: torch.Tensor) -> Index:
        groups = self.sizes.groups
        torch.remainder(stored, groups, out=index)  # a negative group counts from the end, as in the library
        damaged = check_groups(self.name, "g_idx", stored, -groups, groups)
        if damaged is not None:
            return index, damaged
        torch.arange(self.sizes.columns, out=adjacent)
        return None if torch.equal(index, adjacent.floor_divide_(self.sizes.group)) else index, None


def turned(stored: torch.Tensor, words: int, rows: int) -> Grid:
    """The tiles of words that are stored by column, by row of the weight."""
    return list(zip(*(split(block, rows, 1) for block in split(stored, words)), strict=True))


def check_groups(module: str, end: str, stored: torch.Tensor, least: int, groups: int) -> torch.Tensor | None:
    """Raise CheckpointError if the group of an input is not from ``least`` to the last of ``groups``.

    On a device return whether one is not, bool [].
    """
    low, high = torch.aminmax(stored)
    damaged = (low < least) | (high >= groups)
    if not on_host(stored):
        return damaged
    if damaged:
        raise CheckpointError(
            f"{shown(module)}: expected groups from 0 to {groups - 1} in its tensor {end}, found {int(low)} to "
            f"{int(high)}. The checkpoint is damaged. {FETCH_AGAIN}"
        )
    return None
