"""A position is penalised by its own path alone, as if the path were committed; logprobs are the model's own."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from aspec.errors import InternalError, NumericError
from aspec.generation.params import SamplingParams
from aspec.generation.penalties import Context, Penalties, TokenCounts, proposal_paths
from aspec.generation.sampler import Sampler, TokenLogprob, draw_rows, gumbel, token_logprobs
from tests.test_sampling import warped

INF = float("inf")
ALL = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4}
EACH = [{name: value} for name, value in ALL.items()] + [{"repetition_penalty": 1.8, "frequency_penalty": -0.3}, ALL]


def noisy(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def counted(params: SamplingParams, prompt, generated=()) -> TokenCounts:
    counts = TokenCounts.of(params, prompt)
    assert counts is not None
    counts.commit(generated)
    return counts


def expected(row: torch.Tensor, prompt: list[int], generated: list[int], params: SamplingParams) -> torch.Tensor:
    """One position [V] by the two definitions, token by token over everything that leads to it."""
    ids = torch.tensor([[token for token in (*prompt, *generated) if token < len(row)]], dtype=torch.int64)
    scores = row[None].float()
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))(ids, scores)
    scores = scores[0].clone()
    for token, count in Counter(generated).items():
        if token < len(row):
            number = torch.tensor(float(count))
            scores[token] -= number * params.frequency_penalty + torch.tensor(1.0) * params.presence_penalty
    return scores


# -- penalties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.5, 0.9, 1.05, 1.3, 7])
def test_repetition_is_that_of_transformers(penalty):
    """To the bit; the prompt counts, and a token counts once however often it appeared."""
    params = SamplingParams(repetition_penalty=penalty)
    prompt, generated, proposals = [3, 3, 40, 9], [11, 9, 11], [11, 60, 3, 60]
    logits = noisy(5, 64)
    scores = logits.clone()
    Penalties.of(params).apply(scores, Context(counted(params, prompt, generated), proposal_paths(proposals)))
    processor = RepetitionPenaltyLogitsProcessor(float(penalty))
    for length, (row, found) in enumerate(zip(logits, scores, strict=True)):
        ids = torch.tensor([prompt + generated + proposals[:length]])
        assert torch.equal(processor(ids, row[None])[0], found)


def test_presence_and_frequency_leave_the_prompt_alone():
    """OpenAI's definition, worked by hand: values that binary fractions hold."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    scores = torch.zeros(2, 6)
    context = Context(counted(params, [0, 0, 1], [1, 2, 2]), [(), (2, 4, 4, 4)])
    Penalties.of(params).apply(scores, context)
    assert scores.tolist() == [[0, -0.75, -1.0, 0, 0, 0], [0, -0.75, -1.25, 0, -1.25, 0]]
    rewarded = torch.zeros(1, 3)
    params = SamplingParams(presence_penalty=-2, frequency_penalty=-1)
    Penalties.of(params).apply(rewarded, Context(counted(params, [2], [0, 0])))
    assert rewarded.tolist() == [[4, 0, 0]]


def test_repetition_comes_first():
    params = SamplingParams(repetition_penalty=2, presence_penalty=1)
    scores = torch.tensor([[4.0, -4.0, 0.5]])
    Penalties.of(params).apply(scores, Context(counted(params, [], [0, 1, 2])))
    assert scores.tolist() == [[1.0, -9.0, -0.75]]


@settings(deadline=None, max_examples=80, derandomize=True)
@given(data=st.data())
def test_a_position_is_penalised_as_if_its_path_were_committed(data):
    """Any tree: what other branches hold, how many positions there are and their order change no bit."""
    params = SamplingParams(
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.1, 0.8])),
        presence_penalty=data.draw(st.sampled_from([0.0, 0.3, -1.1])),
        frequency_penalty=data.draw(st.sampled_from([0.7, -0.2])),
    )
    tokens = st.integers(0, 11)  # some beyond the vocabulary of 10
    prompt, generated = data.draw(st.lists(tokens, max_size=6)), data.draw(st.lists(tokens, max_size=6))
    proposals = data.draw(st.lists(tokens, max_size=8))
    parents = [data.draw(st.integers(-1, at - 1)) for at in range(len(proposals))]
    paths = proposal_paths(proposals, parents)
    logits = noisy(len(paths), 10, seed=data.draw(st.integers(0, 99)))
    scores, penalties = logits.clone(), Penalties.of(params)
    penalties.apply(scores, Context(counted(params, prompt, generated), paths))
    for row, path, found in zip(logits, paths, scores, strict=True):
        alone = row[None].clone()
        penalties.apply(alone, Context(counted(params, prompt, [*generated, *path])))
        assert torch.equal(found, alone[0])
        assert torch.equal(found, expected(row, prompt, [*generated, *path], params))


def test_paths_of_a_chain_and_of_a_tree():
    assert proposal_paths([]) == [()]
    assert proposal_paths([5, 6]) == [(), (5,), (5, 6)]
    assert proposal_paths([5, 6, 5, 7], [-1, -1, 1, 0]) == [(), (5,), (6,), (6, 5), (5, 7)]


def test_counts_grow_with_what_is_committed():
    counts = TokenCounts([7, 7, 300_000])
    counts.commit([9, 7])
    counts.commit([9])
    assert [counts.generated(token) for token in (7, 9, 300_000, 8)] == [1, 2, 0, 0]
    ids, generated = counts.table(1 << 20, torch.device("cpu"))
    assert (ids.tolist(), generated.tolist()) == ([7, 300_000, 9], [1, 0, 2])
    assert counts.table(300_000, torch.device("cpu"))[0].tolist() == [7, 9]
    counts.commit(range(1000))  # tables in use do not keep it from growing
    assert (ids.tolist(), counts.generated(999)) == ([7, 300_000, 9], 1)
    assert TokenCounts.of(SamplingParams(temperature=1.0), [1]) is None


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300])
def test_the_strongest_penalties_stay_finite(penalty):
    params = SamplingParams(temperature=1e-5, repetition_penalty=penalty, presence_penalty=2, frequency_penalty=-2)
    logits = noisy(3, 50) * 30
    logits[:, [1, 4, 7]] = 5
    logits[:, 9] = -INF
    drawn = Sampler(params).draw(logits, [0, 1, 2], context=Context(counted(params, [4], [9, 7]), [(), (1,), (1, 9)]))
    assert 9 not in drawn
    assert all((token in (4, 7, 1)) == (penalty < 1) for token in drawn[1:])


# -- draws -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80, derandomize=True)
@given(data=st.data())
def test_penalties_come_before_the_warpers(data):
    """Token for token what transformers would score, plus the noise; greedy and bfloat16 included."""
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0, 1.5])),
        top_k=data.draw(st.sampled_from([0, 3, 20])),
        top_p=data.draw(st.sampled_from([1.0, 0.7])),
        seed=data.draw(st.integers(0, 9)),
        **data.draw(st.sampled_from(EACH)),
    )
    proposals = data.draw(st.lists(st.integers(0, 63), max_size=4))
    logits = noisy(len(proposals) + 1, 60, seed=data.draw(st.integers(0, 999)))
    if params.top_p == 1 and data.draw(st.booleans()):  # bfloat16 ties: which of equals top-p keeps is its sort's whim
        logits = logits.bfloat16()
    before, positions = logits.clone(), range(7, 8 + len(proposals))
    context = Context(counted(params, [1, 2, 3], [3, 4, 4]), proposal_paths(proposals))
    drawn = Sampler(params).draw(logits, positions, context=context)
    rows = [expected(row, [1, 2, 3], [3, 4, 4, *path], params) for row, path in zip(logits, context.paths, strict=True)]
    scores = torch.stack(rows)
    if params.temperature:
        scores = warped(scores, params) + gumbel(params.seed, positions, 60)
    assert drawn == scores.argmax(-1).tolist()
    assert torch.equal(before, logits)


@pytest.mark.parametrize("own", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
def test_a_penalised_row_draws_the_same_in_any_company(own):
    """Beside rows with and without penalties, greedy or not, and position by position."""
    kinds = [ALL, {}, {"presence_penalty": 1.5}, {}]
    requests = [SamplingParams(seed=row, **own, **kind) for row, kind in enumerate(kinds)]
    samplers, logits = [Sampler(params) for params in requests], noisy(4, 5, 200, seed=2)
    proposals = [[5, 5, 6, 7], [1], [9, 8, 9], []]
    contexts = [
        Context(counts, proposal_paths(chain)) if (counts := TokenCounts.of(params, [1, 5])) else None
        for params, chain in zip(requests, proposals, strict=True)
    ]
    positions = [list(range(2, 3 + len(chain))) for chain in proposals]
    together = draw_rows(samplers, logits, positions, limit=150, contexts=contexts)
    for row, drawn in enumerate(together):
        for at, token in enumerate(drawn):
            context = contexts[row] and Context(contexts[row].counts, [contexts[row].paths[at]])
            assert samplers[row].draw(logits[row, at : at + 1], [positions[row][at]], 150, context) == [token]
    unpenalised = [Sampler(SamplingParams(seed=row, **own)) for row in range(4)]
    plain = draw_rows(unpenalised, logits, positions, limit=150)
    assert [together[1], together[3]] == [plain[1], plain[3]]
    assert draw_rows(unpenalised, logits, positions, 150, contexts) == plain
    assert unpenalised[0].processed(logits, None) is logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_need_to_know_what_leads_to_a_position(temperature):
    params = SamplingParams(temperature=temperature, presence_penalty=1)
    draws, counts = Sampler(params), counted(params, [])
    with pytest.raises(InternalError, match="a path for each of 2 positions, found none"):
        draws.draw(noisy(2, 10), [0, 1])
    with pytest.raises(InternalError, match="a path for each of 2 positions, found 1"):
        draw_rows([draws], noisy(1, 2, 10), [[0, 1]], contexts=[Context(counts)])
    logits = noisy(1, 10)
    logits[0, 3] = float("nan")
    with pytest.raises(NumericError, match="position 8 is nan"):
        draws.draw(logits, [8], context=Context(counts))


def text_with_drafts(params: SamplingParams, propose, length: int = 60) -> list[int]:
    """Generate from a model that knows the last two tokens; ``propose(tokens)`` gives proposals and their parents."""
    model, prompt = noisy(12, 12, 12, seed=8), [3, 1, 3]
    tokens, draws, counts = list(prompt), Sampler(params), counted(params, prompt)
    while len(tokens) < length:
        proposals, parents = propose(tokens)
        paths = proposal_paths(proposals, parents)
        ends = [[*tokens, *path][-2:] for path in paths]
        logits = torch.stack([model[one, two] for one, two in ends])
        drawn = draws.draw(logits, [len(tokens) + len(path) for path in paths], context=Context(counts, paths))
        new = [drawn[0]]
        while tuple(new) in paths:
            new.append(drawn[paths.index(tuple(new))])
        tokens += new
        counts.commit(new)
    return tokens[:length]


@pytest.mark.parametrize("penalties", EACH, ids=str)
@pytest.mark.parametrize("own", [{}, {"temperature": 1.0}, {"temperature": 1.4, "top_p": 0.9}], ids=str)
def test_text_does_not_depend_on_drafts(own, penalties):
    """Not on chains or trees, right or wrong, deep or wide."""
    params = SamplingParams(seed=5, **own, **penalties)
    plain = text_with_drafts(params, lambda tokens: ([], None))
    assert plain != text_with_drafts(SamplingParams(seed=5, **own, frequency_penalty=1e-9), lambda tokens: ([], None))
    dice = random.Random(1)

    def tree(tokens):
        size = dice.randrange(1, 9)
        parents = [dice.randrange(-1, at) for at in range(size)]
        paths, proposals = [list(tokens)], []
        for parent in parents:
            at = len(paths[parent + 1])
            right = plain[at] if at < len(plain) and dice.random() < 0.7 else dice.randrange(12)
            proposals.append(right)
            paths.append([*paths[parent + 1], right])
        return proposals, parents

    assert text_with_drafts(params, tree) == plain
    assert text_with_drafts(params, lambda tokens: (plain[len(tokens) : len(tokens) + 5], None)) == plain
    assert text_with_drafts(params, lambda tokens: ([tokens[-1]] * 3, None)) == plain


# -- logprobs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype):
    logits = noisy(3, 500, seed=1).to(dtype)
    tokens = [4, int(logits[1].argmax()), 499]
    law = logits.double().log_softmax(-1)
    for num_top in (0, 1, 20):
        found = token_logprobs(logits, tokens, num_top)
        assert [one.token for one in found] == tokens
        for row, one in zip(law, found, strict=True):
            assert one.logprob == pytest.approx(float(row[one.token]), abs=2e-6)
            assert len(one.top) == num_top
            assert [value for _, value in one.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=2e-6)
            assert all(value == pytest.approx(float(row[token]), abs=2e-6) for token, value in one.top)
    assert found[1].top[0] == (tokens[1], found[1].logprob)
    assert token_logprobs(logits[:0], [], 5) == []


def test_of_equal_tokens_the_lowest_id_comes_first():
    logits = torch.zeros(1, 3000, dtype=torch.bfloat16)
    logits[0, [2000, 1500]] = 1
    (found,) = token_logprobs(logits, [77], 4)
    assert [token for token, _ in found.top] == [1500, 2000, 0, 1]
    assert found.logprob == found.top[2][1]


def test_banned_tokens_are_not_among_the_likeliest():
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0]])
    half = pytest.approx(-0.6931472)
    assert token_logprobs(logits, [3], 20) == [TokenLogprob(3, half, ((1, half), (3, half)))]
    assert len(token_logprobs(torch.zeros(1, 4), [0], 20)[0].top) == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_logprobs_do_not_depend_on_company(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits = noisy(7, 70_001, seed=3)
        tokens = logits.argmin(-1).tolist()
        together = token_logprobs(logits, tokens, 3)
        alone = [token_logprobs(logits[row : row + 1].clone(), [tokens[row]], 3)[0] for row in range(7)]
        assert together == alone
    finally:
        torch.set_num_threads(before)
