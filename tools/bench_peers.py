"""aspec beside the alternatives: same checkpoint, prompts, tokens and memory limit, interleaved in one run.

    python tools/expand.py aspec/demo/target BIG --size 2GB
    python tools/bench_peers.py BIG --draft aspec/demo/draft --rounds 3 --json peers.json

aspec                 streams weights while a chain is drafted, under --device-memory
aspec, trees          the same as it comes: --speculation auto
accelerate            transformers with accelerate's disk offload; layers beyond --offload-memory are on disk
assistant, default    the same with the draft as assistant model, on transformers' default schedule
assistant, 5 tokens   the same with always 5 draft tokens; the better of the two is "accelerate+assistant"
..., tuned            the same with help that its users do not have: see below
in memory             transformers with every weight in memory and no limit: the upper reference

Each runs in a child process, all but the last in a memory cgroup of --memory-limit, loading included. A child loads,
generates 2 tokens to warm up, drops the checkpoint's page cache and generates --tokens greedy tokens, end tokens
ignored, timed from the call to its end; "decoding" leaves out what arrived first, alike for all. Round r starts with
contender r. Without --threads each has its own default: transformers a thread per core, aspec one less.

Tuned: the weights that transformers holds are copied out of its mapped files, where a tight limit evicts them again
and again, and OMP_WAIT_POLICY=passive, because threads that spin on a busy machine made transformers slower here.
Timings are in the checkpoint's dtype. Then each generates --check-tokens tokens in fp32, without a limit and with about
half of the weights off memory: the exit status is 1 unless all are the same.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aspec.io.memory import peak_rss_bytes
from aspec.units import parse_bytes

PROMPT = "class Reader:\n    def __init__(self, path):\n        self.path = path\n"
WARMUP_TOKENS = 2
PROBE_S = 0.5  # one probe of the raw disk rate
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
Record = dict[str, Any]  # what is known of one run; goes to --json as it is


@dataclass(frozen=True)
class Job:
    """What a child is asked to do; travels as JSON."""

    contender: str
    target: str
    draft: str
    prompts: list[str]
    tokens: int
    memory: int | None = None  # bytes: aspec's device memory, or what accelerate keeps
    resident: int | None = None  # bytes of weights that aspec keeps resident at most
    dtype: str = "auto"  # the checkpoint's
    threads: int | None = None
    cgroup: str | None = None  # the folder of the cgroup to join before anything is loaded


@dataclass
class Arrivals:
    """Which tokens arrived when, the prompt first; grows while a generation runs. A streamer for transformers."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def put(self, tokens: Any) -> None:
        """A tensor or a sequence of tokens arrives now."""
        self.seconds.append(time.perf_counter())
        self.tokens.append(tokens.flatten().tolist() if hasattr(tokens, "flatten") else list(tokens))

    def end(self) -> None:
        """Nothing more comes."""


Peer = tuple[Callable[[list[int], int, Arrivals], Awaitable[None]], Callable[[], Awaitable[Record]]]
"""A loaded contender: what generates (prompt, number of tokens, arrivals), and what tells more about it."""


@contextlib.asynccontextmanager
async def open_aspec(job: Job, max_context: int, speculation: str = "chain") -> AsyncIterator[Peer]:
    """aspec for one sequence of at most this length."""
    from aspec.engine import open_engine
    from aspec.params import SamplingParams

    rates, stats = [0.0], []

    async def generate(prompt: list[int], num_tokens: int, arrivals: Arrivals) -> None:
        arrivals.put(prompt)
        async for piece in engine.stream(prompt, SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)):
            arrivals.put(piece.token_ids)
        stats[:] = [piece.stats]

    async def facts() -> Record:
        rates.append(await asyncio.to_thread(engine.probe_link_rate, PROBE_S) or 0.0)
        known = stats[0].as_dict(max(rates) or None, peak_rss_bytes()) if stats else {}
        return known | {"link_bytes_per_s": max(rates), "plan": engine.plan.describe()}

    sizes = {"device_memory": job.memory, "resident_memory": job.resident, "max_context": max_context, "max_batch": 1}
    models = {"target": job.target, "draft": job.draft, "dtype": job.dtype, "reuse_prefix": False}
    async with open_engine(**models, **sizes, speculation=speculation, threads=job.threads) as engine:
        yield generate, facts


@contextlib.asynccontextmanager
async def open_transformers(
    job: Job, max_context: int, assistant: Record | None = None, copied: bool = False
) -> AsyncIterator[Peer]:
    """transformers, offloaded to disk beyond the job's memory if it has one; refuses where nothing is on disk."""
    import torch
    from transformers import AutoModelForCausalLM

    async def generate(prompt: list[int], num_tokens: int, arrivals: Arrivals) -> None:
        ids = torch.tensor([prompt])
        how = {"max_new_tokens": num_tokens, "do_sample": False, "assistant_model": draft, "streamer": arrivals}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)

    async def facts() -> Record:
        return {"device_map": getattr(model, "hf_device_map", None)}

    with tempfile.TemporaryDirectory(prefix="aspec-offload-") as folder:
        offload = {"device_map": "auto", "max_memory": {"cpu": job.memory}, "offload_folder": folder}
        model = AutoModelForCausalLM.from_pretrained(job.target, dtype=job.dtype, **(offload if job.memory else {}))
        if job.memory and "disk" not in getattr(model, "hf_device_map", {}).values():
            raise SystemExit(f"nothing is on disk with {job.memory} bytes in memory: give a smaller --offload-memory")
        for parameter in model.parameters() if copied else ():
            if parameter.device.type == "cpu":  # not on disk: copy it out of the mapped file
                parameter.data = parameter.data.clone()
        model.generation_config.eos_token_id = None  # go on past end tokens
        draft = None
        if assistant is not None:
            draft = AutoModelForCausalLM.from_pretrained(job.draft, dtype=job.dtype)
            draft.generation_config.update(**assistant)
        yield generate, facts


@dataclass(frozen=True)
class Contender:
    """A row: how a child opens it, with which settings, and the option that says what it may keep in memory."""

    open: Callable[..., contextlib.AbstractAsyncContextManager[Peer]]
    settings: Record = field(default_factory=dict)
    memory_option: str | None = "offload_memory"  # None: runs without a limit
    environment: dict[str, str] = field(default_factory=dict)


FIVE_TOKENS = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
FIVE_TOKENS |= {"assistant_confidence_threshold": 0.0}  # else an unsure draft stops earlier
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
CONTENDERS = {
    "aspec": Contender(open_aspec, memory_option="device_memory"),
    "aspec, trees": Contender(open_aspec, {"speculation": "auto"}, memory_option="device_memory"),
    "accelerate": Contender(open_transformers),
    "assistant, default": Contender(open_transformers, {"assistant": {}}),
    "assistant, 5 tokens": Contender(open_transformers, {"assistant": FIVE_TOKENS}),
    "accelerate, tuned": Contender(open_transformers, {"copied": True}, environment=PASSIVE),
    "assistant, tuned": Contender(open_transformers, {"assistant": {}, "copied": True}, environment=PASSIVE),
    "in memory": Contender(open_transformers, memory_option=None),
}
ASSISTED = ("assistant, default", "assistant, 5 tokens")
BEST_ASSISTED = "accelerate+assistant"


async def measure(job: Job) -> Record:
    """A child's whole life; with several prompts their counts and seconds add up."""
    if job.cgroup:
        (Path(job.cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    import torch
    from transformers import AutoTokenizer

    if job.threads:
        torch.set_num_threads(job.threads)
    tokenizer = AutoTokenizer.from_pretrained(job.target)
    prompts = [tokenizer(prompt).input_ids for prompt in job.prompts]
    row, max_context = CONTENDERS[job.contender], max(map(len, prompts)) + max(job.tokens, WARMUP_TOKENS)
    started = time.perf_counter()
    async with row.open(job, max_context, **row.settings) as (generate, facts):
        load_s = time.perf_counter() - started
        await generate(prompts[0], WARMUP_TOKENS, Arrivals())
        runs = []
        for prompt in prompts:
            await facts()  # aspec probes the disk, before and after
            drop_page_cache(job.target)
            arrivals, called_s = Arrivals(), time.perf_counter()
            await generate(prompt, job.tokens, arrivals)
            runs.append((time.perf_counter() - called_s, arrivals))
            if (num_tokens := sum(map(len, arrivals.tokens[1:]))) != job.tokens:
                raise SystemExit(f"expected {job.tokens} tokens, got {num_tokens}")
        more = {"facts": await facts(), "load_s": load_s, "threads": torch.get_num_threads()}
    return summed(runs) | more | {"peak_rss_bytes": peak_rss_bytes()}


def summed(runs: Sequence[tuple[float, Arrivals]]) -> Record:
    """Rates over all runs; decoding is what came after the first arrival of each."""
    tokens = [[token for some in arrivals.tokens[1:] for token in some] for _, arrivals in runs]
    seconds = sum(seconds for seconds, _ in runs)
    decoded = [len(some) for _, arrivals in runs for some in arrivals.tokens[2:]]
    decode_s = sum(arrivals.seconds[-1] - arrivals.seconds[1] for _, arrivals in runs)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "whole_tokens_per_s": sum(map(len, tokens)) / seconds,
        "decode_tokens_per_s": sum(decoded) / decode_s if decoded else None,
        "decode_tokens_per_pass": statistics.mean(decoded) if decoded else None,
    }


def drop_page_cache(folder: str) -> str:
    """Forget the checkpoint's cached pages, those that nobody maps; returns how."""
    with contextlib.suppress(OSError):
        DROP_CACHES.write_text("1")
        return str(DROP_CACHES)
    for file in Path(folder).glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "posix_fadvise"


MEMORY_FILES = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"
CGROUP_FILES = {  # versions 1 and 2: what limits memory, what limits swap, the peak, the count of kills
    Path("/sys/fs/cgroup/memory"): MEMORY_FILES,
    Path("/sys/fs/cgroup"): ("memory.max", "memory.swap.max", "memory.peak", "memory.events"),
}


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


def run_child(job: Job, limit: int | None) -> Record:
    """Run a job in a process of its own; the record has ``failure`` where there is no result."""
    drop_page_cache(job.target)
    with memory_cgroup(limit) as folder, tempfile.TemporaryDirectory() as scratch:
        job = replace(job, cgroup=str(folder) if folder else None)
        command = [sys.executable, __file__, "--child", json.dumps(asdict(job))]
        environment = {**os.environ, **CONTENDERS[job.contender].environment, "TMPDIR": scratch}
        child = subprocess.run(command, capture_output=True, text=True, start_new_session=True, env=environment)
        record: Record = {"contender": job.contender, **(cgroup_facts(folder) if folder else {})}
    if child.returncode == 0:
        return record | json.loads(child.stdout.splitlines()[-1])
    why = "killed by the memory limit, " if record.get("limit_kills") else ""
    last = [line for line in child.stderr.splitlines() if line.strip()][-4:]
    return record | {"failure": "\n    ".join([f"{why}exit code {child.returncode}", *last])}


def plan_runs(options: argparse.Namespace) -> Iterator[tuple[str, Job, int | None]]:
    """Stage, job and memory limit of every run: the rounds, then the checks in fp32."""
    common = {"draft": options.draft, "prompts": options.prompt or [PROMPT], "threads": options.threads}
    for index in range(options.rounds):
        turn = index % len(options.only)
        for name in options.only[turn:] + options.only[:turn]:
            option = CONTENDERS[name].memory_option
            job = Job(name, options.target, tokens=options.tokens, memory=vars(options).get(option), **common)
            yield f"round {index}", job, options.memory_limit if option else None
    target, tokens = options.check_target or options.target, options.check_tokens
    half = sum(file.stat().st_size for file in Path(target).glob("*.safetensors"))  # bf16 on disk, fp32 in memory
    for name in options.only if tokens else ():
        memory = {"memory": half if CONTENDERS[name].memory_option == "offload_memory" else None, "resident": half}
        yield "fp32", Job(name, target, tokens=tokens, dtype="float32", **memory, **common), None


def same_tokens(records: Sequence[Record]) -> dict[str, bool]:
    """Whether each one's fp32 tokens are those of the last that has any: the reference in memory, unless it died."""
    checks = [record for record in records if record["stage"] == "fp32"]
    reference = next((check["tokens"] for check in reversed(checks) if "tokens" in check), None)
    return {check["contender"]: reference is not None and check.get("tokens") == reference for check in checks}


def spread(values: Sequence[float | None]) -> Record | None:
    """Median, least and most of what is known."""
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else None


def summarise(records: Sequence[Record]) -> dict[str, Record]:
    """A row per contender; ``ratio`` is aspec's speed over its own in the same round."""
    runs = {name: [r for r in records if r["contender"] == name and r["stage"] != "fp32"] for name in CONTENDERS}
    done = {name: [run for run in own if "failure" not in run] for name, own in runs.items()}
    speeds = {name: {run["stage"]: run["whole_tokens_per_s"] for run in own} for name, own in done.items()}
    assisted = [name for name in ASSISTED if speeds[name]]
    if assisted:
        best = max(assisted, key=lambda name: statistics.median(speeds[name].values()))
        runs[BEST_ASSISTED], speeds[BEST_ASSISTED] = runs[best], speeds[best]
    rows: dict[str, Record] = {}
    for name in filter(runs.get, runs):
        shared = speeds["aspec"].keys() & speeds[name].keys()
        rows[name] = {key: spread([run.get(key) for run in runs[name]]) for key, *_ in COLUMNS}
        rows[name]["ratio"] = spread([speeds["aspec"][stage] / speeds[name][stage] for stage in shared])
        rows[name] |= {"runs": len(speeds[name]), "failed": len(runs[name]) - len(speeds[name])}
    return rows


COLUMNS = (  # key, title, unit, decimals
    ("whole_tokens_per_s", "tokens/s (min-max)", 1, 2),
    ("decode_tokens_per_s", "decoding", 1, 2),
    ("decode_tokens_per_pass", "tokens per pass", 1, 2),
    ("load_s", "load s", 1, 1),
    ("peak_rss_bytes", "peak RSS MB", 1e6, 0),
    ("ratio", "aspec / this", 1, 2),
)


def table(rows: dict[str, Record]) -> str:
    """For people: medians and, in brackets, the range over the rounds; a markdown table."""
    lines = ["| | " + " | ".join(title for _, title, _, _ in COLUMNS) + " | runs |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, row in rows.items():
        cells = []
        for key, _, unit, decimals in COLUMNS:
            values = [f"{value / unit:.{decimals}f}" for value in (row[key] or {}).values()]
            cells.append(f"{values[0]} ({values[1]}-{values[2]})" if values else "-")
        failed = f", {row['failed']} failed" if row["failed"] else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {row['runs']}{failed} |")
    return "\n".join(lines)


def machine_facts(options: argparse.Namespace) -> Record:
    """What the figures hold for."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    with memory_cgroup(options.memory_limit) as folder:
        limit = f"{options.memory_limit} bytes, {folder.parent}" if folder else "none (not wanted or not possible)"
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        "memory_limit": limit,
        "page_cache_dropped_by": drop_page_cache(options.target),
        "commit": commit.stdout.strip(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="folder of the checkpoint")
    parser.add_argument("--draft", required=True, help="folder of the draft")
    parser.add_argument("--prompt", action="append", help="may be given several times; default: a class in Python")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--memory-limit", type=parse_bytes, default="1.2GB", help="of the cgroup (%(default)s)")
    parser.add_argument("--no-limit", dest="memory_limit", action="store_const", const=None)
    parser.add_argument("--device-memory", type=parse_bytes, default="640MiB", help="aspec's budget (%(default)s)")
    parser.add_argument("--offload-memory", type=parse_bytes, default="900MB", help="accelerate's part (%(default)s)")
    parser.add_argument("--threads", type=int, help="compute threads of all; default: each one's own choice")
    parser.add_argument("--check-tokens", type=int, default=16, help="of the fp32 check; 0: none (%(default)s)")
    parser.add_argument("--check-target", help="checkpoint of the fp32 check; default: the same")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    machine, records = machine_facts(options), []
    print(json.dumps(machine), file=sys.stderr)
    said = "{whole_tokens_per_s:.2f} tokens/s in {seconds:.1f} s, loaded in {load_s:.1f} s, {threads} threads"
    with contextlib.suppress(KeyboardInterrupt):
        for stage, job, limit in plan_runs(options):
            records.append(record := run_child(job, limit) | {"stage": stage})
            print(f"{stage}, {job.contender}:", record.get("failure") or said.format(**record), file=sys.stderr)
    rows, same = summarise(records), same_tokens(records)
    print(f"{table(rows)}\nmemory limit: {machine['memory_limit']}")
    for name, equal in same.items():
        print(f"same tokens: {'yes' if equal else 'no'} ({name}, fp32)")
    if options.json:
        everything = {"machine": machine, "summary": rows, "same_tokens": same, "runs": records}
        options.json.write_text(json.dumps(everything | {"options": vars(options)}, indent=1, default=str) + "\n")
    return int(not all(same.get(name) for name in options.only if options.check_tokens))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(asyncio.run(measure(Job(**json.loads(sys.argv[2]))))))
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.exit(main())
