"""The threads of kernels: whoever comes helps, whoever is late holds nobody up, and the bits stay the same."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from aspec.io.host_info import compiler
from aspec.models.compiled import products as compiled
from aspec.models.compiled.products import dense_product

pytestmark = pytest.mark.skipif(
    not compiler() or os.name != "posix", reason="without llvmlite or POSIX threads kernels have no team"
)


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    """Work for every thread, and the threads of before."""
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def operands():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 256), (300, 256))]


def test_callers_at_the_same_time_get_what_each_gets_alone():
    rows, weight = operands()
    torch.set_num_threads(1)
    alone = dense_product(rows, weight)
    wrong = []

    def call():
        torch.set_num_threads(3)
        for _ in range(300):
            if not torch.equal(dense_product(rows, weight), alone):
                wrong.append(True)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_team_that_sleeps_wakes_up():
    rows, weight = operands()
    torch.set_num_threads(1)
    alone = dense_product(rows, weight)
    torch.set_num_threads(4)
    for pause_s in (0.0, 0.0001, 0.02, 0.0, 0.05):
        time.sleep(pause_s)
        assert torch.equal(dense_product(rows, weight), alone)


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 100])
def test_every_output_is_computed_once_whatever_the_number_of_threads(count):
    """More threads than pieces, and pieces that do not divide the outputs."""
    rows, weight = torch.ones(1, 64).bfloat16(), torch.eye(count, 64).bfloat16()
    torch.set_num_threads(1)
    alone = dense_product(rows, weight)
    for threads in (2, 3, 7, 16):
        torch.set_num_threads(threads)
        assert torch.equal(dense_product(rows, weight), alone)


FORKED = """
import os, torch
from aspec.models.compiled import products as compiled
from aspec.models.compiled.products import dense_product
compiled.LEAST_WORK = 1
rows, weight = torch.randn(3, 256).bfloat16(), torch.randn(300, 256).bfloat16()
torch.set_num_threads(1)
alone = dense_product(rows, weight)
torch.set_num_threads(3)
assert torch.equal(dense_product(rows, weight), alone)
child = os.fork()
same = all(torch.equal(dense_product(rows, weight), alone) for _ in range(50))
if child == 0:
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert same and status == 0, (same, status)
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX forks")
def test_a_forked_process_has_a_team_of_its_own():
    """The copy of a process has none of its threads; and a process whose team sleeps ends at once."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "same\n", done.stderr
