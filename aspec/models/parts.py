"""From stored tensors to parts: which bytes of which file land where in a buffer, and what the model sees there.

Rules. Where a stored tensor can be used as it is, its bytes land at ``at = offset`` modulo a page, so that the disk
can write them there itself, and the parameter is a view of them. Experts of a fused tensor are read straight into
their places in it. Everything else (another dtype, an unknown conversion, bytes that are not aligned to their
dtype) lands as it is stored and is converted into scratch memory when it is bound. No weight is read here.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from aspec.io.checkpoint import TensorRef
from aspec.models.hf_compat import WeightConverter
from aspec.models.tensor_map import Entry, TensorMap

PAGE = 4096  # bytes; offsets, addresses and lengths of direct reads are multiples of it
MAX_GAP = 1 << 20  # bytes that are cheaper to read over than to seek across, see IO notes: 3 MiB reads at full rate
ALIGNMENT = 256  # bytes, of converted tensors: the kernels' results and speed depend on alignment
REST = -1  # the layer number of what belongs to no layer


@dataclass(frozen=True, slots=True)
class Segment:
    """``file[offset : offset + nbytes]`` must land at ``buffer[at : at + nbytes]``."""

    file: str
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Binding:
    """The parameter or buffer ``target`` is a view from byte ``at``, contiguous, dtype and shape as given."""

    target: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int

    @property
    def nbytes(self) -> int:
        """Bytes of the view."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Conversion:
    """Stored tensors in the buffer become ``targets``, whose ``at`` counts from the part's scratch."""

    name: str
    sources: tuple[tuple[Binding, str | None], ...]  # what is stored, and the converter pattern its name matched
    targets: tuple[Binding, ...]
    converter: WeightConverter | None  # None: a copy of the one source, cast where the dtypes differ


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of weights that is loaded at once, and what it binds in the model.

    ``scratch_at`` is where its ``scratch_bytes`` begin among those of its layer: parts of one layer are bound at
    the same time, so their converted tensors must not share memory.
    """

    index: int
    layer: int  # REST for embeddings, norms and head
    segments: tuple[Segment, ...]
    bindings: tuple[Binding, ...]
    conversions: tuple[Conversion, ...]
    nbytes: int  # bytes that are read
    size: int  # bytes of buffer, whole pages
    scratch_bytes: int
    scratch_at: int
    shift: int = 0  # from where on a device's buffer holds the bytes, so that its tensors are aligned

    def targets(self) -> tuple[Binding, ...]:
        """Everything the part binds; ``at`` counts in the buffer or, for what is converted, in the scratch."""
        return self.bindings + tuple(target for conversion in self.conversions for target in conversion.targets)


def plan_parts(tensors: TensorMap, layers: str, max_part_bytes: int, alignment: int = 1) -> tuple[Part, ...]:
    """All parts in the order of use: the rest first, then layer by layer, about ``max_part_bytes`` each at most.

    ``layers`` is the name of the module list that holds the decoder layers. A tensor is never cut, so a part is
    larger where a single tensor is. Tensors are at multiples of ``alignment`` in a device's buffer, to which a part is
    copied as it was read, ``shift`` bytes further on; those that this does not align are converted, to themselves.
    """
    by_layer: dict[int, list[Entry]] = defaultdict(list)
    for entry in tensors.entries:
        by_layer[_layer_of(entry.name, layers)].append(entry)
    gap = min(MAX_GAP, max_part_bytes // 32)
    parts: list[Part] = []
    for layer in sorted(by_layer):
        scratch_at = 0
        for group in _groups(by_layer[layer], max_part_bytes if layer != REST else None):
            part = _lay_out(group, tensors, gap, alignment)
            parts.append(replace(part, index=len(parts), layer=layer, scratch_at=scratch_at))
            scratch_at += part.scratch_bytes
    return tuple(parts)


def scratch_bytes(parts: Iterable[Part]) -> int:
    """Scratch that serves these parts when layers take turns in it."""
    return max((part.scratch_at + part.scratch_bytes for part in parts), default=0)


def view(buffer: torch.Tensor, binding: Binding) -> torch.Tensor:
    """The tensor that ``binding`` describes inside ``buffer`` (uint8 [nbytes]); a copy where it is not aligned."""
    stored = buffer[binding.at : binding.at + binding.nbytes]
    if stored.storage_offset() % binding.dtype.itemsize:
        stored = stored.clone()
    return stored.view(binding.dtype).view(binding.shape)


def as_tensor(buffer: memoryview) -> torch.Tensor:
    """A uint8 tensor over the same bytes."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _layer_of(name: str, layers: str) -> int:
    match = re.match(re.escape(layers) + r"\.(\d+)\.", name)
    return int(match[1]) if match else REST


def _groups(entries: Sequence[Entry], most: int | None) -> list[list[Entry]]:
    """Entries in file order, cut into as few groups as ``most`` bytes allow, and these about equally large."""
    ordered = sorted(entries, key=lambda entry: min((ref.file, ref.offset) for ref, _ in entry.sources))
    if most is None:
        return [ordered]
    largest = max(entry.nbytes for entry in ordered)
    count = len(_cut(ordered, max(most, largest)))
    low, high = (
        largest,
        max(most, largest),
    )  # the smallest bound that needs no more groups: slots are as large as it
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(ordered, middle)) <= count else (middle + 1, high)
    return _cut(ordered, high)


def _cut(entries: Sequence[Entry], most: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = []
    held = most
    for entry in entries:
        if held + entry.nbytes > most or not groups:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += entry.nbytes
    return groups


class _Builder:
    """Places stored tensors in a part's buffer; mutable while one part is laid out."""

    def __init__(self, gap: int) -> None:
        self.gap = gap
        self.size = 0  # bytes of the buffer that are taken
        self.scratch = 0  # bytes of scratch that are taken, a multiple of ALIGNMENT
        self.segments: list[Segment] = []

    def place(self, refs: Iterable[TensorRef]) -> dict[str, int]:
        """Stored tensors as they lie in their files, neighbours in one segment: name -> byte in the buffer."""
        places: dict[str, int] = {}
        for run in _runs(sorted(refs, key=lambda ref: (ref.file, ref.offset)), self.gap):
            first, last = run[0], run[-1]
            at = _page_up(self.size) + first.offset % PAGE
            nbytes = last.offset + last.nbytes - first.offset
            self.segments.append(Segment(first.file, first.offset, nbytes, at))
            places |= {ref.name: at + ref.offset - first.offset for ref in run}
            self.size = at + nbytes
        return places

    def fuse(self, places: Sequence[tuple[TensorRef, int]]) -> int:
        """Stored tensors at given bytes of one contiguous tensor; returns where that begins.

        It begins such that as many bytes as possible agree with their file offset modulo a page.
        """
        skews: Counter[int] = Counter()
        for ref, within in places:
            skew = (ref.offset - within) % PAGE
            if skew % ref.dtype.itemsize == 0:
                skews[skew] += ref.nbytes
        base = _page_up(self.size) + max(skews, key=lambda skew: (skews[skew], -skew), default=0)
        self.segments += [Segment(ref.file, ref.offset, ref.nbytes, base + within) for ref, within in places]
        self.size = base + sum(ref.nbytes for ref, _ in places)
        return base

    def reserve(self, nbytes: int) -> int:
        """Room in the scratch."""
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


def _lay_out(entries: Sequence[Entry], tensors: TensorMap, gap: int, alignment: int) -> Part:
    """Segments, bindings and conversions of one part; its number, layer and scratch_at are the caller's."""
    builder = _Builder(gap)
    fused = {entry.name: places for entry in entries if (places := _fused_places(entry)) is not None}
    bases = {name: builder.fuse(places) for name, places in fused.items()}
    plain = builder.place(ref for entry in entries if entry.name not in fused for ref, _ in entry.sources)
    bindings: list[Binding] = []
    conversions: list[Conversion] = []
    found = [_stored(entry, bases.get(entry.name), plain) for entry in entries]
    shift = _shift([stored for stored in found if stored is not None], alignment)
    for entry, stored in zip(entries, found, strict=True):
        aligned = stored is not None and (stored.at + shift) % alignment == 0
        if stored is not None and aligned and _usable(stored, tensors.wanted):
            bindings += _shared(stored, tensors.aliases)
        else:
            conversions.append(_conversion(entry, stored, plain, builder, tensors))
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
        shift=shift,
    )


def _shift(stored: Sequence[Binding], alignment: int) -> int:
    """By how much a part moves on so that most of its bytes are aligned."""
    skews: Counter[int] = Counter()
    for binding in stored:
        skews[-binding.at % alignment] += binding.nbytes
    return max(skews, key=lambda shift: (skews[shift], -shift), default=0)


def _stored(entry: Entry, base: int | None, plain: Mapping[str, int]) -> Binding | None:
    """The parameter as it lies in the buffer, in its stored dtype; None where a converter has to make it."""
    if base is None and entry.converter is not None:
        return None
    (target, (shape, dtype)), *_ = entry.outputs.items()
    return Binding(target, dtype, shape, plain[entry.sources[0][0].name] if base is None else base)


def _usable(stored: Binding, wanted: Mapping[str, torch.dtype]) -> bool:
    return stored.dtype == wanted[stored.target] and stored.at % stored.dtype.itemsize == 0


def _shared(binding: Binding, aliases: Mapping[str, tuple[str, ...]]) -> list[Binding]:
    """The binding, and the same memory under every tied name."""
    return [binding, *(replace(binding, target=alias) for alias in aliases.get(binding.target, ()))]


def _conversion(
    entry: Entry, stored: Binding | None, plain: Mapping[str, int], builder: _Builder, tensors: TensorMap
) -> Conversion:
    """A cast of what is stored, or transformers' conversion of it, with room for the result in the scratch."""
    sources = ((stored, None),) if stored else tuple(
        (Binding(ref.name, ref.dtype, ref.shape, plain[ref.name]), pattern) for ref, pattern in entry.sources
    )  # fmt: skip
    targets: list[Binding] = []
    for target, (shape, _) in entry.outputs.items():
        made = Binding(target, tensors.wanted[target], shape, 0)
        targets += _shared(replace(made, at=builder.reserve(made.nbytes)), tensors.aliases)
    return Conversion(entry.name, sources, tuple(targets), None if stored else entry.converter)


def _fused_places(entry: Entry) -> list[tuple[TensorRef, int]] | None:
    """Where each stored expert goes inside its fused tensor, or None where moving bytes does not make it."""
    if entry.converter is None or len(entry.outputs) != 1:
        return None
    if len({ref.dtype for ref, _ in entry.sources}) != 1:
        return None
    chain = [f"{type(operation).__name__}({getattr(operation, 'dim', '')})" for operation in entry.converter.operations]
    by_pattern: dict[str | None, list[TensorRef]] = defaultdict(list)
    for ref, pattern in entry.sources:
        by_pattern[pattern].append(ref)
    patterns = entry.converter.source_patterns
    if chain not in (["MergeModulelist(0)"], ["MergeModulelist(0)", "Concatenate(1)"]):
        return None
    if chain == ["MergeModulelist(0)"] and len(by_pattern) != 1:
        return None
    columns = [by_pattern[pattern] for pattern in patterns if pattern in by_pattern]
    places, at = [], 0
    for expert in zip(*columns, strict=True):
        for ref in expert:
            places.append((ref, at))
            at += ref.nbytes
    return places
