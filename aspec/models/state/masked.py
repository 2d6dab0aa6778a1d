"""The recurrence of one row as products over all of its nodes at once: faster, and equal up to rounding.

The nodes see the committed state and their ancestors, as in attention, with weights that decay along the path: the
chunk algorithm of linear attention (Yang et al., arXiv 2412.06464) with a tree in place of a triangle. A node comes
after its ancestors, so the updates of the delta rule solve a triangular system.
"""

import torch


def run_piece(
    state: torch.Tensor,
    seen: torch.Tensor,
    final: int | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rates: torch.Tensor,
    beta: torch.Tensor | None,
    updates: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results and updates [H, N, Dv] of the new nodes; ``state`` [H, Dk, Dv] becomes the one behind node ``final``.

    Queries [H, N, Dk] and values [H, N, Dv] are those of the new nodes; keys [H, M + N, Dk] and rates [H, M + N] are
    those of all, ``updates`` [H, M, Dv] those of the logged ones; ``beta`` [H, N], None: u = v.
    """
    num_logged = updates.shape[1]
    path = rates @ seen.T.float()  # [H, M + N]: the logarithm of the decay from the committed state down to a node
    own = path[:, num_logged:]
    pair = (own[:, :, None] - path[:, None]).masked_fill_(~seen[num_logged:], float("-inf")).exp_()  # [H, N, M + N]
    grown = own.exp()[..., None]
    if beta is None:
        added = values
    else:
        new_keys = keys[:, num_logged:]
        overlap = (new_keys @ keys.mT).mul_(pair).mul_(beta[..., None])
        right = beta[..., None] * (values - (new_keys * grown) @ state) - overlap[..., :num_logged] @ updates
        added = torch.linalg.solve_triangular(overlap[..., num_logged:], right, upper=False, unitriangular=True)
    everything = torch.cat([updates, added], 1)
    results = (queries * grown) @ state + (queries @ keys.mT).mul_(pair) @ everything
    if final is not None:
        ending = path[:, final, None]
        left = (ending - path).masked_fill_(~seen[final], float("-inf")).exp_()[..., None]
        state.mul_(ending[..., None].exp()).add_((keys * left).mT @ everything)
    return results, added
