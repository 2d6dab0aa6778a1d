"""What a long-lived process keeps: memory, threads and descriptors stay flat, whatever it generates and cancels."""

import asyncio
import ctypes
import gc
import random
import threading

import psutil
import pytest

from aspec.api import collect, run
from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from tests import tiny

pytestmark = pytest.mark.slow
SHAPES = {
    "chain": {"speculation": "chain", "num_draft_tokens": 4},
    "tree": {"speculation": "tree", "num_draft_tokens": 12},
    "auto": {},
    "off": {"speculation": "off"},
}
GROWTH = 1.02  # of the resident bytes in the second half


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target = tiny.build(tmp_path_factory.mktemp("soak") / "target", "llama", varied=True)
    return target, tiny.noisy_copy(target, target.parent / "draft", 0.1)


def opened(pair, **more):
    return open_engine(target=pair[0], draft=pair[1], device_memory=6 << 20, max_context=192, threads=1, **more)


class Footprints:
    """What the process holds after every step; freed memory is returned to the system first."""

    def __init__(self):
        self.taken = []
        self.process, self.libc = psutil.Process(), ctypes.CDLL(None)

    def take(self):
        gc.collect()
        if hasattr(self.libc, "malloc_trim"):
            self.libc.malloc_trim(0)
        self.taken.append((self.process.memory_info().rss, threading.active_count(), self.process.num_fds()))

    def check_flat(self, what):
        half = len(self.taken) // 2
        first, second = self.taken[half], self.taken[-1]
        print(f"{what}: resident bytes, threads, descriptors after each step: {self.taken}")
        assert second[0] <= GROWTH * first[0], f"{first[0]} bytes, then {second[0]}"
        assert second[1:] == first[1:], "threads and descriptors"


def any_prompt(noise):
    return "".join(noise.choice("abcdef \n") for _ in range(noise.randint(1, 60)))


def any_params(noise):
    params = {"max_new_tokens": noise.randint(1, 100), "seed": noise.randrange(1000)}
    params |= noise.choice([{}, {"temperature": 0.9}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.2}])
    return SamplingParams(**params | noise.choice([{}, {"ignore_eos": True}, {"stop": ("e", "aa")}, {"logprobs": 3}]))


def test_generations_in_one_engine_leave_nothing(pair):
    noise, footprints = random.Random(1), Footprints()

    async def main():
        async with opened(pair, max_batch=4, **SHAPES["tree"]) as engine:
            for _ in range(10):
                for _ in range(3):
                    await asyncio.gather(*(collect(engine, any_prompt(noise), any_params(noise)) for _ in range(4)))
                footprints.take()

    run(main)
    footprints.check_flat("120 generations")


def test_openings_in_one_process_leave_nothing(pair):
    noise, footprints = random.Random(2), Footprints()

    async def once(shape, rows):
        async with opened(pair, max_batch=rows, **shape) as engine:
            await asyncio.gather(*(collect(engine, any_prompt(noise), any_params(noise)) for _ in range(rows)))

    for _ in range(5):
        for index, shape in enumerate([*SHAPES.values()] * 2):
            run(lambda shape=shape, rows=1 + index % 4: once(shape, rows))
        footprints.take()
    footprints.check_flat("40 openings")


def test_streams_that_are_cancelled_at_random_leave_nothing_and_spoil_nothing(pair):
    noise, footprints = random.Random(3), Footprints()
    prompt, params = "the same words as before", SamplingParams(max_new_tokens=40, temperature=0.8, ignore_eos=True)

    async def begin_and_cancel(engine):
        task = asyncio.ensure_future(collect(engine, any_prompt(noise), any_params(noise)))
        await asyncio.wait([task], timeout=noise.choice([0, 0.001, 0.01, 0.05]))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def main():
        async with opened(pair, max_batch=4, **SHAPES["chain"]) as engine:
            expected = (await collect(engine, prompt, params)).token_ids
            for _ in range(10):
                for _ in range(4):
                    await asyncio.gather(*(begin_and_cancel(engine) for _ in range(5)))
                assert (await collect(engine, prompt, params)).token_ids == expected
                footprints.take()

    run(main)
    footprints.check_flat("200 streams")
