"""The map from stored tensors to a model's parameters: transformers' own conversion rules, run once on meta.

Files have the names and shapes of a family's publication (``experts.3.w1.weight``), modules have other ones
(``experts.gate_up_proj``). The conversion rules are transformers'. This file only finds the sources of every parameter,
so that missing or ambiguous tensors and wrong shapes raise an error before any weight is read.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from aspec.errors import CheckpointError
from aspec.io.checkpoint import FETCH_AGAIN, TensorRef
from aspec.io.weight_format import quantised_tensors
from aspec.models.formats.int4.form import Int4
from aspec.models.formats.packed import PackedWeight, StoredWeight
from aspec.models.formats.settings import is_of_activations
from aspec.models.hf_compat import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    conversion_rules,
    dot_natural_key,
    ignored_keys,
    kept_dtypes,
    rename_source_key,
    tied_weights,
)
from aspec.models.weights.merge import LowRank

COMPUTED = r"rotary_emb\.inv_freq"  # old checkpoints store it, every model computes it
CASTABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

Source = tuple[StoredWeight, str | None]
"""A stored weight and the converter pattern that its name matched."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter (or several, if a conversion splits) and its stored tensors."""

    name: str
    sources: tuple[Source, ...]
    converter: WeightConverter | None  # a copy for this entry; None: the only source is the parameter
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # parameter -> shape and dtype as converted
    updates: Mapping[str, LowRank[TensorRef]] = field(default_factory=dict)  # of an adapter, by parameter

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All tensors to read: the sources, and the matrices of updates."""
        matrices = (ref for update in self.updates.values() for ref in (update.a, update.b))
        return (*(ref for stored, _ in self.sources for ref in stored.refs), *matrices)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(ref.nbytes for ref in self.refs)

    @property
    def sizes(self) -> Int4 | None:
        """Of a weight that products take packed."""
        own = self.sources[0][0]
        return own.sizes if isinstance(own, PackedWeight) else None


@dataclass(frozen=True, slots=True)
class TensorMap:
    """The stored tensors of every parameter of a model."""

    entries: tuple[Entry, ...]
    aliases: Mapping[str, tuple[str, ...]]  # parameter -> tied names that share its memory
    wanted: Mapping[str, torch.dtype]  # the dtype of every parameter and stored buffer in the model
    unexpected: tuple[str, ...]  # stored tensors that the model does not use
    remarks: tuple[str, ...] = ()  # texts for the user


def map_tensors(
    model: PreTrainedModel,
    folder: Path,
    weights: Mapping[str, StoredWeight],
    remarks: Sequence[str] = (),
    unused: Set[str] = frozenset(),
) -> TensorMap:
    """Find every parameter of ``model`` (on meta) among the stored weights of ``folder``, except the ``unused`` ones.

    ``remarks``: texts for the user about how the weights are stored.
    Raises CheckpointError if a parameter is missing, has several candidates, or has another shape or dtype.
    """
    wanted = target_dtypes(model)
    found, converters, unexpected = _match(model, weights)
    entries = tuple(
        _entry(model, folder, name, sources, converters) for name, sources in found.items() if name not in unused
    )
    produced = {target: entry for entry in entries for target in entry.outputs}
    aliases = _aliases(model, produced)
    _check_shapes(model, folder, entries, wanted)
    shared = {target for targets in aliases.values() for target in targets}
    missing = [name for name in wanted if name not in produced and name not in shared and name not in unused]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        kind = quantised_tensors(unexpected)
        cause = f"The checkpoint is incomplete, or its {_settings(folder)} belongs to another model."
        if kind is not None:
            cause = (
                f"Other tensors are stored, which are quantised ({kind}), and config.json has no quantization_config "
                f"that says how. Take config.json and the weights from the same place: fetch both again."
            )
        raise CheckpointError(
            f"{folder}: {len(missing)} of the {len(wanted)} tensors of {model.config.model_type} are not "
            f"stored: expected {names}. {cause}"
        )
    return TensorMap(entries, aliases, wanted, tuple(unexpected), tuple(remarks))


def target_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype of every stored parameter in the model; some families keep a part of them in fp32."""
    dtypes: dict[str, torch.dtype] = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = kept_dtypes(model)
    if not kept:
        return dtypes
    alternation, groups, _ = build_glob_alternation(list(kept))
    for name in dtypes:
        if match := alternation.search(name):
            dtypes[name] = kept[groups[match.lastgroup]]
    return dtypes


def convert(
    converter: WeightConverter,
    name: str,
    stored: Iterable[tuple[str, str | None, torch.Tensor]],
    model: PreTrainedModel,
) -> dict[str, torch.Tensor]:
    """Run transformers' converter on stored (name, pattern, tensor); returns parameter name -> tensor.

    The converter releases its tensors, so it can be used again, but not on two threads at the same time.
    """
    for key, pattern, tensor in stored:
        converter.add_tensor(name, key, pattern, _constant(tensor))
    made = converter.convert(name, model=model, config=model.config)
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _constant(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def parameter_names(model: PreTrainedModel) -> Callable[[str], str]:
    """A function from a stored name to the parameter that it is; a name of none, or of a part of one, is unchanged."""
    renames = [rule for rule in conversion_rules(model) if isinstance(rule, WeightRenaming)]
    conversions = [rule for rule in conversion_rules(model) if isinstance(rule, WeightConverter)]
    state = model.state_dict()

    def find(key: str) -> str:
        if key in state:
            return key
        name, pattern = rename_source_key(key, renames, conversions, model.base_model_prefix, state)
        return name if pattern is None and name in state else key

    return find


def _match(
    model: PreTrainedModel, weights: Mapping[str, StoredWeight]
) -> tuple[dict[str, list[Source]], dict[str, WeightConverter], list[str]]:
    """Stored weights by the name of their parameter, converters by pattern, and names without a parameter."""
    rules = conversion_rules(model)
    renames = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    conversions = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in conversions for pattern in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    ignored = [re.compile(p) for p in {COMPUTED, *ignored_keys(model)}]
    found: dict[str, list[Source]] = defaultdict(list)
    companions = {f"{name.removesuffix('.weight')}.weight_shape" for name, own in weights.items() if _is_packed(own)}
    unexpected: list[str] = []
    for key in sorted(weights, key=dot_natural_key):  # natural order: experts by number
        name, pattern = rename_source_key(key, renames, conversions, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name in state:
            found[name].append((weights[key], pattern))
        elif not (key in companions or is_of_activations(key) or any(rule.search(key) for rule in ignored)):
            unexpected.append(key)
    return found, by_pattern, unexpected


def _is_packed(weight: StoredWeight) -> bool:
    return isinstance(weight, PackedWeight)


def _entry(
    model: PreTrainedModel,
    folder: Path,
    name: str,
    sources: Sequence[Source],
    converters: Mapping[str, WeightConverter],
) -> Entry:
    """One entry; its conversion runs once on meta tensors. Raises CheckpointError if the conversion fails."""
    first, pattern = sources[0]
    rules = {id(converters[p]) if p else None for _, p in sources}
    if len(rules) > 1 or (pattern is None and len(sources) > 1):
        names = ", ".join(ref.name for ref, _ in sources[:3])
        raise CheckpointError(
            f"{folder}: {len(sources)} stored tensors map to {name}: expected one, found {names}. Remove the shard "
            f"that does not belong to this checkpoint."
        )
    if pattern is None:
        return Entry(name, tuple(sources), None, {name: (first.shape, first.dtype)})
    meta = [(ref.name, p, torch.empty(ref.shape, dtype=ref.dtype, device="meta")) for ref, p in sources]
    own = copy.deepcopy(converters[pattern])  # a converter has state while it runs, and every bind runs it
    try:
        made = convert(own, name, meta, model)
    except Warning:  # raised as an error by the caller's filter; not caused by the tensors
        raise
    except Exception as error:  # any exception means that these tensors do not fit the conversion
        raise CheckpointError(
            f"{folder}: the {len(sources)} stored tensors of {name} (first {first.name}) cannot be combined: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. The checkpoint is incomplete, or "
            f"its {_settings(folder)} belongs to another model."
        ) from error
    return Entry(name, tuple(sources), own, {t: (tuple(v.shape), v.dtype) for t, v in made.items()})


def _aliases(model: PreTrainedModel, produced: Mapping[str, Entry]) -> dict[str, tuple[str, ...]]:
    """Tied names that are not stored, by the tied name that is stored; this may be either side of the tie.

    If both are stored, each has its own bytes, as in transformers, which ties them only if they are equal.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for target, source in tied_weights(model).items():
        groups[source] |= {source, target}
    aliases: dict[str, tuple[str, ...]] = {}
    for source, names in groups.items():
        stored = [name for name in (source, *sorted(names)) if name in produced]
        if stored:
            aliases[stored[0]] = tuple(sorted(name for name in names if name not in produced))
    return {source: targets for source, targets in aliases.items() if targets}


def _settings(source: Path) -> str:
    """Where the settings of a model are: in a file of its folder, or in its only file."""
    return "header" if source.suffix == ".gguf" else "config.json"


def _check_shapes(
    model: PreTrainedModel,
    folder: Path,
    entries: Iterable[Entry],
    wanted: Mapping[str, torch.dtype],
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for entry in entries:
        for target, (shape, dtype) in entry.outputs.items():
            own = wanted.get(target, dtype)
            if dtype != own and not {dtype, own} <= CASTABLE:
                raise CheckpointError(
                    f"{folder}: {target} is stored as {dtype}: expected {own} or another plain float "
                    f"type, because no quantization_config in config.json says how to decode it. {FETCH_AGAIN}"
                )
            if shapes.get(target) != shape:
                expected = list(shapes[target]) if target in shapes else "no such tensor"
                raise CheckpointError(
                    f"{folder}: {target} does not fit: expected {expected} from its {_settings(folder)}, found "
                    f"{list(shape)} in {entry.refs[0].file}. The weights and its {_settings(folder)} do not belong "
                    f"together. {FETCH_AGAIN}"
                )
