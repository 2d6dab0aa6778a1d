"""The engine's life: streams that share passes, failures that reach everyone, stops, cancels, nothing left behind."""

import asyncio
import gc
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import aspec
from aspec.engine.engine import open_engine
from aspec.errors import BudgetError, NumericError, PromptError, ReadError, UserError, VocabularyError
from aspec.generation.params import SamplingParams
from aspec.options import DEMO
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from tests import tiny

SMALL = dict(max_context=96, prefill_tokens=32, device_memory=3 << 20, resident_memory=0, threads=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("engine") / "target", "llama")
    return target, tiny.noisy_copy(target, target.parent / "draft", 0.1)


async def collect(engine, prompt, **params):
    pieces = [piece async for piece in engine.stream(prompt, SamplingParams(**{"ignore_eos": True, **params}))]
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.token_ids], pieces[-1]


async def test_streams_share_passes_and_retire_at_once(pair):
    spans = []
    async with open_engine(observers=[spans.append], target=pair[0], draft=pair[1], max_batch=2, **SMALL) as engine:
        wanted = (20, 5, 9, 1, 12)
        results = await asyncio.gather(
            *(collect(engine, [10 + i, 11, 12], max_new_tokens=n) for i, n in enumerate(wanted))
        )
        alone = [await collect(engine, [10 + i, 11, 12], max_new_tokens=n) for i, n in enumerate(wanted)]
    assert [len(tokens) for _, tokens, _ in results] == list(wanted)
    assert [tokens for _, tokens, _ in results] == [tokens for _, tokens, _ in alone]
    assert all(last.finish_reason == "length" for _, _, last in results)
    assert find_races(spans) == []
    shared = [s for s in spans if s.task.op is Op.HEAD and len(s.task.item.rows) == 2]
    assert shared, "two rows went through one pass"


async def test_the_links_are_probed_when_they_rest(pair, monkeypatch):
    """After a stream its slots are refilled: a probe beside that would measure half of the disk, and flatter a run."""
    gate, reading, probed = asyncio.Event(), [], []
    monkeypatch.setattr("aspec.engine.engine.raw_link_rate", lambda *_: probed.append(len(reading)) or 1e9)
    closing = [True]

    def observe(span):
        if span.task.op is Op.LAYER and span.task.layer == 3 and closing:
            closing.clear()
            gate.clear()  # what refills the slots of the only pass stays under way

    async with open_engine(observers=[observe], target=pair[0], max_batch=1, **SMALL) as engine:
        read = engine._disk.read

        def held_back(*args):
            done = read(*args)
            reading.append(done)

            async def settle():
                result = await done
                await gate.wait()
                reading.remove(done)
                return result

            return asyncio.ensure_future(settle())

        gate.set()
        monkeypatch.setattr(engine._disk, "read", held_back)
        await collect(engine, [10, 11, 12], max_new_tokens=1)
        await asyncio.sleep(0)
        assert reading
        probing = asyncio.ensure_future(engine.probe_link_rate(0.0))
        late = asyncio.ensure_future(collect(engine, [10, 11, 12], max_new_tokens=2))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not probed, "it waits for the reads under way"
        gate.set()
        assert await probing == 1e9
        assert probed == [0]
        assert len((await late)[1]) == 2, "a stream that came meanwhile is served after it"
        assert await engine.probe_link_rate(0.0) == 1e9
        assert probed == [0, 0]


async def test_weights_without_a_use_are_told_once(pair, tmp_path):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (pair[0] / name).exists():
            shutil.copy(pair[0] / name, tmp_path / name)
    tensors = {name: tensor for file in pair[0].glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file({**tensors, "extra.weight": torch.zeros(8)}, tmp_path / "model.safetensors")
    with pytest.warns(RuntimeWarning, match=r"1 stored tensors have no use .*: extra\.weight") as told:
        async with open_engine(target=tmp_path, max_batch=1, **SMALL):
            pass
    assert sum("no use" in str(one.message) for one in told) == 1


async def test_statistics_add_up(pair):
    async with open_engine(target=pair[0], draft=pair[1], max_batch=1, num_draft_tokens=4, **SMALL) as engine:
        _, tokens, last = await collect(engine, list(range(30, 50)), max_new_tokens=20)
        stats = last.stats.as_dict(1e9, 1)
    assert stats["tokens_per_pass"] == (len(tokens) - 1) / stats["passes"]
    assert last.stats.prompt_tokens == 20
    assert last.stats.completion_tokens == len(tokens) == 20
    assert stats["streamed_bytes"] >= stats["passes"] * last.stats.bytes_per_pass
    assert 0 < stats["acceptance_rate"] < 1
    assert stats["ceiling_tokens_per_s"] == pytest.approx(stats["tokens_per_pass"] * 1e9 / last.stats.bytes_per_pass)


async def test_an_end_token_inside_an_accepted_block_ends_the_row(pair, tmp_path):
    async with open_engine(target=pair[0], max_batch=1, **SMALL) as engine:
        _, plain, _ = await collect(engine, [5, 6, 7], max_new_tokens=16)
    end = plain[7]
    folder = tmp_path / "t"
    folder.mkdir()
    for file in pair[0].iterdir():
        os.link(file, folder / file.name)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 255]}))
    for chain in (0, 8):
        async with open_engine(target=folder, draft=pair[0], num_draft_tokens=chain, max_batch=1, **SMALL) as engine:
            _, tokens, last = await collect(engine, [5, 6, 7], max_new_tokens=16, ignore_eos=False)
            assert tokens == plain[: plain.index(end) + 1], "nothing behind the end token is kept"
            assert last.finish_reason == "stop"
            assert last.stats.completion_tokens == len(tokens)


async def test_stop_strings_cut_the_text_and_end_the_row(pair):
    async with open_engine(target=pair[0], draft=pair[1], max_batch=1, **SMALL) as engine:
        text, _, _ = await collect(engine, [5, 6, 7], max_new_tokens=30)
        stop = text[8:10]
        cut, _, last = await collect(engine, [5, 6, 7], max_new_tokens=30, stop=(stop,))
    assert cut == text[: text.index(stop)]
    assert last.finish_reason == "stop"


@pytest.mark.parametrize("new", [0, 1, 2])
async def test_exact_counts_at_the_smallest_limits(pair, new):
    async with open_engine(target=pair[0], draft=pair[1], num_draft_tokens=8, max_batch=1, **SMALL) as engine:
        _, tokens, last = await collect(engine, [5, 6, 7], max_new_tokens=new)
    assert len(tokens) == last.stats.completion_tokens == new
    assert last.finish_reason == "length"


async def test_the_context_limit_is_reached_and_not_passed(pair):
    async with open_engine(target=pair[0], draft=pair[1], num_draft_tokens=8, max_batch=1, **SMALL) as engine:
        _, tokens, last = await collect(engine, list(range(10, 100)), max_new_tokens=50)
        assert len(tokens) == 96 - 90
        assert last.finish_reason == "length"
        with pytest.raises(PromptError, match="96"):
            await collect(engine, list(range(96)), max_new_tokens=1)
        with pytest.raises(PromptError, match="empty"):
            await collect(engine, "")
        with pytest.raises(PromptError, match="token 0 is 300"):
            await collect(engine, [300])
        _, again, _ = await collect(engine, list(range(10, 100)), max_new_tokens=50)
        assert again == tokens, "a refused prompt changes nothing"


async def test_leaving_a_stream_early_frees_its_row(pair):
    async with open_engine(target=pair[0], draft=pair[1], max_batch=1, **SMALL) as engine:
        stream = engine.stream([1, 2, 3], SamplingParams(max_new_tokens=80, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()
        async with asyncio.timeout(20):
            _, tokens, _ = await collect(engine, [4, 5], max_new_tokens=5)
        assert len(tokens) == 5


async def test_closing_while_streams_run_leaves_nothing(pair):
    async with open_engine(target=pair[0], draft=pair[1], max_batch=2, link_rate=300e3, **SMALL) as engine:
        task = asyncio.create_task(collect(engine, [1, 2, 3], max_new_tokens=80))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


SPLIT = [Op.PROJECT, Op.ATTEND, Op.FFN]


@pytest.mark.parametrize("op", [Op.EMBED, Op.LAYER, *SPLIT, Op.HEAD, Op.ACCEPT, Op.DRAFT, Op.DRAFT_PREFILL, Op.READ])
async def test_a_fault_reaches_every_stream_as_one_error(pair, op, monkeypatch):
    """On the real backend: the runner or the disk fails at the fourth task of a kind."""
    from aspec.engine.model_runner import ModelRunner
    from aspec.io import disk

    real, count = ModelRunner.run, []

    def failing(self, task):
        if task.op is op:
            count.append(task)
            if len(count) == (1 if op is Op.DRAFT_PREFILL else 4):
                raise OSError("injected fault")
        return real(self, task)

    monkeypatch.setattr(ModelRunner, "run", failing)
    if op is Op.READ:
        transfer = disk.transfer

        def failing_read(*args):
            count.append(args)
            if len(count) == 40:
                raise OSError("injected fault")
            transfer(*args)

        monkeypatch.setattr(disk, "transfer", failing_read)
    options = {"num_draft_tokens": 4, "max_batch": 2, "attention": "cpu" if op in SPLIT else "device"}
    async with open_engine(target=pair[0], draft=pair[1], **options, **SMALL) as engine:
        streams = [collect(engine, [i, 2, 3], max_new_tokens=60) for i in (7, 8)]
        for result in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(result, OSError)
            assert str(result) == "injected fault"
            assert any("while running" in note for note in result.__notes__)
        with pytest.raises(OSError, match="injected fault"):
            await collect(engine, [1], max_new_tokens=1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_shard_cut_while_running_is_an_error_and_no_text(pair, tmp_path):
    for file in pair[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    async with open_engine(target=tmp_path, max_batch=1, link_rate=400e3, **SMALL) as engine:
        task = asyncio.create_task(collect(engine, [1, 2, 3], max_new_tokens=80))
        await asyncio.sleep(0.2)
        for shard in tmp_path.glob("*.safetensors"):
            os.truncate(shard, 3000)
        with pytest.raises(ReadError, match="truncated"):
            await task


async def test_nan_logits_are_one_error(pair, tmp_path, monkeypatch):
    from aspec.models.model import Model

    real = Model.head
    monkeypatch.setattr(Model, "head", lambda self, *args: real(self, *args) * float("nan"))
    async with open_engine(target=pair[0], max_batch=1, **SMALL) as engine:
        with pytest.raises(NumericError, match="finite number"):
            await collect(engine, [1, 2, 3], max_new_tokens=4)


async def test_refusals_at_the_door(pair, tmp_path):
    with pytest.raises(BudgetError, match="at least"):
        async with open_engine(target=pair[0], device_memory=100_000):
            pass
    with pytest.raises(UserError, match="without --target"):
        async with open_engine(draft=pair[1]):
            pass
    with pytest.raises(UserError, match="dtype"):
        async with open_engine(target=pair[0], dtype="int3"):
            pass
    for file in pair[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    first, second = (next(k for k, v in vocab.items() if v == i) for i in (40, 41))
    vocab[first], vocab[second] = 41, 40
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(VocabularyError, match="40"):
        async with open_engine(target=pair[0], draft=tmp_path):
            pass


@pytest.mark.slow
async def test_memory_is_given_back(pair):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    sizes = []
    for _ in range(6):
        async with open_engine(target=pair[0], max_context=128, max_batch=4, device_memory=256 << 20) as engine:
            await collect(engine, [1, 2, 3], max_new_tokens=4)
        gc.collect()
        sizes.append(resident())
    assert sizes[-1] - sizes[1] < 30 << 20


def test_the_demo_pair_streams_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a first run: nothing is known of the pair
    result = aspec.generate("def main(argv):\n    ", max_new_tokens=24)
    assert result.stats.completion_tokens == 24
    assert result.stats.bytes_per_pass > 0, "its budget is below its size"
    assert result.stats.proposed > 0
    plain = aspec.generate("def main(argv):\n    ", max_new_tokens=24, num_draft_tokens=0)
    assert plain.token_ids == result.token_ids


def test_several_prompts_at_once_have_seeds_of_their_own():
    prompts = ["import os\n", "import os\n", "class A:\n"]
    first = aspec.generate(prompts, max_new_tokens=12, temperature=1.0, seed=4)
    again = aspec.generate(prompts, max_new_tokens=12, temperature=1.0, seed=4, num_draft_tokens=0, max_batch=1)
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert first[0].token_ids != first[1].token_ids


def test_the_demo_is_what_its_readme_says():
    text = (DEMO / "README.md").read_text()
    assert "tokens per pass" in text
    assert len(json.loads((DEMO / "heldout.json").read_text())) == 20


SHAPES = [("off", None), ("chain", 3), ("tree", 12)]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.1, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 3.0}, {"presence_penalty": 1.5, "frequency_penalty": 0.7}], ids=str
)
async def test_penalties_follow_each_path_whatever_the_draft(pair, params, penalty):
    texts = set()
    for speculation, budget in SHAPES:
        options = dict(target=pair[0], draft=pair[1], speculation=speculation, num_draft_tokens=budget, max_batch=1)
        async with open_engine(**{**SMALL, **options, "dtype": "float32"}) as engine:
            _, tokens, last = await collect(engine, [9, 10, 11, 9], max_new_tokens=20, **params, **penalty)
            plain = (await collect(engine, [9, 10, 11, 9], max_new_tokens=20, **params))[1]
        assert (last.stats.proposed > 0) == (speculation != "off")
        assert tokens != plain
        texts.add(tuple(tokens))
    assert len(texts) == 1


async def test_logprobs_are_the_models_own_whatever_the_draft(pair):
    found = []
    for speculation, budget in SHAPES:
        options = dict(target=pair[0], draft=pair[1], speculation=speculation, num_draft_tokens=budget, max_batch=1)
        async with open_engine(**{**SMALL, **options, "dtype": "float32"}) as engine:
            params = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=3, temperature=0.9, seed=2)
            pieces = [piece async for piece in engine.stream([9, 10, 11], params)]
        logprobs = [one for piece in pieces for one in piece.logprobs]
        assert [one.token for one in logprobs] == [token for piece in pieces for token in piece.token_ids]
        assert all(len(one.top) == 3 and one.top[0][1] >= one.logprob for one in logprobs)
        found.append([one.logprob for one in logprobs])
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize("speculation", ["auto", "chain"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.1, "seed": 5}], ids=["greedy", "sampled"])
async def test_a_lookup_proposes_what_the_text_has_said_and_changes_nothing(pair, params, speculation):
    prompts = [[9, 10, 11, 12] * 6, [20, 21, 22] * 3, [7]]
    found = []
    for draft in (None, "ngram"):
        options = dict(target=pair[0], draft=draft, speculation=speculation, num_draft_tokens=6)
        async with open_engine(**{**SMALL, **options, "max_batch": 3, "dtype": "float32"}) as engine:
            results = await asyncio.gather(*(collect(engine, p, max_new_tokens=24, **params) for p in prompts))
        found.append([tokens for _, tokens, _ in results])
    assert found[0] == found[1]
    assert sum(last.stats.proposed for _, _, last in results) > 0


async def test_streams_that_are_left_while_they_wait_leave_nothing(pair):
    async with open_engine(target=pair[0], max_batch=1, **SMALL) as engine:
        first = asyncio.create_task(collect(engine, [10, 11, 12], max_new_tokens=30))
        left = [asyncio.create_task(collect(engine, [20 + i, 11, 12], max_new_tokens=30)) for i in range(3)]
        last = asyncio.create_task(collect(engine, [10, 11, 13], max_new_tokens=5))
        await asyncio.sleep(0.01)
        for task in left:
            task.cancel()
        _, tokens, _ = await first
        _, _, end = await last
        assert (len(tokens), end.stats.completion_tokens) == (30, 5)
        assert end.stats.num_cached_tokens == 2, "it was chosen which row to follow when that row was free"
        assert not engine._streams._waiting
        assert not engine._streams._admitted
        assert not engine._streams._requests
        assert not engine._streams._queues
        assert not engine._open.runner._sequences
