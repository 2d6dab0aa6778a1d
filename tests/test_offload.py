"""KV in host memory behind a device's link: what crosses, when, and that no bit and no token changes by it."""

import threading
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from aspec.backends import registry as devices
from aspec.backends.registry import Kind
from aspec.errors import BudgetError, InternalError, UnsupportedModelError
from aspec.models import frame
from aspec.models.attention import attend
from aspec.models.exact.paths import MaskKind
from aspec.models.kv_cache import KVCache, StepCache
from aspec.models.model import Model
from aspec.models.split_layer import project, to_host
from aspec.observe.chrome_trace import write_trace
from aspec.observe.recorder import Recorder
from aspec.observe.timeline import length, merge, shared
from aspec.observe.trace_reading import read_trace
from aspec.options import EngineOptions
from aspec.plan import Speculation, Tier, Workload
from aspec.planning.coarsening import coarse
from aspec.planning.footprint import read_models, request_for
from aspec.planning.placement import make_plan as plan_from
from aspec.planning.resolve import resolve
from aspec.planning.sim_backend import DEVICE_RESOURCES, SimCosts
from aspec.planning.simulation import measured_profile
from aspec.planning.workload import search_space
from aspec.profiling.hardware import Hardware, Processor
from aspec.tasks.cost_model import CostModel
from aspec.tasks.op import Op
from aspec.tasks.races import find_races
from aspec.tasks.task import COMPUTE, CPU, D2H, H2D_RESULTS, LayerWork, Span, Task, WorkItem
from tests import tiny
from tests.compat import few, in_both
from tests.fake_device import EagerDevice
from tests.simulate import asking, make_plan, simulate
from tests.test_equality import NAMED, OTHERS
from tests.test_split import DTYPES, SHAPES, busy, run, run_attention, say, split
from tests.trace_rules import check_trace, load

LATENT = ("deepseek_v2", "deepseek_v3")  # they keep something else on the device than what they attend to
STAGES = {Op.PROJECT: COMPUTE, Op.SEND: D2H, Op.ATTEND: CPU, Op.RETURN: H2D_RESULTS, Op.FFN: COMPUTE}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the maths ---------------------------------------------------------------------------------------------


def crossed(model, layer, activations):
    """All items between their halves at once; nothing that has crossed is looked at on the device any more."""
    for activation in activations:
        model.project(layer, activation)
        crossing = activation.split.host_attention
        crossing.device_result.fill_(float("nan"))
        model.send(activation)
        for tensor in crossing.device_arguments[: 3 if crossing.stores else 1]:
            tensor.fill_(float("nan"))
    threads = [threading.Thread(target=run_attention, args=(model, activation)) for activation in activations]
    for thread in threads:
        thread.start()
        thread.join()
    for activation in reversed(activations):
        model.bring_back(activation)
        model.finish(layer, activation)
        assert activation.split is None


def check_bits(family, dtype, folder):
    model = Model(tiny.build(folder / family, family, dtype=dtype))
    for exact in (False, True):
        (expected, kept), (found, hosted) = run(model, split, exact), run(model, crossed, exact, offloaded=True)
        for one, other in zip(expected, found, strict=True):
            if family in LATENT and not exact:  # expanded in products of another size
                torch.testing.assert_close(other, one, atol=0.03 if dtype is torch.bfloat16 else 1e-5, rtol=1e-3)
            else:
                assert torch.equal(one, other), f"{family}, exact: {exact}"
        if family not in LATENT:
            assert all(torch.equal(one, other) for one, other in zip(kept, hosted, strict=True))


@pytest.mark.parametrize(("family", "dtype"), in_both([*NAMED, "gemma3n_text"]), ids=str)
def test_attention_beside_kv_in_host_memory_gives_the_bits_of_a_split_layer(family, dtype, tmp_path):
    check_bits(family, dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", [*OTHERS, "granitemoeshared"])
def test_attention_beside_kv_in_host_memory_gives_those_bits_for_the_other_families(family, dtype, tmp_path):
    check_bits(family, dtype, tmp_path)


class Sides(TorchDispatchMode):
    """Tells device memory from host memory on a machine that has one kind: whatever a stage makes is on its side.

    Only a copy may meet both, where something crosses. Storages are kept, so that none is taken for another.
    """

    def __init__(self, weights):
        super().__init__()
        self.host = {}
        self.stage, self.crossings = "device", 0
        for tensor in weights:
            self.put(tensor, False)

    def at(self, stage, work, *args):
        self.stage, before = stage, self.stage
        try:
            return work(*args)
        finally:
            self.stage = before

    def put(self, tensor, host):
        storage = tensor.untyped_storage()
        self.host.setdefault(storage._cdata, (host, storage))

    def is_host(self, tensor):
        """What nobody has seen was made here from numbers."""
        self.put(tensor, self.stage in ("host", "send"))
        return self.host[tensor.untyped_storage()._cdata][0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        met = [self.is_host(one) for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        if self.stage in ("device", "host"):
            assert set(met) <= {self.stage == "host"}, f"{func} in {self.stage} memory meets the other"
        elif func is torch.ops.aten.copy_.default:
            assert met == [self.stage == "send", self.stage == "return"], "to and from"
            self.crossings += 1
        for one in tree_flatten(result)[0]:
            if isinstance(one, torch.Tensor):
                self.put(one, self.stage in ("host", "send"))
        return result


@torch.inference_mode()
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v3", "gemma3n_text", "phi3", "gpt2"])
def test_no_operation_meets_memory_of_both_sides(family, exact, tmp_path, monkeypatch):
    """What would be an error on two devices is one here: masks, positions, sinks, keys of other layers."""
    model = Model(tiny.build(tmp_path / family, family))
    streamed = tiny.Streamed(model)
    sides = Sides([*streamed.resident, *streamed.slots, streamed.scratch])
    shapes = model.kv_shapes(offloaded=True)

    mask = StepCache.mask
    monkeypatch.setattr(StepCache, "mask", lambda *args: sides.at("host", mask, *args))

    def cross(tensor, *_):
        return sides.at("return", lambda: torch.empty_like(tensor).copy_(tensor))

    monkeypatch.setattr(Model, "_on_layers_device", lambda model, step, tensor: cross(tensor))
    monkeypatch.setattr(frame, "upload", cross)
    with sides:
        cache = sides.at("host", lambda: KVCache(shapes, 3, 96, model.dtype, exact=exact, offloaded=True))
        for starts, parents in (([0, 0], None), ([9, 6], [[-1, 0, 0, 2], [-1]])):
            counts = [len(links) for links in parents] if parents else [9, 6]
            step = sides.at("host", cache.step, [0, 2], starts, counts, parents)
            activation = model.embed(torch.full((2, max(counts)), 7), step)
            for layer in range(model.num_layers):
                streamed.load(layer)
                model.project(layer, activation)
                sides.at("send", model.send, activation)
                sides.at("host", model.attend, activation)
                sides.at("return", model.bring_back, activation)
                model.finish(layer, activation)
            model.head(activation)
    assert sides.crossings >= 2 * 2 * model.num_layers


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "phi3", "deepseek_v3"])
def test_the_plan_counts_what_is_held_and_what_crosses(family, tmp_path):
    model = Model(tiny.build(tmp_path / family, family))
    streamed = tiny.Streamed(model)
    cache = KVCache(model.kv_shapes(offloaded=True), 3, 96, model.dtype, offloaded=True)
    activation = model.embed(torch.full((2, 70), 7), cache.step([0, 2], [0, 0], [70, 70]))
    most = 0
    for layer in range(model.num_layers):
        streamed.load(layer)
        model.project(layer, activation)
        most = max(most, activation.split.nbytes)
        crossing = activation.split.host_attention
        assert crossing.token_bytes == model.offload.crossing[layer]
        model.send(activation)
        arrived = [one for one in crossing.host_arguments if isinstance(one, torch.Tensor)]
        assert sum(one.nbytes for one in arrived) == 140 * model.offload.crossing[layer][0]
        assert crossing.host_result.nbytes == 140 * model.offload.crossing[layer][1]
        model.attend(activation)
        assert not crossing.device_arguments, "what has crossed is let go on the device"
        model.bring_back(activation)
        model.finish(layer, activation)
    assert most == pytest.approx(140 * model.offload.per_token, rel=0.05)


@torch.inference_mode()
def test_stages_out_of_turn_are_errors_and_no_results(tmp_path):
    model = Model(tiny.build(tmp_path, "llama"))
    streamed = tiny.Streamed(model)
    activations = []
    for offloaded in (True, False):
        cache = KVCache(model.kv_shapes(offloaded=offloaded), 1, 64, model.dtype, offloaded=offloaded)
        activations.append(model.embed(torch.full((1, 3), 7), cache.step([0], [0], [3])))
    streamed.load(0)
    crossed, beside = activations
    with pytest.raises(InternalError, match="must run split"):
        model.layer(0, crossed)
    with pytest.raises(InternalError, match="nothing to copy"):
        model.send(crossed)
    model.project(0, beside)
    with pytest.raises(InternalError, match="nothing to copy"):
        model.send(beside)
    model.project(0, crossed)
    for stage, match in ((model.attend, "before its queries"), (model.bring_back, "never sent")):
        with pytest.raises(InternalError, match=match):
            stage(crossed)
    model.send(crossed)
    model.attend(crossed)
    with pytest.raises(InternalError, match="attention twice"):
        model.finish(0, crossed)


class Converting(nn.Module):
    """A layer that attends to keys and values of another dtype than it stores."""

    def forward(self, hidden, step):
        heads = hidden[:, None]
        key, value = step.update(heads, heads, 0)
        return attend(self, heads.double(), key.double(), value.double(), ())[0]


@torch.inference_mode()
def test_what_the_host_cannot_keep_is_refused():
    step = KVCache([(1, 8, 8)], 1, 64, torch.float32, offloaded=True).step([0], [0], [3])
    hidden, layer = torch.randn(1, 3, 8), Converting()
    split_there = project(lambda: layer(hidden, step), hidden)
    with pytest.raises(InternalError, match="keys and values that cannot be stored"):
        to_host(split_there, step, 0, MaskKind(), stores=True)


def test_a_family_that_attends_twice_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, "diffllama", lambda: transformers.DiffLlamaConfig(**tiny.COMMON))
    model = Model(tiny.build(tmp_path, "diffllama"))
    with pytest.raises(UnsupportedModelError, match=r"diffllama: .* attention twice.*--attention device"):
        model.kv_shapes(offloaded=True)


# -- the schedule ------------------------------------------------------------------------------------------

ARRIVALS = ((0, 20, 16), (1, 150, 16), (2, 9, 12), (3, 30, 9))
LINK = SimCosts(disk_bytes_per_s=1e12, copy_bytes_per_s=25e9, d2h_bytes_per_s=20e9)
OUT, BACKWARD = 20_480, 16_384  # bytes of a token: 64 query heads and 8 of keys of 128, bf16


def offloaded_plan(**changes):
    shape = {"num_layers": 8, "num_slots": 8, "num_rows": 4, "tier": Tier.HOST, "micro_batches": 2, **changes}
    link = {"num_staging": 2, "draft_resource": "draft", "attention_resource": CPU}
    return make_plan(**link, crossing=((OUT, BACKWARD),) * shape["num_layers"], **shape)


def serve(virtual, plan, arrivals=ARRIVALS, profile=LINK):
    return virtual(lambda: simulate(plan, arrivals, None, profile, DEVICE_RESOURCES))[0]


def stages_of(spans):
    """The spans of every layer of every item, by stage."""
    found = defaultdict(dict)
    for span in spans:
        if span.task.op in STAGES:
            found[span.task.number, span.task.item.name, span.task.layer][span.task.op] = span
    return found


@pytest.mark.parametrize("how", ["off", *Speculation])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("items", [1, 2])
def test_every_layer_goes_out_and_comes_back_without_a_race(virtual, how, groups, items):
    most = {"max_draft_tokens": 0, "fixed_draft_tokens": None} if how == "off" else {"speculation": how}
    spans = serve(virtual, offloaded_plan(num_groups=groups, micro_batches=items, **most))
    assert find_races(spans) == []
    layers = stages_of(spans)
    assert len({name for _, name, _ in layers}) >= groups * items
    for stages in layers.values():
        assert {op: span.task.resource for op, span in stages.items()} == STAGES
        in_order = [stages[op] for op in STAGES]
        assert all(one.stop_s <= other.start_s for one, other in pairwise(in_order))
        tokens = stages[Op.SEND].task.item.padded_tokens
        assert stages[Op.SEND].task.nbytes == tokens * OUT
        assert stages[Op.RETURN].task.nbytes == tokens * BACKWARD
        stored = {op for op, span in stages.items() for one in span.task.writes if one.buffer.startswith("kv:")}
        assert stored == {Op.ATTEND}, "keys and values are stored where they are kept"
    assert Op.LAYER not in {span.task.op for span in spans}


def test_chunks_of_a_prompt_are_stored_in_their_order(virtual):
    spans = serve(virtual, offloaded_plan(num_rows=1), ((0, 300, 4),))
    attended = [s.task.item for s in sorted(spans, key=lambda s: s.start_s) if s.task.op is Op.ATTEND]
    chunks = [item.starts[0] for item in attended if item.prefill]
    assert chunks == [64 * chunk for _ in range(8) for chunk in range(5)]


def hidden_share(spans):
    """Of two items that decode: how much of the way and the attention of one lies beside the other's products."""
    aside, beside = busy(spans, Op.SEND, Op.ATTEND, Op.RETURN), busy(spans, Op.PROJECT, Op.FFN)
    assert set(aside) == {0, 1}
    return sum(shared(aside[i], beside[1 - i]) for i in (0, 1)) / sum(map(length, aside.values()))


@pytest.mark.parametrize("speculation", list(Speculation))
def test_an_item_is_on_its_way_and_attends_while_the_other_computes(virtual, speculation):
    """A layer is worth twice its attention, as where products bind; what crosses takes a tenth of it."""
    spans = serve(virtual, offloaded_plan(speculation=speculation))
    assert hidden_share(spans) > 0.8


@pytest.mark.parametrize("speculation", list(Speculation))
def test_the_stream_of_weights_does_not_rest_while_attention_is_under_way(virtual, speculation):
    """Where the link binds, a run takes as long as one whose attention costs nothing, plus what comes back over it."""
    plan = offloaded_plan(nbytes=400_000_000, speculation=speculation, fixed_draft_depth=4, draft_ahead=False)
    alone = asking(plan, attention_resource="compute", micro_batches=1)
    ends = [max(span.stop_s for span in serve(virtual, one, ((0, 20, 40), (1, 30, 40)))) for one in (plan, alone)]
    assert ends[0] < 1.02 * ends[1]
    spans = serve(virtual, plan, ((0, 20, 40), (1, 30, 40)))
    aside = merge((s.start_s, s.stop_s) for s in spans if s.task.op in (Op.SEND, Op.ATTEND, Op.RETURN))
    copies = merge((s.start_s, s.stop_s) for s in spans if s.task.op is Op.COPY)
    assert shared(aside, copies) > 0.9 * length(aside)


def test_what_comes_back_passes_the_weights_and_takes_its_time_from_them(virtual):
    plan = offloaded_plan(nbytes=400_000_000, max_draft_tokens=0, fixed_draft_tokens=None)
    spans = serve(virtual, plan)
    for stages in stages_of(spans).values():
        assert stages[Op.RETURN].start_s == stages[Op.ATTEND].stop_s, "it never waits behind weights"
    copies = sorted((s.start_s, s.stop_s) for s in spans if s.task.op is Op.COPY)
    back = sorted((s.start_s, s.stop_s) for s in spans if s.task.op is Op.RETURN)
    gaps = sum(b[0] - a[1] for a, b in pairwise(copies) if b[0] - a[1] < 1e-3)
    passed = sum(stop - start for start, stop in back if any(a < start < b for a, b in copies))
    assert gaps == pytest.approx(passed, rel=0.1), "there is one link"


def test_a_faster_way_out_shortens_what_crosses(virtual):
    seconds = []
    for rate in (2e9, 20e9):
        spans = serve(virtual, offloaded_plan(), profile=replace(LINK, d2h_bytes_per_s=rate))
        seconds.append(sum(span.stop_s - span.start_s for span in spans if span.task.op is Op.SEND))
    assert seconds[0] == pytest.approx(10 * seconds[1])


def test_merged_layers_let_as_much_cross():
    plan = offloaded_plan(num_layers=80, num_slots=160, nbytes=1000)
    crossing = tuple((OUT + layer, BACKWARD) for layer in range(80))
    merged, _ = coarse(replace(plan, crossing=crossing, expected_layer_s=((1, 0.5),)), LINK)
    assert merged.expected_layer_s[0][1] * merged.num_layers == pytest.approx(0.5 * plan.num_layers)
    assert merged.num_layers < 80
    assert len(merged.crossing) == merged.num_layers
    assert [sum(way) for way in zip(*merged.crossing, strict=True)] == [80 * OUT + sum(range(80)), 80 * BACKWARD]
    with pytest.raises(InternalError, match="crossing bytes are given for 3 of 80 layers"):
        replace(plan, crossing=crossing[:3])


@pytest.mark.parametrize(("num_items", "expected"), [(1, 3.0 + 4.0 + 5.0 + 2.0), (2, 10.0)])
def test_the_way_counts_as_the_attention_does(num_items, expected):
    """One item waits for all of it; of two, whatever takes longest is what a layer takes."""
    costs, items = CostModel(), [WorkItem(i, (i,), (5,), (4,)) for i in range(num_items)]
    seconds = {Op.PROJECT: 1.0, Op.SEND: 3.0, Op.ATTEND: 4.0, Op.RETURN: 5.0, Op.FFN: 1.0}
    for number in range(60):  # until nothing is left of what the model assumed before it measured
        for layer, item, (op, taken) in product(range(2), items, seconds.items()):
            task = Task(0, op, STAGES[op], 0, item=item, payload=LayerWork(layer), number=number)
            costs.observe(Span(task, 0.0, taken))
        costs.end_round(number, 0.0)
    plan = make_plan(num_layers=1, resident=(0, 1), num_slots=0)
    assert costs.round_seconds(plan, 4 * num_items, 0.0) == pytest.approx(expected, rel=1e-3)


def test_a_trace_shows_the_way_out_on_a_lane_of_its_own(tmp_path, virtual):
    plan, recorder = offloaded_plan(), Recorder()
    for span in serve(virtual, plan):
        recorder(span)
    timeline = recorder.timeline({"slots": plan.num_slots})
    assert timeline.lanes == ["h2d", "d2h", "target", "draft", "cpu"]
    write_trace(tmp_path / "t.json", {"aspec": timeline})
    events = check_trace(load(tmp_path / "t.json"))
    assert "d2h GB/s" in {event["name"] for event in events["C"]}
    free = [event["args"]["value"] for event in events["C"] if event["name"] == "free slots"]
    assert 0 <= min(free) <= max(free) <= plan.num_slots
    back = read_trace(tmp_path / "t.json")["aspec"]
    names = {one.name for lane in ("h2d", "d2h") for one in back.lane(lane)}
    assert {"copy 3", "L3 queries out", "L3 result back"} <= names
    for lane in ("h2d", "d2h"):
        for one, other in zip(timeline.lane(lane), back.lane(lane), strict=True):
            assert (one.name, one.round, one.layer, one.part, one.tokens) == (
                (other.name, other.round, other.layer, other.part, other.tokens)
            )
    measured = measured_profile(back)
    assert measured.d2h_bytes_per_s == pytest.approx(20e9, rel=0.02)
    assert measured.copy_bytes_per_s == pytest.approx(25e9, rel=0.02)


# -- the engine --------------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.fixture
def card(monkeypatch):
    """A device behind a link, on a machine without one."""
    kind = Kind(torch.device("cpu"), lambda: True, lambda: 1 << 34, lambda: EagerDevice(pace_s=1e-4), lambda: "a card")
    monkeypatch.setitem(devices.KINDS, "cuda", kind)


def test_host_memory_is_planned_for_and_bounded(card):
    options = EngineOptions(
        device="cuda", attention="cpu", device_memory=36 * MIB, max_context=128, host_memory=1 << 30
    )
    models = read_models(resolve(options))
    request = request_for(models)
    plan = plan_from(models.footprint(request), request)
    rows = request.num_rows * KVCache.bytes_per_token(models.target.kv_shapes(offloaded=True), models.target.dtype)
    assert plan.kv_on_host
    assert plan.crossing == models.target.offload.crossing
    assert plan.host_arithmetic["KV cache"] == rows * (request.capacity + 1)
    assert plan.host_arithmetic["draft trees"] == rows * request.max_draft_tokens
    assert min(plan.host_arithmetic["crossing"], plan.host_arithmetic["attention"]) > 0
    beside = replace(request, attention_resource=COMPUTE, micro_batches=1)
    other = plan_from(models.footprint(beside), beside)
    on_device = [one.arithmetic["KV cache"] + one.arithmetic["draft trees"] for one in (plan, other)]
    assert on_device[1] - on_device[0] == rows * (request.capacity + 1 + request.max_draft_tokens)
    assert "crossing" not in other.host_arithmetic
    needed = sum(plan.host_arithmetic.values()) - plan.host_arithmetic["pinned layers"]
    small = replace(request, host_bytes=needed - 1)
    with pytest.raises(BudgetError, match=r"host memory of .* is too small .* KV cache .* crossing .*--host-memory"):
        plan_from(models.footprint(small), small)
    everything = replace(small, budget_bytes=1 << 30)
    with pytest.raises(BudgetError, match="host memory of"):
        plan_from(models.footprint(everything), everything)


def test_a_search_leaves_out_what_a_family_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, "diffllama", lambda: transformers.DiffLlamaConfig(**tiny.COMMON))
    machine = Hardware(h2d_bytes_per_s=2.5e10, device=Processor())
    for family, places in (("llama", (COMPUTE, CPU)), ("diffllama", (COMPUTE,))):
        options = EngineOptions(target=tiny.build(tmp_path / family, family))
        assert search_space(read_models(resolve(options)), machine, Workload(8, 20, 20)).attention == places


@pytest.mark.parametrize("groups", few([2, 1], 1))
@pytest.mark.parametrize(("family", "shape"), [("llama", "tree"), ("gemma3n_text", "chain"), ("gpt_oss", "off")])
def test_tokens_are_those_of_the_host(card, family, shape, groups, tmp_path):
    target = tiny.build(tmp_path / "target", family, varied=True)
    draft = None if shape == "off" else tiny.noisy_copy(target, tmp_path / "draft", 0.05)
    common = {"speculation": SHAPES[shape][0], "num_draft_tokens": SHAPES[shape][1], "exact": True}
    common |= {"prefill_tokens": 16, "attention": "cpu", "resident_memory": 60_000}
    expected, _ = say(target, draft, device="cpu", **common)
    spans = []
    found, plan = say(target, draft, [spans.append], device="cuda", num_groups=groups, host_memory=1 << 24, **common)
    assert found == expected
    assert plan.kv_on_host
    assert find_races(spans) == []
    layers = stages_of(spans)
    assert all(set(stages) == set(STAGES) for stages in layers.values())
    assert {layer for _, _, layer in layers} == set(range(plan.num_layers))
    assert all(span.task.nbytes for span in spans if span.task.op in (Op.SEND, Op.RETURN))
