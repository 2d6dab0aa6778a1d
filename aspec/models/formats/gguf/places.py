"""Where the elements of a stored tensor are in a parameter of transformers: as views of the parameter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, ...]
View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """A stored tensor's part of a parameter."""

    shape: Shape  # of the parameter
    view: View  # from the parameter to the elements, in the order of the file
    part: int = 0  # of how many
    parts: int = 1
    plain: bool = False  # the stored tensor is the parameter


Form = Callable[[Shape, Mapping[str, Any]], Place | None]
"""From the stored shape and the configuration to a place; None if they do not fit."""


def as_is(shape: Shape, config: Mapping[str, Any]) -> Place | None:
    """The tensor is the parameter."""
    return Place(shape, lambda weight: weight, plain=True)


def query_heads(shape: Shape, config: Mapping[str, Any]) -> Place | None:
    """Rows of heads, whose rotary pairs are neighbours; in transformers the second ones follow all first ones."""
    return _heads(shape, config["num_attention_heads"])


def key_heads(shape: Shape, config: Mapping[str, Any]) -> Place | None:
    """The same for the heads of keys."""
    return _heads(shape, config["num_key_value_heads"])


def _heads(shape: Shape, heads: int) -> Place | None:
    if shape[0] % (2 * heads):
        return None
    return Place(shape, lambda weight: torch.unflatten(weight, 0, (heads, 2, -1)).transpose(1, 2))


def half(number: int) -> Form:
    """Experts [E, I, H] whose partner has the other half of [E, 2 I, H]."""

    def form(shape: Shape, config: Mapping[str, Any]) -> Place | None:
        if len(shape) != 3:
            return None
        experts, width, hidden = shape
        begin = number * width
        return Place((experts, 2 * width, hidden), lambda weight: weight[:, begin : begin + width], number, 2)

    return form


def interleaved(number: int) -> Form:
    """Experts [E, I, H] whose partner has every other column of [E, H, 2 I]; of biases [E, I] likewise."""

    def form(shape: Shape, config: Mapping[str, Any]) -> Place | None:
        if len(shape) == 2:
            return Place((shape[0], 2 * shape[1]), lambda weight: weight[:, number::2], number, 2)
        if len(shape) != 3:
            return None
        experts, width, hidden = shape
        return Place((experts, hidden, 2 * width), lambda weight: weight[..., number::2].transpose(1, 2), number, 2)

    return form


def transposed(shape: Shape, config: Mapping[str, Any]) -> Place | None:
    """Experts [E, H, I] as [E, I, H]."""
    if len(shape) != 3:
        return None
    return Place((shape[0], shape[2], shape[1]), lambda weight: weight.transpose(1, 2))


def one_row(shape: Shape, config: Mapping[str, Any]) -> Place | None:
    """A vector as a matrix of one row."""
    return Place((1, *shape), lambda weight: weight[0]) if len(shape) == 1 else as_is(shape, config)
