"""Models whose experts are read one by one: the bits of whole layers, whatever the slots, the draft and the batch."""

import asyncio
import functools
import itertools
import os
import random
import time
import types

import pytest
import torch

from aspec.backends import registry as devices
from aspec.backends.registry import Kind
from aspec.engine.design import design
from aspec.engine.engine import open_engine
from aspec.errors import InternalError, ReadError, UserError
from aspec.generation.params import SamplingParams
from aspec.models.experts import pause
from aspec.models.formats.gguf.folder import folder_of
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.options import EngineOptions
from aspec.planning.resolve import resolve
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from tests import tiny
from tests.fake_device import EagerDevice
from tests.peak import Peak
from tests.quantised_models import build
from tests.quantised_pairs import SIZES
from tests.test_equality import Pair
from tests.test_quantised import CASES

FAMILIES = ["mixtral", "gpt_oss", "qwen3_next", "qwen3_moe", "qwen2_moe", "granitemoe", "deepseek_v2", "deepseek_v3"]
FAMILIES += ["glm4_moe", "olmoe", "ernie4_5_moe", "granitemoeshared", "minimax_m2", "phimoe", "granitemoehybrid"]
FAMILIES += ["kimi_linear", "granite_h", "nemotron_h", "jamba"]
RUN = ["mixtral", "gpt_oss", "qwen3_next", "deepseek_v3", "granite_h", "jamba", "kimi_linear"]
"""One of a kind of experts and of layers beside them; of every family, a layer with experts on demand is compared."""

BF16, FP32 = torch.bfloat16, torch.float32
QUICK = [("mixtral", BF16, BF16), ("qwen3_next", BF16, BF16), ("gpt_oss", BF16, FP32)]
"""Experts stored one by one, those beside a recurrent layer, and fused ones that are converted where they are used."""

# -- layers ------------------------------------------------------------------------------------------------


def bytes_of(part, nbytes):
    """A buffer with the bytes of a part in it."""
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    for segment in part.segments:
        with open(segment.file, "rb") as file:
            file.seek(segment.offset)
            stored = torch.frombuffer(bytearray(file.read(segment.nbytes)), dtype=torch.uint8)
        buffer[segment.at : segment.at + segment.nbytes] = stored
    return buffer


class Loaded:
    """A model in memory; ``routed``: without its experts, of which two are in memory at a time."""

    def __init__(self, folder, dtype, routed, exact=True):
        self.model = Model(folder, dtype=dtype)
        self.layers = self.model.routed() if routed else None
        for part in self.model.parts(1 << 40, 1, self.layers):
            scratch = torch.zeros(part.scratch_at + part.scratch_bytes, dtype=torch.uint8)
            self.model.bind(part, bytes_of(part, part.size), scratch)
        if routed:
            self.runner, shape = self.model.read_on_demand(self.layers), self.layers.shape
            self.slots = [torch.zeros(shape.slot_bytes, dtype=torch.uint8) for _ in range(2)]
            self.runner.use(self.slots, torch.zeros(shape.scratch_bytes, dtype=torch.uint8))
        shapes, states = self.model.kv_shapes(), self.model.state_shapes
        self.kv = KVCache(shapes, 2, 128, self.model.dtype, exact=exact, states=states, log_slots=8)

    def layer(self, number, activation, dice):
        """Run a layer; experts are computed in any order."""
        if self.layers is None or number not in self.layers.layers:
            self.model.layer(number, activation)
            return
        chosen = [expert for expert, _ in self.model.route(number, activation)]
        dice.shuffle(chosen)
        for turn, expert in enumerate(chosen):
            part = self.runner.part(number, expert)
            self.slots[turn % 2].copy_(bytes_of(part, len(self.slots[0])))
            self.model.compute_experts(number, activation, [(expert, turn % 2)])
        self.model.combine(number, activation)

    @torch.inference_mode()
    def logits(self, order=0):
        """Of a prompt, of single tokens and of a tree, in two rows."""
        dice, found, start = random.Random(order), [], 0
        tokens = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(3))
        for count, parents in ((9, None), (1, None), (4, [[-1, 0, 0, 1]] * 2), (1, None)):
            finals = [start + (count if parents is None else 1)] * 2
            step = self.kv.step([0, 1], [start] * 2, [count] * 2, parents, finals=finals)
            activation = self.model.embed(tokens[:, start : start + count], step)
            for number in range(self.model.num_layers):
                self.layer(number, activation, dice)
            found.append(self.model.head(activation))
            start += count if parents is None else 1
            if parents is not None:
                for row in range(2):
                    self.kv.gather(row, start - 1, [0])
        return found


def check_layers(folder, dtype):
    wanted = Loaded(folder, dtype, routed=False).logits()
    found = Loaded(folder, dtype, routed=True).logits(order=1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    assert not torch.equal(wanted[0][0], wanted[0][1]), "the rows differ"


@pytest.mark.parametrize(("family", "stored", "dtype"), QUICK)
def test_a_layer_has_the_same_bits_whatever_the_order_of_its_experts(family, stored, dtype, tmp_path, one_thread):
    check_layers(tiny.build(tmp_path, family, dtype=stored, varied=True), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "dtype"), [(BF16, BF16), (FP32, FP32), (BF16, FP32)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_bits(family, stored, dtype, tmp_path, one_thread):
    check_layers(tiny.build(tmp_path, family, dtype=stored, varied=True), dtype)


PACKED = [case for case in CASES if case[0] not in ("llama", "llama4_text")]
QUICK_PACKED = [("gpt_oss", "mxfp4")]


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*case, marks=() if case in QUICK_PACKED else pytest.mark.slow) for case in PACKED],
)
def test_an_expert_that_is_decoded_alone_has_the_same_bits(family, method, tmp_path, one_thread):
    if method.startswith("ct "):
        pytest.importorskip("compressed_tensors")
    sizes = SIZES if family == "deepseek_v3" else None
    source = tiny.build(tmp_path / "source", family, seed=1, varied=True, shards=1, sizes=sizes)
    check_layers(build(tmp_path, source, method)[0], BF16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "qwen3moe", "gpt-oss"])
def test_an_expert_of_a_gguf_file_has_the_same_bits(name, kind, tmp_path, one_thread):
    models = pytest.importorskip("tests.gguf_models")
    path = models.write_model(tmp_path / "model.gguf", name, models.tiny_model(name), models.Type[kind])
    check_layers(folder_of(path), BF16)


def test_a_dense_model_has_no_routed_layer_and_is_refused_by_name(tmp_path):
    folder = tiny.build(tmp_path / "llama", "llama")
    assert Model(folder).routed().shape is None
    with pytest.raises(UserError, match=r"llama has no experts that can be read one by one\. Leave out --experts"):
        asyncio.run(_open(target=folder, experts="on-demand"))


async def _open(**options):
    async with open_engine(device_memory=32 << 20, max_context=64, threads=1, **options):
        pass


def test_an_expert_that_is_missing_or_computed_twice_is_an_error(tmp_path):
    loaded = Loaded(tiny.build(tmp_path, "mixtral"), FP32, routed=True)
    with torch.inference_mode():
        activation = loaded.model.embed(torch.tensor([[5]]), loaded.kv.step([0], [0], [1]))
        chosen = loaded.model.route(0, activation)
        with pytest.raises(InternalError, match="2 experts of L0 were not computed"):
            loaded.model.combine(0, activation)
        absent = next(expert for expert in range(4) if expert not in dict(chosen))
        with pytest.raises(InternalError, match=f"expert {absent} of L0 was not chosen"):
            loaded.model.compute_experts(0, activation, [(absent, 0)])
        with pytest.raises(InternalError, match="read on demand ran as a whole"):
            loaded.model.layer(1, activation)


def test_what_an_item_holds_at_its_experts_is_within_the_plan(tmp_path):
    """Beside its hidden state: what the layer's variables hold, not what its attention has computed."""
    loaded = Loaded(tiny.build(tmp_path, "qwen2_moe"), FP32, routed=True)
    with torch.inference_mode():
        activation = loaded.model.embed(torch.full((1, 60), 7), loaded.kv.step([0], [0], [60]))
        with Peak() as peak:
            loaded.model.route(0, activation)
            held = peak.live
    assert 0 < held <= 60 * (6 * 64 * 4 + 8 * 4)


# -- engines -----------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 11, 40, 7, 3] * 5, [200, 3, 9], [17, 30, 31, 32, 90, 4, 4, 8]]
RUNS = [
    {"speculation": "off"},
    {"speculation": "chain", "num_draft_tokens": 4},
    {"speculation": "tree", "num_draft_tokens": 8},
    {"speculation": "tree", "max_batch": 1},
    {"speculation": "chain", "num_groups": 2, "max_batch": 3},
]
SLOTS = ("least", "some", "all")


def params(row):
    return SamplingParams(max_new_tokens=12, temperature=(0.0, 1.0, 0.6)[row], seed=row, ignore_eos=True, logprobs=0)


class Mixture:
    """A target in bf16 whose experts are large beside its other weights, and its draft."""

    def __init__(self, folder, family):
        self.target = tiny.build(folder / "target", family, dtype=BF16, varied=True)
        self.draft = tiny.noisy_copy(self.target, folder / "draft", 0.05)
        self.wanted = self.run(experts="whole", speculation="off", max_batch=1)[0]

    def run(self, slots="all", **options):
        """The tokens and their logprobs, by prompt, and the spans; ``slots``: how much memory there is for experts."""
        spans = []

        async def one(engine, row):
            found = []
            async for piece in engine.stream(PROMPTS[row], params(row)):
                found += zip(piece.token_ids, piece.logprobs or (), strict=True)
            return found

        async def main():
            common = {"target": self.target, "max_context": 96, "device_memory": 48 << 20, "threads": 1}
            if options.get("speculation") != "off":
                common["draft"] = self.draft
            common["resident_memory"] = {"least": 0, "some": self.half_bytes, "all": None}[slots]
            async with open_engine(observers=[spans.append], **{"experts": "on-demand", **common, **options}) as engine:
                self.plan = engine.plan
                return await asyncio.gather(*(one(engine, row) for row in range(len(PROMPTS))))

        said = asyncio.run(main())
        assert find_races(spans) == []
        return [[repr(token) for token in row] for row in said], spans

    @functools.cached_property
    def half_bytes(self):
        """Everything but experts, and about half of them."""
        options = EngineOptions(target=self.target, max_context=96, device_memory=48 << 20, experts="on-demand")
        plan = design(resolve(options)).plan
        dense = sum(part.resident_bytes for part in plan.parts)
        return dense + sum(plan.experts.shape.num_experts) // 2 * plan.experts.shape.slot_bytes


def check_runs(mixture, runs, slots):
    for options in runs:
        for size in slots:
            found, spans = mixture.run(size, **options)
            assert found == mixture.wanted, f"{options}, {size} slots"
            cached = mixture.plan.experts.cached
            numbers = mixture.plan.experts.shape.num_experts
            assert (cached == numbers) == (size == "all")
            loads = [span.task for span in spans if span.task.op is Op.LOAD_EXPERT]
            assert loads
            assert size != "all" or len({(task.layer, task.detail) for task in loads}) == len(loads)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return Mixture(tmp_path_factory.mktemp("mixture"), "mixtral")


def test_the_tokens_are_those_of_whole_layers(mixtral):
    check_runs(mixtral, RUNS[2:3], ("some",))


@pytest.mark.slow
@pytest.mark.parametrize("family", RUN)
def test_the_tokens_of_a_family_are_those_of_whole_layers(family, tmp_path):
    """Each way of proposing with one number of slots; Mixtral with every number."""
    mixture = Mixture(tmp_path, family)
    for number, options in enumerate(RUNS):
        check_runs(mixture, [options], SLOTS if family == "mixtral" else [SLOTS[number % len(SLOTS)]])


def test_a_single_slot_is_enough(mixtral, monkeypatch):
    monkeypatch.setattr("aspec.planning.placement.PASSING_SLOTS", 1)
    found, _ = mixtral.run("least", speculation="off")
    assert found == mixtral.wanted
    assert mixtral.plan.experts.num_slots == 1


def test_without_greenlets_the_tokens_are_the_same(mixtral, monkeypatch):
    monkeypatch.setattr(pause, "greenlet", None)
    found, _ = mixtral.run("some", speculation="chain", num_draft_tokens=3)
    assert found == mixtral.wanted


@pytest.fixture
def card(monkeypatch):
    """A device behind a link, whose streams are out of step."""

    def opened():
        return EagerDevice(3, pace_s=1e-4, copy_pace_s=1e-4)

    kind = Kind(torch.device("cpu"), lambda: True, lambda: 1 << 34, opened, lambda: "a card")
    monkeypatch.setitem(devices.KINDS, "cuda", kind)


def test_a_device_gets_experts_through_host_memory_that_keeps_some(mixtral, card):
    """Three tiers: files, pinned host memory, the device."""
    common = {"speculation": "chain", "num_draft_tokens": 4, "device": "cuda", "exact": True}
    for host_memory, keeps in ((4 << 20, True), (1, False)):
        found, spans = mixtral.run("least", host_memory=host_memory, **common)
        assert found == mixtral.wanted
        copies = [span.task for span in spans if span.task.op is Op.COPY_EXPERT]
        reads = [span.task for span in spans if span.task.op is Op.LOAD_EXPERT]
        assert (len(reads) < len(copies)) == keeps
        assert bool(sum(mixtral.plan.experts.host.cached)) == keeps


class OnDemand(Pair):
    """What transformers generates, beside an engine that reads experts on demand."""

    options = types.MappingProxyType({"experts": "on-demand"})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "glm4_moe"])
def test_greedy_equals_transformers(family, tmp_path):
    pair = OnDemand(tmp_path, family)
    for shape, batch, resident in ((("off", None), 1, "none"), (("off", None), 3, "some")):
        assert pair.run(shape, batch, resident)[0] == pair.wanted[:batch]
        assert pair.plan.experts is not None
    pair.draft = tiny.noisy_copy(pair.target, tmp_path / "draft", 0.05)
    for shape in (("chain", 4), ("tree", 16)):
        assert pair.run(shape, 3, "none")[0] == pair.wanted


async def test_statistics_say_how_many_experts_were_in_memory(mixtral):
    last = {}
    for memory, prefetch in ((0, False), (0, True), (None, True)):
        options = {"max_context": 96, "device_memory": 32 << 20, "threads": 1, "resident_memory": memory}
        options["prefetch_experts"] = prefetch
        async with open_engine(target=mixtral.target, experts="on-demand", speculation="off", **options) as engine:
            async for piece in engine.stream(PROMPTS[0], params(0)):
                last[memory, prefetch] = piece.stats
            assert await engine.probe_link_rate(0.01) > 0
    none, guessed, every = last.values()
    assert none.expert_hit_rate == 0.0
    assert none.experts.chosen == every.experts.chosen == none.experts_loaded
    assert every.experts_loaded == 4 * 4, "each expert of each layer once"
    assert every.expert_hit_rate == 1 - 16 / every.experts.chosen
    assert none.bytes_per_pass > every.bytes_per_pass
    assert none.as_dict(1e9, 0)["ceiling_tokens_per_s"] > 0
    assert (none.prefetch_hit_rate, every.experts.guessed) == (None, 0), "what stays needs no guess"
    assert guessed.experts.chosen == none.experts.chosen == guessed.experts_loaded + guessed.experts.used
    said = guessed.as_dict(None, 0)
    assert 0 < said["prefetch_hit_rate"] <= 1
    unused = said["experts_prefetched"] - guessed.experts.used
    assert said["prefetch_wasted_bytes"] == unused * 36864, "up, gate and down of one expert"


# -- errors ------------------------------------------------------------------------------------------------


def test_a_shard_that_is_truncated_under_a_run_ends_it_by_name(tmp_path):
    target = tiny.build(tmp_path / "target", "mixtral", varied=True)
    found = []

    async def main():
        options = {"max_context": 96, "device_memory": 32 << 20, "threads": 1, "experts": "on-demand"}
        async with open_engine(target=target, resident_memory=0, **options) as engine:
            async for piece in engine.stream(PROMPTS[0], params(0)):
                found.extend(piece.token_ids)
                for shard in target.glob("*.safetensors"):
                    os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(ReadError, match="was truncated since aspec read its header"):
        asyncio.run(main())
    assert found


@pytest.mark.slow
def test_a_cancel_at_any_instant_leaves_nothing(mixtral):
    """The fixtures of all tests look for what is left: threads, files, memory. The instants cover a measured run."""
    options = {"target": mixtral.target, "draft": mixtral.draft, "max_context": 96, "device_memory": 32 << 20}
    said = []  # seconds from the start, of every piece of text

    async def consume(requests):
        start = time.monotonic()
        async with open_engine(experts="on-demand", resident_memory=0, threads=1, **options) as engine:
            for _ in requests:
                async for _ in engine.stream(PROMPTS[0], params(0)):
                    said.append(time.monotonic() - start)

    async def cancel_at(instant):
        task = asyncio.create_task(consume(itertools.count()))  # without an end of its own
        await asyncio.sleep(instant)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(consume(range(1)))
    opened, ended = said[0], said[-1]
    for instants in (opened * i / 12 for i in range(12)), (opened + (ended - opened) * i / 12 for i in range(12)):
        said.clear()
        for instant in instants:
            asyncio.run(cancel_at(instant))
    assert said, "some cancels came while it generated"
