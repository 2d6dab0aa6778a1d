"""How products of queries and keys become the weights of values."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Scoring:
    """The softmax of scaled products, and what some models change in it."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None  # [H]

    def repeated(self, count: int) -> "Scoring":
        """The same scoring for the heads of ``count`` rows."""
        return replace(self, sinks=None if self.sinks is None else self.sinks.repeat(count))

    @property
    def plain(self) -> bool:
        """Whether weights are a softmax of the scaled products and nothing else."""
        return self.softcap is None and self.sinks is None

    def weights(self, products: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Softmax in fp32 of [..., G, H / G, T, S] without the ``hidden`` keys (broadcast), in the products' dtype.

        It overwrites ``products``. Plain weights are scaled in the products' own dtype, as transformers does it: half
        the memory traffic of fp32 scores.
        """
        if self.plain:
            scaled = products if self.scale == 1.0 else products.mul_(self.scale)
            return scaled.masked_fill_(hidden, float("-inf")).softmax(-1)
        scores = products.float().mul_(self.scale)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        scores.masked_fill_(hidden, float("-inf"))
        if self.sinks is not None:
            groups, shared = scores.shape[-4:-2]
            sinks = self.sinks.float().view(groups, shared, 1, 1).expand(*scores.shape[:-1], 1)
            return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(products.dtype)
        return scores.softmax(-1).to(products.dtype)
