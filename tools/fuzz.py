"""Feeds damaged files of every kind to their readers: python tools/fuzz.py --count 10000 --jobs 2

Cases are numbered, and a case depends on --seed, its kind and its number only, so that one can be run again
(--kind config --first 17 --count 1). Worker processes with a limit on memory run them; a case that takes too long is a
hang, one whose process dies is a crash. Faulty cases are kept in --keep. The exit status is 1 if there is any.
"""

import argparse
import contextlib
import json
import os
import queue
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
MEMORY_BYTES = 2 << 30  # that a worker may take beyond what it has after its imports
LIMIT_S = 30.0  # for one case
BATCH = 100  # cases that a worker is given at once
SAFE = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/", "/lib", "/etc/localtime", "/etc/mime.types")


class OpenedFiles:
    """The paths that this process opens, but for the interpreter's own; mutable: an audit hook adds to it."""

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._own = (*SAFE, *{os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, HERE.parent)})
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            self._paths.append(os.path.abspath(os.fsdecode(args[0])))

    def __call__(self) -> Iterator[str]:
        """The paths since the last call."""
        paths, self._paths = self._paths, []
        links = (sys.prefix, sys.base_prefix)
        return (path for path in paths if not path.startswith((*self._own, *links)))


def work(sources: Path) -> None:
    """A worker: read orders (kind, seed, number) line by line, answer each with a line."""
    sys.path.insert(0, str(HERE))
    from fuzz_kinds import FAULTS, run_case

    opened = OpenedFiles()
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        kind, seed, number, keep = json.loads(line)
        folder = Path(tempfile.mkdtemp(prefix="case-"))
        started = time.perf_counter()
        verdict = run_case(kind, Random(f"{seed}/{kind}/{number}"), sources, folder, opened)
        seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if verdict.outcome in FAULTS:
            kept = Path(keep) / f"{kind}-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            with contextlib.suppress(shutil.Error):  # of pipes
                shutil.copytree(folder, kept, symlinks=True)
        shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps([number, verdict.outcome, verdict.reason, seconds, peak]), flush=True)


@dataclass
class Tally:
    """The results of one kind; mutable: it grows by the case."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    total_s: float = 0.0
    peak_bytes: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, number: int, outcome: str, reason: str, seconds: float, peak: int) -> None:
        """Add a case."""
        self.outcomes[outcome] += 1
        self.slowest_s, self.peak_bytes = max(self.slowest_s, seconds), max(self.peak_bytes, peak)
        self.total_s += seconds
        if outcome not in ("accepted", "refused"):
            self.faults.append(f"{number}: {outcome}: {reason}")


class Worker:
    """A worker process that is started again when it dies or hangs."""

    def __init__(self, sources: Path, keep: Path) -> None:
        self._sources, self._keep = sources, keep
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, kind: str, seed: int, number: int) -> tuple[str, str, float, int]:
        """The outcome of one case, its reason, its seconds, the worker's peak memory in bytes."""
        if self._process is None:
            command = [sys.executable, __file__, "--work", str(self._sources)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=-3)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([kind, seed, number, str(self._keep)]).encode() + b"\n")
        process.stdin.flush()
        first = 60.0  # the worker's imports
        ready, _, _ = select.select([process.stdout], [], [], LIMIT_S + first)
        line = process.stdout.readline() if ready else b""
        if line:
            _, outcome, reason, seconds, peak = json.loads(line)
            return outcome, reason, seconds, peak
        process.kill()
        status, self._process = process.wait(), None
        return ("crash", f"exit status {status}", 0.0, 0) if ready else ("hang", "", LIMIT_S, 0)

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def fuzz(kinds: dict[str, int], seed: int, first: int, jobs: int, keep: Path) -> dict[str, Tally]:
    """Run ``kinds`` (name -> number of cases), interleaved, in ``jobs`` workers."""
    tallies, orders = {kind: Tally() for kind in kinds}, queue.SimpleQueue[tuple[str, int]]()
    for number in range(max(kinds.values())):
        for kind, count in kinds.items():
            if number < count:
                orders.put((kind, first + number))
    with tempfile.TemporaryDirectory(prefix="aspec-fuzz-") as root:
        from fuzz_kinds import make_sources

        make_sources(Path(root))

        def serve() -> None:
            worker = Worker(Path(root), keep)
            with contextlib.suppress(queue.Empty):
                while True:
                    kind, number = orders.get_nowait()
                    tallies[kind].add(number, *worker.run(kind, seed, number))
            worker.close()

        threads = [threading.Thread(target=serve) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return tallies


def report(tallies: dict[str, Tally]) -> bool:
    """Print the table and every fault; whether there is none."""
    names = ("accepted", "refused", "wrong", "traceback", "message", "outside", "crash", "hang")
    titles = ("kind", "cases", *names, "mean ms", "slowest s", "peak MiB")
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for kind, tally in tallies.items():
        cases = sum(tally.outcomes.values())
        counts = [cases, *(tally.outcomes[name] for name in names)]
        times = [f"{1e3 * tally.total_s / cases:.0f}", f"{tally.slowest_s:.2f}", f"{tally.peak_bytes / 2**20:.0f}"]
        print("| " + " | ".join([kind, *map(str, counts), *times]) + " |")
    for kind, tally in tallies.items():
        for fault in tally.faults:
            print(f"{kind} {fault}")
    return not any(tally.faults for tally in tallies.values())


def main() -> int:
    """Parse the arguments and run."""
    sys.path.insert(0, str(HERE))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", help="only this kind; may be repeated")
    parser.add_argument("--count", type=int, default=1200, help="cases in total, an equal share of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-faults"), help="folder for faulty cases")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work)
        return 0
    from fuzz_kinds import KINDS

    kinds = options.kind or list(KINDS)
    share = dict.fromkeys(kinds, -(-options.count // len(kinds)))
    return 0 if report(fuzz(share, options.seed, options.first, options.jobs, options.keep)) else 1


if __name__ == "__main__":
    sys.exit(main())
