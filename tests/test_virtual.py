"""Virtual time: exact, in order, and loud when nothing can happen."""

import asyncio
import time

import pytest

from aspec.errors import DeadlockError
from aspec.planning.virtual_time import VirtualTimeLoop


def test_an_hour_passes_in_no_time(virtual):
    async def main():
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    begin = time.perf_counter()
    assert virtual(main) == 3600
    assert time.perf_counter() - begin < 5


def test_a_thousand_tenths_are_exactly_a_hundred(virtual):
    async def main():
        for _ in range(1000):
            await asyncio.sleep(0.1)
        return asyncio.get_running_loop().time()

    assert virtual(main) == pytest.approx(100.0, abs=1e-6)


def test_equal_deadlines_fire_in_the_order_they_were_set(virtual):
    async def main():
        fired = []
        loop = asyncio.get_running_loop()
        for i in range(50):
            loop.call_at(1.0, fired.append, i)
        await asyncio.sleep(2.0)
        return fired

    assert virtual(main) == list(range(50))


def test_waiting_for_nothing_is_an_error():
    loop = VirtualTimeLoop()
    with pytest.raises(DeadlockError):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_threads_are_refused(virtual):
    async def main():
        with pytest.raises(RuntimeError, match="threads"):
            asyncio.get_running_loop().run_in_executor(None, print)

    virtual(main)


def test_cancelled_timers_never_fire(virtual):
    async def main():
        fired = []
        handle = asyncio.get_running_loop().call_later(1.0, fired.append, 1)
        handle.cancel()
        async with asyncio.timeout(5):
            await asyncio.sleep(3)
        return fired

    assert virtual(main) == []
