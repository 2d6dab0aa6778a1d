"""How long a row may be: what configurations say of it, a draft with a smaller context, a number beyond both."""

import asyncio
import json
import warnings

import pytest
import torch
import transformers as T
from typer.testing import CliRunner

from aspec.cli.main import app
from aspec.engine.engine import open_engine
from aspec.errors import PromptError
from aspec.generation.params import SamplingParams
from aspec.models.configuration.context import context_limit
from aspec.models.model import Model
from aspec.options import EngineOptions
from aspec.plan import Speculation
from aspec.planning.footprint import read_models, request_for
from aspec.planning.placement import make_plan
from aspec.planning.resolve import resolve
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from tests import tiny
from tests.compat import few

BORDER = 24  # tokens that the small draft can read
LONG = 48


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("context") / "target", "llama", varied=True)
    draft = tiny.noisy_copy(target, target.parent / "draft", 0.05)
    return target, tiny.edit_config(draft, max_position_embeddings=BORDER)


@pytest.fixture(scope="module")
def plain(pair):
    """The tokens of plain decoding of each prompt."""
    return asyncio.run(run(pair, draft=None))


def rows():
    """Prompts far below the border, at it, and beyond it; each row crosses it or lies beyond."""
    lengths = (3, BORDER - 2, BORDER - 1, BORDER, BORDER + 1, 40)
    return [tuple((7 * at + 11 * length) % 200 + 10 for at in range(length)) for length in lengths]


async def run(pair, spans=None, prompts=None, new=30, **options):
    """The tokens of all prompts in one engine."""
    common = dict(target=pair[0], draft=pair[1], threads=1, max_context=128, prefill_tokens=16, temperature=0)
    common |= dict(device_memory=1 << 28, max_batch=4) | options
    params = SamplingParams(temperature=common.pop("temperature"), seed=5, max_new_tokens=new, ignore_eos=True)
    observers = [] if spans is None else [spans.append]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        async with open_engine(observers=observers, **common) as engine:

            async def tokens(prompt):
                return [token async for piece in engine.stream(list(prompt), params) for token in piece.token_ids]

            return await asyncio.gather(*map(tokens, prompts or rows()))


SHAPES = {
    "chains": dict(speculation="chain"),
    "chains of 4": dict(speculation="chain", num_draft_tokens=4),
    "chains in groups": dict(speculation="chain", num_draft_tokens=3, num_groups=2),
    "trees": dict(speculation="tree"),
    "trees of 12": dict(speculation="tree", num_draft_tokens=12, draft_depth=4),
    "trees at once": dict(speculation="tree", num_draft_tokens=12, draft_ahead=False),
    "trees in groups": dict(speculation="tree", num_draft_tokens=8, num_groups=2),
    "trees that stream": dict(speculation="tree", num_draft_tokens=8, resident_memory=0, max_batch=2),
    "one row": dict(speculation="tree", num_draft_tokens=8, max_batch=1),
    "attention on the CPU": dict(speculation="chain", num_draft_tokens=4, attention="cpu"),
}


@pytest.mark.parametrize("shape", few(SHAPES, 6))
async def test_rows_go_on_beyond_the_context_of_the_draft(pair, plain, shape):
    """Nothing is refused or cut; the tokens are those of plain decoding; the draft's KV ends at its context."""
    spans = []
    found = await run(pair, spans, **SHAPES[shape])
    assert found == plain
    assert find_races(spans) == []
    drafted = [s.task.item for s in spans if s.task.op is Op.DRAFT]
    assert drafted, "below the border the draft proposes"
    assert all(start < BORDER for item in drafted for start in item.starts)
    prefilled = [s.task.item for s in spans if s.task.op is Op.DRAFT_PREFILL]
    ends = [start + count for item in prefilled for start, count in zip(item.starts, item.counts, strict=True)]
    assert max(ends) == BORDER - 1, "a prompt beyond the border never enters the draft"


@pytest.mark.filterwarnings("ignore:the draft:RuntimeWarning")
async def test_the_conversation_of_a_row_beyond_the_border_goes_on(pair):
    """A next turn reuses the target's KV of a row whose draft ended early, a shorter one the draft's again."""
    first = rows()[0]
    results = []
    for draft in (None, pair[1]):
        spans: list = []
        async with open_engine(
            observers=[spans.append], target=pair[0], draft=draft, max_context=128, max_batch=1, threads=1
        ) as engine:
            said = list(first)
            turns = []
            for new in (10, 20, 10):
                params = SamplingParams(max_new_tokens=new, ignore_eos=True)
                turns.append([t async for piece in engine.stream(said, params) for t in piece.token_ids])
                said += [*turns[-1], 50, 51]
            params = SamplingParams(max_new_tokens=6, ignore_eos=True)
            turns.append([t async for piece in engine.stream(said[:9], params) for t in piece.token_ids])
        results.append(turns)
        if draft is not None:
            assert [s for s in spans if s.task.op is Op.DRAFT][-1].task.number > 0, "the short prompt is drafted for"
    assert results[0] == results[1]


async def test_sampled_tokens_are_the_same_beyond_the_border(pair):
    """The draft's noise is keyed by position, so a border in it may not shift a draw."""
    without = await run(pair, draft=None, temperature=1.0)
    assert await run(pair, temperature=1.0, speculation="tree", num_draft_tokens=8) == without


def test_the_plan_counts_the_draft_up_to_its_own_context(pair):
    def planned(draft):
        resolved = resolve(
            EngineOptions(target=pair[0], draft=draft, max_context=200, speculation="chain", max_batch=3)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            models = read_models(resolved)
        request = request_for(models)
        return models, make_plan(models.footprint(request), request)

    models, plan = planned(pair[1])
    footprint = models.footprint(plan.request)
    assert (plan.capacity, plan.draft_capacity) == (200, BORDER)
    expected = 3 * (201 * footprint.kv_bytes_per_token + (BORDER + 1) * footprint.draft_kv_bytes_per_token)
    assert plan.arithmetic["KV cache"] == expected
    assert planned(pair[0])[1].draft_capacity == 200, "a draft with a longer context than the rows limits nothing"
    assert plan.speculation is Speculation.CHAIN


def test_a_short_draft_is_told_in_one_warning(pair):
    resolved = resolve(EngineOptions(target=pair[0], draft=pair[1], max_context=100))
    with pytest.warns(
        RuntimeWarning, match=rf"reads {BORDER} tokens, a row may have 100: .* without proposals"
    ) as told:
        read_models(resolved)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_models(resolve(EngineOptions(target=pair[0], draft=pair[1], max_context=BORDER)))


# -- scaled rotary positions -------------------------------------------------------------------------------------


def limit_of(**config):
    """(trained, possible) of a llama configuration as it stands in a file."""
    found = context_limit(T.LlamaConfig.from_dict({**tiny.COMMON, "max_position_embeddings": 64, **config}))
    return found.trained, found.possible


YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.compat
@pytest.mark.parametrize(
    ("config", "expected"),
    {
        "no scaling": ({}, (64, None)),
        "yarn, the original length implied": ({"rope_scaling": YARN}, (256, None)),
        "yarn, as Qwen writes it": ({"rope_scaling": {**YARN, "original_max_position_embeddings": 32}}, (128, None)),
        "yarn, in today's key": ({"rope_parameters": {**YARN, "rope_theta": 1e4}}, (256, None)),
        "yarn, the old key for its type": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, (256, None)),
        "yarn, the product written, as DeepSeek does": (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 16}},
            (64, None),
        ),
        "yarn, the original length outside": (
            {"rope_scaling": YARN, "original_max_position_embeddings": 48},
            (192, None),
        ),
        "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, (128, None)),
        "llama3 writes the product": (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
            (64, None),
        ),
        "longrope ends at the original length": (
            {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32}},
            (32, 32),
        ),
        "dynamic ends at the original length": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, (64, 64)),
    }.values(),
)
def test_the_context_follows_the_convention_of_each_rotary_type(config, expected):
    assert limit_of(**config) == expected


@pytest.mark.compat
def test_the_context_where_layer_types_differ():
    """Gemma 3 scales its full layers and writes the product; yarn in some layers names its own original length."""
    full, sliding = "full_attention", "sliding_attention"
    plain = {"rope_type": "default", "rope_theta": 1e4}
    common = dict(**tiny.COMMON, head_dim=16, sliding_window=8)
    linear = T.Gemma3TextConfig(
        **common, rope_parameters={full: {**plain, "rope_type": "linear", "factor": 8.0}, sliding: plain}
    )
    assert context_limit(linear).trained == 256
    yarn = {**plain, **YARN, "original_max_position_embeddings": 128}
    assert context_limit(T.Gemma3TextConfig(**common, rope_parameters={full: yarn, sliding: plain})).trained == 512


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
async def test_scaled_rotary_text_equals_transformers_beyond_the_unscaled_length(tmp_path, kind):
    """yarn and linear beyond 64 tokens, dynamic up to them."""
    folder = tiny.build(tmp_path / kind, "llama", varied=True)
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    tiny.edit_config(folder, max_position_embeddings=64, rope_parameters=scaling)
    start, new = (40, 24) if kind == "dynamic" else (129, 16)
    prompt = [(7 * at) % 200 + 10 for at in range(start)]
    model = tiny.reference(folder)
    with torch.inference_mode():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=new, eos_token_id=None, do_sample=False)
    async with open_engine(target=folder, threads=1) as engine:
        assert engine.max_context == (64 if kind == "dynamic" else 256)
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        found = [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]
    assert found == expected[0, start:].tolist()


async def test_a_context_beyond_the_trained_one_is_served_with_one_warning(tmp_path):
    folder = tiny.edit_config(tiny.build(tmp_path / "target", "llama"), max_position_embeddings=32)
    prompt, params = list(range(10, 60)), SamplingParams(max_new_tokens=8, ignore_eos=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        async with open_engine(target=folder, max_context=80, threads=1) as engine:
            found = [token async for piece in engine.stream(prompt, params) for token in piece.token_ids]
    assert len(found) == 8
    (warning,) = [str(one.message) for one in told if "--max-context" in str(one.message)]
    assert "80 exceeds the 32 tokens" in warning
    async with open_engine(target=folder, threads=1) as engine:
        with pytest.raises(PromptError, match="the context holds 32"):
            [piece async for piece in engine.stream(prompt, params)]


def test_positions_in_a_table_end_where_it_ends(tmp_path):
    """GPT-2 has no embedding beyond its table, whatever is asked for."""
    model = Model(tiny.build(tmp_path / "gpt2", "gpt2"))
    assert (model.context.trained, model.context.possible) == (256, 256)
    resolved = resolve(EngineOptions(target=tmp_path / "gpt2", max_context=1000))
    with pytest.warns(RuntimeWarning, match="exceeds the 256 positions .*: rows end there"):
        models = read_models(resolved)
    assert request_for(models).capacity == 256


def test_a_batch_of_rows_longer_than_the_context_of_the_draft(pair, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x" * n, "max_tokens": 20}}
        for n in (3, 20, 30, 60)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["batch", "-i", source, "-o", output, "--target", pair[0], "--draft", pair[1], "--ignore-eos"]
    result = CliRunner().invoke(app, [*map(str, command), "--device-memory", "64MiB"])
    assert result.exit_code == 0, result.output
    answers = [json.loads(line)["response"]["body"]["usage"]["completion_tokens"] for line in output.open()]
    assert answers == [20] * 4
