"""The checkpoint to prepare: its weights, the parameters that they are, and the files beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from aspec.errors import UserError
from aspec.io.checkpoint import Checkpoint
from aspec.io.fetching.files import SIZES, WANTED, WEIGHTS
from aspec.io.hub import known_as, read_config, source_of
from aspec.models.configuration.compute_dtype import named_dtype
from aspec.models.formats.packed import Format
from aspec.models.formats.registry import format_of, open_weights
from aspec.models.probing.facts import ModelFacts
from aspec.models.probing.layers import examine
from aspec.models.skeleton import build_skeleton, find_layers, load_config
from aspec.models.weights.tensor_map import TensorMap, map_tensors
from aspec.models.weights.unused import check_unused
from aspec.preparing.journal import JOURNAL

INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that aspec runs; no weight has been read."""

    folder: Path
    config: Mapping[str, object]  # of its config.json
    checkpoint: Checkpoint
    packing: Format | None
    tensors: TensorMap
    model: PreTrainedModel  # on meta
    layers: str  # the name of the list of decoder layers

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linear modules by the names of their weights, without the head."""
        head = self.model.get_output_embeddings()
        found = {f"{name}.weight": own for name, own in self.model.named_modules() if isinstance(own, nn.Linear)}
        return {name: own for name, own in found.items() if own is not head}


def open_source(folder: Path) -> Source:
    """Read the headers of a checkpoint. Raises UserError, as an engine does, for one that cannot be run."""
    if source_of(folder) is not None:
        raise UserError(
            f"{known_as(folder)} is a GGUF file: expected a checkpoint of safetensors, whose form can hold its "
            f"weights. A GGUF file streams as it is; to prepare the model, take its safetensors."
        )
    config = load_config(folder)
    raw = read_config(folder)
    packing = format_of(folder, raw)
    checkpoint, weights = open_weights(folder, packing)
    dtype = named_dtype(None, config) or torch.float32
    facts: ModelFacts = examine(config, dtype)
    model = build_skeleton(config, dtype, torch.device("cpu"))
    tensors = map_tensors(model, folder, weights, unused=facts.unused)
    check_unused(model, checkpoint, tensors.unexpected)
    return Source(folder, raw, checkpoint, packing, tensors, model, find_layers(model)[0])


def files_beside(folder: Path) -> list[Path]:
    """The files of a checkpoint beside its weights: configuration, tokenizer, chat template, generation settings."""
    found = {path for pattern in WANTED for path in folder.glob(pattern) if path.is_file()}
    kept = [path for path in found if not path.name.endswith((WEIGHTS, INDEX)) and path.name not in (JOURNAL, SIZES)]
    return sorted(kept, key=lambda path: path.name)
