"""The tensors of a GGUF file under transformers' names: plain ones as they are, the others as packed weights."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.checkpoint import TensorRef
from aspec.io.gguf import Gguf, GgufTensor
from aspec.models.formats.gguf.architectures import TOP, USED_ELSEWHERE, Architecture
from aspec.models.formats.gguf.config import architecture_of
from aspec.models.formats.gguf.decode import KERNELS, PLAIN, Piece, decoder
from aspec.models.formats.gguf.places import Form, Place, as_is
from aspec.models.formats.gguf.repack import blocks_factor
from aspec.models.formats.packed import PackedWeight

BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<leaf>.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Weights:
    """All tensors of a file. A tensor that the architecture does not know keeps its name."""

    tensors: Mapping[str, TensorRef]
    packed: tuple[PackedWeight, ...]


def open_weights(gguf: Gguf, config: Mapping[str, Any]) -> Weights:
    """The weights of a file. Raises CheckpointError for tensors that do not fit, UnsupportedModelError for a type."""
    architecture = architecture_of(gguf)
    tensors: dict[str, TensorRef] = {}
    pieces: dict[str, list[tuple[GgufTensor, Place, float]]] = defaultdict(list)
    for name, tensor in gguf.tensors.items():
        if name in USED_ELSEWHERE:
            continue
        target, form = _target(name, architecture, config["num_hidden_layers"])
        place = form(tensor.shape, config)
        if place is None:
            raise CheckpointError(
                f"{tensor.ref.file}: tensor {shown(name)} does not fit: found shape {list(tensor.shape)} for "
                f"{config['num_attention_heads']} heads, {config['num_key_value_heads']} of keys. Fetch the file again."
            )
        offset = -architecture.norm_offset if name.endswith("norm.weight") else 0.0
        if place.plain and not offset and tensor.kind not in KERNELS:
            _check_type(tensor, whole=True)
            tensors[target] = replace(tensor.ref, name=target)
        else:
            pieces[target].append((tensor, place, offset))
    packed = tuple(_packed(gguf, name, found) for name, found in pieces.items())
    return Weights(tensors, packed)


def _target(name: str, architecture: Architecture, num_layers: int) -> tuple[str, Form]:
    """The name in transformers and the form of a tensor."""
    match = BLOCK.fullmatch(name)
    if match is None:
        stem, _, end = name.rpartition(".")
        return (f"{TOP[stem]}.{end}" if stem in TOP else name), as_is
    leaf = match["leaf"]
    if int(match["layer"]) >= num_layers:
        return name, as_is
    layer = f"model.layers.{int(match['layer'])}"
    if leaf in architecture.forms:
        target, form = architecture.forms[leaf]
        return f"{layer}.{target}", form
    stem, _, end = leaf.rpartition(".")
    return (f"{layer}.{architecture.names[stem]}.{end}" if stem in architecture.names else name), as_is


def _packed(gguf: Gguf, name: str, found: list[tuple[GgufTensor, Place, float]]) -> PackedWeight:
    """The weight of one or several stored tensors."""
    found = sorted(found, key=lambda item: item[1].part)
    places = [place for _, place, _ in found]
    expected = list(range(places[0].parts))
    if [place.part for place in places] != expected or len({place.shape for place in places}) > 1:
        stored = ", ".join(f"{shown(tensor.ref.name)} {list(tensor.shape)}" for tensor, _, _ in found)
        raise CheckpointError(
            f"{gguf.path}: {name} is made of {len(expected)} stored tensors: expected as many of equal shape, found "
            f"{stored}. Fetch the file again."
        )
    for tensor, _, _ in found:
        _check_type(tensor, whole=False)
    pieces = [Piece(tensor.kind, tensor.shape, place.view, offset) for tensor, place, offset in found]
    decode, workspace_bytes = decoder(pieces)
    kinds = " and ".join(dict.fromkeys(tensor.kind for tensor, _, _ in found))
    alone = pieces[0] if len(pieces) == 1 else None
    factor = None if alone is None else blocks_factor(alone.kind, places[0].shape, alone.view, alone.offset)

    def cut(index: int) -> PackedWeight:
        """One expert: a slice of every tensor and of its place."""
        return _packed(gguf, f"{name}[{index}]", [(*_cut(tensor, place, index), at) for tensor, place, at in found])

    return PackedWeight(
        name=name,
        shape=places[0].shape,
        dtype=torch.float32,
        refs=tuple(tensor.ref for tensor, _, _ in found),
        method=f"GGUF, {kinds}",
        decode=decode,
        workspace_bytes=workspace_bytes,
        factor=factor,
        cut=cut if len(places[0].shape) == 3 and all(len(tensor.shape) == 3 for tensor, _, _ in found) else None,
    )


def _cut(tensor: GgufTensor, place: Place, index: int) -> tuple[GgufTensor, Place]:
    """One expert of a tensor [E, ...] at its place: views of places leave the first dimension as it is."""
    own = replace(tensor, ref=tensor.ref.cut(index), shape=(1, *tensor.shape[1:]))
    return own, replace(place, shape=(1, *place.shape[1:]))


def _check_type(tensor: GgufTensor, whole: bool) -> None:
    """Refuse a type that cannot be decoded; integers that are ``whole`` parameters are for the model to judge."""
    if tensor.kind in KERNELS or tensor.kind in PLAIN or (whole and tensor.ref.dtype != torch.uint8):
        return
    raise UnsupportedModelError(
        f"{tensor.ref.file}: tensor {shown(tensor.ref.name)} is stored as {tensor.kind}, which aspec does not read; "
        f"it reads {', '.join(KERNELS)}. Choose another quantisation of the model, such as Q4_K_M."
    )
