"""What is free is what the host has, and no more than the control groups around this process leave."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest
import torch

from aspec.backends.registry import KINDS, Kind
from aspec.errors import BudgetError, UserError
from aspec.io import host_memory
from aspec.io.host_memory import available_bytes, total_bytes
from aspec.options import EngineOptions
from aspec.plan import Plan, PlannedPart, Tier
from aspec.planning import resolve
from aspec.planning.memory_check import check_memory
from aspec.profiling import cpu_profiler as measuring

MIB = 1 << 20
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
V2 = "memory.max", "memory.current"
PLENTY = 1 << 50


@pytest.fixture(autouse=True)
def _a_large_host(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=PLENTY, total=2 * PLENTY)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def tree(root, own, groups):
    """A file tree as the kernel shows it; groups: folder -> files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for folder, files in groups.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(f"{content}\n")
    return root


def v2(limit, used, **stat):
    return {"memory.max": limit, "memory.current": used, "memory.stat": "\n".join(f"{k} {v}" for k, v in stat.items())}


def v1(limit, used, **stat):
    files = v2(limit, used, **stat)
    return dict(zip((*V1, "memory.stat"), files.values(), strict=True))


CASES = {
    "no groups at all": ("", {}, PLENTY, 2 * PLENTY),
    "v2": ("0::/a/b\n", {"a/b": v2(1000 * MIB, 400 * MIB)}, 600 * MIB, 1000 * MIB),
    "v2, no limit": ("0::/a\n", {"a": v2("max", 400 * MIB)}, PLENTY, 2 * PLENTY),
    "v2, a limit above": (
        "0::/a/b/c\n",
        {"a/b/c": v2("max", 1), "a/b": v2(500 * MIB, 300 * MIB), "a": v2(900 * MIB, 850 * MIB)},
        50 * MIB,
        500 * MIB,
    ),
    "v2, seen from inside": ("0::/\n", {"": v2(800 * MIB, 100 * MIB)}, 700 * MIB, 800 * MIB),
    "v2, a namespace": ("0::/../../other\n", {"": v2(800 * MIB, 100 * MIB)}, 700 * MIB, 800 * MIB),
    "v2, page cache": (
        "0::/a\n",
        {"a": v2(800 * MIB, 790 * MIB, anon=1, inactive_file=500 * MIB)},
        510 * MIB,
        800 * MIB,
    ),
    "v2, above its limit": ("0::/a\n", {"a": v2(800 * MIB, 900 * MIB)}, 0, 800 * MIB),
    "v1": (
        "3:cpu:/x\n2:memory:/a\n0::/u\n",
        {"memory/a": v1(700 * MIB, 300 * MIB, total_inactive_file=100 * MIB)},
        500 * MIB,
        700 * MIB,
    ),
    "v1, no limit": ("2:memory:/a\n", {"memory/a": v1(9223372036854771712, 1)}, PLENTY, 2 * PLENTY),
    "v1 in a container": ("2:memory:/docker/1\n", {"memory": v1(700 * MIB, 300 * MIB)}, 400 * MIB, 700 * MIB),
    "nonsense": ("::::\nmemory\n0::/a\n", {"a": v2("lots", "x")}, PLENTY, 2 * PLENTY),
}


@pytest.mark.parametrize("case", CASES)
def test_a_group_bounds_what_is_free_and_what_there_is(tmp_path, case):
    own, groups, free, total = CASES[case]
    root = tree(tmp_path, own, groups)
    assert available_bytes(root) == free
    assert total_bytes(root) == total


@pytest.fixture
def in_group(tmp_path, monkeypatch):
    """Puts this process, which has grown already, into a group with so many MiB left of 1000."""
    own = host_memory._groups
    monkeypatch.setattr(host_memory, "_own_bytes", lambda: host_memory.PROCESS_BYTES)

    def enter(left, version="v2"):
        files = {"v2": v2, "v1": v1}[version](1000 * MIB, (1000 - left) * MIB)
        line, folder = {"v2": ("0::/a\n", "a"), "v1": ("2:memory:/a\n", "memory/a")}[version]
        root = tree(tmp_path, line, {folder: files})
        monkeypatch.setattr(host_memory, "_groups", lambda _: own(root))

    return enter


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_default_budgets_and_the_machine_know_the_group(in_group, version):
    in_group(600, version)
    assert resolve._host_share() == int(600 * MIB * resolve.HOST_SHARE)
    assert measuring.memory_bytes() == 1000 * MIB


def test_a_default_budget_leaves_the_process_what_it_will_still_take(in_group):
    in_group(100)
    assert resolve._host_share() == 100 * MIB - host_memory.GROWTH_BYTES


def test_a_process_that_has_not_grown_yet_is_left_more(monkeypatch, in_group):
    in_group(600)
    monkeypatch.setattr(host_memory, "_own_bytes", lambda: 200 * MIB)
    assert resolve._host_share() == 600 * MIB - (host_memory.PROCESS_BYTES - 200 * MIB)


@pytest.mark.parametrize(("left", "most"), [(900, 128), (300, (300 - 64) // 4), (10, 16)])
def test_measuring_the_machine_takes_a_part_of_what_the_group_leaves(in_group, monkeypatch, left, most):
    monkeypatch.setattr(measuring, "ARENA_BYTES", 128 * MIB)
    in_group(left)
    assert most - 2 < measuring._arena_bytes() / MIB <= most


# -- a plan and the memory that there is -----------------------------------------------------------------------


def check(held, **options):
    """Check a plan that holds so many MiB."""
    plan = Plan((PlannedPart(0, 0, held * MIB, held * MIB, Tier.DEVICE),), 1, 0, 0, arithmetic={"all": held * MIB})
    check_memory(plan, resolve.resolve(EngineOptions(device="cpu", **options)))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_plan_that_the_group_would_kill_is_refused_before_loading(in_group, version):
    in_group(300, version)
    check(230, device_memory=230 * MIB)  # and the process itself takes 64 more
    with pytest.raises(BudgetError, match=r"leaves 300 MiB.* Give --device-memory at most 236MiB, or raise the limit"):
        check(250, device_memory=250 * MIB)
    with pytest.warns(RuntimeWarning, match="300 MiB are free"):
        check(250)  # a default budget


def test_a_plan_above_the_free_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(300 * MIB, 1000 * MIB))
    with pytest.warns(RuntimeWarning, match="300 MiB are free. Give --device-memory at most"):
        check(290)


def test_a_budget_above_the_machine_is_one_warning(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(900 * MIB, 1000 * MIB))
    with pytest.warns(
        RuntimeWarning, match="--device-memory 1.95 GiB is more than this process may use, which is 1000"
    ):
        check(10, device_memory=2000 * MIB)
    with warnings.catch_warnings(action="error"):
        check(10, device_memory=1000 * MIB)


class Memory:
    """What psutil tells of a machine's memory."""

    def __init__(self, available, total):
        self.available, self.total = available, total


def test_process_memory_is_the_budget_and_what_the_process_takes_itself(monkeypatch):
    monkeypatch.setattr(host_memory, "_own_bytes", lambda: 200 * MIB)
    process = resolve.resolve(EngineOptions(device="cpu", process_memory=1000 * MIB))
    assert process.budget_bytes == 1000 * MIB - host_memory.PROCESS_BYTES
    monkeypatch.setattr(host_memory, "_own_bytes", lambda: 700 * MIB)
    process = resolve.resolve(EngineOptions(device="cpu", process_memory=1000 * MIB))
    assert process.budget_bytes == 300 * MIB - host_memory.GROWTH_BYTES


def test_process_memory_that_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match="leaves nothing for a model: the interpreter and torch take about"):
        resolve.resolve(EngineOptions(device="cpu", process_memory=100 * MIB))
    with pytest.raises(UserError, match="expected one of them"):
        EngineOptions(process_memory=1000 * MIB, device_memory=500 * MIB)
    kind = Kind(torch.device("cpu"), lambda: True, lambda: MIB, lambda: None, lambda: "a card")
    monkeypatch.setitem(KINDS, "cuda", kind)
    with pytest.raises(UserError, match=r"is for a CPU.* the device is a card"):
        resolve.resolve(EngineOptions(device="cuda", process_memory=1000 * MIB))


@pytest.fixture
def real_group(tmp_path):
    """Runs Python code in a group with a limit in MiB; nothing is known of the machine."""
    mount = Path("/sys/fs/cgroup/memory")
    if not os.access(mount, os.W_OK) or not (mount / V1[0]).exists():
        pytest.skip("no memory groups can be made here: expected version 1 and root")
    group = mount / f"aspec-test-{os.getpid()}"
    group.mkdir()

    def run(limit, code, *args):
        (group / V1[0]).write_text(str(limit * MIB))
        join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')"
        command = [sys.executable, "-c", f"{join}; {code}", *args]
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(command, capture_output=True, text=True, env=env)

    yield run
    group.rmdir()


def test_a_real_group_bounds_a_real_process(real_group):
    done = real_group(300, "from aspec.io.host_memory import *; print(available_bytes(), total_bytes())")
    free, total = map(int, done.stdout.split())
    assert 0 < free < total == 300 * MIB


@pytest.mark.slow
def test_nothing_is_killed_in_a_small_group(real_group, tmp_path):
    """With the default budget a model larger than the group is served; a budget that cannot be is an error."""
    demo = Path(__file__).parent.parent / "aspec" / "demo"
    expand = [sys.executable, Path(__file__).parent.parent / "tools" / "expand.py", demo / "target", tmp_path / "big"]
    subprocess.run([*expand, "--size", "600MB"], check=True, capture_output=True)
    command = ["generate", "--target", str(tmp_path / "big"), "-p", "def a", "-n", "4", "--threads", "1"]
    code = "from aspec.cli.main import main; main()"
    served = real_group(600, code, *command)
    assert served.returncode == 0, served.stderr
    refused = real_group(600, code, *command, "--device-memory", "500MiB")
    assert refused.returncode == 1, "not killed"
    assert "control group leaves" in refused.stderr
