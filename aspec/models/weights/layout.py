"""From stored tensors to parts: the cut of a checkpoint, and the place of every tensor in its part's buffer.

Rules. If a stored tensor needs no conversion, its bytes go to ``at = offset`` modulo a page, so that a direct read can
write them there, and the parameter is a view of them; an adapter's update is merged there, once per read. Experts of a
fused tensor are read directly into their places in it. All other tensors (another dtype, an unknown conversion, bytes
not aligned to their dtype) are read as stored and are converted into scratch memory when their part is bound; packed
weights are decoded there. This file reads no weights.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from aspec.io.checkpoint import TensorRef
from aspec.models.formats.int4.form import Int4
from aspec.models.formats.packed import PackedWeight, StoredWeight
from aspec.models.weights.merge import LowRank
from aspec.models.weights.parts import PAGE, REST, Binding, Conversion, Factor, Part, Segment, Source, layer_of
from aspec.models.weights.tensor_map import Entry, TensorMap

MAX_GAP = (
    1 << 20
)  # bytes; a smaller gap is read too, which costs less than a second read (3 MiB reads run at full rate)
MAX_COPIED = 1 << 20  # bytes of a plain tensor beside packed ones that is copied, so that decoding frees the slot
ALIGNMENT = 256  # bytes; of converted tensors. The kernels' results and speed depend on it


def plan_parts(tensors: TensorMap, layers: str, max_part_bytes: int, alignment: int = 1) -> tuple[Part, ...]:
    """All parts in the order of use: first the tensors outside the layers, then layer by layer.

    A layer's part has about ``max_part_bytes`` at most, or one tensor if that is larger: a tensor is never cut.
    ``layers`` is the name of the module list of the decoder layers. In a device's buffer tensors are at multiples of
    ``alignment`` bytes: a part is copied as it was read, ``shift`` bytes further on, and the tensors that are still not
    aligned are copied to scratch.
    """
    by_layer: dict[int, list[Entry]] = defaultdict(list)
    for entry in tensors.entries:
        by_layer[layer_of(entry.name, layers)].append(entry)
    gap = min(MAX_GAP, max_part_bytes // 32)
    parts: list[Part] = []
    for layer in sorted(by_layer):
        scratch_at = 0
        for group in _groups(by_layer[layer], max_part_bytes if layer != REST else None):
            part = lay_out(group, tensors, gap, alignment)
            parts.append(replace(part, index=len(parts), layer=layer, scratch_at=scratch_at))
            scratch_at += part.scratch_bytes
    return tuple(parts)


def _groups(entries: Sequence[Entry], max_bytes: int | None) -> list[list[Entry]]:
    """Entries in file order, in the fewest groups of at most ``max_bytes``, of about equal size; None: one group."""
    ordered = sorted(
        entries, key=lambda entry: min((ref.file, ref.offset) for own, _ in entry.sources for ref in own.refs)
    )
    if max_bytes is None:
        return [ordered]
    largest = max(entry.nbytes for entry in ordered)
    count = len(_cut(ordered, max(max_bytes, largest)))
    low, high = (
        largest,
        max(max_bytes, largest),
    )  # search the smallest bound for this number of groups: it is the size of slots
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(ordered, middle)) <= count else (middle + 1, high)
    return _cut(ordered, high)


def _cut(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = []
    nbytes = max_bytes
    for entry in entries:
        if nbytes + entry.nbytes > max_bytes or not groups:
            groups.append([])
            nbytes = 0
        groups[-1].append(entry)
        nbytes += entry.nbytes
    return groups


class _Builder:
    """Assigns places in a part's buffer to stored tensors; mutable while one part is laid out."""

    def __init__(self, gap: int) -> None:
        self.gap = gap
        self.size = 0  # bytes of the buffer in use
        self.scratch = 0  # bytes of scratch in use, a multiple of ALIGNMENT
        self.workspace = 0  # bytes for decoding, of the weight that takes most
        self.segments: list[Segment] = []

    def place(self, refs: Iterable[TensorRef]) -> dict[TensorRef, int]:
        """Place stored tensors in file order, neighbours in one segment; returns the byte of each in the buffer."""
        places: dict[TensorRef, int] = {}
        for run in _runs(sorted(refs, key=lambda ref: (ref.file, ref.offset)), self.gap):
            first, last = run[0], run[-1]
            at = _page_up(self.size) + first.offset % PAGE
            nbytes = last.offset + last.nbytes - first.offset
            self.segments.append(Segment(first.file, first.offset, nbytes, at))
            places |= {ref: at + ref.offset - first.offset for ref in run}
            self.size = at + nbytes
        return places

    def fuse(self, places: Sequence[tuple[TensorRef, int]]) -> int:
        """Place stored tensors at given bytes of one contiguous tensor; returns the byte where this tensor begins.

        It begins where the most bytes have the same place as in their file, modulo a page.
        """
        skews: Counter[int] = Counter()
        for ref, within in places:
            skew = (ref.offset - within) % PAGE
            if skew % ref.dtype.itemsize == 0:
                skews[skew] += ref.nbytes
        base = _page_up(self.size) + max(skews, key=lambda skew: (skews[skew], -skew), default=0)
        for ref, within in places:
            self._extend(Segment(ref.file, ref.offset, ref.nbytes, base + within))
        self.size = base + sum(ref.nbytes for ref, _ in places)
        return base

    def _extend(self, segment: Segment) -> None:
        """Add a segment; where it continues the last one, in the file and in the buffer, both are one."""
        last = self.segments[-1] if self.segments else None
        if last is not None and (last.file, last.offset + last.nbytes, last.at + last.nbytes) == (
            segment.file,
            segment.offset,
            segment.at,
        ):
            self.segments[-1] = replace(last, nbytes=last.nbytes + segment.nbytes)
        else:
            self.segments.append(segment)

    def reserve(self, nbytes: int) -> int:
        """Reserve ``nbytes`` of scratch; returns their first byte."""
        at = self.scratch
        self.scratch += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return at


def _page_up(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _runs(refs: Iterable[TensorRef], gap: int) -> Iterator[list[TensorRef]]:
    run: list[TensorRef] = []
    for ref in refs:
        if run and (ref.file != run[-1].file or ref.offset - (run[-1].offset + run[-1].nbytes) > gap):
            yield run
            run = []
        run.append(ref)
    if run:
        yield run


def lay_out(entries: Sequence[Entry], tensors: TensorMap, gap: int, alignment: int) -> Part:
    """Segments, bindings and conversions of one part; the caller sets its index, layer and scratch_at.

    Stored tensors in one file with at most ``gap`` bytes between them are read at once.
    """
    builder = _Builder(gap)
    fused = {entry.name: places for entry in entries if (places := _fused_places(entry)) is not None}
    bases = {name: builder.fuse(places) for name, places in fused.items()}
    plain = builder.place(dict.fromkeys(ref for entry in entries if entry.name not in fused for ref in entry.refs))
    uses = Counter(own for entry in entries for own, _ in entry.sources)
    bindings: list[Binding] = []
    updates: list[tuple[Binding, LowRank[Binding]]] = []
    conversions: list[Conversion] = []
    found = [_stored(entry, bases.get(entry.name), plain) for entry in entries]
    shift = _shift([stored for stored in found if stored is not None], alignment)
    factors = [_factor(entry, entry.sizes, plain, builder) for entry in entries if entry.sizes is not None]
    stays = any(factor.write is None for factor in factors)
    packed = not stays and any(isinstance(own, PackedWeight) for entry in entries for own, _ in entry.sources)
    for entry, stored in zip(entries, found, strict=True):
        if entry.sizes is not None:
            continue
        own = {name: _placed(update, plain) for name, update in entry.updates.items()}
        aligned = stored is not None and (stored.at + shift) % alignment == 0
        shared = bool(own) and uses[entry.sources[0][0]] > 1  # another parameter needs the bytes as they are stored
        copied = packed and entry.nbytes <= MAX_COPIED
        if stored is not None and aligned and not (shared or copied) and _is_usable(stored, tensors.wanted):
            bindings += _with_aliases(stored, tensors.aliases)
            updates += [(stored, update) for update in own.values()]
        else:
            made = _conversion(entry, stored, plain, builder, tensors)
            conversions.append(replace(made, updates=own))
    workspace = Binding("workspace", torch.uint8, (builder.workspace,), builder.reserve(builder.workspace))
    return Part(
        index=0,
        layer=REST,
        segments=tuple(builder.segments),
        bindings=tuple(bindings),
        conversions=tuple(conversions),
        nbytes=sum(segment.nbytes for segment in builder.segments),
        size=_page_up(builder.size + shift),
        scratch_bytes=builder.scratch,
        scratch_at=0,
        workspace=workspace if workspace.nbytes else None,
        shift=shift,
        updates=tuple(updates),
        factors=tuple(factors),
    )


def _factor(entry: Entry, sizes: Int4, plain: Mapping[TensorRef, int], builder: _Builder) -> Factor:
    """A weight that products take packed: where it was read, or in scratch that is reserved."""
    ((own, _),) = entry.sources
    assert isinstance(own, PackedWeight), "a weight with sizes is packed"
    assert own.factor is not None, "a weight with sizes can be a factor"
    stored = tuple(Binding(ref.name, ref.dtype, ref.shape, plain[ref]) for ref in own.refs)
    if own.factor.write is None:
        codes, scales = stored
        return Factor(entry.name, sizes, codes, scales)
    codes = Binding(entry.name, torch.uint8, sizes.codes, 0)
    scales = Binding(entry.name, torch.bfloat16, sizes.scales, 0)
    builder.workspace = max(builder.workspace, own.factor.workspace_bytes)
    codes, scales = (replace(made, at=builder.reserve(made.nbytes)) for made in (codes, scales))
    return Factor(entry.name, sizes, codes, scales, stored, own.factor.write)


def _placed(update: LowRank[TensorRef], plain: Mapping[TensorRef, int]) -> LowRank[Binding]:
    """An update whose matrices are at their places in the buffer."""
    a, b = (Binding(ref.name, ref.dtype, ref.shape, plain[ref]) for ref in (update.a, update.b))
    return LowRank(a, b, update.scale, update.transposed)


def _shift(stored: Sequence[Binding], alignment: int) -> int:
    """Bytes to shift a part by, so that most of its bytes are aligned."""
    skews: Counter[int] = Counter()
    for binding in stored:
        skews[-binding.at % alignment] += binding.nbytes
    return max(skews, key=lambda shift: (skews[shift], -shift), default=0)


def _stored(entry: Entry, base: int | None, plain: Mapping[TensorRef, int]) -> Binding | None:
    """The parameter in the buffer, in its stored dtype; None if it must be decoded, or a converter must compute it."""
    first = entry.sources[0][0]
    if isinstance(first, PackedWeight) or (base is None and entry.converter is not None):
        return None
    (target, (shape, dtype)), *_ = entry.outputs.items()
    return Binding(target, dtype, shape, plain[first] if base is None else base)


def _is_usable(stored: Binding, wanted: Mapping[str, torch.dtype]) -> bool:
    return stored.dtype == wanted[stored.target] and stored.at % stored.dtype.itemsize == 0


def _with_aliases(binding: Binding, aliases: Mapping[str, tuple[str, ...]]) -> list[Binding]:
    """The binding, and one with the same memory for every tied name."""
    return [binding, *(replace(binding, target=alias) for alias in aliases.get(binding.target, ()))]


def _conversion(
    entry: Entry, stored: Binding | None, plain: Mapping[TensorRef, int], builder: _Builder, tensors: TensorMap
) -> Conversion:
    """A cast of the stored tensor, transformers' conversion, or decoding; reserves scratch for the result."""
    targets: list[Binding] = []
    for target, (shape, _) in entry.outputs.items():
        made = Binding(target, tensors.wanted[target], shape, 0)
        targets += _with_aliases(replace(made, at=builder.reserve(made.nbytes)), tensors.aliases)
    if stored is not None:
        return Conversion(entry.name, (Source(entry.name, None, (stored,)),), tuple(targets), None)
    order = fused_order(entry) if all(isinstance(own, PackedWeight) for own, _ in entry.sources) else None
    sources: list[Source] = []
    within = targets[0].at  # the next piece of the target
    for own, pattern in order or entry.sources:
        found = tuple(Binding(ref.name, ref.dtype, ref.shape, plain[ref]) for ref in own.refs)
        if not isinstance(own, PackedWeight):
            sources.append(Source(own.name, pattern, found))
            continue
        piece = Binding(own.name, targets[0].dtype, own.shape, within)
        if order is None:
            piece = replace(piece, at=builder.reserve(piece.nbytes))
        within += piece.nbytes
        builder.workspace = max(builder.workspace, own.workspace_bytes)
        sources.append(Source(own.name, pattern, found, own, piece))
    return Conversion(entry.name, tuple(sources), tuple(targets), None if order else entry.converter)


def _fused_places(entry: Entry) -> list[tuple[TensorRef, int]] | None:
    """The byte of each stored expert in its fused tensor; None if moving bytes is not enough to build it."""
    stored = [own for own, _ in entry.sources]
    if entry.converter is None or any(isinstance(own, PackedWeight) for own in stored):
        return None
    order = fused_order(entry) if len({own.dtype for own in stored}) == 1 else None
    if order is None:
        return None
    places, at = [], 0
    for own, _ in order:
        (ref,) = own.refs
        places.append((ref, at))
        at += ref.nbytes
    return places


def fused_order(entry: Entry) -> Sequence[tuple[StoredWeight, str | None]] | None:
    """The sources in the order in which they follow one another in the only output; None if they do not."""
    if entry.converter is None:
        return entry.sources
    chain = [f"{type(operation).__name__}({getattr(operation, 'dim', '')})" for operation in entry.converter.operations]
    by_pattern: dict[str | None, list[tuple[StoredWeight, str | None]]] = defaultdict(list)
    for own, pattern in entry.sources:
        by_pattern[pattern].append((own, pattern))
    if len(entry.outputs) != 1 or chain not in (["MergeModulelist(0)"], ["MergeModulelist(0)", "Concatenate(1)"]):
        return None
    if chain == ["MergeModulelist(0)"] and len(by_pattern) != 1:
        return None
    columns = [by_pattern[pattern] for pattern in entry.converter.source_patterns if pattern in by_pattern]
    return [source for expert in zip(*columns, strict=True) for source in expert]
