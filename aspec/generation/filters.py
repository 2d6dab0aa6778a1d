"""The filters of sampling, by transformers' own warpers: which tokens remain to be drawn."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from aspec.generation.params import SamplingParams

Warper = Callable[[Any, torch.Tensor], torch.Tensor]
"""(not read, scores [N, V] float32) -> scores, -inf for tokens that it removes."""


def warpers_of(params: SamplingParams) -> list[Warper]:
    """The filters of a request, in transformers' order, for scores at its temperature."""
    return [
        *([TopHLogitsWarper(float(params.top_h))] if params.top_h is not None else []),
        *([TopKLogitsWarper(int(params.top_k))] if params.top_k > 0 else []),
        *([TopPLogitsWarper(float(params.top_p))] if params.top_p < 1 else []),
        *([MinPLogitsWarper(float(params.min_p))] if params.min_p > 0 else []),
        *([TypicalLogitsWarper(float(params.typical_p))] if params.typical_p < 1 else []),
        *([EpsilonLogitsWarper(float(params.epsilon_cutoff))] if params.epsilon_cutoff > 0 else []),
        *([_eta(float(params.eta_cutoff))] if params.eta_cutoff > 0 else []),
    ]


def narrows(params: SamplingParams) -> bool:
    """Whether top-k, top-p and min-p are the only filters: they need no scores of tokens that cannot survive."""
    others = params.top_h, params.typical_p, params.epsilon_cutoff, params.eta_cutoff
    return others == (None, 1, 0, 0)


def _eta(cutoff: float) -> Warper:
    """The eta filter on the device of the scores."""
    return lambda _, scores: EtaLogitsWarper(cutoff, device=scores.device)(_, scores)
