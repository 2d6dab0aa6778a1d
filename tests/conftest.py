"""How tests run: on all cores, with or without plugins. Neither pytest-asyncio nor pytest-xdist has to be there."""

import asyncio
import gc
import inspect
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests share the cores, and so do processes they start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where a test takes more threads, none waits in a loop

import pytest

from tests.fork_server import shared_server


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


def pytest_configure(config):
    """A process that only hands out tests to others needs no fixture, and none of the seconds that importing takes."""
    if getattr(config.option, "dist", "no") == "no" or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("tests.fixtures")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A coroutine test in a loop of its own, where no plugin does that; coroutine fixtures still need the plugin."""
    if pyfuncitem.config.pluginmanager.hasplugin("asyncio") or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


def pytest_collection_finish():
    """What is here now stays to the end: 800,000 objects, and every engine that opens collects garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    if shared_server.cache_info().currsize:
        shared_server().close()
