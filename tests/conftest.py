"""Fixtures shared by all tests: leaks are failures. Neither pytest-asyncio nor pytest-xdist has to be there."""

import asyncio
import functools
import inspect
import os
import threading
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests share the cores, and so do processes they start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where a test takes more threads, none waits in a loop

import pytest
import torch

from aspec.backends import registry as devices
from aspec.cli import bench
from aspec.cli import generate as generation
from aspec.models import model
from aspec.planning.virtual_time import VirtualTimeLoop
from aspec.profiling import ceilings as profile
from aspec.profiling import layer_ratios
from tests.fork_server import shared_server
from tools.real_model import Unavailable, real_gguf, real_model

torch.cuda.is_available()  # settles what this process sees of a GPU; those that tests start see none
os.environ["CUDA_VISIBLE_DEVICES"] = ""
devices.KINDS["cuda"] = replace(devices.KINDS["cuda"], available=lambda: False)  # unless a test brings a device


def pytest_addoption(parser, pluginmanager):
    """Without the plugin its settings in pyproject.toml would be unknown ones."""
    if not pluginmanager.hasplugin("asyncio"):
        for setting in ("asyncio_mode", "asyncio_default_fixture_loop_scope"):
            parser.addini(setting, "of pytest-asyncio, which is not here")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests together run on all cores, at most 8, where pytest-xdist is; a test that is named runs here."""
    option, everything = config.option, config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not everything or not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if option.numprocesses is None and option.dist == "no" and not (option.collectonly or option.usepdb):
        option.numprocesses = min(len(os.sched_getaffinity(0)), 8)
        option.dist = "worksteal"  # whole stretches of files: what a module builds is mostly built once


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A coroutine test in a loop of its own, where no plugin does that; coroutine fixtures still need the plugin."""
    if pyfuncitem.config.pluginmanager.hasplugin("asyncio") or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


def pytest_sessionfinish():
    if shared_server.cache_info().currsize:
        shared_server().close()


@pytest.fixture(autouse=True)
def no_thread_left():
    """No test may leave one of aspec's threads behind."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("aspec")]
    assert not left, f"threads left behind: {left}"


@pytest.fixture(autouse=True, scope="session")
def short_measurements():
    """What commands measure beside their work, they measure for a moment: no test needs it to be exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PROBE_S", 0.02)
        patch.setattr(bench, "PROBE_S", 0.02)
        patch.setattr(layer_ratios, "ROUNDS", 1)
        patch.setattr(profile, "SHORTEST_S", 1e-3)
        patch.setattr(profile, "COPY_BYTES", 8 << 20)
        patch.setattr(profile, "MATMUL_SIZE", 256)
        yield


@pytest.fixture(autouse=True, scope="session")
def probed_once():
    """A configuration is probed once: what the probe finds depends on nothing else, and engines are opened often."""
    found = {}

    def remembered(probe, config, dtype, *facts):
        key = probe, type(config), config.to_json_string(use_diff=False), dtype, *facts
        if key not in found:
            found[key] = probe(config, dtype, *facts)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("examine", "examine_split", "examine_offload"):
            patch.setattr(model, name, functools.partial(remembered, getattr(model, name)))
        yield


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


@pytest.fixture
def server():
    """Starts processes of the command line at once."""
    return shared_server()


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def smollm2():
    """A real model of 135M parameters, built once in the user's own cache folder; a skip where it cannot be had."""
    try:
        return real_model()
    except Unavailable as reason:
        pytest.skip(f"no real model: {reason}")


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The file that this model comes from, in Q4_1."""
    try:
        return real_gguf()
    except Unavailable as reason:
        pytest.skip(f"no real GGUF file: {reason}")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, cache_home):
    """What commands keep from run to run goes nowhere near the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setenv("XDG_STATE_HOME", cache_home)
