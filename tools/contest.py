"""What benchmarks beside the alternatives share: child processes under one memory limit, page cache dropped, tables.

A child is the benchmark's own script with ``--child`` and a job as JSON; its last line of output is its record. What
it printed before it failed is kept beside the failure.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MEMORY_FILES = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"
CGROUP_FILES = {  # versions 1 and 2: what limits memory, what limits swap, the peak, the count of kills
    Path("/sys/fs/cgroup/memory"): MEMORY_FILES,
    Path("/sys/fs/cgroup"): ("memory.max", "memory.swap.max", "memory.peak", "memory.events"),
}
Record = dict[str, Any]  # what is known of one run; goes to --json as it is
Column = tuple[str, str, float, int]
"""Of a table: key, title, unit, decimals."""


GREEDY: Record = {"do_sample": False, "repetition_penalty": 1.0}
"""How transformers generates, whatever the checkpoint's generation_config.json asks for."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What any child is told; a benchmark's jobs say more."""

    contender: str
    target: str
    cgroup: str | None = None  # the folder of the cgroup to join before anything is loaded
    cold: bool = True  # the checkpoint's page cache is dropped first
    card: int | None = None  # bytes that all of it may take of a CUDA device; None: it runs on the CPU

    @property
    def device(self) -> str:
        """Where it computes."""
        return "cpu" if self.card is None else "cuda"

    def join_cgroup(self) -> None:
        """Put this process under the job's memory limit."""
        if self.cgroup:
            (Path(self.cgroup) / "cgroup.procs").write_text(str(os.getpid()))


def run_child(
    script: str,
    job: Task,
    limit: int | None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Record:
    """Run a job in a process of its own; the record has ``failure`` where there is no result."""
    if job.cold:
        drop_page_cache(job.target)
    with memory_cgroup(limit) as folder, tempfile.TemporaryDirectory() as scratch:
        job = replace(job, cgroup=str(folder) if folder else None)
        command = [sys.executable, script, "--child", json.dumps(asdict(job))]
        settings = {**os.environ, **(environment or {}), "TMPDIR": scratch}
        how: Record = {"capture_output": True, "text": True, "start_new_session": True, "env": settings}
        try:
            child = subprocess.run(command, **how, timeout=timeout_s)
        except subprocess.TimeoutExpired as late:
            child, printed = None, late.stdout
        record: Record = {"contender": job.contender, **(cgroup_facts(folder) if folder else {})}
    if child is None:
        return record | last_record(printed) | {"failure": f"not done after {timeout_s:g} s"}
    if child.returncode == 0:
        return record | json.loads(child.stdout.splitlines()[-1])
    why = "killed by the memory limit, " if record.get("limit_kills") else ""
    last = [line for line in child.stderr.splitlines() if line.strip()][-4:]
    failure = "\n    ".join([f"{why}exit code {child.returncode}", *last])
    return record | last_record(child.stdout) | {"failure": failure}


def last_record(printed: str | bytes | None) -> Record:
    """The last line that is a whole record; empty where none is."""
    text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(line), dict):
                return found
    return {}


@contextlib.contextmanager
def load_transformers(
    target: str, dtype: str, memory: int | None, copied: bool = False, card: int | None = None
) -> Iterator[Any]:
    """A model of transformers that goes on past end tokens, on disk beyond ``memory`` bytes if that is given.

    With ``card`` those bytes are of a CUDA device, of which torch may take ``card`` in all, and the rest is in the
    host's memory. Refuses where nothing is offloaded. ``copied`` copies what is in memory out of the mapped files.
    """
    from transformers import AutoModelForCausalLM

    if card is not None:
        hold_card(card)
    beyond, room = ("disk", {"cpu": memory}) if card is None else ("cpu", {0: memory, "cpu": 1 << 50})
    with tempfile.TemporaryDirectory(prefix="aspec-offload-") as folder:
        offload = {"device_map": "auto", "max_memory": room, "offload_folder": folder}
        model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, **(offload if memory else {}))
        if memory and beyond not in getattr(model, "hf_device_map", {}).values():
            raise SystemExit(f"nothing is offloaded with {memory} bytes in memory: give a smaller --offload-memory")
        for parameter in model.parameters() if copied else ():
            if parameter.device.type == "cpu":  # not on disk
                parameter.data = parameter.data.clone()
        model.generation_config.eos_token_id = None
        yield model


def hold_card(nbytes: int) -> None:
    """More than these bytes of the CUDA device are out of memory for torch's allocator in this process."""
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / torch.cuda.get_device_properties(0).total_memory))


def drop_page_cache(folder: str) -> str:
    """Forget the checkpoint's cached pages, those that nobody maps; returns how."""
    with contextlib.suppress(OSError):
        DROP_CACHES.write_text("1")
        return str(DROP_CACHES)
    for file in Path(folder).glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "posix_fadvise"


@contextlib.contextmanager
def memory_cgroup(limit: int | None) -> Iterator[Path | None]:
    """A fresh cgroup for one child, without swap; None without a limit or where none can be made."""
    root = next((root for root in CGROUP_FILES if (root / "cgroup.procs").exists()), None)
    if limit is None or root is None:
        yield None
        return
    memory, swap, *_ = CGROUP_FILES[root]
    folder, limited = root / f"aspec-bench-{os.getpid()}", False
    with contextlib.suppress(OSError):
        if (control := root / "cgroup.subtree_control").exists():
            control.write_text("+memory")
        folder.mkdir()
        (folder / memory).write_text(str(limit))
        limited = True
        (folder / swap).write_text("0" if swap == "memory.swap.max" else str(limit))
    try:
        yield folder if limited else None
    finally:
        if folder.is_dir():
            folder.rmdir()


def cgroup_facts(folder: Path) -> Record:
    """The most that was charged, page cache included, and how often the limit killed."""
    *_, peak, events = CGROUP_FILES[folder.parent]
    peak_bytes = int((folder / peak).read_text()) if (folder / peak).exists() else None
    kills = [line.split()[1] for line in (folder / events).read_text().splitlines() if line.startswith("oom_kill ")]
    return {"cgroup_peak_bytes": peak_bytes, "limit_kills": sum(map(int, kills))}


def machine_facts(target: str, memory_limit: int | None) -> Record:
    """What the figures hold for."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    with memory_cgroup(memory_limit) as folder:
        limit = f"{memory_limit} bytes, {folder.parent}" if folder else "none (not wanted or not possible)"
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        **versions("torch", "transformers", "accelerate"),
        "memory_limit": limit,
        "page_cache_dropped_by": drop_page_cache(target),
        "commit": commit(),
    }


def versions(*names: str) -> dict[str, str | None]:
    """Of packages; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The commit that this tree is at; empty where git cannot tell."""
    command = ["git", "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return ""


def in_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[str, str]]:
    """Stage and contender of every timed run; round r starts with contender r."""
    for index in range(rounds):
        turn = index % len(names)
        for name in [*names[turn:], *names[:turn]]:
            yield f"round {index}", name


def same_tokens(records: Sequence[Record]) -> dict[str, bool]:
    """Whether each one's fp32 tokens are those of the last that has any: the reference in memory, unless it died."""
    checks = [record for record in records if record["stage"] == "fp32"]
    reference = next((check["tokens"] for check in reversed(checks) if "tokens" in check), None)
    return {check["contender"]: reference is not None and check.get("tokens") == reference for check in checks}


def spread(values: Sequence[float | None]) -> Record | None:
    """Median, least and most of what is known."""
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else None


def timed_runs(records: Sequence[Record], names: Iterable[str]) -> dict[str, list[Record]]:
    """The runs of the rounds by contender."""
    timed = [record for record in records if record["stage"].startswith("round")]
    return {name: [record for record in timed if record["contender"] == name] for name in names}


def summarise(
    runs: Mapping[str, Sequence[Record]], columns: Sequence[Column], speed: str, base: str
) -> dict[str, Record]:
    """A row per contender that ran; ``ratio`` is the ``speed`` of ``base`` over its own in the same round."""
    done = {name: [run for run in own if "failure" not in run] for name, own in runs.items()}
    speeds = {name: {run["stage"]: run[speed] for run in own} for name, own in done.items()}
    rows: dict[str, Record] = {}
    for name in filter(runs.get, runs):
        shared = speeds.get(base, {}).keys() & speeds[name].keys()
        rows[name] = {key: spread([run.get(key) for run in runs[name]]) for key, *_ in columns}
        rows[name]["ratio"] = spread([speeds[base][stage] / speeds[name][stage] for stage in shared])
        rows[name] |= {"runs": len(speeds[name]), "failed": len(runs[name]) - len(speeds[name])}
    return rows


def table(rows: Mapping[str, Record], columns: Sequence[Column]) -> str:
    """For people: medians and, in brackets, the range over the rounds; a markdown table."""
    lines = ["| | " + " | ".join(title for _, title, _, _ in columns) + " | runs |", "|---" * (len(columns) + 2) + "|"]
    for name, row in rows.items():
        cells = []
        for key, _, unit, decimals in columns:
            values = [f"{value / unit:.{decimals}f}" for value in (row[key] or {}).values()]
            cells.append(f"{values[0]} ({values[1]}-{values[2]})" if values else "-")
        failed = f", {row['failed']} failed" if row["failed"] else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {row['runs']}{failed} |")
    return "\n".join(lines)
