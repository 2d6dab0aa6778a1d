"""Drawing tokens with shared noise: the token at position t is a function of (seed, t) and the target alone.

token = argmax(processed logits + g), g = Gumbel noise over the vocabulary from an integer counter hash of (the
request's seed, t, token id). That is an exact draw from the processed distribution (the Gumbel-max trick), and it
does not depend on drafts, batches or plans. A draft that ranks with the same noise chases the very token the
target will draw (Daliri et al., "Coupling without communication and drafter-invariant speculative decoding").
"""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aspec.errors import NumericError
from aspec.params import SamplingParams

# Odd constants of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit numbers.
GOLDEN = -7046029254386353131
MIX_1 = -4658895280553007687
MIX_2 = -7723592293110705685
BITS = 40  # bits of a uniform number


def derive_seed(seed: int, index: int) -> int:
    """The seed of prompt ``index`` of a run with one seed: never the row, which depends on the plan."""
    mixed = _mix(_mix(torch.tensor([_wrap(seed)]) + GOLDEN) + _wrap((index + 1) * MIX_2))
    return int(mixed.item()) & ((1 << 62) - 1)


def gumbel(seed: int, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float64, for int64 positions and token ids that broadcast: one value per pair."""
    uniform = noise_bits(seed, positions, tokens).double().add_(0.5).mul_(2.0**-BITS)
    return uniform.log_().neg_().log_().neg_()


def noise_bits(seed: int, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The integers behind the noise, 0 .. 2^40 - 1, equal on every device."""
    key = _mix(positions.new_full((1,), _wrap(seed)) + GOLDEN)
    return _shift(_mix(_mix(key + positions * MIX_2) + tokens * GOLDEN), 64 - BITS)


def _wrap(seed: int) -> int:
    """Any integer as a signed 64-bit one."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on wrapping int64."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right, which torch lacks for signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Sampler:
    """One request's draws, through transformers' own logits processors."""

    def __init__(self, params: SamplingParams) -> None:
        self.greedy = params.temperature == 0
        self._seed = params.seed
        self._truncates = bool(params.top_k or params.top_p < 1 or params.min_p)
        self._warpers = LogitsProcessorList()
        if self.greedy:
            return
        if params.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._warpers.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            self._warpers.append(MinPLogitsWarper(params.min_p))

    def draw(self, logits: torch.Tensor, positions: Sequence[int]) -> list[int]:
        """The tokens at ``positions`` from logits [N, V] of any float dtype; ties go to the lowest id.

        Raises NumericError where logits are NaN or leave nothing to draw from.
        """
        scores = logits.float()
        _check(scores, positions)
        if self.greedy:
            return [int(token) for token in scores.argmax(-1).tolist()]
        return self._perturbed(self._warpers(None, scores), positions)

    def _perturbed(self, scores: torch.Tensor, positions: Sequence[int]) -> list[int]:
        """The argmax of scores [N, V] plus noise; truncated distributions pay only for what they keep."""
        where = torch.tensor(positions, device=scores.device)
        if not self._truncates:
            noisy = gumbel(self._seed, where[:, None], torch.arange(scores.shape[-1], device=scores.device))
            noisy += scores
        else:
            rows, tokens = scores.isfinite().nonzero(as_tuple=True)
            noisy = scores.double()
            noisy[rows, tokens] += gumbel(self._seed, where[rows], tokens)
        return [int(token) for token in noisy.argmax(-1).tolist()]


def draw_rows(
    samplers: Sequence[Sampler],
    logits: torch.Tensor,
    positions: Sequence[Sequence[int]],
    limit: int | None = None,
) -> list[list[int]]:
    """Draw for every row of logits [B, T, V] at its own positions (the first columns of the row).

    Tokens from ``limit`` on are never drawn: a draft's vocabulary may be padded further than the target's.
    """
    if limit is not None:
        logits = logits[..., :limit]
    return [
        sampler.draw(row[: len(wanted)], wanted)
        for sampler, row, wanted in zip(samplers, logits, positions, strict=True)
    ]


def _check(scores: torch.Tensor, positions: Sequence[int]) -> None:
    best = scores.amax(-1)
    if bool(torch.isfinite(best).all()):
        return
    bad = next(
        position for position, value in zip(positions, best.tolist(), strict=True) if not abs(value) < float("inf")
    )
    raise NumericError(
        f"the model's logits for position {bad} are not numbers (NaN or infinite): expected finite values. The weights "
        f"are damaged, or overflow in this dtype: verify the checkpoint, or try --dtype float32."
    )
