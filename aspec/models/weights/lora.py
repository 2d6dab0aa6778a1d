"""A LoRA adapter in peft's format, as changes of the map from stored tensors to parameters. No weight is read here.

An adapter stores two small matrices per changed module, and may store whole modules. Its matrices are read with the
part that they change, so that plans and costs count them; ``binding.py`` merges them into the weights that were read.
Every stored matrix must fit a module of the model: nothing of an adapter is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from aspec.errors import CheckpointError, UnsupportedModelError
from aspec.io.checkpoint import TensorRef, read_header, version_of
from aspec.io.disk import FileVersion
from aspec.models.hf_compat import is_transposed_linear
from aspec.models.weights.adapter_config import REMEDY, AdapterConfig, is_within, read_adapter_config
from aspec.models.weights.merge import LowRank
from aspec.models.weights.tensor_map import CASTABLE, Entry, TensorMap, parameter_names
from aspec.models.weights.unused import summary

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR_ENDS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_ENDS = (".lora_embedding_A", ".lora_embedding_B")
ENDS = (*LINEAR_ENDS, *EMBEDDING_ENDS)
"""The ends of the names of A and B."""

Stored = tuple[tuple[int, ...], torch.dtype]
"""The shape and dtype of a parameter as it is stored."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's configuration, and its stored tensors by the names that the file gives them."""

    config: AdapterConfig
    tensors: Mapping[str, TensorRef]
    files: Mapping[str, FileVersion]  # the one file, as it was when its header was read

    @classmethod
    def open(cls, folder: Path) -> "Adapter":
        """Index an adapter's folder. Raises CheckpointError or UnsupportedModelError."""
        config, path = read_adapter_config(folder), folder / WEIGHTS
        if not path.is_file():
            others = ", ".join(sorted(file.name for file in folder.glob("adapter_model*"))) or "no adapter_model file"
            raise CheckpointError(
                f"{folder} has no adapter that can be read: expected {WEIGHTS}, found {others}. Save the adapter in "
                f"safetensors format, or fetch it again."
            )
        files = {str(path): version_of(path)}
        return cls(config, {ref.name: ref for ref in read_header(path)}, files)


def adapt(tensors: TensorMap, adapter: Adapter, model: PreTrainedModel) -> TensorMap:
    """The map of ``model`` with an adapter's changes.

    Raises CheckpointError if the adapter contradicts itself or the model, and UnsupportedModelError if a module cannot
    take its update.
    """
    changes = _Changes.of(adapter, model)
    entries: list[Entry] = []
    aliases: dict[str, tuple[str, ...]] = {}
    for entry in tensors.entries:
        tied = {name: tensors.aliases.get(name, ()) for name in entry.outputs}
        entries += changes.applied(entry, tied)
        for owner, names in tied.items():
            kept = [name for name in (owner, *names) if name not in changes.names]
            if len(kept) > 1:  # the first one keeps the stored bytes, the others share them
                aliases[kept[0]] = tuple(kept[1:])
    remarks = (*tensors.remarks, *changes.remarks(model))
    return replace(tensors, entries=tuple(entries), aliases=aliases, remarks=remarks)


@dataclass(frozen=True, slots=True)
class _Changes:
    """What an adapter does to parameters: low-rank updates, and tensors that replace them."""

    adapter: Adapter
    updates: Mapping[str, LowRank[TensorRef]]
    replaced: Mapping[str, TensorRef]

    @property
    def names(self) -> set[str]:
        """The parameters that change."""
        return {*self.updates, *self.replaced}

    @classmethod
    def of(cls, adapter: Adapter, model: PreTrainedModel) -> "_Changes":
        """Sort an adapter's tensors by the parameters that they change. Raises CheckpointError if one fits none."""
        file, rename = adapter.config.path.parent / WEIGHTS, parameter_names(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        pairs: dict[str, dict[str, TensorRef]] = {}
        whole: dict[str, TensorRef] = {}
        unfit: list[str] = []
        for name, ref in adapter.tensors.items():
            plain = name.removeprefix(PREFIX)
            end = next((end for end in ENDS if plain.endswith(end)), None)
            parameter = rename(f"{plain.removesuffix(end)}.weight" if end else plain.replace(".base_layer.", "."))
            if parameter not in shapes:
                unfit.append(plain)
            elif end is None:
                _check(ref, shapes[parameter])
                whole[parameter] = ref
            else:
                pairs.setdefault(parameter, {})[end] = ref
        if unfit:
            raise CheckpointError(
                f"{file}: {len(unfit)} of its {len(adapter.tensors)} tensors fit no module of this "
                f"{model.config.model_type} model: {summary(unfit)}. The adapter belongs to another base, or is not "
                f"plain LoRA. {REMEDY}"
            )
        for saved in adapter.config.saved:
            if not any(is_within(name, saved) for name in whole):
                raise CheckpointError(
                    f"{file}: expected the module {saved!r:.80}, which modules_to_save of {adapter.config.path.name} "
                    f"names, found no tensor of it. Fetch the adapter again."
                )
        updates = {name: _update(adapter.config, model, name, pair) for name, pair in pairs.items()}
        return cls(adapter, updates, whole)

    def remarks(self, model: PreTrainedModel) -> tuple[str, ...]:
        """A text for the user if the configuration names modules without a stored update."""
        config = self.adapter.config
        missing = [
            name
            for name, module in model.named_modules()
            if config.targets(name) and _is_changeable(module) and f"{name}.weight" not in self.updates
        ]
        if not missing:
            return ()
        return (
            f"{config.path.parent / WEIGHTS}: {len(missing)} modules that {config.path.name} names have no stored "
            f"update and stay as they are in the base: {summary(missing)}",
        )

    def applied(self, entry: Entry, tied: Mapping[str, Sequence[str]]) -> list[Entry]:
        """The entries in place of one: with updates, replaced, or divided where only some of tied names change."""
        changed = [name for owner, names in tied.items() for name in (owner, *names) if name in self.names]
        if not changed:
            return [entry]
        if set(changed) <= entry.outputs.keys() and not any(tied.values()) and not self.replaced.keys() & set(changed):
            return [replace(entry, updates={name: self.updates[name] for name in changed})]
        if len(entry.outputs) > 1 or entry.converter is not None:
            raise UnsupportedModelError(
                f"{self.adapter.config.path}: {changed[0]} is made of several stored tensors, and aspec cannot change "
                f"it alone. {REMEDY}"
            )
        ((owner, made),) = entry.outputs.items()
        kept = [name for name in (owner, *tied[owner]) if name not in changed]
        base = [replace(entry, name=kept[0], outputs={kept[0]: made})] if kept else []
        return base + [self._changed(entry, name, made) for name in changed]

    def _changed(self, entry: Entry, name: str, made: Stored) -> Entry:
        """The entry of one changed parameter."""
        updates = {name: self.updates[name]} if name in self.updates else {}
        ref = self.replaced.get(name)
        if ref is None:
            return replace(entry, name=name, outputs={name: made}, updates=updates)
        return Entry(name, ((ref, None),), None, {name: (ref.shape, ref.dtype)}, updates)


def _update(
    config: AdapterConfig, model: PreTrainedModel, parameter: str, pair: Mapping[str, TensorRef]
) -> LowRank[TensorRef]:
    """The update of one parameter, checked against its module and the configuration."""
    name = parameter.rpartition(".")[0]
    module = model.get_submodule(name)
    if not _is_changeable(module):
        raise UnsupportedModelError(
            f"{config.path}: it changes {name}, a {type(module).__name__}: expected a linear layer or an embedding. "
            f"{REMEDY}"
        )
    if config.targets(name) is False:
        raise CheckpointError(
            f"{config.path.parent / WEIGHTS}: it stores an update of {name}, which {config.path.name} does not name. "
            f"The two files do not belong together. Fetch the adapter again."
        )
    ends = EMBEDDING_ENDS if isinstance(module, nn.Embedding) else LINEAR_ENDS
    if set(pair) != set(ends):
        raise CheckpointError(
            f"{config.path.parent / WEIGHTS}: expected {' and '.join(ends)} of {name}, found "
            f"{', '.join(sorted(pair))}. Fetch the adapter again."
        )
    a, b = pair[ends[0]], pair[ends[1]]
    rows, columns = (int(size) for size in model.get_parameter(parameter).shape)
    transposed = isinstance(module, nn.Embedding) or is_transposed_linear(module)
    rank = config.rank_of(name)
    _check(a, (rank, rows if transposed else columns))
    _check(b, (columns if transposed else rows, rank))
    return LowRank(a, b, config.scale_of(name, rank), transposed)


def _check(ref: TensorRef, shape: tuple[int, ...]) -> None:
    if ref.shape != shape or ref.dtype not in CASTABLE:
        raise CheckpointError(
            f"{ref.file}: {summary([ref.name])} does not fit: expected a plain float type of shape {list(shape)} from "
            f"adapter_config.json and the base, found {ref.dtype} {list(ref.shape)}. The adapter belongs to another "
            f"base (perhaps to one with another vocabulary), or its two files do not belong together."
        )


def _is_changeable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or is_transposed_linear(module)
