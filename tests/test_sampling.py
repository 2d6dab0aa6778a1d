"""Draws are exact, keyed by (seed, position) alone, and the same whatever else is in the batch."""

import dataclasses
import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aspec.errors import NumericError, PromptError
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import NO_TOKEN, Sampler, _to_gumbel, derive_seed, draw_rows, gumbel, noise_bits

NAN, INF = math.nan, math.inf
LIMIT = 4.5  # standard deviations: the seeds are fixed, so what passes once passes always

GOLDEN_BITS = [
    [-2395131, 1589817484, -2042097352, -1679040911],
    [44567792, 1466334170, 106766065, -1553984637],
]
GOLDEN_SEEDS = [3725210598701212161, 1908093422684998445, 5675370592208760370, 5346642176467364641]


pytestmark = pytest.mark.usefixtures("one_thread")


def sampler(**params) -> Sampler:
    return Sampler(SamplingParams(**params))


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers' generate does to scores, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(None, logits.float())


def deviation(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-square of counts, as a standard normal deviate (Wilson and Hilferty); rare cells count as one."""
    assert not counts[expected == 0].any()
    counts, expected = counts.flatten().double(), expected.flatten().double()
    rare = expected < 8
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(len(counts) - 1, 1)
    ratio, spread = float(((counts - expected) ** 2 / expected).sum()) / freedom, 2 / (9 * freedom)
    return (ratio ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def correlation(one: torch.Tensor, two: torch.Tensor) -> float:
    """Of two arrays of the same shape, in standard deviations of what independent ones show."""
    return float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]) * math.sqrt(one.numel())


# -- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": -1},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": NAN},
        {"temperature": INF},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 0.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": NAN},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": INF},
        {"presence_penalty": 2.1},
        {"presence_penalty": None},
        {"frequency_penalty": -2.01},
        {"frequency_penalty": NAN},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": True},
        {"logprobs": 1.0},
        {"seed": 0.5},
        {"seed": None},
        {"stop": ("a", "")},
        {"stop": (1,)},
        {"ignore_eos": 1},
    ],
    ids=repr,
)
def test_parameters_that_make_no_sense_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(PromptError, match=rf"{name} must be .*; found .* default, "):
        SamplingParams(**wrong)


def test_parameters_are_taken_as_people_write_them():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(temperature=1, top_p=1, max_new_tokens=0, seed=-(1 << 70)).temperature == 1
    assert SamplingParams(presence_penalty=-2, frequency_penalty=2, logprobs=20).logprobs == 20
    assert SamplingParams(seed=10**400).seed == 10**400
    sampler(temperature=2, top_p=1, min_p=0).draw(torch.zeros(1, 4), [0])  # ints where floats are meant


# -- noise -------------------------------------------------------------------------------------------------


def test_noise_is_these_integers_on_every_machine():
    ids = torch.tensor([0, 1, 2, 151935], dtype=torch.int32)
    assert noise_bits(0, [0, 1], ids).tolist() == GOLDEN_BITS
    assert noise_bits(-5, [1 << 20], ids[:2]).tolist() == noise_bits((1 << 64) - 5, [1 << 20], ids[:2]).tolist()
    assert [derive_seed(0, 0), derive_seed(0, 1), derive_seed(1, 0), derive_seed(-1, 3)] == GOLDEN_SEEDS


def mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 on uint64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


def words(seeds: np.ndarray, positions: list[int], tokens: list[int]) -> np.ndarray:
    """triple32 of the token id with the halves of splitmix64's stream: seeds [S] uint64 -> [S, P, V] uint32."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    keys = mixed(mixed(seeds + golden)[:, None] + golden * (np.array(positions, np.uint64) + 1))[..., None]
    x = np.array(tokens, np.uint32)
    x = (x ^ x >> 17) * 0xED5AD4BB ^ (keys & 0xFFFFFFFF).astype(np.uint32)
    x = (x ^ x >> 11) * 0xAC4C1B51 ^ (keys >> 32).astype(np.uint32)
    x = (x ^ x >> 15) * 0x31848BAB
    return x ^ x >> 14


def test_noise_is_the_documented_hash():
    tokens = [*range(20), 32000, 151935, 2**31 - 1]
    for seed, positions in ((0, [0]), (7, [3, 4]), (derive_seed(9, 9), [100_000, 1])):
        found = noise_bits(seed, positions, torch.tensor(tokens, dtype=torch.int32)).numpy().view(np.uint32)
        assert np.array_equal(found, words(np.array([seed], np.uint64), positions, tokens)[0])


def test_noise_depends_on_seed_position_and_token_only():
    whole = gumbel(5, [3, 9, 1], 1000)
    assert torch.equal(gumbel(5, torch.tensor([1, 3]), 137), whole[[2, 0], :137])
    assert torch.equal(gumbel(5, [9], 70_001)[:, :1000], whole[1:2])
    bits = noise_bits(5, [3, 9, 1], torch.arange(1000, dtype=torch.int32))  # all rows at once, as on a GPU
    assert torch.equal(bits[1:2], noise_bits(5, [9], torch.arange(1000, dtype=torch.int32)))
    assert not torch.equal(gumbel(6, [3], 1000), whole[:1])
    assert gumbel(5, [], 10).shape == (0, 10)
    assert len(noise_bits(5, [3], torch.arange(1 << 16, dtype=torch.int32)).unique()) == 1 << 16


def test_values_are_precise_where_they_win():
    bits = torch.cat(
        [
            torch.tensor([0, 1, 2, 1000, -1, -(1 << 31), (1 << 31) - 1]),
            torch.arange(-(1 << 31), 1 << 31, 99991),
        ]
    )
    found = _to_gumbel(bits.int(), torch.empty(len(bits))).double()
    exact = -(-torch.log1p(-((bits.double() % 2**32) + 0.5) / 2**32)).log()
    assert torch.isfinite(found).all()
    assert (found - exact).abs()[exact > 0].max() < 3e-6
    assert (found - exact).abs()[exact > -2].max() < 1e-4
    assert found.max() > 22.8


def test_noise_has_gumbels_distribution():
    values = gumbel(11, range(16), 1 << 15).double().flatten().sort().values
    cdf, steps = (-(-values).exp()).exp(), torch.arange(len(values) + 1) / len(values)
    distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()) * math.sqrt(len(values))
    assert distance < 1.95  # Kolmogorov: exceeded once in 1000
    bits = noise_bits(12, range(16), torch.arange(1 << 15, dtype=torch.int32)).flatten()
    for shift in (0, 8, 16, 24):
        counts = ((bits >> shift) & 255).bincount(minlength=256)
        assert abs(deviation(counts, torch.full((256,), len(bits) / 256))) < LIMIT


def test_neighbours_are_independent():
    size = 1 << 15
    base = noise_bits(3, range(16), torch.arange(size, dtype=torch.int32))
    seeds = {
        f"seed + {d}": noise_bits(3 + d, range(16), torch.arange(size, dtype=torch.int32)) for d in (1, 2, 1 << 32)
    }
    pairs = {name: (base, other) for name, other in seeds.items()}
    pairs |= {f"token + {lag}": (base[:, :-lag], base[:, lag:]) for lag in (1, 2, 3, 256, 4096)}
    pairs |= {f"position + {lag}": (base[:-lag], base[lag:]) for lag in (1, 2, 8)}
    for name, (one, two) in pairs.items():
        for shift in (0, 27):
            joint = (((one >> shift) & 31) * 32 + ((two >> shift) & 31)).flatten().bincount(minlength=1024)
            assert abs(deviation(joint, torch.full((1024,), int(joint.sum()) / 1024))) < LIMIT, (name, shift)


# -- the law -----------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 1.5, 0.3, 0.0, -1.0, -1.2, -3.0, 1.5])


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9}], ids=str
)
def test_draws_follow_the_processed_distribution(temperature, filters):
    """A shift of 3 % of the mass between two tokens would be found where nothing is filtered."""
    params = SamplingParams(temperature=temperature, seed=77, **filters)
    count = 20_000 if not filters else 2_000
    drawn = Sampler(params).draw(LOGITS.expand(count, -1), range(count))
    law = warped(LOGITS[None], params).softmax(-1)[0]
    assert abs(deviation(torch.tensor(drawn).bincount(minlength=8), law * count)) < LIMIT


NUM_SEEDS, FIRST = 1 << 18, 5  # requests, and the position of their first token


@functools.cache
def request_seeds() -> np.ndarray:
    """Half of them neighbours, half of them derived from one run's seed, as for the prompts of a batch."""
    plain = np.arange(NUM_SEEDS // 2, dtype=np.uint64)
    derived = mixed(mixed(np.array([1 + 0x9E3779B97F4A7C15], np.uint64)) ^ mixed(plain + 0xBF58476D1CE4E5B9)) >> 1
    assert derived[[0, 77]].tolist() == [derive_seed(1, 0), derive_seed(1, 77)]
    return np.concatenate([plain, derived])


@functools.cache
def request_noise() -> torch.Tensor:
    """``gumbel(seed, [FIRST, FIRST + 1, FIRST + 2], 16)`` of every request: [S, 3, 16]."""
    bits = torch.from_numpy(words(request_seeds(), [FIRST, FIRST + 1, FIRST + 2], [*range(16)]).view(np.int32))
    noise = _to_gumbel(bits, torch.empty(bits.shape))
    for index in (0, 1, NUM_SEEDS - 1):
        assert torch.equal(noise[index], gumbel(int(request_seeds()[index]), range(FIRST, FIRST + 3), 16))
    return noise


def three_tokens(scores: list[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    """What scores [16], [16, 16] and [16, 16, 16], each given the tokens before, draw with noise [S, 3, 16]: [S, 3]."""
    one = (scores[0] + noise[:, 0]).argmax(-1)
    two = (scores[1][one] + noise[:, 1]).argmax(-1)
    return torch.stack([one, two, (scores[2][one, two] + noise[:, 2]).argmax(-1)], -1)


def joint_law(scores: list[torch.Tensor]) -> torch.Tensor:
    """[16, 16, 16] float64: the product of the conditional laws."""
    one, two, three = (table.double().softmax(-1) for table in scores)
    return one[:, None, None] * two[:, :, None] * three


def misfit(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """The largest deviation of tokens [S, 3] from a joint law [16, 16, 16], in standard deviations.

    Of each token, of each pair, of all three, and of the mean log-likelihood, which a wrong temperature moves most.
    """
    logs = law.log().where(law > 0, 0.0)
    mean = float((law * logs).sum())
    spread = math.sqrt(float((law * (logs - mean) ** 2).sum()) / len(tokens))
    found = [abs(float(logs[tuple(tokens.T)].mean()) - mean) / spread]
    for places in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        codes = sum(tokens[:, place] * 16**at for at, place in enumerate(reversed(places)))
        margin = law.sum([place for place in range(3) if place not in places]) if len(places) < 3 else law
        found.append(abs(deviation(codes.bincount(minlength=margin.numel()), margin.flatten() * len(tokens))))
    return max(found)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.85}, {"top_k": 8, "top_p": 0.9}], ids=str)
def test_three_tokens_follow_the_joint_law(temperature, filters):
    """All 4096 sequences of a model over 16 tokens. A temperature 3 % off, or noise used twice, would be found."""
    params = SamplingParams(temperature=temperature, **filters)
    generator = torch.Generator().manual_seed(4)
    model = [torch.randn(*[16] * order, generator=generator) * 1.2 for order in (1, 2, 3)]
    scores = [warped(table.reshape(-1, 16), params).reshape(table.shape) for table in model]
    tokens, law = three_tokens(scores, request_noise()), joint_law(scores)
    for index in range(0, NUM_SEEDS, NUM_SEEDS // 50):  # the sampler itself, alone, on the raw logits
        draws = Sampler(dataclasses.replace(params, seed=int(request_seeds()[index])))
        one, two, three = tokens[index].tolist()
        rows = torch.stack([model[0], model[1][one], model[2][one, two]])
        assert draws.draw(rows, range(FIRST, FIRST + 3)) == [one, two, three]
    assert misfit(tokens, law) < LIMIT
    assert misfit(tokens, joint_law([table / 1.03 for table in scores])) > 1.5 * LIMIT
    assert misfit(three_tokens(scores, request_noise()[:, [0, 1, 1]]), law) > 10 * LIMIT


def test_noise_does_not_correlate_across_positions_or_seeds():
    run = gumbel(21, range(1 << 12), 64)
    noise = request_noise()[: NUM_SEEDS // 2]
    for lag in (*range(1, 17), 32, 64, 256, 1024):
        assert abs(correlation(run[:-lag], run[lag:])) < LIMIT, f"positions {lag} apart"
        assert abs(correlation(noise[:-lag], noise[lag:])) < LIMIT, f"seeds {lag} apart"
        assert abs(correlation(noise[:-lag, 1:], noise[lag:, :-1])) < LIMIT, f"seeds {lag} up, a position down"
    assert abs(correlation(request_noise()[: NUM_SEEDS // 2], request_noise()[NUM_SEEDS // 2 :])) < LIMIT
    assert correlation(run[:-1], run[:-1] + 10 * run[1:]) > 10 * LIMIT  # a tenth of it shared would be found


def test_draws_do_not_depend_on_earlier_draws():
    """Tokens some steps apart in one long run, whose law is the same at every position."""
    count = 1 << 15
    drawn = torch.tensor(sampler(temperature=1.0, seed=6).draw(LOGITS.expand(count, -1), range(count)))
    law = LOGITS.double().softmax(-1)
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16, 64):
        pairs = (drawn[:-lag] * 8 + drawn[lag:]).bincount(minlength=64)
        assert abs(deviation(pairs, (law[:, None] * law).flatten() * (count - lag))) < LIMIT, lag


@settings(deadline=None, max_examples=120, derandomize=True)
@given(data=st.data())
def test_every_draw_is_transformers_scores_plus_noise(data):
    """Token for token, bfloat16 included: narrowing a row changes nothing."""
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([1e-4, 0.3, 0.7, 1.0, 1.5, 50.0])),
        top_k=data.draw(st.sampled_from([0, 0, 1, 2, 7, 40, 5000])),
        top_p=data.draw(st.sampled_from([1.0, 1e-6, 0.3, 0.9, 0.999])),
        min_p=data.draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])),
        seed=data.draw(st.integers(-10, 10)),
    )
    size, scale = (
        data.draw(st.sampled_from([1, 2, 5, 64, 999])),
        data.draw(st.sampled_from([0.0, 0.1, 3.0, 30.0])),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(3, size, generator=generator) * scale
    if data.draw(st.booleans()):
        logits = logits.bfloat16()
    if data.draw(st.booleans()) and size > 2:
        logits[:, 0] = -INF
    before = logits.clone()
    drawn, scores = Sampler(params).draw(logits, [4, 5, 6]), warped(logits, params)
    expected = (scores + gumbel(params.seed, [4, 5, 6], size)).max(-1).indices.tolist()
    for row, found, wanted in zip(logits.float(), drawn, expected, strict=True):
        if params.top_p < 1 and len(row.unique()) < size:  # which of equals top-p keeps is its sort's whim
            law = warped(row[None], dataclasses.replace(params, top_p=1.0, min_p=0.0)).softmax(-1)[0]
            assert law[found] > 0
            assert law[row > row[found]].sum() < params.top_p + 1e-5
        else:
            assert found == wanted
    assert torch.equal(before, logits)


def test_a_draft_with_the_same_noise_foresees_the_target():
    """Two models 0.5 logits apart agree far more often than the independent draws of a lucky draft would."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(400, 500, generator=generator) * 2
    draft = target + 0.5 * torch.randn(400, 500, generator=generator)
    one, two = (sampler(temperature=1.0, seed=8).draw(logits, range(400)) for logits in (target, draft))
    agreement = sum(a == b for a, b in zip(one, two, strict=True)) / 400
    chance = float((target.softmax(-1) * draft.softmax(-1)).sum(-1).mean())
    assert agreement > 0.55
    assert agreement > 5 * chance


# -- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
def test_a_row_draws_the_same_in_any_company(params):
    logits = torch.randn(6, 5, 300, generator=torch.Generator().manual_seed(2)) * 3
    samplers = [sampler(seed=row, **params) for row in range(6)]
    positions = [list(range(10 * row, 10 * row + 1 + row % 5)) for row in range(6)]
    together = draw_rows(samplers, logits, positions)
    assert [len(drawn) for drawn in together] == [len(wanted) for wanted in positions]
    for row, drawn in enumerate(together):
        alone = [samplers[row].draw(logits[row, t : t + 1], [position])[0] for t, position in enumerate(positions[row])]
        assert drawn == alone
    order = [3, 0, 5]
    assert draw_rows([samplers[r] for r in order], logits[order], [positions[r] for r in order]) == [
        together[r] for r in order
    ]


def test_greedy_and_sampled_rows_share_a_batch():
    logits = torch.randn(4, 2, 50, generator=torch.Generator().manual_seed(3))
    samplers = [
        sampler(),
        sampler(temperature=1.0, seed=4),
        sampler(temperature=1e-9),
        sampler(temperature=1.0),
    ]
    drawn = draw_rows(samplers, logits, [[1, 2]] * 4)
    assert [drawn[0], drawn[2]] == logits[[0, 2]].argmax(-1).tolist()
    assert drawn[1] == samplers[1].draw(logits[1], [1, 2])
    assert draw_rows([], logits[:0], []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_ties_go_to_the_lowest_id(dtype):
    logits = torch.zeros(3, 40_000, dtype=dtype)
    logits[0, [17, 30_000]] = 2
    logits[1, [39_999, 5]] = 2
    assert sampler().draw(logits, [0, 1, 2]) == [17, 5, 0]
    assert draw_rows([sampler()], logits[None], [[0, 1, 2]]) == [[17, 5, 0]]


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_ids_from_the_limit_on_are_never_drawn(params):
    logits = torch.zeros(1, 64, 40)
    logits[..., 30:] = 50
    logits[..., 33] = NAN  # padding of an embedding may hold anything
    drawn = draw_rows([sampler(**params)], logits, [range(64)], limit=30)[0]
    assert max(drawn) < 30
    assert drawn == draw_rows([sampler(**params)], logits[..., :30], [range(64)], limit=99)[0]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1e-5},
        {"temperature": 0.5, "top_k": 3, "min_p": 0.1},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 19, "top_p": 0.999},
    ],
    ids=str,
)
def test_banned_tokens_are_never_drawn(params):
    logits = torch.full((50, 20), -INF)
    logits[:, 7] = -1e30
    assert set(sampler(**params).draw(logits, range(50))) == {7}
    logits[:, [3, 11]] = -1e30
    assert set(sampler(**params).draw(logits, range(50))) <= {3, 7, 11}


def test_tiny_temperatures_and_filters_draw_the_likeliest():
    """What the likeliest token leads by, 0.1 here, is worth more than any noise at these temperatures."""
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(5)) * 3
    best = logits.argmax(-1)
    logits[range(40), best] += 0.1
    filters = [{}, {"top_p": 0.3}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}]
    tiny = [{"temperature": value, **other} for value in (0, 5e-324, 9.9e-6, 1e-5, 1e-3) for other in filters]
    alone = [{"top_p": 5e-324}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}]
    for params in (*tiny, *({"temperature": 1.5, **one} for one in alone)):
        assert sampler(seed=3, **params).draw(logits, range(40)) == best.tolist(), params
        assert sampler(seed=3, **params).draw(logits * 1e3, range(40)) == best.tolist(), params


def test_filters_that_remove_nothing_change_nothing():
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(6))
    plain = sampler(temperature=1.2, seed=3).draw(logits, range(40))
    for off in ({"top_p": 1.0}, {"top_p": 1 - 2**-53}, {"top_k": 300}, {"top_k": 10**9}, {"min_p": 1e-12}):
        assert sampler(temperature=1.2, seed=3, **off).draw(logits, range(40)) == plain, off


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_logits_that_are_no_numbers_are_refused(params, bad):
    logits = torch.zeros(2, 3, 10)
    logits[1, 1, 4] = bad
    rows = [sampler(**params), sampler(**params)]
    with pytest.raises(NumericError, match=r"for position 41 is (nan|inf): expected a finite number.*--dtype float32"):
        draw_rows(rows, logits, [[7, 8, 9], [40, 41, 42]])
    with pytest.raises(NumericError, match="position 41"):
        rows[1].draw(logits[1], [40, 41, 42])
    assert len(draw_rows(rows, logits, [[7, 8, 9], [40]])[1]) == 1  # what nobody asked for is not checked
    logits[1, 1] = -INF
    with pytest.raises(NumericError, match="position 41 is -inf"):
        draw_rows(rows, logits, [[7, 8, 9], [40, 41, 42]])


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_position_that_is_no_number_draws_no_token_and_all_others_what_they_would(params, bad):
    logits = torch.randn(3, 3, 10, generator=torch.Generator().manual_seed(1))
    rows, positions = [sampler(**params) for _ in range(3)], [[7, 8, 9], [40, 41, 42], [3]]
    plain = draw_rows(rows, logits, positions)
    logits[1, 1, 4] = bad
    errors = {}
    drawn = draw_rows(rows, logits, positions, errors=errors)
    assert drawn == [plain[0], [plain[1][0], NO_TOKEN, plain[1][2]], plain[2]]
    assert list(errors) == [(1, 1)]
    assert "position 41" in str(errors[1, 1])


def test_seeds_of_prompts_differ():
    seeds = [derive_seed(run, index) for run in (0, 1, 2, -1) for index in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert all(abs(a - b) > 1 << 30 for a, b in pairwise(seeds))
    assert derive_seed(7, 0) != 7
