"""Proves aspec on a CUDA card, in one command: its tests, equal tokens, and how near it comes to what the card can do.

    python tools/gpu_check.py --prepare /dev/shm/aspec-8gb --size 8GB
    python tools/gpu_check.py /dev/shm/aspec-8gb --json gpu.json
    python tools/gpu_check.py --dry-run

--prepare expands the demo target into DIR, which should lie in memory (a tmpfs), so that no disk is measured. The check
takes less than 8 minutes, gives aspec a quarter of the checkpoint as device memory, and writes one JSON after every
step, so that what was found stays. A step that fails or takes too long is recorded and stops no other:

contract     the suite that every backend passes, and the CUDA backend's own, on the card
equality     fp32 greedy tokens against transformers' generate on the card: six families, off, chains and trees
events       microseconds from the end of a kernel to the coroutine that waits for it
links        bytes per second to the card and back, pageable, pinned, and registered as aspec does it
stream       aspec without speculation, with chains, with trees, and a batch with chains, held against the link
peers        transformers with accelerate's CPU offload under the same budget: one prompt, an assistant, its best batch
trace        what `aspec trace` records and says of one run; the file lies beside the JSON

The exit status is 0 only if every step was done and every threshold holds. --dry-run does all of it on the CPU, small,
with a checkpoint of its own; only what holds on any machine is judged there.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psutil
import torch

from aspec.io.host_info import host_info
from aspec.options import DEMO
from aspec.units import format_bytes, parse_bytes
from tools import contest, expand, gpu_runs, gpu_steps
from tools.contest import Record
from tools.gpu_report import failures, judge, lines
from tools.gpu_steps import Job, attempt

ALL_S = 450.0  # of all steps; a step gets no more than what is left of it
BUDGET_SHARE = 0.25  # of the checkpoint: aspec's device memory
DRY_BYTES = 300_000_000  # of the checkpoint that a dry run makes
SMI = ("name", "driver_version", "memory.total", "pcie.link.gen.max", "pcie.link.width.max", "power.limit")


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the check, run in a child of its own where it uses the device itself."""

    name: str
    limit_s: float
    work: Callable[[Job], Iterator[Record]]
    prepared: bool = False  # needs the checkpoint
    isolated: bool = True


STEPS = {
    step.name: step
    for step in (
        Step("contract", 90, gpu_steps.contract, isolated=False),
        Step("equality", 90, gpu_steps.equality),
        Step("events", 30, gpu_steps.events),
        Step("links", 30, gpu_runs.links, prepared=True),
        Step("stream", 130, gpu_runs.stream, prepared=True),
        Step("peers", 150, gpu_runs.peers, prepared=True, isolated=False),
        Step("trace", 40, gpu_runs.trace, prepared=True, isolated=False),
    )
}


# -- running -------------------------------------------------------------------------------------------------


def run_step(step: Step, job: Job) -> Record:
    """Its record, with ``failure`` where it did not end well."""
    started = time.perf_counter()
    record: Record = {}

    def work() -> Record:
        if job.limit_s <= 0:
            raise TimeoutError(f"not begun: the steps before took all of the {ALL_S:g} s")
        if step.prepared and not (Path(job.target) / "config.json").exists():
            raise FileNotFoundError(f"{job.target} holds no checkpoint: make one with --prepare {job.target}")
        if step.isolated:
            return contest.run_child(__file__, job, None, timeout_s=job.limit_s)
        for grown in step.work(job):
            record.update(grown)
        return {}

    outcome = attempt(work)
    return record | outcome | {"seconds": time.perf_counter() - started}


def run_steps(steps: Sequence[Step], job: Job, tell: Callable[[str, Record], None]) -> Iterator[tuple[str, Record]]:
    """One after the other; the link's rate goes to those that come later."""
    until_s = time.monotonic() + ALL_S
    for step in steps:
        left = until_s - time.monotonic()
        record = run_step(step, replace(job, contender=step.name, limit_s=min(step.limit_s, left)))
        if step.name == "links":
            job = replace(job, link_bytes_per_s=record.get("h2d_pinned_bytes_per_s"))
        tell(step.name, record)
        yield step.name, record


def child(job: Job) -> None:
    """A step in a process of its own: prints its record whenever that has grown."""
    for record in STEPS[job.contender].work(job):
        print(json.dumps(record), flush=True)


def machine(folder: Path, dry: bool) -> Record:
    """What the figures hold for."""
    facts: Record = {**asdict(host_info()), "python": platform.python_version(), "platform": platform.platform()}
    facts |= contest.versions("transformers", "accelerate", "safetensors")
    facts |= {"cuda": torch.version.cuda, "commit": contest.commit(), "memory_bytes": psutil.virtual_memory().total}
    facts |= {"checkpoint": str(folder), "file_system": file_system(folder)}
    if not dry:
        card = torch.cuda.get_device_properties(0)
        facts |= {"gpu": card.name, "gpu_bytes": card.total_memory, "capability": f"{card.major}.{card.minor}"}
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True)
        facts["nvidia_smi"] = dict(zip(SMI, map(str.strip, told.stdout.split(",")), strict=False))
    return facts


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, such as tmpfs; empty where the system does not tell."""
    places = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((places[place] for place in (folder, *folder.parents) if place in places), "")


def make_checkpoint(folder: Path, nbytes: int) -> None:
    """The demo target, expanded."""
    try:
        expand.main([str(DEMO / "target"), str(folder), "--size", f"{nbytes}"])
    except ValueError as error:
        sys.exit(str(error))


def prepare(folder: Path, nbytes: int) -> None:
    """Expand the demo target, and say what came of it and where it lies."""
    room = shutil.disk_usage(next(place for place in folder.parents if place.exists())).free
    if room < 1.01 * nbytes:
        sys.exit(f"{folder}: {format_bytes(nbytes)} do not fit, {format_bytes(room)} are free: give a smaller --size.")
    if (kind := file_system(folder)) != "tmpfs":
        print(f"{folder} is on {kind or 'an unknown file system'}, no tmpfs: what is loaded from it comes from a disk.")
    started = time.perf_counter()
    make_checkpoint(folder, nbytes)
    print(f"made in {time.perf_counter() - started:.0f} s; next: python tools/gpu_check.py {folder} --json gpu.json")


# -- the command ---------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="the checkpoint that --prepare made, or another one")
    add("--prepare", type=Path, metavar="DIR", help="make the checkpoint there, and nothing else")
    add("--size", type=parse_bytes, default="8GB", help="of its weights (%(default)s)")
    add("--draft", type=Path, default=DEMO / "draft", help="folder of the draft; default: the demo pair's")
    add("--json", type=Path, help="write every figure here")
    add("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help="steps to run, in their order")
    add("--dry-run", action="store_true", help="everything on the CPU, small")
    options = parser.parse_args(arguments)
    if sum((options.folder is not None, options.prepare is not None, options.dry_run)) != 1:
        parser.error("give one of DIR, --prepare DIR and --dry-run")
    if options.folder is not None and options.json is None:
        parser.error("give the file to write: --json gpu.json")
    return options


def check(options: argparse.Namespace, folder: Path, scratch: Path) -> int:
    """Run the steps, write and print; the exit status."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    budget = max(1, int(weights * BUDGET_SHARE))
    output = (options.json or scratch / "check.json").absolute()
    job = Job(
        contender="",
        target=str(folder.absolute()),
        draft=str(options.draft.absolute()),
        budget=budget,
        card=None if options.dry_run else budget,
        limit_s=0.0,
        trace=str(output.with_suffix(".trace.json.gz")),
    )
    facts, records = machine(folder.absolute(), options.dry_run), {}
    print(json.dumps(facts), file=sys.stderr)

    def tell(name: str, record: Record) -> None:
        print(f"{name}: {record['seconds']:.1f} s, {record.get('failure', 'done')}", file=sys.stderr)

    def write() -> Record:
        verdicts, failed = judge(records, options.dry_run), failures(records)
        done = records.keys() == set(options.only) and not failed
        passed = done and all(one["verdict"] != "failed" for one in verdicts)
        found = {"passed": passed, "dry_run": options.dry_run, "machine": facts, "thresholds": verdicts}
        found |= {"failures": failed, "budget_bytes": budget, "weight_bytes": weights, "steps": records}
        output.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        return found

    try:
        found = write()
    except OSError as error:
        sys.exit(f"{output}: cannot be written: {error.strerror}. Give another file to --json.")
    for name, record in run_steps([step for step in STEPS.values() if step.name in options.only], job, tell):
        records[name] = record
        found = write()
    print(*lines(records, found["thresholds"]), sep="\n")
    print("all passed" if found["passed"] else "NOT all passed")
    return int(not found["passed"])


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.prepare is not None:
        prepare(options.prepare.absolute(), options.size)
        return 0
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device: install a CUDA build of torch, or give --dry-run in place of DIR.")
    with tempfile.TemporaryDirectory(prefix="aspec-check-") as scratch:
        folder = options.folder or Path(scratch) / "checkpoint"
        if options.dry_run:
            make_checkpoint(folder, DRY_BYTES)
        return check(options, folder, Path(scratch))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Job(**json.loads(sys.argv[2])))
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.exit(130)
