"""Compute threads: how they wait, how many serve which kind of work, and that a run uses as many as its plan says."""

import os
import subprocess
import sys

import pytest
import torch

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.models.model import Model
from aspec.options import DEMO
from aspec.profiling import profile_cache, threads
from aspec.profiling.hardware import Hardware, Processor
from aspec.profiling.layer_ratios import measure_layer_ratios
from aspec.profiling.model_shape import LayerShape, ModelShape
from aspec.profiling.threads import GAIN, choose_threads, fastest, thread_counts
from aspec.threads import WAITING, Threads, asked_threads, wait_passively
from tests import tiny
from tests.test_hardware import measured, profile  # noqa: F401 - a fixture

# -- how they wait -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not imported torch, and whose user has said nothing of threads."""
    monkeypatch.delitem(sys.modules, "torch")
    for name in (*WAITING, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def test_idle_threads_sleep_unless_the_user_says_how_they_wait(fresh, monkeypatch):
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    for name in WAITING:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setenv(name, "1")
        before = dict(os.environ)
        wait_passively()
        assert dict(os.environ) == before
        monkeypatch.delenv(name)


def test_the_number_of_threads_says_nothing_of_how_they_wait(fresh, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_runtime_that_is_loaded_already_is_left_alone(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch)
    wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_aspec_sets_it_before_anything_imports_torch():
    code = "import aspec, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    own = {name: value for name, value in os.environ.items() if name not in WAITING}
    run = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["PASSIVE", "False"]


@pytest.mark.slow
@pytest.mark.skipif(threads.num_cores() < 2, reason="one core has no idle threads")
@pytest.mark.parametrize(("policy", "loop"), [("PASSIVE", False), ("ACTIVE", True)])
def test_the_probe_tells_how_idle_threads_wait(policy, loop):
    code = "from aspec.profiling.threads import idle_threads_loop; print(idle_threads_loop())"
    own = {name: value for name, value in os.environ.items() if name not in WAITING}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**own, "OMP_WAIT_POLICY": policy}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(loop)


# -- how many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "given", "found"),
    [("", None, None), ("3", None, 3), ("4,2", None, 4), ("3", 2, 2), ("0", None, None), ("many", None, None)],
)
def test_the_users_number_is_the_options_or_the_variables(monkeypatch, variable, given, found):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert asked_threads(given) == found


@pytest.mark.parametrize(
    ("cores", "loop", "on_device", "counts"),
    [
        (8, False, False, (1, 8)),
        (8, True, False, (7,)),  # a thread per core would wait for whatever else there is
        (8, False, True, (7,)),
        (1, False, False, (1,)),
        (2, True, False, (1,)),
    ],
)
def test_numbers_are_compared_where_idle_threads_sleep(monkeypatch, cores, loop, on_device, counts):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "num_cores", lambda: cores)
    monkeypatch.setattr(threads, "idle_threads_loop", lambda: loop)
    assert thread_counts(None, on_device=on_device) == counts
    assert thread_counts(5, on_device=on_device) == (5,)


def shape(hidden, layers=4):
    """A model whose layers have the weights of ``hidden`` outputs and inputs."""
    nbytes = 2 * hidden * hidden
    layer = LayerShape(project_bytes=2 * nbytes, rest_bytes=10 * nbytes, wide=12 * hidden)
    return ModelShape((layer,) * layers, hidden, 32000, 16, 4, 64, 64, head_bytes=0)


def machine(number, wake_s=4e-4):
    """Threads multiply what a core can do; waking them for a layer's products takes ``wake_s``."""
    fixed = 3e-4 + (number > 1) * wake_s
    rates = {"flop_per_s": {"bfloat16": number * 4e11}, "memory_bytes_per_s": 9e9 * min(number, 2)}
    return Hardware(cpu=Processor(layer_s=fixed, exact_layer_s=fixed, **rates))


MACHINES = {1: machine(1), 2: machine(2)}


def test_a_large_target_takes_all_cores_and_a_small_draft_one():
    assert choose_threads(MACHINES, shape(2048), shape(64), exact=True) == Threads(2, 2, 1, 2)
    assert choose_threads(MACHINES, shape(64), shape(2048), exact=True) == Threads(1, 1, 2, 2)
    assert choose_threads(MACHINES, shape(2048), None, exact=True) == Threads(2, 2, 2, 2)


def test_only_without_exactness_prompts_take_another_number_than_rows():
    sizes = range(64, 2048, 64)
    plain = [choose_threads(MACHINES, shape(hidden), None, exact=False) for hidden in sizes]
    assert any(found.prefill > found.decode for found in plain)
    exact = [choose_threads(MACHINES, shape(hidden), None, exact=True) for hidden in sizes]
    assert all(found.prefill == found.decode for found in exact)
    assert {found.decode for found in exact} == {1, 2}


def test_a_number_that_gains_little_leaves_the_cores_free():
    costs = {n: Seconds(n, seconds) for n, seconds in ((1, 1.0), (2, GAIN + 0.01))}
    assert fastest(costs, (1,)) == 1
    assert fastest({**costs, 4: Seconds(4, GAIN - 0.01)}, (1,)) == 4


class Seconds:
    """The cost of a model whose every pass takes the given seconds."""

    def __init__(self, number, seconds):
        self.seconds = seconds

    def layer_seconds(self, item):
        return self.seconds

    def head_seconds(self, rows, draws):
        return 0.0


def test_one_measured_number_needs_no_prices():
    assert choose_threads({3: None}, shape(64), None, exact=True) == Threads.all(3)


def test_products_of_looping_and_of_sleeping_threads_are_measured_apart(measured, tmp_path, monkeypatch):  # noqa: F811
    found = []
    for loop in (False, True):
        monkeypatch.setattr(profile_cache, "idle_threads_loop", lambda loop=loop: loop)
        found.append((profile(tmp_path, threads=1), profile(tmp_path, threads=2)))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_prices_of_exactness_and_of_threads_are_ratios_by_kind_of_pass():
    before = torch.get_num_threads()
    found = measure_layer_ratios(DEMO / "target", None, exact=True, threads=1, cores=2)
    assert found.exact.keys() == found.cores.keys() == {"row", "tree", "prompt"}
    assert min(*found.exact.values(), *found.cores.values()) > 0
    assert torch.get_num_threads() == before
    assert not measure_layer_ratios(DEMO / "target", None, exact=False, threads=1, cores=1).cores


# -- a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planned", [Threads(2, 2, 1), Threads(1, 3, 2)])
async def test_every_kind_of_work_runs_with_the_threads_of_the_plan(tmp_path, monkeypatch, planned):
    target = tiny.build(tmp_path / "target", "llama")
    draft = tiny.noisy_copy(target, tmp_path / "draft", 0.1)
    monkeypatch.setattr("aspec.engine.design.threads_for", lambda _: planned)
    seen = set()
    layer = Model.layer

    def recorded(self, index, activation):
        prompt = activation.input_ids.shape[1] == 8
        kind = "draft" if self.folder == draft else "prefill" if prompt else "decode"
        seen.add((kind, torch.get_num_threads()))
        return layer(self, index, activation)

    monkeypatch.setattr(Model, "layer", recorded)
    async with open_engine(
        target=target, draft=draft, num_draft_tokens=2, speculation="chain", max_context=64, device_memory=3 << 20
    ) as engine:
        assert engine.plan.request.threads == planned
        params = SamplingParams(max_new_tokens=6, ignore_eos=True)
        assert [piece async for piece in engine.stream(list(range(10, 18)), params)]
    expected = {("decode", planned.decode), ("prefill", planned.prefill), ("draft", planned.draft)}
    assert seen == expected
