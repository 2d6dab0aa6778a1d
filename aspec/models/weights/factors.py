"""Which weights are multiplied as they are packed: those of linear modules, in 4 bits, where torch has the products."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from aspec.errors import UnsupportedModelError
from aspec.models.formats.int4.form import GROUPS, Int4, Int4Factor
from aspec.models.formats.int4.kernel import proved_block
from aspec.models.formats.packed import PackedWeight
from aspec.models.weights.linears import Linears
from aspec.models.weights.tensor_map import Entry, TensorMap

TAKEN = "multiplied packed"
ROUNDED = "weights of 4 bits are multiplied packed, with scales rounded to bfloat16: not the bits of decoded weights"


def choose_factors(
    tensors: TensorMap,
    linears: Linears,
    where: torch.device,
    dtype: torch.dtype,
    asked: bool | None,
) -> TensorMap:
    """The same tensors, with the sizes of the weights that products take packed; their linear modules know it.

    ``asked``: None for those that are stored in the form of products. Raises UnsupportedModelError if packed products
    were asked for and there are none.
    """
    block = _block(tensors, asked) if where.type == "cpu" and dtype is torch.bfloat16 else None
    if block is not None:
        tensors = _untied(tensors, linears, block, asked)
    entries: list[Entry] = []
    for entry in tensors.entries:
        linear = linears.of(entry.name)
        sizes = None
        if block is not None and linear is not None and entry.name not in tensors.aliases:
            sizes = linear.sizes = _sizes(entry, block, asked)
        entries.append(entry if sizes is None else _taken(entry, sizes))
    if asked and not any(entry.sizes for entry in entries):
        raise UnsupportedModelError(
            f"products with packed weights were asked for: expected weights of 4 bits in groups of "
            f"{', '.join(map(str, GROUPS))} that compute in bfloat16 on a CPU with AVX2, found none. Run with "
            f"--products decoded."
        )
    rounds = any(factor.rounds for entry in entries if entry.sizes is not None for factor in _factors([entry]))
    return replace(tensors, entries=tuple(entries), remarks=(*tensors.remarks, *([ROUNDED] if rounds else [])))


def _block(tensors: TensorMap, asked: bool | None) -> int | None:
    """Rows of a block of this machine's products; None where no weight needs them."""
    return proved_block() if asked is not False and any(_factors(tensors.entries)) else None


def _factors(entries: Iterable[Entry]) -> Iterator[Int4Factor]:
    """The weights that could be factors."""
    for entry in entries:
        own = entry.sources[0][0]
        if isinstance(own, PackedWeight) and own.factor is not None:
            yield own.factor


def _taken(entry: Entry, sizes: Int4) -> Entry:
    """The entry with its weight as products take it."""
    ((own, pattern),) = entry.sources
    assert isinstance(own, PackedWeight), "a weight with sizes is packed"
    return replace(entry, sources=((replace(own, method=f"{own.method}, {TAKEN}", sizes=sizes), pattern),))


def _untied(tensors: TensorMap, linears: Linears, block: int, asked: bool | None) -> TensorMap:
    """The same, but for tied weights: the linear module takes its weight packed, beside the decoded embedding."""
    entries: list[Entry] = []
    aliases = dict(tensors.aliases)
    for entry in tensors.entries:
        names = (entry.name, *aliases.get(entry.name, ()))
        heads = [name for name in names if linears.of(name) is not None]
        if len(names) == 1 or len(heads) != 1 or _sizes(entry, block, asked) is None:
            entries.append(entry)
            continue
        first, *others = [name for name in names if name not in heads]
        made = entry.outputs[entry.name]
        entries += [replace(entry, name=name, outputs={name: made}) for name in (first, *heads)]
        del aliases[entry.name]
        aliases |= {first: tuple(others)} if others else {}
    return replace(tensors, entries=tuple(entries), aliases=aliases)


def _sizes(entry: Entry, block: int, asked: bool | None) -> Int4 | None:
    """The sizes of an entry's weight; None if it cannot be taken packed, or is not to be."""
    own = entry.sources[0][0]
    alone = len(entry.sources) == 1 and entry.converter is None and not entry.updates
    if not alone or not isinstance(own, PackedWeight) or own.factor is None:
        return None
    return own.factor.sizes(own.shape, block) if asked or own.factor.write is None else None
