"""One recurrence for all families: S <- d * S + k (x) u, out = S q, along the path of every node.

S [Dk, Dv] per head decays by d, per head, per key channel, or per channel of both. The update u is v, or with the delta
rule beta (v - S k). Gated delta net (Yang et al., arXiv 2412.06464) and Kimi delta attention are the latter; the SSD of
Mamba 2 (Dao and Gu, arXiv 2405.21060) has k = B, u = dt x; Mamba 1 (Gu and Dao, arXiv 2312.00752) has one head with
Dk = N, Dv = channels. A convolution keeps its last inputs.

In an exact step a node runs alone, with the same products and elementwise operations over S in every step. So its bits
follow from its path, not from the step that computes it. S is read once for k and q together: with the decayed state
S' = d * S, S' k = S (d * k), and out = S q = S (d * q) + (k q) u. Other steps run all nodes of a row at once
(``masked.py``), where a head has one decay.
"""

from dataclasses import dataclass

import torch

from aspec.models.exact.blocks import in_whole_vectors
from aspec.models.state.layer_state import LoggedState
from aspec.models.state.masked import run_piece
from aspec.models.state.nodes import NodePlan, Visit
from aspec.models.state.shapes import RecurrenceShape


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a layer gives for the N nodes of a step, padding included; fp32."""

    query: torch.Tensor  # [N, G, Dk]; the heads of a group share queries and keys
    key: torch.Tensor  # [N, G, Dk]
    value: torch.Tensor  # [N, H, Dv]
    rate: torch.Tensor  # [N, H, 1 or Dk, 1 or Dv]: the logarithm of d, or a factor of it
    beta: torch.Tensor | None = None  # [N, H]; None: u = v
    scale: torch.Tensor | None = None  # broadcast to S: the other factor of log d; None: 1


class RecurrentState(LoggedState):
    """States [R, H, Dk, Dv], and a log of k, u and rate; fp32."""

    def __init__(
        self, shape: RecurrenceShape, num_rows: int, log_slots: int, device: torch.device, *, saves: bool = False
    ) -> None:
        def zeros(*sizes: int) -> torch.Tensor:
            return torch.zeros(num_rows, *sizes, dtype=torch.float32, device=device)

        log = (
            zeros(log_slots, shape.groups, shape.key),
            zeros(log_slots, shape.heads, shape.value),
            zeros(log_slots, shape.heads, *shape.rate),
        )
        super().__init__(zeros(shape.heads, shape.key, shape.value), log, saves=saves)

    def run(self, plan: NodePlan, given: Inputs, *, exact: bool) -> torch.Tensor:
        """The results [N, H, Dv] of a step's nodes; 0 for padding. ``exact``: their bits follow from their paths."""
        if plan.fresh:
            self.committed[plan.fresh] = 0.0
        if exact or given.rate.shape[2:] != (1, 1):
            results, updates = self._run_alone(plan, given)
        else:
            results, updates = self._run_pieces(plan, given)
        tokens, rows, places = plan.logged
        if len(tokens):
            for tensor, new in zip(self.log, (given.key, updates, given.rate), strict=True):
                tensor[rows, places] = new[tokens]
        return results

    def _run_pieces(self, plan: NodePlan, given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Results and updates of all nodes, a piece at once; only with one decay per head."""
        heads, results = given.value.shape[1], torch.zeros_like(given.value)
        updates = given.value if given.beta is None else torch.zeros_like(given.value)
        old_keys, old_updates, old_rates = (tensor[plan.old] for tensor in self.log)
        for piece in plan.pieces:
            at, logged = piece.tokens, piece.logged
            keys = _of_heads(torch.cat([old_keys[logged], given.key[at]]), heads)
            found, added = run_piece(
                self.committed[piece.row],
                piece.seen,
                piece.final,
                _of_heads(given.query[at], heads).transpose(0, 1),
                keys.transpose(0, 1),
                given.value[at].transpose(0, 1),
                torch.cat([old_rates[logged], given.rate[at]])[..., 0, 0].T,
                None if given.beta is None else given.beta[at].T,
                old_updates[logged].transpose(0, 1),
            )
            results[at] = found.transpose(0, 1)
            if given.beta is not None:
                updates[at] = added.transpose(0, 1)
        return results, updates

    def _run_alone(self, plan: NodePlan, given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Results and updates of all nodes, one after another."""
        step = _Step(given, [tensor[plan.old] for tensor in self.log])
        states: list[torch.Tensor | None] = []  # by visit
        spare: list[torch.Tensor] = []  # memory of states that nobody needs
        for visit in plan.visits:
            before = self._state_before(visit, states)
            takes_over = self._takes_over(visit, before)
            after = before if takes_over else spare.pop() if spare else torch.empty_like(before)
            step.visit(visit, before, after)
            states.append(after if visit.is_continued else None)
            if visit.commits and not self._is_committed(visit, after):
                self.committed[visit.row] = after
            if not visit.is_continued and not self._is_committed(visit, after):
                spare.append(after)
            if visit.is_last and visit.parent >= 0:
                spare += [] if takes_over or self._is_committed(visit, before) else [before]
                states[visit.parent] = None
        return step.results, step.updates

    def _state_before(self, visit: Visit, states: list[torch.Tensor | None]) -> torch.Tensor:
        """The state [H, Dk, Dv] that a node continues."""
        if visit.parent < 0:
            return self.committed[visit.row]
        state = states[visit.parent]
        assert state is not None, "a state is held until the last node that continues it"
        return state

    def _takes_over(self, visit: Visit, state: torch.Tensor) -> bool:
        """Whether a node changes the state that it continues in place: the committed one only if it is final."""
        return visit.is_last and (visit.is_final or not self._is_committed(visit, state))

    def _is_committed(self, visit: Visit, state: torch.Tensor) -> bool:
        """Whether a state is the storage of a row's committed one."""
        return state.data_ptr() == self.committed[visit.row].data_ptr()


class _Step:
    """The nodes of one step: what they bring, and their results."""

    def __init__(self, given: Inputs, logged: list[torch.Tensor]) -> None:
        self._given, (self._old_keys, self._old_updates, self._old_rates) = given, logged
        self.updates = given.value if given.beta is None else torch.zeros_like(given.value)
        self.results = torch.zeros_like(given.value)
        heads, key = given.value.shape[1], given.key.shape[2]
        self._by_value = given.rate.shape[3] > 1  # the decay does not commute with products over Dk
        self._keys, query = (_of_heads(one, heads) for one in (given.key, given.query))  # [N, H, Dk]
        self._old_heads = _of_heads(self._old_keys, heads)
        self._decay = None if given.scale is not None else in_whole_vectors(torch.exp, given.rate)
        self._old_decay = None if given.scale is not None else in_whole_vectors(torch.exp, self._old_rates)
        decay = 1.0 if self._decay is None or self._by_value else self._decay[..., 0]
        rows = [query * decay] if given.beta is None else [query * decay, self._keys * decay]
        self._rows = torch.stack(rows, 2)  # [N, H, 1 or 2, Dk]
        self._overlap = pairwise_sum((self._keys * query).view(-1, heads, key, 1))  # [N, H, 1]: k q

    def visit(self, visit: Visit, before: torch.Tensor, after: torch.Tensor) -> None:
        """Run one node from the state [H, Dk, Dv] ``before`` it; write the one ``after`` it, if anybody needs it.

        ``after`` may be the same memory; it is overwritten in any case.
        """
        is_new, at = visit.token >= 0, max(visit.token, visit.logged)
        decay = self._decay_of(is_new, at)
        decayed = torch.mul(before, decay, out=after) if self._by_value else before
        if is_new:
            seen = torch.matmul(self._rows[at], decayed)  # [H, 1 or 2, Dv]
            if self._given.beta is not None:
                torch.mul(self._given.value[at] - seen[:, 1], self._given.beta[at, :, None], out=self.updates[at])
            torch.addcmul(seen[:, 0], self._overlap[at], self.updates[at], out=self.results[at])
        if not visit.is_continued and not visit.commits:
            return
        if not self._by_value:
            torch.mul(before, decay, out=after)
        keys, updates = (self._keys, self.updates) if is_new else (self._old_heads, self._old_updates)
        after.baddbmm_(keys[at, :, :, None], updates[at, :, None])

    def _decay_of(self, is_new: bool, at: int) -> torch.Tensor:
        """d [H, 1 or Dk, 1 or Dv] of a node."""
        decays = self._decay if is_new else self._old_decay
        if decays is not None:
            return decays[at]
        rate, scale = (self._given.rate if is_new else self._old_rates)[at], self._given.scale
        assert scale is not None, "the decay is not computed beforehand"
        return in_whole_vectors(torch.exp, rate * scale)


def _of_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, G, D] -> [N, H, D]: a group's vector for each of its heads."""
    groups = states.shape[1]
    return states if groups == heads else states.repeat_interleave(heads // groups, 1, output_size=heads)


class ConvolutionState(LoggedState):
    """The last inputs [R, K - 1, C] of a causal convolution over K inputs, oldest first, and a log of inputs."""

    def __init__(
        self,
        channels: int,
        size: int,
        num_rows: int,
        log_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        saves: bool = False,
    ) -> None:
        self._size = size
        sizes = (size - 1, channels), (log_slots, channels)
        tail, log = (torch.zeros(num_rows, *own, dtype=dtype, device=device) for own in sizes)
        super().__init__(tail, (log,), saves=saves)

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
