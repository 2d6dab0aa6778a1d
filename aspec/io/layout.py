"""From stored tensors to parts: which bytes of which file land where in a buffer, and what the model sees there.

The mapping of stored names to parameters is transformers' own conversion machinery, run once on meta tensors.
Stored tensors that need no work are views of the buffer; the experts of a fused tensor are read straight into
their places; everything else (casts, unknown conversions) is converted into a scratch buffer when it is bound.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from aspec.errors import CheckpointError
from aspec.io.checkpoint import Checkpoint, Segment, TensorRef
from aspec.io.memory import PAGE

MAX_GAP = 1 << 20  # bytes that are cheaper to read over than to seek across
ALIGNMENT = 64  # of converted tensors in the scratch buffer
REST = -1  # the layer number of what belongs to no layer


@dataclass(frozen=True, slots=True)
class Binding:
    """The parameter or buffer ``target`` is a view at byte ``at``, dtype and shape as given."""

    target: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """Stored views of the buffer (``sources``) that become ``targets``, whose ``at`` counts in the scratch buffer."""

    name: str
    sources: tuple[tuple[Binding, str | None], ...]  # stored tensor and the converter pattern it matched
    targets: tuple[Binding, ...]
    converter: WeightConverter | None  # None: a cast


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of weights that is loaded at once, and what it binds in the model."""

    index: int
    layer: int  # REST for embeddings, norms and head
    segments: tuple[Segment, ...]
    bindings: tuple[Binding, ...]
    conversions: tuple[Conversion, ...]
    nbytes: int  # bytes that are read
    size: int  # bytes of buffer, whole pages
    scratch_bytes: int
    scratch_at: int  # where this part's scratch begins among its layer's


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter (or several, where a conversion splits) and the stored tensors it is made of."""

    name: str
    converter: WeightConverter | None
    sources: tuple[tuple[TensorRef, str | None], ...]
    targets: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # what the conversion yields


def plan_parts(model: PreTrainedModel, layers: str, checkpoint: Checkpoint, max_part_bytes: int) -> tuple[Part, ...]:
    """All parts in the order of use: the rest first, then layer by layer, each about ``max_part_bytes`` at most.

    ``layers`` is the name of the module list that holds the decoder layers. Raises CheckpointError where the
    stored tensors do not make up the model.
    """
    wanted = target_dtypes(model)
    entries, aliases = _entries(model, checkpoint, wanted)
    by_layer: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_layer[_layer_of(entry.name, layers)].append(entry)
    parts: list[Part] = []
    for layer in sorted(by_layer):
        scratch_at = 0
        most = max_part_bytes if layer != REST else 1 << 62
        for group in _groups(by_layer[layer], most):
            part = replace(_lay_out(group, aliases, wanted), index=len(parts), layer=layer, scratch_at=scratch_at)
            scratch_at += part.scratch_bytes
            parts.append(part)
    return tuple(parts)


def target_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype every parameter must have, those included that a family keeps in fp32."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = model._get_dtype_plan(model.dtype)
    if not kept:
        return dtypes
    alternation, groups, _ = build_glob_alternation(list(kept))
    matches = {name: alternation.search(name) for name in dtypes}
    return {n: kept[groups[m.lastgroup]] if (m := matches[n]) else dtype for n, dtype in dtypes.items()}


def _entries(
    model: PreTrainedModel, checkpoint: Checkpoint, wanted: Mapping[str, torch.dtype]
) -> tuple[list[Entry], dict[str, list[str]]]:
    """Entries for every parameter, and for tied ones the names that share a stored parameter."""
    sources, converters = _match(model, checkpoint)
    tied = {t: s for t, s in model.all_tied_weights_keys.items() if s in sources and t != s}
    made = [_entry(model, name, found, converters) for name, found in sources.items() if name not in tied]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    produced = {target: shape for entry in made for target, (shape, _) in entry.targets.items()}
    for target, shape in produced.items():
        if shapes.get(target) != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: the stored {target} has shape {list(shape)}, the configuration expects "
                f"{list(shapes.get(target, ()))}: config.json and the weights do not belong together."
            )
    missing = [name for name in wanted if name not in produced and name not in tied]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} of the model's tensors are not stored, the first is {missing[0]}: "
            f"the checkpoint is incomplete or its config.json belongs to another model."
        )
    aliases: dict[str, list[str]] = defaultdict(list)
    for target, source in tied.items():
        aliases[source].append(target)
    return made, aliases


def _match(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, list[tuple[TensorRef, str | None]]], dict[str, WeightConverter]]:
    """Stored tensors by the parameter name they belong to, through the family's renames and converters."""
    mapping = get_model_conversion_mapping(model, None, None)
    renames = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    conversions = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in conversions for pattern in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[tuple[TensorRef, str | None]]] = defaultdict(list)
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renames, conversions, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name in state:
            found[name].append((checkpoint.tensors[key], pattern))
    return found, by_pattern


def _entry(
    model: PreTrainedModel,
    name: str,
    sources: Sequence[tuple[TensorRef, str | None]],
    converters: Mapping[str, WeightConverter],
) -> Entry:
    pattern = sources[0][1]
    converter = converters[pattern] if pattern else None
    if converter is None:
        ref = sources[0][0]
        return Entry(name, None, tuple(sources[:1]), {name: (ref.shape, ref.dtype)})
    meta = [(ref.name, p, torch.empty(ref.shape, dtype=ref.dtype, device="meta")) for ref, p in sources]
    made = convert(converter, name, meta, model)
    targets = {target: (tuple(tensor.shape), tensor.dtype) for target, tensor in made.items()}
    return Entry(name, converter, tuple(sources), targets)


def convert(
    converter: WeightConverter,
    name: str,
    stored: Iterable[tuple[str, str | None, torch.Tensor]],
    model: PreTrainedModel,
) -> dict[str, torch.Tensor]:
    """Run transformers' converter on stored tensors: parameter name -> tensor."""
    fresh = copy.deepcopy(converter)
    for key, pattern, tensor in stored:
        fresh.add_tensor(name, key, pattern, _constant(tensor))
    made = fresh.convert(name, model=model, config=model.config)
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _constant(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _layer_of(name: str, layers: str) -> int:
    match = re.match(re.escape(layers) + r"\.(\d+)\.", name)
    return int(match[1]) if match else REST


def _groups(entries: Sequence[Entry], most: int) -> Iterable[list[Entry]]:
    """Entries in file order, cut where a part would grow beyond ``most`` bytes."""
    group: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (e.sources[0][0].file, min(ref.offset for ref, _ in e.sources))):
        if group and _stored_bytes([*group, entry]) > most:
            yield group
            group = []
        group.append(entry)
    yield group


def _stored_bytes(entries: Iterable[Entry]) -> int:
    return sum(ref.nbytes for entry in entries for ref, _ in entry.sources)


class _Builder:
    """Places stored tensors in a part's buffer."""

    def __init__(self) -> None:
        self.size = 0
        self.scratch = 0
        self.segments: list[Segment] = []

    def place(self, refs: Sequence[TensorRef]) -> dict[str, int]:
        """Stored tensors as they lie in their files, neighbours in one segment: name -> byte in the buffer."""
        places: dict[str, int] = {}
        for run in _runs(sorted(refs, key=lambda ref: (ref.file, ref.offset))):
            first, last = run[0], run[-1]
            at = self._page_up() + first.offset % PAGE
            nbytes = last.offset + last.nbytes - first.offset
            self.segments.append(Segment(first.file, first.offset, nbytes, at))
            places |= {ref.name: at + ref.offset - first.offset for ref in run}
            self.size = at + nbytes
        return places

    def fuse(self, refs: Sequence[tuple[TensorRef, int]]) -> int:
        """Stored tensors at given bytes of one contiguous tensor; returns where that begins."""
        first, within = refs[0]
        item = max(ALIGNMENT, torch.empty(0, dtype=first.dtype).element_size())
        skew = (first.offset - within) % PAGE
        base = self._page_up() + (skew if skew % item == 0 else 0)
        self.segments += [Segment(ref.file, ref.offset, ref.nbytes, base + at) for ref, at in refs]
        self.size = base + sum(ref.nbytes for ref, _ in refs)
        return base

    def reserve(self, nbytes: int) -> int:
        """Room in the scratch buffer."""
        at = self.scratch
        self.scratch += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return at

    def _page_up(self) -> int:
        return -(-self.size // PAGE) * PAGE


def _runs(refs: Sequence[TensorRef]) -> Iterable[list[TensorRef]]:
    run: list[TensorRef] = []
    for ref in refs:
        if run and (ref.file != run[-1].file or ref.offset - (run[-1].offset + run[-1].nbytes) > MAX_GAP):
            yield run
            run = []
        run.append(ref)
    if run:
        yield run


def _lay_out(entries: Sequence[Entry], aliases: Mapping[str, Sequence[str]], wanted: Mapping[str, torch.dtype]) -> Part:
    """Segments, bindings and conversions of one part; index and layer are filled in by the caller."""
    builder = _Builder()
    fused = {entry.name: experts for entry in entries if (experts := _fused_places(entry, wanted))}
    bindings: list[Binding] = []
    for entry in entries:
        if entry.name in fused:
            (target, (shape, dtype)), *_ = entry.targets.items()
            bindings.append(Binding(target, dtype, shape, builder.fuse(fused[entry.name])))
    stored = [entry for entry in entries if entry.name not in fused]
    places = builder.place([ref for entry in stored for ref, _ in entry.sources])
    conversions: list[Conversion] = []
    for entry in stored:
        ref = entry.sources[0][0]
        at = places[ref.name]
        if entry.converter is None and _is_view(ref, at, wanted[entry.name]):
            bindings.append(Binding(entry.name, ref.dtype, ref.shape, at))
        else:
            conversions.append(_conversion(entry, places, builder, wanted))
    bindings += [replace(b, target=alias) for b in bindings for alias in aliases.get(b.target, ())]
    nbytes = sum(segment.nbytes for segment in builder.segments)
    size = -(-builder.size // PAGE) * PAGE
    converted = [_with_aliases(conversion, aliases) for conversion in conversions]
    return Part(0, 0, tuple(builder.segments), tuple(bindings), tuple(converted), nbytes, size, builder.scratch, 0)


def _is_view(ref: TensorRef, at: int, dtype: torch.dtype) -> bool:
    return ref.dtype == dtype and at % torch.empty(0, dtype=dtype).element_size() == 0


def _with_aliases(conversion: Conversion, aliases: Mapping[str, Sequence[str]]) -> Conversion:
    shared = tuple(replace(t, target=alias) for t in conversion.targets for alias in aliases.get(t.target, ()))
    return replace(conversion, targets=conversion.targets + shared)


def _conversion(
    entry: Entry, places: Mapping[str, int], builder: _Builder, wanted: Mapping[str, torch.dtype]
) -> Conversion:
    sources = tuple((Binding(ref.name, ref.dtype, ref.shape, places[ref.name]), p) for ref, p in entry.sources)
    targets = []
    for target, (shape, _) in entry.targets.items():
        dtype = wanted[target]
        nbytes = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        targets.append(Binding(target, dtype, shape, builder.reserve(nbytes)))
    return Conversion(entry.name, sources, tuple(targets), entry.converter)


def _fused_places(entry: Entry, wanted: Mapping[str, torch.dtype]) -> list[tuple[TensorRef, int]] | None:
    """Where each stored expert goes inside its fused tensor, or None where bytes alone do not do it."""
    if entry.converter is None or len(entry.targets) != 1:
        return None
    (target, (_, dtype)), *_ = entry.targets.items()
    chain = [type(op).__name__ + str(getattr(op, "dim", "")) for op in entry.converter.operations]
    if dtype != wanted[target] or any(ref.dtype != dtype for ref, _ in entry.sources):
        return None
    by_pattern = defaultdict(list)
    for ref, pattern in entry.sources:
        by_pattern[pattern].append(ref)
    if chain == ["MergeModulelist0"]:
        order = [by_pattern[entry.converter.source_patterns[0]]]
    elif chain == ["MergeModulelist0", "Concatenate1"]:
        order = [by_pattern[pattern] for pattern in entry.converter.source_patterns]
    else:
        return None
    places, at = [], 0
    for expert in zip(*order, strict=True):
        for ref in expert:
            places.append((ref, at))
            at += ref.nbytes
    return places
