"""AWQ (gemm): integers of 4 bits, 8 outputs a word, with scales and zero points by group of inputs.

A module stores ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` [groups, out]; its
weight [out, in] is (q - z) * s. The outputs of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7. Libraries:
https://github.com/casper-hansen/AutoAWQ (WQLinear_GEMM), https://github.com/ModelCloud/GPTQModel (AwqTorchLinear).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from aspec.errors import UnsupportedModelError, shown
from aspec.io.checkpoint import TensorRef
from aspec.models.formats.fields import CONFIG, FLOATS, Fields, Module, compiled, modules_with
from aspec.models.formats.gptq import QUANTISING, check_companions, turned
from aspec.models.formats.packed import PackedWeight
from aspec.models.formats.packed_ints import AWQ_ROWS, AwqUnpacker, Room, Unpacker
from aspec.models.formats.scaled import Grid, ScaledDecode, Shared, Sizes

BITS, EIGHT = 4, 8

LAYOUT = frozenset(
    {
        "backend",
        "bits",
        "format",
        "group_size",
        "lm_head",
        "modules_to_not_convert",
        "pack_dtype",
        "q_group_size",
        "quant_method",
        "sym",  # zero points are stored in both cases
        "version",
        "w_bit",
        "zero_point",
    }
)
FUSED = frozenset({"do_fuse", "fuse_max_seq_len", "modules_to_fuse", "rope_theta"})
"""Fields of modules that AutoAWQ fuses to run faster."""


@dataclass(frozen=True, slots=True)
class Awq:
    """AWQ with the settings of one checkpoint; a ``Format``."""

    group_size: int  # -1: one group
    excluded: tuple[tuple[str, re.Pattern[str]], ...]  # modules_to_not_convert: a name and its pattern

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a ``quantization_config``. Raises UnsupportedModelError, by name, for what is not supported."""
        fields = Fields.of(config, CONFIG)
        fields.check_known(LAYOUT | FUSED | QUANTISING)
        for key in ("version", "format"):
            if fields.text(key, "gemm") != "gemm":
                raise fields.unsupported(key, "gemm")
        if fields.text("backend", "auto") == "llm-awq":
            raise fields.unsupported("backend", "a backend of the layout gemm")
        if fields.text("pack_dtype", "int32").removeprefix("torch.") != "int32":
            raise fields.unsupported("pack_dtype", "int32")
        for key in ("bits", "w_bit"):
            if fields.integer(key, BITS) != BITS:
                raise fields.unsupported(key, "4")
        for key in ("zero_point", "sym", "desc_act", "lm_head"):
            fields.flag(key, False)
        key = "group_size" if fields.raw.get("group_size") is not None else "q_group_size"
        size = fields.integer(key, 128, least=-1)
        if size == 0:
            raise fields.refuse(key, "-1 or a whole number from 1 on")
        names = fields.texts("modules_to_not_convert")
        return cls(size, tuple((name, _within(name)) for name in names))

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        if scaled := next((name for name in tensors if name.endswith(".act.scales")), None):
            raise UnsupportedModelError(
                f"{shown(scaled)}: scales of activations are not supported: expected scales of weights only. Give a "
                f"copy of the model that is quantised in another way, or the original model."
            )
        check_companions(tensors, ("qzeros", "scales"))
        return [self._weight(Module(name, tensors)) for name in modules_with(tensors, "qweight")]

    def _weight(self, module: Module) -> PackedWeight:
        if any(module.name.endswith(name) or pattern.match(module.name) for name, pattern in self.excluded):
            raise module.refuse(f"{CONFIG} says that it is not quantised, but it has a tensor qweight")
        words = module.get("qweight", (torch.int32,))
        columns, rows = words.shape[0], words.shape[1] * EIGHT
        size = columns if self.group_size == -1 else self.group_size
        if not columns or columns % size:
            raise module.refuse(
                f"expected inputs in groups of {size}, found qweight {list(words.shape)}: {columns} inputs",
                f"{CONFIG} and the weights do not belong together.",
            )
        groups = columns // size
        zeros = module.get("qzeros", (torch.int32,), (groups, words.shape[1]))
        scales = module.get("scales", FLOATS, (groups, rows))
        decode = AwqDecode(Sizes(rows, columns, groups, scales.dtype, BITS))
        return PackedWeight(
            name=f"{module.name}.weight",
            shape=(rows, columns),
            dtype=scales.dtype,
            refs=(words, zeros, scales),
            method="AWQ, 4 bits, " + ("one group" if groups == 1 else f"groups of {size}"),
            decode=decode,
            workspace_bytes=decode.workspace_bytes,
        )


def _within(name: str) -> re.Pattern[str]:
    """What transformers takes for the beginning of a name of ``modules_to_not_convert``."""
    compiled(name, f"{CONFIG}.modules_to_not_convert")
    return re.compile(rf"(?:{name})(?:(?<=\.)|(?=\.|$))")


class AwqDecode(ScaledDecode):
    """Decodes ``qweight``, ``qzeros`` and ``scales``."""

    narrow = True
    multiple = EIGHT

    @classmethod
    def take_shared(cls, sizes: Sizes, room: Room) -> tuple[Any, ...]:  # noqa: D102
        by_nibble = Unpacker(room, BITS, sizes.groups, sizes.rows)
        return by_nibble, room.take(torch.uint8, sizes.groups, sizes.rows)

    @classmethod
    def unpacker(cls, sizes: Sizes, room: Room, rows: int, columns: int) -> Unpacker:  # noqa: D102
        return AwqUnpacker(room, BITS, rows, columns)

    def numbers(self, stored: torch.Tensor, height: int) -> Grid:  # noqa: D102
        return turned(stored, self.width, height // EIGHT)

    def share(self, stored: Sequence[torch.Tensor], pieces: tuple[Any, ...]) -> Shared:  # noqa: D102
        by_nibble, zeros = pieces
        by_nibble(stored[1])
        nibbles, rows = (own.view(self.sizes.groups, -1, EIGHT) for own in (by_nibble.values, zeros))
        for nibble, row in enumerate(AWQ_ROWS):
            rows[..., row].copy_(nibbles[..., nibble])
        return Shared(stored[2].t(), zeros.t())
