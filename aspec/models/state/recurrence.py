"""One recurrence for all families: S <- d * S + k (x) u, out = S q, along the path of every node.

S [Dk, Dv] per head decays by d, per head, per key channel, or per channel of both. The update u is v, or with the delta
rule beta (v - S k). Gated delta net (Yang et al., arXiv 2412.06464) and Kimi delta attention are the latter; the SSD of
Mamba 2 (Dao and Gu, arXiv 2405.21060) has k = B, u = dt x; Mamba 1 (Gu and Dao, arXiv 2312.00752) has one head with
Dk = N, Dv = channels. A convolution keeps its last inputs.

Sums over Dk are pairwise sums of elementwise operations, whose bits depend on the numbers only. So a node's bits follow
from its path, not from the step that computes it.
"""

from dataclasses import dataclass

import torch

from aspec.models.exact.blocks import in_whole_vectors
from aspec.models.state.layer_state import LoggedState
from aspec.models.state.nodes import Block, Index, NodePlan
from aspec.models.state.shapes import RecurrenceShape


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a layer gives for the N nodes of a step, padding included; fp32."""

    query: torch.Tensor  # [N, G, Dk]
    key: torch.Tensor  # [N, G, Dk]
    value: torch.Tensor  # [N, G, H / G, Dv]
    rate: torch.Tensor  # [N, G, H / G, 1 or Dk, 1 or Dv]: the logarithm of d, or a factor of it
    beta: torch.Tensor | None = None  # [N, G, H / G]; None: u = v
    scale: torch.Tensor | None = None  # broadcast to S: the other factor of log d; None: 1

    def decay(self, rate: torch.Tensor) -> torch.Tensor:
        """The decay of nodes with these rates."""
        return in_whole_vectors(torch.exp, rate if self.scale is None else rate * self.scale)


class RecurrentState(LoggedState):
    """States [R, G, H / G, Dk, Dv], and a log of k, u and rate; fp32."""

    def __init__(self, shape: RecurrenceShape, num_rows: int, log_slots: int, device: torch.device) -> None:
        heads = shape.groups, shape.shared

        def zeros(*sizes: int) -> torch.Tensor:
            return torch.zeros(num_rows, *sizes, dtype=torch.float32, device=device)

        log = (
            zeros(log_slots, shape.groups, shape.key),
            zeros(log_slots, *heads, shape.value),
            zeros(log_slots, *heads, *shape.rate),
        )
        super().__init__(zeros(*heads, shape.key, shape.value), log)

    def run(self, plan: NodePlan, given: Inputs) -> torch.Tensor:
        """The results [N, G, H / G, Dv] of a step's nodes; 0 for padding."""
        if plan.fresh:
            self.committed[plan.fresh] = 0.0
        old_key, old_update, old_rate = (tensor[plan.old] for tensor in self.log)
        logs, tokens = len(plan.logged[0]) > 0, given.value
        updates = given.value if given.beta is None or not logs else torch.empty_like(given.value)
        results = torch.zeros_like(tokens)
        states: dict[int, torch.Tensor] = {-1: self.committed}
        for number, block in enumerate(plan.blocks):
            rate = _joined(old_rate[block.old], given.rate, block.new)
            key = _joined(old_key[block.old], given.key, block.new)[:, :, None, :, None]
            state = states[block.parent][block.source] * given.decay(rate)
            first = state.shape[0] - block.num_new
            update = self._update(given, block, state, key, first)
            if block.new is not None and given.beta is not None and logs:
                updates[block.new] = update
            state += key * _beside(old_update[block.old], update)[..., None, :]
            if block.new is not None:
                results[block.new] = pairwise_sum(state[first:] * given.query[block.new][:, :, None, :, None])
            if block.committed is not None:
                at, rows = block.committed
                self.committed[rows] = state[at]  # no other block reads this row's: the committed nodes are a chain
            if block.continued is not None:
                kept = state[block.continued]
                states[number] = kept if len(kept) == len(state) else kept.clone()  # the rest of a view is freed
            if block.is_last and block.parent >= 0:
                del states[block.parent]
        self._write(plan, given, updates)
        return results

    @staticmethod
    def _update(given: Inputs, block: Block, state: torch.Tensor, key: torch.Tensor, first: int) -> torch.Tensor:
        """u [n, G, H / G, Dv] of a block's new nodes, whose states have decayed."""
        if block.new is None:
            return given.value[:0]
        if given.beta is None:
            return given.value[block.new]
        return (given.value[block.new] - pairwise_sum(state[first:] * key[first:])) * given.beta[block.new][..., None]

    def _write(self, plan: NodePlan, given: Inputs, updates: torch.Tensor) -> None:
        """Log what may be taken back."""
        tokens, rows, places = plan.logged
        if len(tokens):
            for tensor, new in zip(self.log, (given.key, updates, given.rate), strict=True):
                tensor[rows, places] = new[tokens]


class ConvolutionState(LoggedState):
    """The last inputs [R, K - 1, C] of a causal convolution over K inputs, oldest first, and a log of inputs."""

    def __init__(
        self, channels: int, size: int, num_rows: int, log_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._size = size
        sizes = (size - 1, channels), (log_slots, channels)
        tail, log = (torch.zeros(num_rows, *own, dtype=dtype, device=device) for own in sizes)
        super().__init__(tail, (log,))

    def run(
        self, plan: NodePlan, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Inputs [N, C] of a step's nodes, ``weight`` [C, K] -> [N, C]: a node sees the last K inputs on its path."""
        if plan.fresh:
            self.committed[plan.fresh] = 0
        (log,) = self.log
        seen, rows, tails = plan.taps(self._size)
        everything = torch.cat([self.committed.flatten(0, 1), log[plan.old], inputs])
        result = torch.zeros(inputs.shape, dtype=torch.float32, device=inputs.device)
        for tap in range(self._size):
            result += everything[seen[:, tap]].float() * weight[:, tap].float()
        if bias is not None:
            result += bias.float()
        if len(rows):
            self.committed[rows] = everything[tails]
        tokens, rows, places = plan.logged
        if len(tokens):
            log[rows, places] = inputs[tokens]
        return result.to(inputs.dtype)


def pairwise_sum(products: torch.Tensor) -> torch.Tensor:
    """The sum [..., Dv] of [..., Dk, Dv] over Dk, by halves."""
    while (size := products.shape[-2]) > 1:
        half = size // 2
        summed = products[..., :half, :] + products[..., half : 2 * half, :]
        products = torch.cat([summed, products[..., 2 * half :, :]], -2) if size % 2 else summed
    return products[..., 0, :]


def _joined(old: torch.Tensor, new: torch.Tensor, chosen: Index | None) -> torch.Tensor:
    """Logged values of a block, then those of its new nodes."""
    return old if chosen is None else _beside(old, new[chosen])


def _beside(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return new if not len(old) else torch.cat([old, new]) if len(new) else old
