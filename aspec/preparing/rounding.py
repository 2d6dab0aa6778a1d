"""Rounding of weights to a few bits: round to nearest, with a search for the best range of every group of inputs.

A group's smallest and largest weight span its range at first. Narrower ranges clip these and make the steps finer; the
one with the least squared error is kept. Errors are those of scales and offsets as they will be stored, in few bits
themselves. Nothing but the weights is needed: no texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range
LEAST = 2.0**-100  # of a scale: its inverse is a number
MOST_SEARCHED_BITS = 4  # with more bits, clipping costs more than finer steps gain


@dataclass(frozen=True, slots=True)
class Rounding:
    """How weights become codes from 0 to 2 ** bits - 1: w = (code - half) * scale + offset."""

    bits: int
    has_offsets: bool  # False: every offset is 0
    dtype: torch.dtype  # of scales and offsets

    @property
    def half(self) -> int:
        """The code of a weight that is its group's offset."""
        return 1 << self.bits - 1

    def __call__(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From fp32 [R, groups, inputs]: codes of the same shape, scales and offsets [R, groups, 1], all in fp32."""
        best: list[torch.Tensor] = []
        room = torch.empty_like(weights)  # new memory for each range would cost more than the arithmetic
        for scale, offset in self._ranges(weights):
            found = (self._error(weights, scale, offset, room), scale, offset.expand_as(scale))
            better = found[0] < best[0] if best else None
            best = (
                list(found) if better is None else [torch.where(better, *own) for own in zip(found, best, strict=True)]
            )
        return self._codes(weights, best[1], best[2], room), best[1], best[2]

    def _ranges(self, weights: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scales and offsets to try, as they will be stored."""
        low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
        shrinks = SHRINKS if self.bits <= MOST_SEARCHED_BITS else SHRINKS[:1]
        for shrink in shrinks:
            if self.has_offsets:
                scale = self._stored((high - low) * (shrink / (2 * self.half - 1)))
                yield scale, (low * shrink + self.half * scale).to(self.dtype).float()
                continue
            long = torch.where(-low >= high, -low, -high) * shrink  # codes reach one further on the lower side
            yield self._stored(long / self.half), torch.zeros(1)
            yield self._stored(-long / (self.half - 1)), torch.zeros(1)

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale as it will be stored, which is not zero, even if all weights of the group are."""
        scale, limits = scale.to(self.dtype).float(), torch.finfo(self.dtype)
        return torch.where(scale == 0, max(limits.smallest_normal * limits.eps, LEAST), scale)

    def _codes(
        self, weights: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        torch.sub(weights, offset, out=out)
        return out.div_(scale).round_().add_(self.half).clamp_(0, 2 * self.half - 1)

    def _error(
        self, weights: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, room: torch.Tensor
    ) -> torch.Tensor:
        """The squared error of every group, [R, groups, 1]."""
        self._codes(weights, scale, offset, room).sub_(self.half).mul_(scale).add_(offset)
        return room.sub_(weights).square_().sum(-1, keepdim=True)
