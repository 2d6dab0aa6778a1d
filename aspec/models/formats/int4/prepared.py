"""Checkpoints that aspec prepared: every packed linear weight is stored in the form of int4 products.

``X.int4_codes`` and ``X.int4_scales`` stand for the weight of the module X, see ``form.py``, or, with one dimension
more, for the parameter X itself: the matrices of all experts of a layer, which are decoded. The settings name the bits,
the group size, and the rows of a block of codes; on a processor with other blocks all weights are decoded.
"""

from collections.abc import Mapping

import torch

from aspec.io.checkpoint import TensorRef
from aspec.models.formats.int4.form import GROUPS, Int4Decode, Int4Factor, MatricesDecode
from aspec.models.formats.int4.kernel import BLOCKS
from aspec.models.formats.integers.fields import Fields, Module, modules_with
from aspec.models.formats.packed import Format, Kind, Outline, PackedWeight, PlainWeight, by_matrix, outlined

METHOD = "aspec"
CODES, SCALES = "int4_codes", "int4_scales"


class Prepared(Format):
    """The method with the settings of one checkpoint."""

    def __init__(self, fields: Fields) -> None:
        fields.check_known({"quant_method", "bits", "group_size", "block"})
        fields.choice("bits", (4,), 4)
        self._fields = fields
        self._group, self._block = fields.whole("group_size", 0, least=0), fields.whole("block", 0, least=0)
        if self._group not in GROUPS:
            fields.refuse("group_size", f"one of {', '.join(map(str, GROUPS))}")
        if self._block not in BLOCKS.values():
            fields.refuse("block", f"one of {', '.join(map(str, BLOCKS.values()))}")

    def weights(self, tensors: Mapping[str, TensorRef]) -> list[PackedWeight]:
        """See ``Format``."""
        for name in modules_with(tensors, SCALES):
            Module(name, tensors).need(CODES)
        found = [self._weight(Module(name, tensors)) for name in modules_with(tensors, CODES)]
        self._fields.check_found(len(found), f"tensors named *.{CODES}")
        return found

    def outline(self, weight: PlainWeight) -> Outline:
        """See ``Format``."""
        *experts, rows, columns = weight.shape if len(weight.shape) > 1 else (0, 0)
        sizes = self._factor.sizes((rows, columns), self._block)
        if weight.kind is not (Kind.EXPERTS if experts else Kind.LINEAR) or sizes is None:
            return {}
        name = weight.name if experts else weight.module
        return {
            f"{name}.{CODES}": outlined(torch.uint8, *experts, *sizes.codes),
            f"{name}.{SCALES}": outlined(torch.bfloat16, *experts, *sizes.scales),
        }

    @property
    def _factor(self) -> Int4Factor:
        return Int4Factor(self._group, block=self._block, rounds=False)

    def _weight(self, module: Module) -> PackedWeight:
        whole = len(module.need(CODES).shape) == 3  # the matrices of all experts
        codes = module.get(CODES, (torch.uint8,), (-1, -1, -1) if whole else (-1, -1))
        *experts, rows, pairs = codes.shape
        shape = rows, 2 * pairs
        sizes = self._factor.sizes(shape, self._block)
        if sizes is None:
            raise module.misfit(
                f"expected outputs in multiples of {self._block} and inputs in multiples of {self._group}, found "
                f"{CODES} {list(codes.shape)}, which is {shape[0]} outputs and {shape[1]} inputs"
            )
        refs = codes, module.get(SCALES, (torch.bfloat16,), (*experts, *sizes.scales))
        method, decode = f"prepared, 4 bits, groups of {self._group}", Int4Decode(sizes)
        name, dtype, workspace = module.name, torch.bfloat16, decode.workspace_bytes
        if not whole:
            return PackedWeight(f"{name}.weight", shape, dtype, refs, method, decode, workspace, self._factor)
        return by_matrix(
            PackedWeight(name, codes.shape[:1] + shape, dtype, refs, method, MatricesDecode(decode), workspace)
        )


def read(values: Mapping[str, object], where: str) -> Format:
    """The method with the settings of a checkpoint."""
    return Prepared(Fields(values, where, METHOD))
