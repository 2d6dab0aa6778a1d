"""How much memory this process may still take: the host's free memory, within the limits of its control groups.

Files: cgroup v2 of the kernel's documentation (``memory.max``, ``memory.current``, ``memory.stat``), and the memory
controller of v1 (``memory.limit_in_bytes``, ``memory.usage_in_bytes``). A group's limit also binds the groups below it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

PROCESS_BYTES = 432 << 20
"""Bytes of a whole process beside the plan's: interpreter, torch, transformers (360 MiB when an engine opens), compiled
products and small buffers. Measured at the end of runs on Linux with torch 2.13: 350 to 425 MiB."""

GROWTH_BYTES = 64 << 20  # of these, the bytes that come after everything is imported
NO_LIMIT = 1 << 60  # bytes; v1 writes a larger number if there is no limit


@dataclass(frozen=True, slots=True)
class _Version:
    """The folder of a version's groups, and the names of their files."""

    mount: str
    limit: str
    usage: str
    reclaimable: str  # in memory.stat: page cache that the kernel drops before it refuses memory


_V1 = _Version("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can take now without being killed; ``root``: the root of the system's files."""
    return min([int(psutil.virtual_memory().available), *(max(0, limit - used) for limit, used in _groups(root))])


def limit_left(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups around this process leave to it; beyond them it is killed. None: no limit."""
    return min((max(0, limit - used) for limit, used in _groups(root)), default=None)


def growth_bytes() -> int:
    """Bytes by which this process will still grow beside a plan."""
    return max(GROWTH_BYTES, PROCESS_BYTES - _own_bytes())


def process_bytes() -> int:
    """Bytes that this process takes beside a plan: those that it holds now, and its growth."""
    return _own_bytes() + growth_bytes()


def _own_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def total_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process could have if nothing else ran."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _groups(root))])


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every control group around this process that has a limit."""
    for version, group in _own_groups(root):
        mount = root / version.mount
        for folder in (mount / str(group).lstrip("/"), *(mount / str(up).lstrip("/") for up in group.parents)):
            limit = _number(folder / version.limit)
            if limit is not None and limit < NO_LIMIT:
                used = (_number(folder / version.usage) or 0) - _reclaimable(folder, version)
                yield limit, max(0, used)


def _own_groups(root: Path) -> Iterator[tuple[_Version, PurePosixPath]]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if ".." in path.split("/"):  # outside of the namespace: only its own root is visible
            path = "/"
        if number == "0" and not controllers:
            yield _V2, PurePosixPath("/", path)
        elif "memory" in controllers.split(","):
            yield _V1, PurePosixPath("/", path)


def _reclaimable(folder: Path, version: _Version) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == version.reclaimable and value.isdecimal():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    """A file's number; None if there is no file or it says "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # no such file, as in a container that shows its own group as the root
