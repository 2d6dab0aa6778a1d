"""AWQ (gemm): integers of 4 bits, 8 outputs a word, with scales and zero points by group of inputs.

A module stores ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` [groups, out]; its
weight [out, in] is (q - z) * s. The outputs of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7. Libraries:
https://github.com/casper-hansen/AutoAWQ (WQLinear_GEMM), https://github.com/ModelCloud/GPTQModel (AwqTorchLinear).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aspec.errors import UnsupportedModelError, shown
from aspec.io.checkpoint import TensorRef
from aspec.io.weight_format import REMEDY
from aspec.models.formats.gptq import QUANTISING, check_companions, turned
from aspec.models.formats.int4.repack import scaled_factor
from aspec.models.formats.integers.fields import FLOATS, Fields, Module, modules_with
from aspec.models.formats.integers.packed_ints import AWQ_ROWS, AwqUnpacker, Room, Unpacker
from aspec.models.formats.integers.scaled import Grid, ScaledDecode, Shared, Sizes
from aspec.models.formats.packed import Format, Kind, Outline, PackedWeight, PlainWeight, outlined

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


class Awq(Format):
    """AWQ with the settings of one checkpoint."""

    def __init__(self, fields: Fields) -> None:
        fields.check_known(LAYOUT | FUSED | QUANTISING)
        for key in ("version", "format"):
            fields.text(key, "gemm", ("gemm",))
        if fields.text("backend", "auto") == "llm-awq":
            fields.refuse("backend", "one that reads the layout gemm")
        fields.text("pack_dtype", "int32", ("int32", "torch.int32"))
        for key in ("bits", "w_bit"):
            fields.choice(key, (BITS, None), BITS)
        for key in ("zero_point", "sym", "desc_act", "lm_head"):
            fields.choice(key, (True, False, None), None)
        key = "group_size" if fields.values.get("group_size") is not None else "q_group_size"
        self._size = fields.whole(key, 128, least=-1)  # -1: one group
        if self._size == 0:
            fields.refuse(key, "-1 or a whole number from 1 on")
        self._fields = fields
        self._excluded = [(name, _start(fields, name)) for name in fields.names("modules_to_not_convert")]

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        if scaled := next((name for name in tensors if name.endswith(".act.scales")), None):
            raise UnsupportedModelError(
                f"{tensors[scaled].file}: tensor {shown(scaled)} scales activations, which is not supported: expected "
                f"scales of weights only. {REMEDY}"
            )
        check_companions(tensors, ("qzeros", "scales"))
        found = [self._weight(Module(name, tensors)) for name in modules_with(tensors, "qweight")]
        self._fields.check_found(len(found), "tensors named *.qweight")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        if weight.kind is not Kind.LINEAR or self._is_excluded(weight.module):
            return {}
        rows, columns = weight.shape
        groups = 1 if self._size == -1 else columns // self._size
        return {
            f"{weight.module}.qweight": outlined(torch.int32, columns, rows // EIGHT),
            f"{weight.module}.qzeros": outlined(torch.int32, groups, rows // EIGHT),
            f"{weight.module}.scales": outlined(torch.float16, groups, rows),
        }

    def _is_excluded(self, module: str) -> bool:
        return any(module.endswith(name) or start.match(module) for name, start in self._excluded)

    def _weight(self, module: Module) -> PackedWeight:
        if self._is_excluded(module.name):
            raise module.misfit("expected no tensor qweight, as modules_to_not_convert names the module, found one")
        words = module.get("qweight", (torch.int32,))
        columns, rows = words.shape[0], words.shape[1] * EIGHT
        size = columns if self._size == -1 else self._size
        if not rows * columns or columns % size:
            raise module.misfit(f"expected inputs in groups of {size}, found qweight {list(words.shape)}")
        groups = columns // size
        zeros = module.get("qzeros", (torch.int32,), (groups, words.shape[1]))
        scales = module.get("scales", FLOATS, (groups, rows))
        method = "AWQ, 4 bits, " + ("one group" if groups == 1 else f"groups of {size}")
        decode = AwqDecode(Sizes(rows, columns, groups, scales.dtype, BITS))
        name, refs = f"{module.name}.weight", (words, zeros, scales)
        factor = scaled_factor(module.name, decode)
        return PackedWeight(name, (rows, columns), scales.dtype, refs, method, decode, decode.workspace_bytes, factor)


def _start(fields: Fields, name: str) -> re.Pattern[str]:
    """What transformers looks for at the start of a module's name: one of ``modules_to_not_convert``, as a pattern."""
    fields.pattern(name)
    return re.compile(rf"(?:{name})(?:(?<=\.)|(?=\.|$))")


def read(values: Mapping[str, object], where: str) -> Format:
    """The method with the settings of a checkpoint."""
    return Awq(Fields(values, where, "AWQ"))


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
