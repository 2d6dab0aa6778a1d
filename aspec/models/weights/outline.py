"""The tensors that a checkpoint would hold, from its configuration alone: for plans without weights."""

from collections import defaultdict

import torch
from torch import nn
from transformers import PreTrainedModel

from aspec.models.formats.packed import Format, Kind, PlainWeight, outlined
from aspec.models.hf_compat import as_published, tied_weights
from aspec.models.weights.tensor_map import target_dtypes


def outline_tensors(
    model: PreTrainedModel, packing: Format | None, stored_dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Tensors on meta by their stored names, or by the names of parameters if no method packs them.

    ``stored_dtype``: of plain weights; None: the model's.
    """
    tied = tied_weights(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    if packing is None:
        return state
    plain = _published(model, state, stored_dtype or model.dtype)
    tensors: dict[str, torch.Tensor] = {}
    for weight in plain:
        tensors |= packing.outline(weight) or {weight.name: outlined(weight.dtype, *weight.shape)}
    return tensors


def _published(model: PreTrainedModel, state: dict[str, torch.Tensor], stored: torch.dtype) -> list[PlainWeight]:
    """The weights as they are published, such as experts one by one; packed ones are packed so."""
    kinds = _kinds(model)
    by_kind: dict[Kind, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        by_kind[_kind_of(name, tensor, kinds)][name] = tensor
    wanted = target_dtypes(model)
    kept = {name for name, dtype in wanted.items() if dtype != model.dtype}
    found: list[PlainWeight] = []
    for kind, tensors in by_kind.items():
        for name, tensor in as_published(model, tensors).items():
            dtype = wanted[name] if name in kept else stored
            split = kind is Kind.EXPERTS and tensor.dim() == 2  # a matrix for each expert
            found.append(PlainWeight(name, tuple(tensor.shape), dtype, Kind.LINEAR if split else kind))
    return sorted(found, key=lambda weight: _layer_of(weight.name))  # as in files: the tensors of a layer side by side


def _layer_of(name: str) -> int:
    """The first number of a name; -1 if it has none."""
    return next((int(word) for word in name.split(".") if word.isdecimal()), -1)


def _kinds(model: PreTrainedModel) -> dict[str, Kind]:
    """The matrices of linear layers and embeddings, by the names of their parameters."""
    head = model.get_output_embeddings()
    kinds: dict[str, Kind] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            kinds[f"{name}.weight"] = Kind.EMBEDDING
        elif isinstance(module, nn.Linear):
            kinds[f"{name}.weight"] = Kind.HEAD if module is head else Kind.LINEAR
    return kinds


def _kind_of(name: str, tensor: torch.Tensor, kinds: dict[str, Kind]) -> Kind:
    return kinds.get(name, Kind.EXPERTS if tensor.dim() == 3 else Kind.OTHER)
