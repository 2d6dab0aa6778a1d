"""What a checkpoint's generation_config.json asks for: applied as transformers applies it, or refused by name."""

import asyncio
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.engine.engine import open_engine
from aspec.errors import CheckpointError, NoTokenError, PromptError
from aspec.generation.defaults import FIELDS, Refused, describe, sampling_params
from aspec.generation.params import SamplingParams
from aspec.generation.penalties import Context, TokenCounts
from aspec.generation.processors import Processors
from aspec.generation.sampler import Sampler, draw_rows, gumbel
from aspec.generation.text.tokenizer import Tokenizer
from aspec.models.configuration.generation_defaults import generation_defaults
from tests import tiny

PROMPTS = [[7, 8, 9, 7, 8], [40], list(range(30, 60))]
NEW = 24
METHODS = {
    "plain": {"speculation": "off"},
    "chain": {"speculation": "chain", "num_draft_tokens": 4},
    "tree": {"speculation": "tree", "num_draft_tokens": 16},
}
ENDS = [2, 5, 200]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("asks") / "target", "llama", varied=True)
    return target, tiny.noisy_copy(target, target.parent / "draft", 0.1)


@pytest.fixture(scope="module")
def model(pair):
    return AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain(model):
    """The greedy text of every prompt if nothing is asked for; no end."""
    return [greedy(model, prompt, {"eos_token_id": None}) for prompt in PROMPTS]


def greedy(model, prompt, asks):
    """The tokens that transformers generates, in fp32."""
    config = GenerationConfig(**{"max_new_tokens": NEW, **asks})
    before, model.generation_config = model.generation_config, config
    try:
        out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64))
    finally:
        model.generation_config = before
    return out[0, len(prompt) :].tolist()


def store(pair, tmp_path, asks):
    """A copy of the target that asks for something."""
    folder = tmp_path / "asks"
    folder.mkdir()
    for file in pair[0].iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(asks))
    return folder


def generate(folder, draft, params, **method):
    """The tokens of all prompts, served together."""

    async def one(engine, prompt):
        return [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]

    async def main():
        options = {"max_batch": 3, "max_context": 128, "device_memory": 24 << 20, "threads": 1, "exact": False}
        async with open_engine(target=folder, draft=draft, **options, **method) as engine:
            return await asyncio.gather(*(one(engine, prompt) for prompt in PROMPTS))

    return asyncio.run(main())


def of_all(plain, at):
    """The tokens at some place of the greedy texts."""
    return sorted({text[at] for text in plain})


def asked(plain):
    """Settings that change the text, from the text without them."""
    first, second = of_all(plain, 0), of_all(plain, 1)
    words = [text[1:3] for text in plain] + [[text[4]] for text in plain]
    return {
        "suppress_tokens": {"suppress_tokens": first + second},
        "begin_suppress_tokens": {"begin_suppress_tokens": first},
        "bad_words_ids": {"bad_words_ids": words},
        "sequence_bias": {"sequence_bias": [[word, -9.0] for word in words] + [[[3], 1.5]]},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.6},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0},
        "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": first + second},
        "min_length": {"min_length": 12, "eos_token_id": first + second},
        "forced_eos_token_id": {"forced_eos_token_id": [11, 12], "eos_token_id": 11},
        "forced_bos_token_id": {"forced_bos_token_id": 17, "begin_suppress_tokens": first},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [3, 1.4], "eos_token_id": ENDS},
        "eos_token_id": {"eos_token_id": of_all(plain, 5)},
        "max_new_tokens": {"max_new_tokens": 7},
        "max_length": {"max_length": 35, "max_new_tokens": None},
        "everything": {
            "sequence_bias": [[word, 2.0] for word in words],
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": words,
            "min_new_tokens": 4,
            "suppress_tokens": first,
            "begin_suppress_tokens": second,
            "eos_token_id": ENDS,
            "exponential_decay_length_penalty": [5, 1.2],
            "temperature": 0.3,
            "top_p": 0.5,
            "typical_p": 0.4,
        },
    }


NAMES = sorted(asked([[0, 1, 2, 3, 4, 5]]))
QUICK = {("tree", name) for name in NAMES} | {(method, "everything") for method in METHODS}
CASES = [
    pytest.param(method, name, marks=[] if (method, name) in QUICK else pytest.mark.slow)
    for method in METHODS
    for name in NAMES
]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_text_is_that_of_transformers(pair, model, plain, tmp_path, name, method):
    """In batches, with chains and trees: every position of a pass is processed by its own path."""
    asks = asked(plain)[name]
    folder = store(pair, tmp_path, {key: value for key, value in asks.items() if value is not None})
    params = sampling_params(generation_defaults(folder), {}, NEW if "max_length" not in asks else 100)
    expected = [greedy(model, prompt, {"eos_token_id": None, **asks}) for prompt in PROMPTS]
    draft = None if method == "plain" else pair[1]
    assert generate(folder, draft, params, **METHODS[method]) == expected
    assert expected != plain


# -- every field -------------------------------------------------------------------------------------------


def test_every_field_of_transformers_is_treated():
    assert set(GenerationConfig().to_dict()) <= set(FIELDS)


REFUSALS = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "num_return_sequences": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "guidance_scale": 1.5,
    "constraints": ["one"],
    "force_words_ids": [[1, 2]],
    "watermarking_config": {"bias": 2.0},
    "token_healing": True,
    "max_time": 2.5,
    "cache_implementation": "quantized",
}


def test_what_would_change_the_text_otherwise_is_refused_by_name():
    assert set(REFUSALS) == {name for name, field in FIELDS.items() if isinstance(field, Refused)}
    for name, value in REFUSALS.items():
        with pytest.raises(CheckpointError, match=rf"generation_config.json asks for .*{name} = .*Remove {name} from"):
            sampling_params({name: value}, {})


def test_values_that_change_nothing_are_taken():
    harmless = {
        "num_beams": 1,
        "num_beam_groups": 1,
        "num_return_sequences": 1,
        "penalty_alpha": 0,
        "guidance_scale": 1,
    }
    harmless |= {"token_healing": False, "cache_implementation": "static", "max_time": None, "dola_layers": None}
    harmless |= {"suppress_tokens": [], "bad_words_ids": [], "begin_suppress_tokens": None, "chat_format": "chatml"}
    assert sampling_params(harmless, {}) == SamplingParams()
    assert describe(harmless, {}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("bad_words_ids", [[]]), ("suppress_tokens", "no"), ("temperature", -1), ("stop_strings", [3]), ("top_p", 7)],
        *[("sequence_bias", [[[1]]]), ("exponential_decay_length_penalty", 4), ("min_new_tokens", 1.5)],
    ],
)
def test_a_value_of_the_file_that_is_not_valid_names_the_file(name, value):
    with pytest.raises(CheckpointError, match=r"generation_config.json: \w+ must be .*; found .*Correct or remove it"):
        sampling_params({name: value, "do_sample": True}, {})


def test_what_the_user_gives_wins():
    asks = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "suppress_tokens": [1, 2], "stop_strings": ["a"]}
    asks |= {"max_length": 50, "no_repeat_ngram_size": 3}
    given = {"temperature": 0.8, "top_p": None, "suppress_tokens": (), "stop": ("b",), "max_new_tokens": 9}
    params = sampling_params(asks, given | {"no_repeat_ngram_size": 0})
    assert params == SamplingParams(max_new_tokens=9, temperature=0.8, top_p=0.9, stop=("b",))
    assert describe(asks, given) == "from generation_config.json: top_p 0.9, no_repeat_ngram_size 3"


def test_only_sampled_text_reads_the_filters():
    """Without do_sample the text is greedy; a temperature of the user makes it sampled, with the file's filters."""
    asks = {"temperature": 0.6, "top_p": 0.9, "typical_p": 0.7}
    assert sampling_params(asks, {}).temperature == 0
    assert describe(asks, {}) is None
    assert sampling_params(asks, {"temperature": 1.5}) == SamplingParams(temperature=1.5, top_p=0.9, typical_p=0.7)
    assert describe(asks, {"temperature": 1.5}) == "from generation_config.json: top_p 0.9, typical_p 0.7"


def test_older_checkpoints_ask_in_config_json(pair, tmp_path):
    folder = store(pair, tmp_path, {})
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]}))
    asks = generation_defaults(folder)
    assert describe(asks, {}) == "from config.json: no_repeat_ngram_size 2, bad_words_ids of 1"
    assert asks["eos_token_id"] == 2


def test_the_command_applies_them_and_says_so(pair, model, plain, tmp_path):
    """Also a stop string of the file, which text never holds, and the limit of the length."""
    first = of_all(plain, 0)
    folder = store(pair, tmp_path, {"begin_suppress_tokens": first, "max_new_tokens": 9, "stop_strings": ["zzz"]})
    words = ["generate", "--target", str(folder), "-p", "hello", "--json", "--threads", "1", "--device-memory", "4MiB"]
    made = CliRunner().invoke(app, words)
    prompt = Tokenizer.load(folder).encode("hello")
    asks = {"begin_suppress_tokens": first, "max_new_tokens": 9, "eos_token_id": 2}
    assert json.loads(made.stdout)["token_ids"] == greedy(model, prompt, asks)
    notes = " ".join(made.stderr.split())
    assert f"max_new_tokens 9, stop 'zzz', begin_suppress_tokens of {len(first)} " in notes


# -- draws -------------------------------------------------------------------------------------------------

EVERYTHING = {
    "sequence_bias": [[[5, 6], 3.0], [[9], -1.0]],
    "encoder_repetition_penalty": 1.4,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[4, 5], [11]],
    "min_new_tokens": 5,
    "exponential_decay_length_penalty": (5, 1.5),
    "suppress_tokens": [20],
    "begin_suppress_tokens": [21],
}
FILTERS = [{}, {"top_h": 0.6}, {"typical_p": 0.5}, {"epsilon_cutoff": 0.02}, {"eta_cutoff": 0.03}]
FILTERS += [{"top_h": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8, "epsilon_cutoff": 1e-3}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("asks", [{}, EVERYTHING], ids=["filters", "everything"])
def test_draws_are_of_transformers_scores(model, asks, filters):
    """Of the list of processors and warpers that its generate makes, with the tokens of each path; plus the noise."""
    prompt, generated, size, ends = [4, 5, 6, 4, 9], [5, 6, 4], 40, [2, 3]
    paths = [(), (5,), (9,), (5, 6), (5, 6, 4)]
    config = GenerationConfig(do_sample=True, temperature=0.7, **({"top_k": 0} | asks | filters))
    config._eos_token_tensor = torch.tensor(ends)
    made = model._get_logits_processor(config, len(prompt), torch.tensor([prompt]), model_kwargs={})
    params = SamplingParams(temperature=0.7, seed=4, **asks, **filters)
    sampler, counts = Sampler(params), TokenCounts.of(params, prompt)
    if counts is not None:
        counts.commit(generated)
    processors = Processors(params, prompt, frozenset(ends), 99, size)
    context = Context(counts, paths, processors, prompt + generated)
    logits = torch.randn(len(paths), size, generator=torch.Generator().manual_seed(1)) * 3
    positions = [len(prompt + generated) + len(path) for path in paths]
    expected = []
    for row, path, at in zip(logits, paths, positions, strict=True):
        scores = made(torch.tensor([[*prompt, *generated, *path]]), row[None].clone())
        expected.append(int((scores + gumbel(4, [at], size)).argmax()))
        own = sampler.scores(row, at, Context(counts, [path], processors, prompt + generated))
        assert int(own.argmax()) == expected[-1]
    assert sampler.draw(logits, positions, None, context) == expected


def test_a_token_that_the_target_does_not_know_is_refused():
    for asked in ({"logit_bias": {300: 1}}, {"forced_eos_token_id": 300}, {"forced_bos_token_id": 300}):
        (name,) = asked
        with pytest.raises(PromptError, match=rf"{name} names token 300: expected tokens of the target, 0 \.\. 255"):
            Processors(SamplingParams(**asked), [1], frozenset(), 9, 256)
    Processors(SamplingParams(suppress_tokens=[300], bad_words_ids=[[300, 1], [5]]), [1], frozenset(), 9, 256)


def test_parameters_that_forbid_every_token_fail_their_own_row():
    params = SamplingParams(suppress_tokens=range(6))
    context = Context(None, [(), (1,)], Processors(params, [1], frozenset(), 9, 6), [1])
    errors = {}
    drawn = draw_rows(
        [Sampler(params), Sampler(SamplingParams())],
        torch.eye(6)[None, :2].expand(2, -1, -1),
        [[1, 2], [1, 2]],
        contexts=[context, None],
        errors=errors,
    )
    assert drawn[1] == [0, 1]
    assert set(errors) == {(0, 0), (0, 1)}
    assert all(isinstance(error, NoTokenError) and "suppress_tokens" in str(error) for error in errors.values())


def test_a_draft_with_fewer_tokens_is_processed_alike():
    params = SamplingParams(suppress_tokens=[1], sequence_bias=[[[3, 9], 5.0], [[2], 7.0]], no_repeat_ngram_size=1)
    processors = Processors(params, [4, 9], frozenset(), 9, 10)
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
    whole = Sampler(params).processed(logits, Context(None, [(3,)], processors, [4, 9]))
    part = Sampler(params).processed(logits[:, :6], Context(None, [(3,)], processors, [4, 9]))
    assert torch.equal(whole[:, :6], part)


def test_a_penalty_for_length_beyond_a_float_is_the_end():
    params = SamplingParams(exponential_decay_length_penalty=(0, 9.0))
    processors = Processors(params, [4], frozenset({2}), 9, 6)
    forbidden = torch.tensor([[0.0, 0, -torch.inf, 0, 0, 0]])
    assert torch.equal(processors.apply(forbidden, [4] * 5, [()]), forbidden), "a forbidden end stays forbidden"
    for length in (300, 3000):
        scores = processors.apply(torch.zeros(1, 6) - 1, [4] * length, [()])
        assert scores.isfinite().all()
        assert int(scores.argmax()) == 2
