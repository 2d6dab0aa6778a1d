"""The facts about this host that every measured figure needs beside it."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from aspec.threads import num_cores

BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names of such instructions, as Linux tells them."""


@dataclass(frozen=True, slots=True)
class HostInfo:
    """The facts about a host that every measured figure needs beside it."""

    cpu: str
    cores: int
    threads: int
    torch: str
    compiler: str  # the version of llvmlite, which compiles kernels for this processor; empty: there is none


def host_info() -> HostInfo:
    """The name of the processor, the cores that this process may use, the threads of torch, the versions."""
    name = _cpu_lines("model name") or platform.processor() or platform.machine()
    return HostInfo(name, num_cores(), torch.get_num_threads(), torch.__version__, compiler())


def compiler() -> str:
    """The version of the package that compiles kernels; empty if there is none."""
    try:
        return version("llvmlite")
    except PackageNotFoundError:
        return ""


def cpu_features() -> str:
    """The instruction sets of the processor; two processors of the same name may differ in them."""
    return _cpu_lines("flags") or _cpu_lines("Features")


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products in bf16; yes where the system does not tell."""
    features = cpu_features().split()
    return not features or not BF16.isdisjoint(features)


def cache_bytes(level: int) -> int:
    """Bytes of a cache of the processor, the second or third; 0 if the system does not give them."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size").read_text(encoding="utf-8").strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return 0


def last_cache_bytes() -> int:
    """Bytes of the processor's last cache; 0 if the system does not give them."""
    return max(cache_bytes(level) for level in (2, 3))


def _cpu_lines(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty if the system does not give it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    values = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(field)]
    return values[0] if values else ""
