"""Shared noise: the same integers everywhere, the right law, and independence from drafts and batches."""

import math

import pytest
import torch

from aspec.errors import NumericError, PromptError
from aspec.params import SamplingParams
from aspec.sampling import Sampler, derive_seed, draw_rows, gumbel, noise_bits


def pairs(positions, vocab):
    return torch.tensor(positions)[:, None], torch.arange(vocab)


def test_golden_integers():
    """The same on every device and in every version: a seeded text must not change."""
    assert noise_bits(0, *pairs([0, 1, 1000], 3)).tolist() == GOLDEN_ZERO
    assert noise_bits(-5, *pairs([7], 3)).tolist() == GOLDEN_NEGATIVE
    assert [derive_seed(0, 0), derive_seed(0, 1), derive_seed(7, 3)] == GOLDEN_SEEDS


GOLDEN_ZERO = [
    [223313908985, 371692604186, 295911862599],
    [55711004316, 770447024147, 976345473216],
    [432938656761, 475480873647, 189950213009],
]
GOLDEN_NEGATIVE = [[581794999480, 1065466262434, 472267902924]]
GOLDEN_SEEDS = [155203844971957558, 145484103376956817, 1994498231723796676]


def test_noise_depends_on_neither_vocabulary_nor_batch():
    wide = noise_bits(3, *pairs([5, 6, 7], 500))
    assert torch.equal(wide[:, :100], noise_bits(3, *pairs([5, 6, 7], 100)))
    assert torch.equal(wide[1:2], noise_bits(3, *pairs([6], 500)))


def test_noise_is_gumbel_and_uncorrelated():
    noise = gumbel(3, *pairs(range(300), 4000))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.005)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    uniform = torch.exp(-torch.exp(-noise))
    histogram = torch.histc(uniform, 64, 0, 1)
    expected = uniform.numel() / 64
    chi_square = ((histogram - expected) ** 2 / expected).sum().item()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    other_seed = torch.exp(-torch.exp(-gumbel(4, *pairs(range(300), 4000))))
    for a, b in ((uniform[:-1], uniform[1:]), (uniform[:, :-1], uniform[:, 1:]), (uniform, other_seed)):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def law(logits, params, draws=40_000):
    """Frequencies over many positions."""
    sampler = Sampler(params)
    tokens = sampler.draw(logits.expand(draws, -1), range(draws))
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=6, min_p=0.05),
    ],
    ids=str,
)
def test_the_law_is_the_processed_distribution(params):
    logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(2)) * 1.5
    wanted = Sampler(params)._warpers(None, logits).softmax(-1)[0]
    got = law(logits, params)
    assert set(got.nonzero().flatten().tolist()) <= set(wanted.nonzero().flatten().tolist())
    kept = wanted > 0
    chi_square = (40_000 * (got - wanted)[kept] ** 2 / wanted[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_the_joint_law_of_two_positions_is_the_product():
    logits = torch.tensor([[0.0, 1.0, -0.5, 0.3]])
    wanted = logits.softmax(-1)[0]
    draws = 30_000
    counts = torch.zeros(4, 4)
    for seed in range(3):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        tokens = sampler.draw(logits.expand(2 * draws, -1), range(2 * draws))
        for first, second in zip(tokens[::2], tokens[1::2], strict=True):
            counts[first, second] += 1
    expected = wanted[:, None] * wanted * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum().item() < 15 + 5 * math.sqrt(30)


def test_draws_do_not_depend_on_batch_or_padding():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(SamplingParams(temperature=0.9, seed=11))
    together = sampler.draw(logits, range(6))
    assert together == [sampler.draw(logits[i : i + 1], [i])[0] for i in range(6)]
    padded = torch.cat([logits, torch.full((6, 14), float("-inf"))], -1)
    assert sampler.draw(padded, range(6)) == together


def test_greedy_takes_the_lowest_of_equals_and_ignores_the_seed():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert Sampler(SamplingParams(seed=1)).draw(logits, [0]) == Sampler(SamplingParams(seed=2)).draw(logits, [9]) == [1]


def test_rows_draw_with_their_own_seeds_and_below_the_limit():
    logits = torch.zeros(2, 3, 20)
    logits[..., 15:] = 50.0
    samplers = [Sampler(SamplingParams(temperature=1.0, seed=s)) for s in (1, 2)]
    drawn = draw_rows(samplers, logits, [[4, 5, 6], [4]], limit=15)
    assert [len(row) for row in drawn] == [3, 1]
    assert max(map(max, drawn)) < 15
    assert drawn[1] == samplers[1].draw(logits[1, :1, :15], [4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(bad):
    logits = torch.zeros(3, 8)
    logits[1, 3] = bad
    with pytest.raises(NumericError, match="position 41"):
        Sampler(SamplingParams()).draw(logits, [40, 41, 42])


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2}, {"max_new_tokens": -1}],
    ids=str,
)
def test_senseless_parameters_are_refused(bad):
    with pytest.raises(PromptError, match=f"{next(iter(bad))} must be"):
        SamplingParams(**bad)
