"""Same seed, same tokens: whatever proposes and how much, in whatever company, order and memory, in bf16 and fp32.

An example is a random small model, a noisy copy of it as its draft, and five random requests. What they are given by
the engine without speculation, one after another, is what every other way of running it must give: bit-exact steps
are the default, so there is no tolerance for near ties.
"""

import asyncio
import dataclasses
import itertools
import random
import re
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from aspec.engine.design import design
from aspec.engine.engine import open_engine
from aspec.errors import BudgetError
from aspec.generation.params import SamplingParams
from aspec.options import EngineOptions
from aspec.planning.resolve import resolve
from aspec.speculation.proposal import ROOT
from tests import tiny
from tests.test_tree import grow, place_path

NUM_ROWS, LONGEST = 5, 80
ROOMY = 24 << 20  # bytes
TEMPERATURES = (0.0, 0.6, 1.0)
LENIENT = {"repetition_penalty": 0.5, "frequency_penalty": -1.0}  # text that repeats itself: what a lookup lives on
STRICT = {"presence_penalty": 0.8, "frequency_penalty": 0.4}
PENALTIES = ({}, {}, {"repetition_penalty": 1.3}, STRICT, LENIENT, LENIENT)
PROCESSED = {"bad_words_ids": [[7, 8], [9, 10]], "suppress_tokens": range(20, 60)}
BIASED = {"sequence_bias": [[[5, 6], 3.0]], "logit_bias": {9: -2.5}, "typical_p": 0.8, "no_repeat_ngram_size": 9}
PROCESSORS = ({}, {}, {}, PROCESSED, BIASED)
UNSIZED = {"llama4_text", "gemma3n_text", "gemma4_text"}  # a list of their configuration has a length of its own
UNSIZED |= {"granitemoehybrid"}  # of other sizes it has recurrent layers
FAMILIES = sorted(set(tiny.FAMILIES) - UNSIZED)
RECURRENT = ("falcon_h1", "jamba", "lfm2", "qwen3_5_text")  # their attention never runs apart from their layers
SIGMAS = (0.02, 0.05, 0.1, 0.2)
DTYPES = (torch.float32, torch.bfloat16)
METHODS = ("off", "chain", "tree", "ngram")


def examples(count):
    """Some tens of seeds, always the same; an example takes seconds, so a failing one is not shrunk."""
    return settings(derandomize=True, deadline=None, max_examples=count, phases=(Phase.explicit, Phase.generate))


# -- examples ----------------------------------------------------------------------------------------------


def random_sizes(dice):
    heads = dice.choice((2, 4))
    return {
        "num_hidden_layers": dice.randint(1, 4),
        "hidden_size": 16 * heads,
        "intermediate_size": dice.choice((40, 96, 136)),
        "num_attention_heads": heads,
        "vocab_size": dice.choice((256, 300)),
    }


def random_prompt(dice):
    length = dice.choice((1, dice.randint(2, 20), dice.randint(20, LONGEST)))
    period = dice.choice((length, 3, 7))
    tokens = [dice.randrange(3, 256) for _ in range(min(period, length))]
    return list(itertools.islice(itertools.cycle(tokens), length))


def random_params(dice, temperature):
    return SamplingParams(
        max_new_tokens=dice.choice((1, 8, 16, 20)),
        temperature=temperature,
        top_k=dice.choice((0, 0, 3, 30)),
        top_p=dice.choice((1.0, 1.0, 0.8, 0.95)),
        min_p=dice.choice((0.0, 0.0, 0.05)),
        seed=(seed := dice.randrange(-(1 << 63), 1 << 64)),
        ignore_eos=dice.random() < 0.3,
        logprobs=0,  # of raw logits: what all of them are shows, to the last bit
        **dice.choice(PENALTIES),
        **PROCESSORS[seed % len(PROCESSORS)],
    )


class Example:
    """A pair, requests, and the engines that serve them."""

    def __init__(self, folder, seed, dtype, families=FAMILIES):
        self.dice = dice = random.Random(f"{seed} {dtype}")
        self.places = random.Random(f"where attention runs {seed} {dtype}")
        self.family, sizes = dice.choice(families), random_sizes(dice)
        stored = {"dtype": dtype, "seed": dice.randrange(100), "varied": True, "sizes": sizes}
        self.target = tiny.build(folder / "target", self.family, **stored)
        self.draft = tiny.noisy_copy(self.target, folder / "draft", dice.choice(SIGMAS))
        self.common = {"target": self.target, "threads": 1, "max_context": dice.choice((LONGEST + 6, 128))}
        self.prompts = [random_prompt(dice) for _ in range(NUM_ROWS)]
        first = dice.randrange(len(TEMPERATURES))
        temperatures = (TEMPERATURES[(first + row) % len(TEMPERATURES)] for row in range(NUM_ROWS))
        self.params = [random_params(dice, temperature) for temperature in temperatures]
        self.params[0] = dataclasses.replace(self.params[0], max_new_tokens=20, ignore_eos=True, **LENIENT)

    def free(self):
        """The same requests with nothing that could end them early."""
        return [dataclasses.replace(params, ignore_eos=True) for params in self.params]

    def choose_ends(self, said):
        """End ids and stop strings out of what is said without them, so that some row really meets them."""
        dice, tokens = self.dice, [token for row_tokens, _, _ in said for token, _ in row_tokens[5:]]
        ends = dice.sample(tokens, min(2, len(tokens)))
        (self.target / "generation_config.json").write_text(f'{{"eos_token_id": {[2, *ends]}}}')
        for row, (_, text, _) in list(enumerate(said))[1:]:
            if len(text) > 4 and dice.random() < 0.5:
                at = dice.randrange(2, len(text) - 1)
                self.params[row] = dataclasses.replace(self.params[row], stop=(text[at : at + 2], "never said"))

    def random_options(self, method):
        """A random way to run it: how much is proposed, who shares a pass, what is held."""
        dice = self.dice
        options = {
            **self.common,
            "draft": {"ngram": "ngram", "off": None}.get(method, self.draft),
            "speculation": "auto" if method == "ngram" else method,
            "num_draft_tokens": dice.choice((1, 3, 5, 8, None) if method == "chain" else (1, 4, 9, 30, None)),
            "draft_depth": dice.choice((None, None, 1, 3)),
            "shared_noise": dice.random() < 0.8,
            "attention": "device" if self.family in RECURRENT else self.places.choice(("device", "cpu")),
            "max_batch": dice.choice((1, 2, NUM_ROWS, NUM_ROWS)),
            "prefill_tokens": dice.choice((5, 16, 200)),
            "resident_memory": dice.choice((None, 0, 30_000)),
        }
        tight = dice.random() < 0.6
        return options | {"device_memory": least_memory(options) * dice.choice((4, 5)) // 4 if tight else ROOMY}


def least_memory(options):
    """About the smallest budget that is not refused; a refusal names what its parts would need."""
    budget = 1
    while True:
        try:
            design(resolve(EngineOptions(**options, device_memory=budget)))
        except BudgetError as refusal:
            number, unit = re.search(r"= ([0-9.]+) (KiB|MiB)", str(refusal)).groups()
            budget = max(budget * 5 // 4, int(float(number) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit]))
        else:
            return budget


async def say(engine, prompt, params):
    """One request's tokens with their logprobs, text and finish reason, and its statistics."""
    pieces = [piece async for piece in engine.stream(prompt, params)]
    tokens = [(one.token, one.logprob) for piece in pieces for one in piece.logprobs]
    return (tokens, "".join(piece.text for piece in pieces), pieces[-1].finish_reason), pieces[-1].stats


def run(example, params, options, order=range(NUM_ROWS)):
    """What an engine gives each request, which arrive in some order; its plan and how much was proposed and taken."""

    async def main():
        async with open_engine(**options) as engine:
            return engine.plan, await asyncio.gather(*(say(engine, example.prompts[row], params[row]) for row in order))

    plan, found = asyncio.run(main())
    by_row = [said for _, (said, _) in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
    stats = [stats for _, stats in found]
    return by_row, plan, (sum(s.proposed for s in stats), sum(s.accepted for s in stats))


def check_example(example, seen):
    """``seen`` counts what happened, so that a test can tell that it proved something."""
    plain_options = {**example.random_options("off"), "device_memory": ROOMY, "max_batch": 1}
    whole, _, _ = run(example, example.free(), {**plain_options, "max_batch": NUM_ROWS})
    example.choose_ends(whole)
    expected, _, _ = run(example, example.params, plain_options)
    for row, ((said, text, reason), (all_said, all_text, _)) in enumerate(zip(expected, whole, strict=True)):
        assert said == all_said[: len(said)], f"row {row}: company or an end has changed what comes before it"
        assert all_text.startswith(text.rstrip("\ufffd"))
        seen[reason] += 1
        seen["tokens"] += len(set(said))
    for method in METHODS:
        options = example.random_options(method)
        order = example.dice.sample(range(NUM_ROWS), NUM_ROWS)
        found, plan, (proposed, accepted) = run(example, example.params, options, order)
        assert found == expected, f"{example.family} {method} {options} {order}"
        seen[method, "proposed"] += proposed
        seen[method, "accepted"] += accepted
        seen["slots", plan.num_slots] += 1
        seen["batch", options["max_batch"]] += 1
        seen["attention", options["attention"]] += 1


def check_that_it_proves_something(seen):
    for method in ("chain", "tree", "ngram"):
        assert 0 < seen[method, "accepted"] < seen[method, "proposed"], f"{method}: {seen}"
    assert seen["off", "proposed"] == 0
    assert seen["stop"] > 0 < seen["length"]
    assert len([key for key in seen if key[0] == "slots"]) > 2
    assert len([key for key in seen if key[0] == "batch"]) > 1


def check_examples(count, dtype, tmp_path, families=FAMILIES):
    seen = Counter()

    @examples(count)
    @given(seed=st.integers(0, 1 << 30))
    def every_way_says_the_same(seed):
        check_example(Example(tmp_path / f"{seed}", seed, dtype, families), seen)

    every_way_says_the_same()
    check_that_it_proves_something(seen)
    return seen


def test_random_requests_to_random_models(tmp_path):
    seen = check_examples(3, torch.bfloat16, tmp_path)
    assert seen["attention", "cpu"] > 0 < seen["attention", "device"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_many_random_requests_to_random_models(dtype, tmp_path):
    seen = check_examples(6, dtype, tmp_path)
    assert seen["attention", "cpu"] > 0 < seen["attention", "device"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_random_requests_to_random_recurrent_models(dtype, tmp_path):
    check_examples(5, dtype, tmp_path, RECURRENT)


# -- trees -------------------------------------------------------------------------------------------------


class Words:
    """A draft and a target as fixed random functions of what comes before; they agree on some prefixes."""

    def __init__(self, dice, vocab, agreement):
        self.seed, self.vocab, self.agreement = dice.random(), vocab, agreement

    def scores(self, prefix):
        """The draft's log softmax of random logits."""
        generator = torch.Generator().manual_seed(random.Random(f"draft {self.seed} {prefix}").getrandbits(60))
        return torch.randn(self.vocab, generator=generator).mul(2).log_softmax(-1).tolist()

    def token(self, prefix):
        """What the target says."""
        source = random.Random(f"target {self.seed} {prefix}")
        scores = self.scores(prefix)
        return scores.index(max(scores)) if source.random() < self.agreement else source.randrange(self.vocab)


def decode(words, length, ends):
    said = []
    while len(said) < length and not (said and said[-1] in ends):
        said.append(words.token(tuple(said)))
    return said


def random_proposal(dice, words, prefix, ends):
    """Any tree at all: grown to random limits, with branches of a lookup beside it, then cut."""
    limits = {"beams": dice.randint(1, 6), "width": dice.randint(1, 9), "max_depth": dice.randint(1, 5)}
    tree = grow(lambda path: words.scores(prefix + path), dice.randint(0, 40), end_ids=ends, **limits)
    for _ in range(dice.choice((0, 0, 2))):
        branch = [dice.randrange(words.vocab) for _ in range(dice.randint(1, 6))]
        tree.add_branch(branch, [-dice.random() for _ in branch])
    tree.prune(dice.randint(0, 40))
    return tree.proposal().first(dice.randint(0, 40))


def decode_with_trees(dice, words, length, ends, seen):
    said = []
    while len(said) < length and not (said and said[-1] in ends):
        prefix = tuple(said)
        proposal = random_proposal(dice, words, prefix, ends)
        places = range(ROOT, len(proposal.tokens))
        path, emitted = proposal.follow([words.token(prefix + place_path(proposal, place)) for place in places])
        assert [proposal.tokens[place] for place in path] == emitted[:-1]
        assert not ends & set(emitted[:-1]), "nothing is said behind an end"
        said += emitted
        seen["accepted"] += len(path)
        seen["refused"] += len(path) < max(proposal.depths, default=0)
    return said[:length]


@pytest.mark.compat
def test_a_tree_says_what_decoding_one_by_one_says():
    """Whatever the budget, depth, width, beams, branches and end ids: a tree decides how much is said, never what."""
    seen = Counter()

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(seed=st.integers(0, 1 << 30))
    def trees_say_the_same(seed):
        dice = random.Random(seed)
        words = Words(dice, dice.randint(1, 9), dice.choice((0.0, 0.5, 0.9, 1.0)))
        ends = frozenset(dice.sample(range(words.vocab), dice.choice((0, 0, 1, min(2, words.vocab)))))
        expected = decode(words, 12, ends)
        assert decode_with_trees(dice, words, 12, ends, seen) == expected
        seen["ended"] += expected[-1] in ends

    trees_say_the_same()
    assert seen["accepted"] > 100 < seen["refused"]
    assert seen["ended"] > 10
