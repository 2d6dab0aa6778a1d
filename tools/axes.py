"""How a dimension grows into a larger one: what each new position takes of which old one, and at what scale."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Heads(Protocol):
    """How many heads an attention has."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, each shared by a group of query heads."""


@dataclass(frozen=True)
class Axis:
    """How a dimension grows: new position i takes source position `index[i]` times `scale[i]`; -1 takes nothing."""

    index: torch.Tensor  # [new size] int64
    scale: torch.Tensor  # [new size] fp32

    def unscaled(self) -> "Axis":
        """The same positions, repeated instead of split."""
        return Axis(self.index, torch.ones_like(self.scale))


def identity(size: int) -> Axis:
    """An axis that does not grow."""
    return Axis(torch.arange(size), torch.ones(size))


def nothing(size: int) -> Axis:
    """An axis of `size` positions without a source."""
    return Axis(torch.full((size,), -1), torch.zeros(size))


def split_one(parts: int) -> torch.Tensor:
    """`parts` powers of two that sum to 1, as even as possible, [parts] fp32."""
    whole = 2 ** (parts.bit_length() - 1)
    halved = parts - whole
    return torch.tensor([1 / whole] * (whole - halved) + [0.5 / whole] * (2 * halved))


def copies(old: int, new: int, generator: torch.Generator) -> Axis:
    """`new` shuffled positions that share out copies of `old` sources; the scales of a source's copies sum to 1."""
    axis = nothing(new)
    places = torch.randperm(new, generator=generator)
    for source in range(old):
        own = places[source::old]
        axis.index[own], axis.scale[own] = source, split_one(len(own))
    return axis


def grow_heads(old: Heads, new: Heads, generator: torch.Generator) -> tuple[Axis, Axis]:
    """(query heads, kv heads): each new kv head copies an old one, its query heads copy heads of the old group."""
    kv = torch.randperm(new.kv_heads, generator=generator) % old.kv_heads
    old_group, group = old.heads // old.kv_heads, new.heads // new.kv_heads
    queries = nothing(new.heads)
    for head in range(old.kv_heads):
        places = (torch.nonzero(kv == head) * group + torch.arange(group)).flatten()
        part = copies(old_group, len(places), generator)
        queries.index[places], queries.scale[places] = part.index + head * old_group, part.scale
    return queries, Axis(kv, torch.ones(len(kv)))


def rotary_dims(old: int, new: int, scale: float) -> Axis:
    """Query or key dimensions of one head: rotary pair i (dimensions i and i + half) moves to pair i * factor."""
    axis, source = nothing(new), torch.arange(old)
    place = source % (old // 2) * (new // old) + source // (old // 2) * (new // 2)
    axis.index[place], axis.scale[place] = source, scale
    return axis


def value_dims(old: int, new: int) -> Axis:
    """Value dimensions of one head: each repeated, with scales that sum to 1."""
    return Axis(torch.arange(old).repeat_interleave(new // old), split_one(new // old).repeat(old))


def all_dims(heads: Axis, dims: Axis, old_head_dim: int) -> Axis:
    """The axis of all dimensions of all heads, head-major."""
    index = torch.where(dims.index < 0, -1, heads.index[:, None] * old_head_dim + dims.index)
    return Axis(index.flatten(), (heads.scale[:, None] * dims.scale).flatten())
