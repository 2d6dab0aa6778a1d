"""Captured draft steps: the same logits, keys and proposals as eager ones, from few graphs; what cannot be captured."""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import random
import warnings
import weakref

import pytest
import torch

from aspec.backends.cuda_graphs import TorchCapture
from aspec.engine import allocate as assembly
from aspec.engine.engine import open_engine
from aspec.errors import InternalError
from aspec.generation.params import SamplingParams
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.speculation import draft_graphs as graphs
from aspec.speculation.capture_check import RefusedError, warm_up
from aspec.speculation.model_drafter import ModelDrafter
from tests import tiny
from tests.compat import few, of_kinds
from tests.fake_capture import CaptureError, FakeCapture
from tests.peak import Peak

CPU = torch.device("cpu")
CAPTURED = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3_longrope",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
)
REFUSED = "gemma3n_text"  # it makes a tensor of a number from its configuration in every layer
REFUSED_ON_A_DEVICE = {REFUSED, "phimoe"}  # phimoe makes its rotary frequencies anew on the host, for every step
ROWS, CAPACITY = 5, 700
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Builds a family once; all its weights are bound."""
    root, made = tmp_path_factory.mktemp("graphs"), {}

    def get(family):
        if family not in made:
            made[family] = bound(tiny.build(root / family, family))
        return made[family]

    return get


def bound(folder, device="cpu"):
    model = Model(folder, dtype=torch.float32, device=device)
    model.held = []
    for part in model.parts(1 << 30):
        buffer = tiny.read_part(part).to(device)
        scratch = torch.empty(part.scratch_bytes, dtype=torch.uint8, device=device)
        model.bind(dataclasses.replace(part, scratch_at=0), buffer, scratch)
        model.held += [buffer, scratch]
    return model


class Twins:
    """One draft twice, with captured steps and without, fed the same."""

    def __init__(self, model, capture, seed=0, num_rows=ROWS, capacity=CAPACITY):
        self.dice, self.model = random.Random(seed), model
        caches = [KVCache(model.kv_shapes(), num_rows, capacity, model.dtype, device=model.device) for _ in range(2)]
        self.captured = ModelDrafter(model, caches[0], model.vocab_size, capture=capture)
        self.eager = ModelDrafter(model, caches[1], model.vocab_size)
        self.lengths = [0] * num_rows
        self.caches = caches

    @property
    def graphs(self):
        return self.captured._graphs

    def tokens(self, count):
        return [self.dice.randrange(3, tiny.VOCAB) for _ in range(count)]

    @torch.inference_mode()
    def run(self, rows, starts, fed, **more):
        """Both; what they say of the tokens that are not padding is the same."""
        ours, plain = (drafter._run(rows, starts, fed, **more).cpu() for drafter in (self.captured, self.eager))
        assert ours.shape == plain.shape
        for own, expected, tokens in zip(ours, plain, fed, strict=True):
            last = len(tokens) if more.get("parents") else 1
            torch.testing.assert_close(own[:last], expected[:last], atol=1e-4, rtol=1e-4)
        return ours

    def prefill(self, rows, count):
        starts, fed = [self.lengths[row] for row in rows], [self.tokens(count) for _ in rows]
        with torch.inference_mode():
            for drafter in (self.captured, self.eager):
                drafter._run(rows, starts, fed, want_logits=False)
        for row in rows:
            self.lengths[row] += count

    def chain(self, rows, most=3):
        fed = [self.tokens(self.dice.randint(1, most)) for _ in rows]
        self.run(rows, [self.lengths[row] for row in rows], fed)
        for row, tokens in zip(rows, fed, strict=True):
            self.lengths[row] += len(tokens)

    def tree(self, rows, levels=3, most=9):
        """Level by level, then some path of every row is kept."""
        starts, parents = [self.lengths[row] for row in rows], [[] for _ in rows]
        for _ in range(levels):
            firsts = [len(links) for links in parents]
            for links in parents:
                for _ in range(self.dice.randint(1, most)):  # paths mostly go on: longer than a sliding window
                    links.append(len(links) - 1 if self.dice.random() < 0.8 else self.dice.randrange(-1, len(links)))
            fed = [self.tokens(len(links) - first) for links, first in zip(parents, firsts, strict=True)]
            self.run(rows, starts, fed, parents=parents, firsts=firsts)
        for row, links in zip(rows, parents, strict=True):
            node, path = self.dice.randrange(len(links)), []
            while node >= 0:
                path.insert(0, node)
                node = links[node]
            for cache in self.caches:
                cache.gather(row, self.lengths[row], path)
            self.lengths[row] += len(path)

    def check_keys(self):
        """What is committed is the same in both."""
        ours, plain = ([*cache.keys, *cache.values] for cache in self.caches)
        for own, expected in zip(ours, plain, strict=True):
            for row, length in enumerate(self.lengths) if own is not None else ():
                torch.testing.assert_close(own[row, :, :length], expected[row, :, :length], atol=1e-4, rtol=1e-4)


def exercise(twins, rounds=6):
    """Rows that join and leave, in any order, with others between them; lengths beyond several sizes of graph."""
    dice = twins.dice
    twins.prefill(list(range(ROWS)), 3)
    for round_ in range(rounds):
        rows = [0, 2, 4] if round_ == 1 else dice.sample(range(ROWS), dice.randint(1, ROWS))
        rows = sorted(rows) if dice.random() < 0.7 else rows
        if round_ % 3 == 2 and max(twins.lengths) < 400:
            twins.prefill(rows, 150)
        for _ in range(2):
            twins.chain(rows)
        twins.tree(rows)
    twins.check_keys()


# -- the same as eager -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAPTURED)
def test_captured_steps_say_what_eager_ones_do(models, family, recwarn):
    capture = FakeCapture()
    twins = Twins(models(family), capture)
    exercise(twins)
    assert capture.captures >= 5
    assert capture.replays > capture.captures
    assert {shape.length for shape in twins.graphs._captured} >= {256, 512}
    assert not [str(one.message) for one in recwarn if "captured" in str(one.message)]


class Noted(ModelDrafter):
    """Notes what was proposed, by sequence and its length."""

    proposals: dict

    def propose(self, row, count):
        made, sequence = super().propose(row, count), self._rows[row].sequence
        self.proposals[sequence.id, len(sequence.tokens)] = made
        return made


async def demo(monkeypatch, capture, *, temperature, requests, **options):
    """What the demo pair says and proposes, the requests all at once."""
    proposals = {}

    class Drafter(Noted):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "capture": capture})
            self.proposals = proposals

    monkeypatch.setattr(assembly, "ModelDrafter", Drafter)
    options = dict(threads=1, dtype="float32", draft_ahead=False, draft_depth=4, device_memory=64 << 20) | options
    async with open_engine(**options) as engine:

        async def one(index, prompt, new):
            params = SamplingParams(max_new_tokens=new, ignore_eos=True, temperature=temperature, seed=index)
            return [
                token
                async for piece in engine.stream(engine.tokenizer.encode(prompt), params)
                for token in piece.token_ids
            ]

        said = await asyncio.gather(*(one(index, *request) for index, request in enumerate(requests)))
    return said, proposals


PROMPTS = (
    "def mean(values):\n    return",
    "import os\n",
    "class Node:\n    def __init__(self",
    "for i in range(10):\n",
)


@pytest.mark.parametrize("temperature", few([1.0, 0.0], 1))
@pytest.mark.parametrize("speculation", ["chain", "tree"])
async def test_tokens_and_proposals_are_those_of_eager_drafts(monkeypatch, speculation, temperature):
    requests = [(PROMPTS[n % len(PROMPTS)] * (1 + 9 * (n == 2)), new) for n, new in enumerate((30, 9, 20, 11, 17, 15))]
    options = dict(speculation=speculation, num_draft_tokens=4 if speculation == "chain" else 12, max_batch=4)
    capture = FakeCapture()
    captured = await demo(monkeypatch, capture, temperature=temperature, requests=requests, **options)
    eager = await demo(monkeypatch, None, temperature=temperature, requests=requests, **options)
    assert capture.replays > capture.captures > 0
    assert captured[0] == eager[0]
    assert captured[1] == eager[1]


@pytest.mark.slow
async def test_a_long_text_is_drafted_by_few_graphs(monkeypatch):
    requests = [("def f(x):\n    return x\n" * 20, 330)]
    options = dict(speculation="chain", num_draft_tokens=4, max_batch=1, max_context=1000)
    capture = FakeCapture()
    captured = await demo(monkeypatch, capture, temperature=0.0, requests=requests, **options)
    eager = await demo(monkeypatch, None, temperature=0.0, requests=requests, **options)
    assert captured == eager
    assert capture.captures <= 9, "three lengths of one row's chains, which catch up on one token, two, or some"
    assert capture.replays > 20 * capture.captures


def test_groups_of_rows_and_rows_between_others_need_no_shape_of_their_own(models):
    capture = FakeCapture()
    twins = Twins(models("llama"), capture)
    twins.prefill(list(range(ROWS)), 9)
    for rows in ([0, 2, 4], [4, 2, 0], [0, 2, 4]):
        twins.chain(rows, most=1)
    assert capture.captures == 1
    assert [list(shape.rows) for shape in twins.graphs._captured] == [[0, 2, 4]]
    for rows in ([0, 1, 3], [0, 2, 3], [3, 0, 1]):
        twins.chain(rows, most=1)
    assert list(map(list, (shape.rows for shape in twins.graphs._captured))) == [[0, 2, 4], [0, 1, 2, 3]]
    for _ in range(3):
        twins.chain([0, 4, 1][:2], most=1)
    twins.check_keys()


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_large_batch_keeps_its_shapes_as_rows_come_and_go(models, groups):
    model, dice = models("llama"), random.Random(groups)
    steps = graphs.DraftGraphs(model, KVCache(model.kv_shapes(), 64, 64, model.dtype), FakeCapture())
    rows, spans = list(range(groups - 1, 64, groups)), set()
    while len(rows) > 8:
        span = steps._span(rows)
        assert set(rows) <= set(span) <= set(range(64))
        assert len(span) <= 1.25 * len(range(min(rows), max(rows) + 1, groups)) + 1
        spans.add(span)
        rows.remove(rows[-1] if dice.random() < 0.3 else dice.choice(rows))
    assert len(spans) <= 16


# -- what is kept ----------------------------------------------------------------------------------------------


def test_a_shape_is_captured_when_it_recurs_and_forgotten_when_it_does_not(models, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    capture, alive = FakeCapture(), weakref.WeakSet()
    twins = Twins(models("llama"), capture)
    twins.prefill(list(range(ROWS)), 9)
    twins.chain([0], most=1)
    assert not capture.captures
    for _ in range(2):
        twins.chain([0], most=1)
    assert (capture.captures, capture.replays) == (1, 2)
    for row in (1, 2):
        for _ in range(2):
            twins.chain([row], most=1)
        alive |= {one.replay for one in twins.graphs._captured.values()}
    assert capture.captures == 3
    assert [list(shape.rows) for shape in twins.graphs._captured] == [[1], [2]]
    gc.collect()
    assert len(alive) == 2, "the oldest graph and its inputs are gone"
    for row in (3, 4, 3, 4):
        twins.chain([row], most=1)
    assert len(twins.graphs._uses) <= 2


def test_large_steps_and_prompts_stay_eager(models):
    capture = FakeCapture()
    twins = Twins(models("llama"), capture)
    for _ in range(3):
        twins.prefill([0, 1], 5)
    for _ in range(3):
        twins.run([0], [0], [twins.tokens(33)])
        twins.run([0, 1, 4], [0] * 3, [twins.tokens(2)] * 3, parents=[[-1, 0]] * 3, firsts=[0] * 3)
    assert capture.captures == 1, "five rows for three are fewer than twice as many"
    for _ in range(3):
        twins.run([0, 4, 3], [0] * 3, [twins.tokens(2)] * 3)
        twins.run(list(range(ROWS)), [0] * ROWS, [twins.tokens(32)] * ROWS)
    assert {shape.tokens for shape in twins.graphs._captured} == {10, 160}


@pytest.mark.parametrize("family", CAPTURED)
def test_memory_is_bounded_by_what_the_plan_counts(models, family):
    model = models(family)
    for num_rows, capacity, nodes in ((1, 256, 0), (3, 512, 64), (8, 256, 64), (5, 1024, 0)):
        kv = KVCache(model.kv_shapes(), num_rows, capacity, model.dtype)
        steps = graphs.DraftGraphs(model, kv, FakeCapture())
        columns = min(graphs.MAX_COLUMNS, graphs.MAX_TOKENS // num_rows)
        for rows in (range(num_rows), range(0, num_rows, 2)):
            shape = graphs.Shape(rows, 1 << columns.bit_length() - 1, capacity, nodes)
            inputs = graphs._Inputs.of(shape, "cpu")
            inputs.flat.zero_()
            with torch.inference_mode():
                steps._forward(shape, inputs)
                with Peak() as peak:
                    logits = steps._forward(shape, inputs)
            kept = graphs.logits_kept(num_rows, trees=bool(nodes)) * model.vocab_size * 4
            assert logits.nbytes <= kept
            held = graphs._step_bytes(model, num_rows, min(num_rows * 32, 256), capacity, kept)
            assert peak.nbytes <= held
            total = graphs.graph_bytes(model, num_rows, capacity, nodes)
            assert total >= 2 * held + kept + graphs.MAX_GRAPHS * shape.input_bytes


# -- what cannot be captured -----------------------------------------------------------------------------------


def test_a_model_that_cannot_be_captured_drafts_eagerly_after_one_warning(models):
    capture = FakeCapture()
    twins = Twins(models(REFUSED), capture)
    with pytest.warns(RuntimeWarning, match=r"the draft \(gemma3n_text\) cannot be captured.*brings data") as told:
        exercise(twins, rounds=3)
    assert len([one for one in told if "captured" in str(one.message)]) == 1
    assert not capture.captures


class Broken:
    """A device that refuses, after so many captures that went well."""

    def __init__(self, error, after=0):
        self.error, self.after, self.good = error, after, FakeCapture()

    def capture(self, work):
        if self.good.captures >= self.after:
            raise self.error
        return self.good.capture(work)


def test_a_device_that_refuses_a_capture_is_asked_once(models):
    capture = Broken(RuntimeError("operation not permitted when stream is capturing"), after=1)
    twins = Twins(models("llama"), capture)
    with pytest.warns(RuntimeWarning, match="cannot be captured.*not permitted when") as told:
        exercise(twins, rounds=3)
    assert len(told) == 1
    assert capture.good.captures == 1


def test_a_device_without_memory_is_no_reason_to_go_on(models):
    twins = Twins(models("llama"), Broken(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        exercise(twins, rounds=1)


def on_another_device(model):
    """The model with nothing but shapes, apart from the host: the meta device stands for a card."""
    for module in (*model._frame.modules(), *model._layers_model.modules()):
        for table in (module._buffers, module.__dict__):
            table |= {name: one.to("meta") for name, one in table.items() if isinstance(one, torch.Tensor)}
    for part in model.parts(1 << 30):
        buffer, scratch = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (part.size, 1 << 24))
        model.bind(dataclasses.replace(part, scratch_at=0), buffer, scratch)
    model._binder.check = lambda layer: None
    return model


@pytest.mark.parametrize("family", of_kinds(sorted(tiny.FAMILIES)))
def test_on_a_device_a_forward_needs_nothing_of_the_host(tmp_path, family):
    device = torch.device("meta")
    model = on_another_device(Model(tiny.build(tmp_path / family, family, dtype=torch.bfloat16)))
    kv = KVCache(model.kv_shapes(), 4, 300, model.dtype, device=device)
    steps = graphs.DraftGraphs(model, kv, FakeCapture())
    for shape in (graphs.Shape(range(1, 2), 1, 300, 0), graphs.Shape(range(0, 4, 2), 8, 256, 64)):
        inputs = graphs._Inputs.of(shape, device)
        outcome = RefusedError if family in REFUSED_ON_A_DEVICE else InternalError
        with torch.inference_mode(), contextlib.suppress(InternalError):
            steps._forward(shape, inputs)  # what is made at first use
        with torch.inference_mode(), pytest.raises(outcome, match=r"the head runs|reads a value|copies between"):
            warm_up(functools.partial(steps._forward, shape, inputs), device)  # without values the head is the end


X = torch.arange(6.0).view(2, 3)
ALLOWED = {
    "indices": lambda: X[torch.arange(2)[:, None], torch.arange(3)],
    "one value behind a mask": lambda: X.clone().masked_fill_(X > 3, 0.0),
    "one hot": lambda: torch.nn.functional.one_hot(X.long(), 9),
    "experts": lambda: torch.histc(X, 4, 0, 3),
    "products": lambda: torch.nn.functional.linear(X, X),
    "dtype": lambda: X.to(torch.bfloat16).to("cpu"),
}
FORBIDDEN = {
    "item": lambda: X[0, 0].item(),
    "branch": lambda: bool(X.max() > 1),
    "equal": lambda: torch.equal(X, X),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 1],
    "mask written": lambda: X.clone().index_put_((X > 3,), torch.zeros(2)),
    "select": lambda: X.masked_select(X > 1),
    "unique": lambda: X.unique(),
    "count": lambda: X.view(-1).long().bincount(),
    "repeat": lambda: X.repeat_interleave(X[:, 0].long(), 0),
    "from Python": lambda: torch.tensor([1, 2]),
    "from the host": lambda: X.to("meta"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_repeats_on_a_device_passes_the_screen(name):
    with torch.inference_mode():
        assert torch.equal(warm_up(ALLOWED[name], CPU), ALLOWED[name]())
        FakeCapture().capture(ALLOWED[name])


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_asks_the_host_does_not(name):
    with torch.inference_mode(), pytest.raises(RefusedError):
        warm_up(FORBIDDEN[name], CPU)


@pytest.mark.parametrize("name", sorted(set(FORBIDDEN) - {"from the host"}))
def test_the_fake_refuses_it_too(name):
    with torch.inference_mode(), pytest.raises(CaptureError):
        FakeCapture().capture(FORBIDDEN[name])


def test_an_operator_from_elsewhere_is_not_trusted():
    with torch.library._scoped_library("aspec_test", "DEF") as library:
        library.define("blind(Tensor x) -> Tensor")
        library.impl("blind", lambda x: x + x.sum().item(), "CPU")
        with torch.inference_mode(), pytest.raises(RefusedError, match="foreign operator"):
            warm_up(lambda: torch.ops.aspec_test.blind(X), CPU)


# -- CUDA ------------------------------------------------------------------------------------------------------


class FakeGraph:
    """torch's graph, without a device; ``failing`` at one of its calls."""

    failing: str | None = None

    def __init__(self):
        self.calls = []

    def _call(self, name, **options):
        self.calls.append((name, options))
        if self.failing == name:
            raise RuntimeError(f"{name} failed")

    def capture_begin(self, **options):
        self._call("begin", **options)

    def capture_end(self):
        self._call("end")

    def replay(self):
        self._call("replay")


@pytest.fixture
def fake_cuda(monkeypatch):
    """The calls that torch.cuda gets; nothing else of it may be touched."""
    ended = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *own: ended.append(own), raising=False)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: pytest.fail("the whole device is held up"))
    monkeypatch.setattr(FakeGraph, "failing", None)
    return ended


def test_a_capture_is_begun_and_ended_by_hand_and_shares_one_pool(fake_cuda):
    seen, capture = [], TorchCapture()
    replays = [capture.capture(lambda: seen.append(gc.isenabled())) for _ in range(2)]
    assert seen == [False, False]
    assert gc.isenabled()
    for replay in replays:
        replay()
        begin = ("begin", {"pool": (0, 7), "capture_error_mode": "thread_local"})
        assert replay.__self__.calls == [begin, ("end", {}), ("replay", {})]
    assert fake_cuda == []


@pytest.mark.parametrize("failing", ["begin", "work", "end"])
def test_a_capture_that_fails_leaves_neither_stream_nor_allocator_in_it(fake_cuda, monkeypatch, failing):
    monkeypatch.setattr(FakeGraph, "failing", failing)
    capture = TorchCapture()

    def work():
        if failing == "work":
            raise RuntimeError("work failed")

    with pytest.raises(RuntimeError, match=f"{failing} failed"):
        capture.capture(work)
    (graph,) = capture._failed
    assert graph.calls[-1] == ("end", {})
    assert fake_cuda == [(0, (0, 7))]
    assert gc.isenabled()


@needs_gpu
def test_on_a_device_captured_steps_say_what_eager_ones_do(tmp_path):
    for family in ("llama", "gemma3"):
        model = bound(tiny.build(tmp_path / family, family), "cuda")
        with torch.cuda.stream(torch.cuda.Stream()), warnings.catch_warnings():
            warnings.simplefilter("error")
            twins = Twins(model, TorchCapture())
            exercise(twins)
            pool = twins.graphs._capture._pool
            segments = [one for one in torch.cuda.memory_snapshot() if tuple(one["segment_pool_id"]) == pool]
            assert len(twins.graphs._captured) >= 5
            assert 0 < sum(one["total_size"] for one in segments) <= graphs.graph_bytes(model, ROWS, CAPACITY, 64)
