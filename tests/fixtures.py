"""Fixtures shared by all tests: leaks are failures. ``conftest.py`` loads them where tests run."""

import functools
import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aspec.backends import registry as devices
from aspec.models import model
from aspec.planning.virtual_time import VirtualTimeLoop
from tests.fork_server import shared_server
from tests.quick import SHARED, SHORT
from tools.real_model import Unavailable, real_gguf, real_model

torch.cuda.is_available()  # settles what this process sees of a GPU; those that tests start see none
os.environ["CUDA_VISIBLE_DEVICES"] = ""
devices.KINDS["cuda"] = replace(devices.KINDS["cuda"], available=lambda: False)  # unless a test brings a device


@pytest.fixture(autouse=True)
def no_thread_left():
    """No test may leave one of aspec's threads behind."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("aspec")]
    assert not left, f"threads left behind: {left}"


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """So does what a file of tests has imported and built."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """Of all processes of this run, those of pytest-xdist included; ``.ci/run`` gives all its runs one."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder = Path(os.environ.get(SHARED, folder))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def short_measurements(shared_folder):
    """See ``tests/quick.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARED, str(shared_folder))
        for place, name, value in SHORT:
            patch.setattr(place, name, value)
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
def cache_home(shared_folder):
    """What is proved and measured of this machine, by whatever process of the run: it takes a minute."""
    return str(shared_folder / "cache")


@pytest.fixture(scope="session")
def state_home(tmp_path_factory):
    return str(tmp_path_factory.mktemp("state"))


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
def own_cache(monkeypatch, cache_home, state_home):
    """What commands keep from run to run goes nowhere near the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setenv("XDG_STATE_HOME", state_home)
