"""Faults, cancels and determinism of whole runs in virtual time."""

import asyncio
import os
import subprocess
import sys

import pytest

from aspec.errors import DeadlockError
from aspec.planning.sim_backend import DEVICE_RESOURCES, HOST_RESOURCES, SimBackend, SimCosts
from aspec.tasks.executor import Executor
from aspec.tasks.op import Op
from aspec.tasks.scheduler import Scheduler
from aspec.tasks.task import CPU, RequestAdded, Shutdown
from tests.simulate import make_plan, simulate, trace_hash, with_experts

ARRIVALS = [(0, 20, 24), (1, 100, 12), (2, 5, 9), (3, 3, 3), (4, 170, 2), (5, 9, 14), (6, 30, 7)]


SPLIT = (Op.PROJECT, Op.SEND, Op.ATTEND, Op.RETURN, Op.FFN)
ON_DEMAND = (Op.ROUTE, Op.LOAD_EXPERT, Op.EXPERTS, Op.COMBINE)
ON_DEVICES = (Op.COPY, Op.SEND, Op.RETURN)


@pytest.mark.parametrize("op", Op)
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_fault_at_any_task_is_one_error_and_leaves_nothing(virtual, op, nth):
    resources = DEVICE_RESOURCES if op in ON_DEVICES else HOST_RESOURCES
    split = {"attention_resource": CPU, "micro_batches": 2} if op in SPLIT else {}
    plan = make_plan(num_staging=2 if op in ON_DEVICES else 0, decoded=1000 if op is Op.DECODE else 0, **split)
    plan = with_experts(plan) if op in ON_DEMAND else plan
    experts = plan.experts.shape if plan.experts else None
    backend = SimBackend(SimCosts(), resources, fail=(op, nth), experts=experts)

    async def main():
        with pytest.raises(OSError, match="injected fault") as caught:
            await simulate(plan, ARRIVALS, backend, resources=resources)
        assert any("while running" in note for note in caught.value.__notes__)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    virtual(main)
    assert backend.in_flight == 0
    assert backend.closed


def test_a_cancel_at_any_instant_settles(virtual):
    whole, _, _ = virtual(lambda: simulate(make_plan(), ARRIVALS))
    end = max(span.stop_s for span in whole)
    for i in range(40):
        backend = SimBackend(SimCosts())

        async def main(instant=end * (i + 0.5) / 41, backend=backend):
            run = asyncio.create_task(simulate(make_plan(), ARRIVALS, backend))
            await asyncio.sleep(instant)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert asyncio.all_tasks() == {asyncio.current_task()}

        virtual(main)
        assert backend.in_flight == 0


def test_the_same_run_gives_the_same_trace(virtual):
    traces = {trace_hash(virtual(lambda: simulate(make_plan(fixed_draft_tokens=None), ARRIVALS))[0]) for _ in range(10)}
    assert len(traces) == 1


def test_the_trace_does_not_depend_on_the_hash_seed():
    code = (
        "from tests.simulate import *; from aspec.planning.virtual_time import VirtualTimeLoop as L; "
        f"print(trace_hash(L().run_until_complete(simulate(make_plan(), {ARRIVALS}))[0]))"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    traces = set()
    for seed in ("0", "1", "4242"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True
        )
        traces.add(done.stdout.strip())
    assert len(traces) == 1
    assert len(traces.pop()) == 64


class _Stuck:
    """A policy that believes a pass is running, though it has emitted none."""

    done = False
    idle = False
    waits_for = ""

    def handle(self, events):
        return []


def test_an_idle_engine_waits_and_a_stuck_one_is_an_error(virtual):
    async def idle():
        executor = Executor(Scheduler(make_plan()), backend := SimBackend(SimCosts()))
        run = asyncio.create_task(executor.run())
        await asyncio.sleep(100.0)
        assert not run.done(), "no sequence: the engine waits"
        executor.post(RequestAdded(0, 4, 2))
        executor.post(Shutdown())
        await run
        await backend.close()

    virtual(idle)

    async def stuck():
        with pytest.raises(DeadlockError, match="no task runs"):
            await Executor(_Stuck(), SimBackend(SimCosts())).run()

    virtual(stuck)
