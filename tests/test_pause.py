"""A layer waits at its experts, in a greenlet or recorded, and goes on with their result as if it had not waited."""

import asyncio
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from aspec.backends.thread_lane import ThreadLane
from aspec.errors import InternalError
from aspec.models.experts import pause as pausing
from aspec.models.experts.pause import call_experts, run_to_experts
from aspec.models.experts.replay import once
from aspec.tasks.task import Completion


@pytest.fixture(params=["greenlets", "replay"])
def way(request, monkeypatch):
    if request.param == "replay":
        monkeypatch.setattr(pausing, "greenlet", None)
    else:
        pytest.importorskip("greenlet")
    return request.param


def forward(hidden, calls):
    """A layer: something before its experts, something that may happen once, and a residual."""
    before = hidden * 2.0
    once(lambda: calls.append(1), "a state")
    index = torch.tensor([[0, 1]]).expand(len(hidden), -1)
    made = call_experts(before + 1.0, index, torch.ones(index.shape))
    return made * 3.0 + before


def test_the_rest_of_a_layer_runs_with_the_result_of_its_experts(way):
    calls, hidden = [], torch.randn(3, 4)
    layer = run_to_experts(lambda: forward(hidden, calls))
    assert torch.equal(layer.hidden, hidden * 2.0 + 1.0)
    assert layer.index.shape == layer.weights.shape == (3, 2)
    result = torch.randn(3, 4)
    assert torch.equal(layer.resume(result), result * 3.0 + hidden * 2.0)
    assert calls == [1]


def test_layers_of_several_items_wait_at_the_same_time(way):
    several = [torch.randn(2, 4) for _ in range(3)]
    layers = [run_to_experts(lambda hidden=hidden: forward(hidden, [])) for hidden in several]
    for layer, hidden in reversed(list(zip(layers, several, strict=True))):
        assert torch.equal(layer.resume(hidden), hidden * 3.0 + hidden * 2.0)


def test_layers_that_do_not_do_as_they_should(way):
    with pytest.raises(InternalError, match="without a call of its experts"):
        run_to_experts(lambda: torch.zeros(1))

    def fails():
        raise ValueError("a family's own")

    with pytest.raises(ValueError, match="a family's own"):
        run_to_experts(fails)

    hidden = torch.zeros(2, 4)
    layer = run_to_experts(lambda: forward(forward(hidden, []), []))
    with pytest.raises(InternalError, match="calls its experts twice"):
        layer.resume(hidden)
    with pytest.raises(InternalError, match="ran as a whole"):
        call_experts(hidden, hidden, hidden)


def test_modes_and_settings_of_a_thread_are_those_of_the_step(way):
    """What surrounds the second half is not what surrounded the first."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    def layer():
        made = call_experts(torch.ones(2), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
        return made.neg()

    with torch.inference_mode():
        waiting = run_to_experts(layer)
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode(), Watch():
        made = waiting.resume(torch.ones(2))
    assert made.is_inference()
    assert torch.Tensor.neg in seen
    seen.clear()
    torch.ones(1)
    assert seen == []


async def test_a_thread_that_ends_frees_the_layers_that_wait_on_it():
    """Its frames hold views of buffers, and no other thread could end them."""
    pytest.importorskip("greenlet")
    refs, waiting = [], []

    def layer():
        held = torch.zeros(4)
        refs.append(weakref.ref(held))
        return call_experts(held, torch.zeros(4, 1, dtype=torch.long), held) + held

    def work():
        waiting.append(run_to_experts(layer))
        waiting[0] = waiting[0].resume  # the call's arguments hold the tensor, too
        return Completion(0.0, 0.0)

    lane = ThreadLane("layers", asyncio.get_running_loop())
    await lane.submit(work)
    assert refs[0]() is not None
    lane.close()
    assert refs[0]() is None


def test_layers_wait_on_several_threads(way):
    wrong = []

    def run():
        for _ in range(20):
            hidden = torch.randn(2, 4)
            layer = run_to_experts(lambda hidden=hidden: forward(hidden, []))
            if not torch.equal(layer.resume(hidden), hidden * 3.0 + hidden * 2.0):
                wrong.append(True)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


WITHOUT = """
import sys
sys.modules["greenlet"] = None
import torch
from aspec.models.experts.pause import abandon, call_experts, run_to_experts
hidden, index = torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.long)
layer = run_to_experts(lambda: call_experts(hidden * 2.0, index, torch.ones(2, 1)) + hidden)
assert torch.equal(layer.resume(layer.hidden), hidden * 3.0)
abandon()
print("done")
"""


def test_the_package_may_be_missing():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "done\n", done.stderr
