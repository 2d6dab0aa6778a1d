"""Constrained text: masks of every path, against a matcher that reads the path anew; engines of every method."""

import asyncio
import functools
import json
import random
import sys
from dataclasses import replace

import llguidance
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor

from aspec.api import collect
from aspec.engine.engine import open_engine
from aspec.errors import NoTokenError, PromptError
from aspec.generation.grammar import compiler
from aspec.generation.grammar.compiler import Grammars, check_grammar
from aspec.generation.grammar.grammar import ANY_OBJECT, Grammar
from aspec.generation.params import SamplingParams
from aspec.generation.penalties import Context
from aspec.generation.processors import Processors
from aspec.generation.sampler import Sampler
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.generation.text.tokenizer import TextStream, Tokenizer
from aspec.options import DEMO
from aspec.speculation.ngram_drafter import NgramDrafter
from aspec.tasks.task import TreeLevel, WorkItem

NESTED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["é", "naïve", "日本", "🎉"]},
        "inner": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "inner"],
    "additionalProperties": False,
}
SCHEMA = Grammar("json_schema", json.dumps(NESTED))
WORD = Grammar("regex", "(ab|日本)+")
CALLS = Grammar("lark", 'start: "<" /[a-z]+/ ">" %json {"type": "boolean"}')
GRAMMARS = (SCHEMA, ANY_OBJECT, WORD, CALLS)
VOCAB, END = 4096 + 5, 0  # the model's, padded: no multiple of 8


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEMO / "target")


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB, [END])


@functools.cache
def vocabulary(tokenizer, vocab):
    return llguidance.LLTokenizer(tokenizer.as_json(), vocab, [END])


def fresh_mask(grammar, tokenizer, tokens, vocab=VOCAB):
    """The allowed tokens after some tokens, by a matcher of its own; None if it does not take them."""
    matcher = llguidance.LLMatcher(vocabulary(tokenizer, vocab), compiler._source(grammar))
    if matcher.try_consume_tokens(list(tokens)) < len(tokens):
        return None
    return np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")).tolist()


def allowed(masks, generated, paths, vocab=VOCAB):
    bits = np.unpackbits(masks.masks(generated, paths).numpy(), axis=1, bitorder="little")[:, :vocab]
    return [np.flatnonzero(row).tolist() for row in bits]


# -- masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.form)
def test_masks_of_a_tree_are_those_of_each_path(grammar, grammars, tokenizer):
    """A text grows as a decoder's does; before each step random paths are asked for, some of them not allowed."""
    dice, masks, generated = random.Random(3), grammars.masks(grammar), []
    for _ in range(5):
        paths = [()]
        for _ in range(6):
            path = dice.choice(paths)
            choices = fresh_mask(grammar, tokenizer, generated + list(path)) or [dice.randrange(VOCAB)]
            token = dice.choice([one for one in choices if one != END] or [7]) if dice.random() < 0.9 else 7
            paths.append((*path, token))
        dice.shuffle(paths)
        asked = paths[:3], paths  # a draft asks first, for a part of them
        for some in asked:
            expected = [fresh_mask(grammar, tokenizer, generated + list(path)) for path in some]
            expected = [list(range(VOCAB)) if one is None else one for one in expected]
            assert allowed(masks, generated, some) == expected
        for path in paths:
            fine = next(n for n in range(len(path), -1, -1) if fresh_mask(grammar, tokenizer, [*generated, *path[:n]]))
            assert masks.num_allowed(generated, path) == fine
        taken = max(paths, key=lambda path: masks.num_allowed(generated, path))
        generated += taken[: masks.num_allowed(generated, taken)]


@pytest.mark.parametrize("grammar", [SCHEMA, ANY_OBJECT])
def test_between_the_parts_of_a_json_text_there_is_little(grammar, tokenizer):
    """Else a weak model spends all its tokens there."""
    for gap, fits in (("", True), ("  ", True), ("\n", True), ("\n        ", True), ("\n\n", False), (" " * 5, False)):
        tokens = tokenizer.encode(f'{{{gap}"name"{gap}:{gap}"a"')
        assert (fresh_mask(grammar, tokenizer, tokens) is not None) == fits, repr(gap)


def test_masks_of_a_path_that_ended_allow_all(grammars, tokenizer):
    masks, done = grammars.masks(WORD), tokenizer.encode("ab")
    assert END in allowed(masks, [], [tuple(done)])[0]
    assert allowed(masks, [], [(*done, END), (*done, END, 7)]) == [list(range(VOCAB))] * 2
    assert masks.num_allowed(done, [END, 7]) == 0
    assert END in allowed(masks, done, [()])[0], "the state before the end is not lost"


def test_two_threads_ask_at_once(grammars, tokenizer):
    """One takes the cursor, the other makes its own: both get the masks of their paths."""
    masks, text = grammars.masks(SCHEMA), tokenizer.encode('{"name": "a", "kind": "日本", "inner": [1')
    wanted = [allowed(grammars.masks(SCHEMA), [], [tuple(text[:n])])[0] for n in range(len(text))]

    async def ask():
        return await asyncio.gather(
            *(
                asyncio.to_thread(allowed, masks, text[:n], [(), *[tuple(text[n : n + 1])] * (n + 1 < len(text))])
                for n in order
            )
        )

    order = [n % len(text) for n in range(40)]
    for n, found in zip(order, asyncio.run(ask()), strict=True):
        assert found == wanted[n : n + len(found)]


# -- draws -----------------------------------------------------------------------------------------------------


def drawn(params, grammars, tokenizer, seed=0, draft_vocab=None):
    """A text drawn from random logits, one token at a time, and its finish."""
    prompt, ends = [5, 6], frozenset({END})
    processors = Processors(params, prompt, ends, 300, VOCAB, grammars.masks(params.grammar))
    sampler, tokens = Sampler(params), list(prompt)
    generator = torch.Generator().manual_seed(seed)
    while len(tokens) < 300 and tokens[-1] != END:
        logits = torch.randn(1, draft_vocab or VOCAB, generator=generator) * 2
        tokens += sampler.draw(logits, [len(tokens)], None, Context(None, [()], processors, tokens))
    return tokenizer.decode(tokens[2:]), tokens[-1] == END


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_whatever_is_drawn_matches_the_schema(temperature, grammars, tokenizer):
    for seed in range(3):
        params = SamplingParams(temperature=temperature, grammar=SCHEMA, seed=seed, logit_bias={END: 100.0, 7: 100.0})
        text, ended = drawn(params, grammars, tokenizer, seed)
        made = json.loads(text)
        assert ended
        assert list(made) == ["name", "kind", "inner"]
        assert made["kind"] in NESTED["properties"]["kind"]["enum"]
        assert 1 <= len(made["inner"]) <= 3
        assert all(isinstance(one, int) and one >= 0 for one in made["inner"])


def test_a_complete_text_ends_whatever_else_is_asked(grammars, tokenizer):
    """min_tokens, forbidden tokens: they hold as long as the grammar leaves another token, and no longer."""
    params = SamplingParams(min_new_tokens=200, grammar=SCHEMA, suppress_tokens=[END])
    text, ended = drawn(params, grammars, tokenizer)
    assert json.loads(text)
    assert ended
    longer = SamplingParams(temperature=1.0, min_new_tokens=20, grammar=WORD)
    text, _ = drawn(longer, grammars, tokenizer)
    short, _ = drawn(replace(longer, min_new_tokens=0, logit_bias={END: 100.0}), grammars, tokenizer)
    assert len(text) > len(short), "a text that may go on does not end before min_new_tokens"


def test_a_text_that_is_forbidden_and_required_fails_its_own_row(grammars, tokenizer):
    params = SamplingParams(grammar=Grammar("regex", "a"), suppress_tokens=tokenizer.encode("a"))
    with pytest.raises(NoTokenError, match="response_format"):
        drawn(params, grammars, tokenizer)


def test_a_draft_with_fewer_tokens_is_masked_alike(grammars):
    params = SamplingParams(grammar=SCHEMA)
    processors = Processors(params, [5], frozenset({END}), 99, VOCAB, grammars.masks(SCHEMA))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    whole = Sampler(params).processed(logits, Context(None, [()], processors, [5]))
    part = Sampler(params).processed(logits[:, :500], Context(None, [()], processors, [5]))
    assert torch.equal(whole[:, :500], part)


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json_schema", "[1]"), "JSON schema"),
        (Grammar("json_schema", '{"type": "wat"}'), "wat"),
        (Grammar("json_schema", '{"enum": []}'), "Unsatisfiable"),
        (Grammar("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}'), "Unsatisfiable"),
        (Grammar("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Grammar("json_schema", '{"$ref": "http://x/y"}'), "fetch"),
        (Grammar("json_schema", '{"items":' * 600 + "{}" + "}" * 600), "recursion"),
        (Grammar("regex", "(a"), "regular expression"),
        (Grammar("lark", "start: /[a/"), "grammar"),
    ],
    ids=str,
)
def test_a_grammar_that_cannot_be_met_is_one_paragraph(grammar, reason, grammars):
    for check in (check_grammar, grammars.masks):
        with pytest.raises(PromptError, match=reason) as found:
            check(grammar)
        assert "\n" not in str(found.value)
        assert len(str(found.value)) < 500


def test_what_a_tokenizer_and_a_model_must_have(tokenizer, monkeypatch):
    with pytest.raises(PromptError, match="end-of-sequence"):
        Grammars(tokenizer, VOCAB, []).masks(SCHEMA)
    with pytest.raises(PromptError, match="ignore_eos"):
        SamplingParams(grammar=SCHEMA, ignore_eos=True)
    with pytest.raises(PromptError, match="grammar must be"):
        SamplingParams(grammar="{}")
    monkeypatch.setattr(Tokenizer, "as_json", lambda self: None)
    with pytest.raises(PromptError, match="Rust library"):
        Grammars(tokenizer, VOCAB, [END]).masks(SCHEMA)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PromptError, match=r"aspec\[grammar\]"):
        check_grammar(Grammar("regex", "never seen"))


# -- engines ---------------------------------------------------------------------------------------------------

PROMPT = "def main(argv):\n    return "


class FromScratch(LogitsProcessor):
    """Plain constrained decoding: a mask from all tokens so far, at every step."""

    def __init__(self, tokenizer, num_prompt, vocab):
        self._tokenizer, self._num_prompt, self._vocab = tokenizer, num_prompt, vocab

    def __call__(self, ids, scores):
        kept = fresh_mask(SCHEMA, self._tokenizer, ids[0, self._num_prompt :].tolist(), self._vocab)
        return torch.full_like(scores, -torch.inf).index_copy_(1, torch.tensor(kept), scores[:, kept])


def said(method, params, prompts=(PROMPT, "import os")):
    async def main():
        options = {"draft": "ngram" if method == "ngram" else DEMO / "draft"}
        options |= {"speculation": {"ngram": "auto"}.get(method, method), "max_batch": 2, "device_memory": 40 << 20}
        async with open_engine(target=DEMO / "target", dtype="float32", **options) as engine:
            return await asyncio.gather(*(collect(engine, prompt, params) for prompt in prompts))

    results = asyncio.run(main())
    stats = [result.stats for result in results]
    return [(one.token_ids, one.text, one.finish_reason) for one in results], sum(one.accepted for one in stats)


@pytest.mark.slow
def test_greedy_text_is_that_of_plain_constrained_decoding(tokenizer):
    """By transformers' generate, with the mask of every step made anew."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    own = FromScratch(tokenizer, ids.shape[1], model.config.vocab_size)
    plain = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 60}
    expected = model.generate(ids, logits_processor=[own], **plain)[0, ids.shape[1] :].tolist()
    (found, *_), accepted = said("tree", SamplingParams(max_new_tokens=60, grammar=SCHEMA))
    assert list(found[0]) == expected
    assert accepted > 0
    assert json.loads(found[1])["kind"] in NESTED["properties"]["kind"]["enum"]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_method_gives_the_same_constrained_text(temperature):
    params = SamplingParams(temperature=temperature, seed=5, max_new_tokens=60, grammar=SCHEMA, repetition_penalty=1.1)
    expected, accepted = said("off", params)
    assert accepted == 0
    for method in ("chain", "tree", "ngram"):
        found, accepted = said(method, params)
        assert found == expected, method
        assert accepted > 0 or method == "ngram"
    assert all(reason == "length" or json.loads(text) for _, text, reason in expected)


def test_no_lookup_proposes_what_the_grammar_forbids(grammars, tokenizer):
    """The text repeats a word that may not come again: its branches end in front of it."""
    prompt = tokenizer.encode("x = abab; y = ab")
    processors = Processors(SamplingParams(grammar=WORD), prompt, frozenset({END}), 99, VOCAB, grammars.masks(WORD))
    for own, bound in ((processors, True), (None, False)):
        text = TextStream(tokenizer)
        params = SamplingParams(grammar=WORD if bound else None)
        sequence = TokenSequence(
            0, list(prompt), len(prompt), params, Sampler(params), text, frozenset(), 9, processors=own
        )
        drafter = NgramDrafter()
        drafter.assign_row(0, sequence)
        drafter.grow_trees(WorkItem(0, (0,), (len(prompt),), (1,)), TreeLevel(1, 4, (8,), (6,)))
        tokens, _ = drafter.propose(0, 8)
        forbidden = [token for token in tokens if set(tokenizer.decode([token])) - set("ab")]
        assert bool(forbidden) == (not bound)


@pytest.mark.slow
def test_a_real_model_fills_in_a_form(smollm2):
    """With its own tokens as proposals and without: the same text, and it is what was asked for."""
    person = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "maximum": 150}}}
    person |= {"required": ["name", "age"], "additionalProperties": False}
    grammar = Grammar("json_schema", json.dumps(person))
    params = SamplingParams(temperature=1.0, seed=2, max_new_tokens=40, grammar=grammar)
    ask = [{"role": "user", "content": "Ann is 31 years old. Write her name and age as JSON."}]
    found = []
    for method in ("off", "tree"):

        async def main(method=method):
            options = {"draft": smollm2, "speculation": method, "max_batch": 1, "exact": True}
            async with open_engine(target=smollm2, **options) as engine:
                return await collect(engine, ask, params)

        found.append(asyncio.run(main()))
    off, tree = found
    assert (off.token_ids, off.text) == (tree.token_ids, tree.text)
    assert tree.stats.accepted > 0
    made = json.loads(off.text)
    assert list(made) == ["name", "age"]
    assert made["age"] <= 150
