"""What is free is what the host has, and no more than the control groups around this process leave."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from aspec.io import host_memory
from aspec.io.host_memory import available_bytes, total_bytes
from aspec.planning import resolve
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


def test_default_budgets_and_the_machine_know_the_group(tmp_path, monkeypatch):
    root = tree(tmp_path, "0::/a\n", {"a": v2(1000 * MIB, 400 * MIB)})
    own = host_memory._groups
    monkeypatch.setattr(host_memory, "_groups", lambda _: own(root))
    assert resolve._host_share() == int(600 * MIB * resolve.HOST_SHARE)
    assert measuring.memory_bytes() == 1000 * MIB


def test_a_real_group_bounds_a_real_process():
    mount = Path("/sys/fs/cgroup/memory")
    if not os.access(mount, os.W_OK) or not (mount / V1[0]).exists():
        pytest.skip("no memory groups can be made here: expected version 1 and root")
    group = mount / f"aspec-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / V1[0]).write_text(str(300 * MIB))
        code = "from aspec.io.host_memory import *; print(available_bytes(), total_bytes())"
        join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')"
        done = subprocess.run([sys.executable, "-c", f"{join}; {code}"], capture_output=True, text=True, check=True)
        free, total = map(int, done.stdout.split())
        assert 0 < free < total == 300 * MIB
    finally:
        group.rmdir()
