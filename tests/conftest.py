"""Fixtures shared by all tests: leaks are failures. Coroutine tests run without pytest-asyncio too."""

import asyncio
import inspect
import os
import threading
from dataclasses import replace

import pytest
import torch

from aspec import devices
from aspec.virtual import VirtualTimeLoop

torch.cuda.is_available()  # settles what this process sees of a GPU; those that tests start see none
os.environ["CUDA_VISIBLE_DEVICES"] = ""
devices.KINDS["cuda"] = replace(devices.KINDS["cuda"], available=lambda: False)  # unless a test brings a device


def pytest_addoption(parser, pluginmanager):
    """Without the plugin its settings in pyproject.toml would be unknown ones."""
    if not pluginmanager.hasplugin("asyncio"):
        for setting in ("asyncio_mode", "asyncio_default_fixture_loop_scope"):
            parser.addini(setting, "of pytest-asyncio, which is not here")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A coroutine test in a loop of its own, where no plugin does that; coroutine fixtures still need the plugin."""
    if pyfuncitem.config.pluginmanager.hasplugin("asyncio") or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


@pytest.fixture(autouse=True)
def no_thread_left():
    """No test may leave one of aspec's threads behind."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("aspec")]
    assert not left, f"threads left behind: {left}"


@pytest.fixture
def one_thread():
    """One compute thread, whatever was set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def virtual():
    """Run a coroutine function in virtual time."""

    def run(main):
        loop = VirtualTimeLoop()
        try:
            return loop.run_until_complete(main())
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return run


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, cache_home):
    """What commands keep from run to run goes nowhere near the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
