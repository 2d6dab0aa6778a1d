"""The law is right: over a vocabulary of 16, three tokens of the whole engine are distributed as the target says.

The law is computed exactly, by transformers alone: its logits after all 16 x 16 beginnings, its warpers. The engine
then answers one request per seed. With ``NUM_SAMPLES`` of them a G-test must not reject that law, and must reject its
neighbours at the same size: filters in the wrong order, a temperature 5 % off, and the draft's law.
"""

import asyncio
import itertools

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import derive_seed
from tests import tiny

VOCAB, PROMPT = 16, [3, 5, 9]
NUM_SAMPLES, TOGETHER = 4096, 256
TEMPERATURE, TOP_K, TOP_P = 0.8, 6, 0.9
FITS, DIFFERS = 1e-3, 1e-6
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("law")
    target = tiny.build(folder / "target", "llama", seed=1, varied=True, sizes=SIZES)
    return target, tiny.noisy_copy(target, folder / "draft", 0.4)


def warpers(temperature=TEMPERATURE, order=("top_k", "top_p")):
    filters = {"top_k": TopKLogitsWarper(TOP_K), "top_p": TopPLogitsWarper(TOP_P)}
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), *(filters[name] for name in order)])


@torch.no_grad()
def joint_law(folder, warp):
    """[16, 16, 16] float64: the product of the conditional laws, by enumeration."""
    beginnings = [[*PROMPT, *two] for two in itertools.product(range(VOCAB), repeat=2)]
    logits = tiny.reference(folder)(torch.tensor(beginnings)).logits[:, -3:]
    after = warp(None, logits.reshape(-1, VOCAB)).double().softmax(-1).reshape(VOCAB, VOCAB, 3, VOCAB)
    return after[0, 0, 0][:, None, None] * after[:, 0, 1][:, :, None] * after[:, :, 2]


def likelihood(counts, law):
    """The p-value of a G-test of counts against a law; cells that expect fewer than 5 are one cell."""
    counts, expected = counts.flatten().double(), law.flatten() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts, expected = (torch.cat([cells[~rare], cells[rare].sum()[None]]) for cells in (counts, expected))
    deviance = 2 * float((counts * (counts / expected).log())[counts > 0].sum())
    freedom = int((expected > 0).sum()) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(deviance / 2)))


@pytest.fixture(scope="module")
def laws(pair):
    """The right one, and those that the same number of samples must tell from it."""
    target, draft = pair
    return {
        "right": joint_law(target, warpers()),
        "filters in the wrong order": joint_law(target, warpers(order=("top_p", "top_k"))),
        "5 % hotter": joint_law(target, warpers(TEMPERATURE * 1.05)),
        "5 % colder": joint_law(target, warpers(TEMPERATURE / 1.05)),
        "the draft's": joint_law(draft, warpers()),
    }


async def draw(pair, speculation, num_draft_tokens):
    """Counts [16, 16, 16] of the first three tokens of every request, and their statistics.

    A fourth token is wanted, or proposals would end with the second: a path leaves room for the target's own token.
    """
    law = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}

    async def one(engine, index):
        params = SamplingParams(max_new_tokens=4, ignore_eos=True, seed=derive_seed(num_draft_tokens, index), **law)
        pieces = [piece async for piece in engine.stream(PROMPT, params)]
        return [token for piece in pieces for token in piece.token_ids], pieces[-1].stats

    shape = {"speculation": speculation, "num_draft_tokens": num_draft_tokens, "max_batch": TOGETHER}
    room = {"device_memory": 1 << 28, "max_context": 64, "prefill_tokens": TOGETHER * len(PROMPT)}
    async with open_engine(target=pair[0], draft=pair[1], exact=False, threads=1, **shape, **room) as engine:
        found = await asyncio.gather(*(one(engine, index) for index in range(NUM_SAMPLES)))
    codes = torch.tensor([tokens[:3] for tokens, _ in found]) @ torch.tensor([VOCAB**2, VOCAB, 1])
    return codes.bincount(minlength=VOCAB**3).reshape(VOCAB, VOCAB, VOCAB), [stats for _, stats in found]


@pytest.mark.parametrize(
    ("speculation", "num_draft_tokens"), [pytest.param("chain", 2, marks=pytest.mark.slow), ("tree", 4)]
)
async def test_three_tokens_follow_the_targets_law(pair, laws, speculation, num_draft_tokens):
    counts, stats = await draw(pair, speculation, num_draft_tokens)
    accepted, proposed = sum(s.accepted for s in stats), sum(s.proposed for s in stats)
    assert NUM_SAMPLES / 2 < accepted < proposed - NUM_SAMPLES / 2, "many were taken, and many were not"
    found = {name: likelihood(counts, law) for name, law in laws.items()}
    assert found.pop("right") > FITS
    assert max(found.values()) < DIFFERS, found
