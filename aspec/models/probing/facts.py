"""What a probe finds out about a model and its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from aspec.models.exact.paths import MaskKind
from aspec.models.kv_cache import KVShape
from aspec.models.state.shapes import StateShape

BIAS = "alibi"
"""The argument by which layers take a bias of positions (Press et al., arXiv 2108.12409)."""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer: the shape it stores, and how its model calls it."""

    kv: KVShape | None  # None: it attends to keys and values of another layer, or not at all
    mask: MaskKind
    mask_argument: str | None  # None: it does not attend
    parameters: tuple[str, ...]  # of its forward, in order, the hidden state first
    state: StateShape | None = None  # what it keeps beside keys and values
    index_width: int = 0  # of the keys by which it selects the slots that it attends to; 0: it attends to all
    taken: str | None = None  # the argument that is the second result of the layer before it


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """All layers of a model, and how it calls them."""

    layers: tuple[LayerFacts, ...]
    num_results: int  # of the tuple that its forward expects from a layer; 0: the hidden state alone
    unused: frozenset[str] = frozenset()  # parameters that text never reaches, such as those of a tower for images
    rows_first: bool = False  # a hidden state is [B, T, ..., H]; otherwise [..., B, T, H]
    own_attention: bool = False  # its layers attend by code of their own, which adds a mask to the scores
    biased: bool = False  # its layers take ``BIAS``

    def result(self, hidden: torch.Tensor) -> object:
        """What a layer returns for a hidden state."""
        return layer_result(hidden, self.num_results)

    def hand_over(self, index: int, output: Any, arguments: Sequence[dict[str, Any]]) -> torch.Tensor:
        """The hidden state among the results of a layer; a second one goes to the next layer, if that takes it."""
        results = output if isinstance(output, tuple) else (output,)
        if index + 1 < len(self.layers) and (taken := self.layers[index + 1].taken) is not None:
            arguments[index + 1][taken] = results[1]
        return cast("torch.Tensor", results[0])

    @property
    def selects(self) -> bool:
        """Whether a layer selects the slots that it attends to, by its indexer or as the layer before it does."""
        return any(layer.index_width or layer.taken for layer in self.layers)

    @property
    def why_not_exact(self) -> str | None:
        """Why no step of this model can have the bits of plain decoding; None if steps can."""
        if self.selects:
            return "its layers select the tokens that they attend to, by scores whose last bits depend on the pass"
        return (
            "its layers attend by code of their own, whose last bits depend on the pass" if self.own_attention else None
        )

    @property
    def kv_shapes(self) -> list[KVShape | None]:
        """The shapes of a cache on the device of the layers."""
        indexes = ((1, width, 0) if (width := layer.index_width) else None for layer in self.layers)
        return [*(layer.kv for layer in self.layers), *(indexes if self.selects else ())]


def layer_result(hidden: torch.Tensor, number: int, second: object = None) -> object:
    """A hidden state, or the tuple of ``number`` results (at most 2) that begins with it."""
    return (hidden, second)[:number] if number else hidden


@dataclass(frozen=True, slots=True)
class OffloadFacts:
    """Sizes of a model's split layers with KV in host memory."""

    per_token: int  # device bytes that an item holds from the projections to the end of a layer
    kept: tuple[KVShape | None, ...]  # by layer: shape on the host; None: it uses another layer's KV
    crossing: tuple[tuple[int, int], ...]  # by layer: bytes per token to the host, and back
