"""What a step gives a model's forward and its layers as masks, in place of those that the forward makes."""

from collections.abc import Sequence
from typing import Any

import torch

from aspec.models.kv_cache import StepCache
from aspec.models.probing.facts import BIAS, LayerFacts, ModelFacts


def frame_mask(facts: ModelFacts, step: StepCache, columns: int | None = None) -> torch.Tensor:
    """The mask argument of a model's own forward over all tokens of a step, or over as many ``columns``.

    A bool mask [B, 1, T, S] is taken as it is. A model with a bias of positions computes it from the sum of a mask
    [B, S] int64.
    """
    if facts.biased:
        return torch.ones(step.position_ids.shape[0], step.high, dtype=torch.long, device=step.position_ids.device)
    mask = step.mask()
    return mask if columns is None or columns == mask.shape[2] else mask[:, :, :columns]


def fill_in(facts: ModelFacts, calls: Sequence[dict[str, Any]], step: StepCache) -> None:
    """Replace the masks in the arguments of all layers, and take out the hidden state."""
    bias = step.biased(calls[0][BIAS]) if facts.biased else None
    for layer, arguments in zip(facts.layers, calls, strict=True):
        if layer.mask_argument is not None:
            arguments[layer.mask_argument] = _mask(facts, layer, step)
        elif "attention_mask" in arguments:
            arguments["attention_mask"] = None  # rows are not padded
        if bias is not None:
            arguments[BIAS] = bias
        del arguments[layer.parameters[0]]


def _mask(facts: ModelFacts, layer: LayerFacts, step: StepCache) -> object:
    if facts.own_attention:
        return step.added_mask(layer.mask)
    # offloaded: the attention makes its mask on the host, and no code reads this placeholder
    if step.offloaded:
        return ()
    return step.mask(layer.mask) if facts.selects else step.seen(layer.mask)
