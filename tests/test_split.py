"""Layers in three tasks, attention on the CPU's lane: the same bits, and one item attends while another computes."""

import asyncio
import itertools
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from aspec.engine.engine import open_engine
from aspec.engine.model_runner import ModelRunner
from aspec.errors import InternalError, UnsupportedModelError
from aspec.generation.params import SamplingParams
from aspec.models.attention import attend
from aspec.models.kv_cache import KVCache
from aspec.models.model import Model
from aspec.models.split_layer import attend_to, finish, project
from aspec.observe.timeline import merge, shared
from aspec.plan import Speculation
from aspec.planning.sim_backend import SimCosts
from aspec.tasks.cost_model import CostModel
from aspec.tasks.layers.buffers import attention_buffer, rows_kv_buffer
from aspec.tasks.layers.weights import Numbering, WeightStream
from aspec.tasks.op import Op
from aspec.tasks.passes import Emission
from aspec.tasks.races import find_races
from aspec.tasks.rows import micro_batches
from aspec.tasks.task import CPU, NOTHING, Access, LayerWork, RowOutcome, Span, Task, WorkItem
from tests import tiny
from tests.compat import KINDS, in_both, marked
from tests.simulate import make_plan, simulate
from tests.test_equality import NAMED, OTHERS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TREE = [[-1, 0, 0, 2], [-1], [-1, 0, 1, 0, 3, 4]]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the maths ---------------------------------------------------------------------------------------------


def whole(model, layer, activations):
    for activation in activations:
        model.layer(layer, activation)


def split(model, layer, activations):
    """All items between their halves at once, each attending on a thread of its own, finished in another order."""
    for activation in activations:
        model.project(layer, activation)
    threads = [threading.Thread(target=run_attention, args=(model, activation)) for activation in activations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for activation in reversed(activations):
        model.finish(layer, activation)
        assert activation.split is None


@torch.inference_mode()
def run_attention(model, activation):
    torch.get_num_threads()
    model.attend(activation)


@torch.inference_mode()
def run(model, how, exact, offloaded=False):
    """Ragged prompts, a later chunk, trees; rows apart and side by side. Logits of all, and what the cache holds."""
    shapes = model.kv_shapes(offloaded=offloaded)
    streamed, cache = tiny.Streamed(model), KVCache(shapes, 4, 96, model.dtype, exact=exact, offloaded=offloaded)
    generator = torch.Generator().manual_seed(1)
    passes = [
        [([0, 2], [0, 0], [20, 9], None), ([1], [0], [13], None)],
        [([0, 2], [20, 9], [1, 3], None), ([1], [13], [18], None), ([3], [0], [2], None)],
        [([0, 1, 2], [21, 31, 12], [4, 1, 6], TREE), ([3], [2], [1], None)],
    ]
    logits = []
    for items in passes:
        activations = []
        for rows, starts, counts, parents in items:
            ids = torch.randint(3, tiny.VOCAB, (len(rows), max(counts)), generator=generator)
            activations.append(model.embed(ids, cache.step(rows, starts, counts, parents)))
        for layer in range(model.num_layers):
            streamed.load(layer)
            how(model, layer, activations)
            for part in streamed.of(layer):
                model.unbind(part)
        logits += [model.head(activation) for activation in activations]
    trash = cache.capacity  # takes what nobody reads
    return logits, [kept[:, :, :trash] for kept in (*cache.keys, *cache.values) if kept is not None]


def check_bits(family, dtype, folder):
    model = Model(tiny.build(folder / family, family, dtype=dtype))
    for exact in (False, True):
        for expected, found in zip(run(model, whole, exact), run(model, split, exact), strict=True):
            for one, other in zip(expected, found, strict=True):
                assert torch.equal(one, other), f"{family}, exact: {exact}"


@pytest.mark.parametrize(("family", "dtype"), in_both([*NAMED, "gemma3n_text"]), ids=str)
def test_a_split_layer_gives_the_bits_of_a_whole_one(family, dtype, tmp_path):
    check_bits(family, dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", [*OTHERS, "granitemoeshared"])
def test_a_split_layer_gives_the_bits_of_a_whole_one_for_the_other_families(family, dtype, tmp_path):
    check_bits(family, dtype, tmp_path)


@torch.inference_mode()
@pytest.mark.parametrize("family", marked([*NAMED, "gemma3n_text", "gemma4_text", "llama4_text"]))
def test_the_plan_counts_what_a_split_layer_holds(family, tmp_path):
    model = Model(tiny.build(tmp_path / family, family))
    streamed, cache = tiny.Streamed(model), KVCache(model.kv_shapes(), 3, 96, model.dtype)
    activation = model.embed(torch.full((2, 70), 7), cache.step([0, 2], [0, 0], [70, 70]))
    per_token, per_slot = model.split_bytes
    most = 0
    for layer in range(model.num_layers):
        streamed.load(layer)
        model.project(layer, activation)
        call = activation.split.call
        model.attend(activation)
        activation.split.call = call  # at the end of the attention both are there
        most = max(most, activation.split.nbytes)
        model.finish(layer, activation)
    assert most == pytest.approx(2 * 70 * per_token + 2 * 96 * per_slot, rel=0.05)


class Careless(nn.Module):
    """A layer that alters what it was given and what it has computed, before and behind its attention."""

    def __init__(self, times=1):
        super().__init__()
        self.times = times
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64)
        self.linears = 0

    def forward(self, hidden):
        hidden += 1
        states = self.inner(hidden)
        states *= 0.5
        states[..., :3] = 0.25
        apart = states.clone()
        apart.mul_(3.0)  # memory of its own: computed in both halves
        heads = states.view(1, -1, 4, 16).transpose(1, 2)
        mask = torch.ones(1, 1, heads.shape[2], heads.shape[2], dtype=torch.bool)
        for _ in range(self.times):
            mixed = attend(self, heads, heads, heads, mask)[0].reshape(hidden.shape)
        hidden.mul_(2.0)
        return hidden + states + apart + self.outer(mixed)


@torch.inference_mode()
def test_what_a_layer_alters_is_altered_once():
    torch.manual_seed(0)
    layer, given = Careless(), torch.randn(1, 5, 64)
    hidden = given.clone()
    made = project(lambda: layer(hidden), hidden)
    attend_to(made)
    assert torch.equal(finish(lambda: layer(hidden), made), layer(given.clone()))
    assert not made.recorded
    assert made.call is made.output is None


@torch.inference_mode()
@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_does_not_attend_once_is_an_error_and_no_result(times):
    hidden = torch.randn(1, 5, 64)
    layer = Careless(max(1, times))

    def forward():
        return layer(hidden) if times else layer.outer(hidden)

    def in_pieces():
        made = project(forward, hidden)
        attend_to(made)
        finish(forward, made)

    with pytest.raises(InternalError, match="without its attention" if not times else "attention twice"):
        in_pieces()


@torch.inference_mode()
def test_a_layer_that_computes_otherwise_the_second_time_is_an_error():
    hidden, layer = torch.randn(1, 5, 64), Careless()
    made = project(lambda: layer(hidden), hidden)
    attend_to(made)
    with pytest.raises(InternalError, match="first half did not call it"):
        finish(lambda: layer(torch.bmm(hidden, hidden.mT) @ hidden), made)


# -- the engine --------------------------------------------------------------------------------------------


def say(target, draft, spans=(), **options):
    """Tokens with their logprobs of three ragged prompts, and the plan."""

    async def one(engine, length):
        params = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=0)
        pieces = [piece async for piece in engine.stream(list(range(5, 5 + length)), params)]
        return [(token.token, token.logprob) for piece in pieces for token in piece.logprobs]

    async def main():
        options_here = {"max_batch": 3, "max_context": 80, "threads": 1, "device_memory": 24 << 20, **options}
        async with open_engine(observers=[*spans], target=target, draft=draft, **options_here) as engine:
            return await asyncio.gather(*(one(engine, length) for length in (23, 20, 11))), engine.plan

    return asyncio.run(main())


SHAPES = {"off": ("off", None), "chain": ("chain", 4), "tree": ("tree", 9)}
HOW = list(itertools.product(SHAPES, ("exact", "not exact")))


@pytest.mark.parametrize(
    ("family", "shape", "exactness"),
    [
        pytest.param(family, *HOW[i % len(HOW)], marks=() if family in KINDS else pytest.mark.slow)
        for i, family in enumerate(NAMED)
    ],
)
def test_attention_on_the_cpu_lane_changes_no_token(family, shape, exactness, tmp_path):
    """fp32; without exact steps the logprobs are equal up to what the size of a pass does to rounding."""
    target = tiny.build(tmp_path / "target", family, varied=True)
    draft = None if shape == "off" else tiny.noisy_copy(target, tmp_path / "draft", 0.05)
    common = {"speculation": SHAPES[shape][0], "num_draft_tokens": SHAPES[shape][1], "exact": exactness == "exact"}
    common |= {"prefill_tokens": 16, "resident_memory": 60_000}
    expected, plan = say(target, draft, attention="device", **common)
    assert (plan.attention_resource, plan.micro_batches) == ("compute", 1)
    spans = []
    found, plan = say(target, draft, [spans.append], attention="cpu", **common)
    assert (plan.attention_resource, plan.micro_batches) == (CPU, 2)
    assert find_races(spans) == []
    if exactness == "exact":
        assert found == expected
    for row, wanted in zip(found, expected, strict=True):
        assert [token for token, _ in row] == [token for token, _ in wanted]
        assert [logprob for _, logprob in row] == pytest.approx([logprob for _, logprob in wanted], abs=1e-3)
    check_order(spans, plan.num_layers)
    decoding = {span.task.item.index for span in spans if span.task.op is Op.FFN and not span.task.item.prefill}
    assert decoding == {0, 1}


def check_order(spans, num_layers):
    """Every layer of every item in three tasks, one behind the other, attention where it belongs."""
    layers = [(span, span.task) for span in spans if span.task.item is not None and span.task.layer is not None]
    at = {(task.number, task.item.name, task.layer, task.op): span for span, task in layers}
    items = {key[:2] for key in at if key[3] is Op.FFN}
    assert items
    assert Op.LAYER not in {key[3] for key in at}
    for (number, name), layer in itertools.product(items, range(num_layers)):
        stages = [at[number, name, layer, op] for op in (Op.PROJECT, Op.ATTEND, Op.FFN)]
        assert [stage.task.resource for stage in stages] == ["compute", CPU, "compute"]
        assert all(one.stop_s <= other.start_s for one, other in itertools.pairwise(stages))


def test_a_family_that_attends_twice_in_a_layer_is_refused_for_this_only(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, "diffllama", lambda: transformers.DiffLlamaConfig(**tiny.COMMON))
    target = tiny.build(tmp_path / "target", "diffllama", varied=True)
    tokens, _ = say(target, None, attention="device")
    assert len(tokens[0]) == 8
    with pytest.raises(UnsupportedModelError, match=r"diffllama: .* attention twice.*--attention device"):
        say(target, None, attention="cpu")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_a_lane_that_begins_with_attention_takes_no_more_threads_than_were_given():
    states, counts = torch.randn(8, 512, 512), []

    class Target:
        @staticmethod
        def attend(activation):
            counts.append(len(os.listdir("/proc/self/task")))
            torch.matmul(states, states)
            counts.append(len(os.listdir("/proc/self/task")))

    runner = ModelRunner(Target(), None, None)
    item = WorkItem(0, (0,), (0,), (1,))
    runner._activations[item.name] = None
    results = []
    task = Task(0, Op.ATTEND, CPU, 0, item=item, payload=LayerWork(0))
    lane = threading.Thread(target=lambda: results.append(runner.run(task)))
    lane.start()
    lane.join()
    assert results == [NOTHING]
    assert counts[1] <= counts[0], "the first product of a thread took cores of its own"


# -- the schedule ------------------------------------------------------------------------------------------

ARRIVALS = ((0, 20, 16), (1, 40, 16), (2, 9, 12))
FAST = SimCosts(disk_bytes_per_s=1e12)


def split_plan(**changes):
    return make_plan(attention_resource=CPU, **{"micro_batches": 2, **changes})


def busy(spans, *ops):
    """Stretches by item in which its tasks of these kinds ran, in passes with two items that decode."""
    found = {}
    both = {s.task.number for s in spans if s.task.op is Op.FFN and s.task.item.index == 1 and not s.task.item.prefill}
    for span in spans:
        if span.task.op in ops and span.task.number in both and not span.task.item.prefill:
            found.setdefault(span.task.item.index, []).append((span.start_s, span.stop_s))
    return {index: merge(stretches) for index, stretches in found.items()}


@pytest.mark.parametrize("speculation", list(Speculation))
def test_an_item_attends_while_the_other_computes(virtual, speculation):
    plan = split_plan(num_layers=8, num_slots=8, speculation=speculation)
    spans, _, _ = virtual(lambda: simulate(plan, ARRIVALS, profile=FAST))
    assert find_races(spans) == []
    attending, rest = busy(spans, Op.ATTEND), busy(spans, Op.FFN)
    projecting = busy(spans, Op.PROJECT)
    assert shared(attending[0], projecting[1]) > 0
    assert shared(attending[1], rest[0]) > 0
    assert shared(attending[0], rest[1]) > 0, "a layer of the first item begins before the second ends the one before"
    hidden = sum(shared(attending[i], merge([*rest[1 - i], *projecting[1 - i]])) for i in (0, 1))
    assert hidden > 0.8 * sum(stop - start for own in attending.values() for start, stop in own)


def test_two_items_are_done_sooner_than_one_by_what_is_hidden(virtual):
    """Where seconds go by tokens, of which a quarter is attention."""
    profile = SimCosts(disk_bytes_per_s=1e12, layer_token_s=5e-4, layer_s=0.0)

    def seconds(**changes):
        plan = make_plan(num_slots=8, num_layers=8, max_draft_tokens=0, fixed_draft_tokens=0, **changes)
        spans, _, _ = virtual(lambda: simulate(plan, ((0, 5, 40), (1, 5, 40)), None, profile))
        rest = sum(span.stop_s - span.start_s for span in spans if span.task.layer is None)
        return max(span.stop_s for span in spans) - rest

    whole_s, alone_s = seconds(), seconds(attention_resource=CPU)
    assert alone_s == pytest.approx(whole_s, rel=0.05), "one item alone hides nothing"
    assert seconds(attention_resource=CPU, micro_batches=2) == pytest.approx(0.75 * alone_s, rel=0.1)


def emitted(items, **changes):
    """The tasks of the layers of one pass, and the plan."""
    plan, next_id = split_plan(num_layers=2, **changes), Numbering()
    stream = WeightStream(plan, next_id)
    stream.fill()
    tasks = Emission(0, items, stream, None, next_id, plan, lambda _: ()).advance()
    return [(task.op, task.item.index) for task in tasks if task.layer == 0 and task.item], tasks


def test_all_project_before_any_attends_and_all_attend_before_any_ends():
    items = [WorkItem(i, (i,), (5,), (2,)) for i in range(2)]
    order, tasks = emitted(items)
    assert order == list(itertools.product((Op.PROJECT, Op.ATTEND, Op.FFN), (0, 1)))
    for task in tasks:
        if task.op in (Op.PROJECT, Op.FFN):
            assert task.slots, "the slots are in use from the projections to the end of the layer"
            assert {access.buffer for access in task.reads} >= {f"slot:{slot}" for _, slot in task.slots}


def test_chunks_of_a_prompt_follow_each_other_at_every_layer():
    """A chunk's keys lie where the chunk before it looks: it is stored behind that one's attention."""
    chunks = [WorkItem(i, (3,), (16 * i,), (16,), prefill=True, samples=i == 3) for i in range(4)]
    order, tasks = emitted([*chunks])
    at = {pair: place for place, pair in enumerate(order)}
    for i in range(3):
        assert at[Op.ATTEND, i] < at[Op.PROJECT, i + 1] < at[Op.FFN, i]
    kv = rows_kv_buffer(chunks[0], 0)
    assert {rows_kv_buffer(chunk, 0) for chunk in chunks} == {kv}
    written = [task.item.index for task in tasks if task.layer == 0 for access in task.writes if access.buffer == kv]
    assert written == [0, 1, 2, 3]


def test_prompts_take_turns_in_two_buffers():
    prompts = [WorkItem(1 + i, (1 + i,), (0,), (16,), prefill=True) for i in range(5)]
    decoding = [WorkItem(0, (0,), (5,), (2,))]
    order, _ = emitted([*decoding, *prompts])
    assert len({attention_buffer(item) for item in prompts}) == 2
    open_items, most = set(), 0
    for op, index in order:
        open_items = open_items | {index} if op is Op.PROJECT else open_items - ({index} if op is Op.FFN else set())
        most = max(most, len(open_items))
    assert most == 3, "the decoding rows and two prompts"


def test_converted_weights_stay_until_every_item_has_left_the_layer(virtual):
    plan = split_plan(num_layers=2)
    plan = replace(plan, parts=tuple(replace(part, scratch_bytes=100, decoded_bytes=100) for part in plan.parts))
    spans, _, _ = virtual(lambda: simulate(plan, ARRIVALS))
    assert find_races(spans) == []
    uses = [span for span in spans if any(access.buffer.startswith("scratch:") for access in span.task.reads)]
    assert {span.task.op for span in uses} == {Op.PROJECT, Op.FFN}


@pytest.mark.parametrize("counts", [(1,), (1, 1), (5, 5, 5), (1, 9, 1, 1), (9, 1, 1, 1), (1, 1, 1, 9), (3,) * 9])
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_rows_are_divided_evenly_and_keep_their_order(counts, most):
    whole_item = WorkItem(0, tuple(range(2, 2 + len(counts))), tuple(7 * n for n in counts), counts, group=3)
    items = micro_batches(whole_item, most)
    assert 1 <= len(items) <= min(most, len(counts))
    assert [item.index for item in items] == list(range(len(items)))
    for name in ("rows", "starts", "counts"):
        assert sum((getattr(item, name) for item in items), ()) == getattr(whole_item, name)
    assert {item.group for item in items} == {3}
    fair = whole_item.num_tokens / most
    assert all(item.num_tokens <= fair + max(counts) for item in items)
    if most <= len(counts) and len(set(counts)) == 1:
        assert len(items) == most


# -- the costs ---------------------------------------------------------------------------------------------


ROUNDS = 60  # until nothing is left of what the model assumed before it measured


def learn(costs, op, item, layer, start, stop, number=0):
    costs.observe(Span(Task(0, op, "compute", 0, item=item, payload=LayerWork(layer), number=number), start, stop))


@pytest.mark.parametrize(("num_items", "attention", "expected"), [(1, 3.0, 6.0), (2, 1.0, 6.0), (2, 4.0, 8.0)])
def test_a_split_layer_is_learned_as_a_whole(num_items, attention, expected):
    """Seconds of a layer over all items: what two of them hide of their attention counts once."""
    costs, items = CostModel(), [WorkItem(i, (i,), (5,), (4,)) for i in range(num_items)]
    for number, layer in itertools.product(range(ROUNDS), range(2)):
        for item in items:
            learn(costs, Op.PROJECT, item, layer, 0.0, 1.0, number)
            learn(costs, Op.ATTEND, item, layer, 0.0, attention, number)
        for item in items:
            learn(costs, Op.FFN, item, layer, 0.0, 2.0, number)
        if layer:
            costs.end_round(number, 0.0)
    plan = make_plan(num_layers=1, resident=(0, 1), num_slots=0)
    assert costs.round_seconds(plan, 4 * num_items, 0.0) == pytest.approx(expected, rel=1e-3)


def test_a_round_of_several_items_is_one_sample_of_speed():
    costs, items = CostModel(), [WorkItem(i, (i,), (5,), (1,)) for i in range(2)]
    for number in range(50):
        start = 10.0 * number
        for item in items:
            learn(costs, Op.EMBED, item, -1, start, start + 1, number)
        for item, stop in zip(items, (start + 8, start + 10), strict=True):
            task = Task(0, Op.ACCEPT, CPU, 0, (Access("a", "b"),), item=item, number=number)
            costs.observe(Span(task, stop - 1, stop, (RowOutcome(item.index, 0, 0, 5, False),)))
        costs.end_round(number, start + 10)
    assert costs.tokens_per_s == pytest.approx(1.0, rel=0.01)
