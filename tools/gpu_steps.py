"""The steps of gpu_check.py that need no checkpoint: the tests, equal tokens, events; and what a step is told.

A step yields its record whenever it has grown: what was found before a fault or the time limit is kept. On the CPU
each does the same on a smaller scale, with a stand-in where there is nothing to measure.
"""

import asyncio
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from aspec.api import generate_all, run
from aspec.backends.cuda import TorchDevice
from aspec.backends.event_lane import EventLane
from aspec.engine.engine import open_engine
from aspec.errors import first_error
from aspec.generation.params import SamplingParams
from aspec.tasks.task import Completion
from tools import contest
from tools.contest import Record

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("tests/test_backend_contract.py", "tests/test_cuda.py")
NO_DEVICE = "no CUDA device here"  # the reason that the suites give for what they skip without one
FAMILIES = ("llama", "qwen3", "gemma3", "mixtral", "gpt_oss", "phi3")
SHAPES: dict[str, Record] = {
    "off": {"speculation": "off"},
    "chain": {"speculation": "chain", "num_draft_tokens": 4},
    "tree": {"speculation": "tree", "num_draft_tokens": 16},
    "attention on the CPU": {"speculation": "chain", "num_draft_tokens": 4, "attention": "cpu"},
}
LENGTHS, NEW_TOKENS = (20, 37, 11), 16  # of the prompts: longer than the families' windows, and than a prefill item
DISTINCT = 8  # tokens that a reference's text must hold, or equal ones prove little
NOISE = 0.05  # of the draft, relative to the target's weights: some proposals are right, some are not
TINY_BUDGET = 1 << 30  # far more than the tiny models take; that they stream is asked for
KERNEL_S = 5e-4
TRIED_CYCLES, EPOCH_TRIES = 10_000_000, 50
FIRST_EVENTS = 10  # that do not count
HOST_SPARE_BYTES = 2 << 30  # of host memory, beside the weights


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a step does."""

    families: int
    events: int
    link_bytes: int
    tokens: dict[str, int]  # new ones, by run of the engine
    rows: int  # of the batch
    peer_tokens: int
    assisted_tokens: int
    peer_batch_tokens: int


ON_CARD = Sizes(6, 400, 64 << 20, {"off": 32, "chain": 160, "tree": 192, "batch": 32}, 64, 12, 48, 8)
ON_CPU = Sizes(6, 40, 4 << 20, {"off": 4, "chain": 16, "tree": 16, "batch": 6}, 4, 3, 6, 3)


@dataclass(frozen=True, kw_only=True)
class Job(contest.Task):
    """What a step is told; travels as JSON. ``contender`` is the step's name, ``target`` the checkpoint to stream."""

    draft: str
    budget: int  # bytes of device memory
    limit_s: float
    cold: bool = False
    trace: str = ""  # the file that a trace goes to
    link_bytes_per_s: float | None = None  # of pinned memory to the device, as the step before found it

    @property
    def sizes(self) -> Sizes:
        """How much to do."""
        return ON_CPU if self.card is None else ON_CARD

    @property
    def weight_bytes(self) -> int:
        """Of the checkpoint."""
        return sum(file.stat().st_size for file in Path(self.target).glob("*.safetensors"))

    def engine(self, **more: Any) -> Record:
        """Options of an engine for the checkpoint: its device, the budget, and the host memory to hold the rest."""
        options = {"target": self.target, "draft": self.draft, "device": self.device, "device_memory": self.budget}
        if self.card is not None:
            options["host_memory"] = self.weight_bytes + HOST_SPARE_BYTES
        return options | more


def attempt(work: Callable[[], Record]) -> Record:
    """What it returns, or ``failure``: what it raised, and where."""
    try:
        return work()
    except Exception as error:
        return {"failure": "".join(traceback.format_exception(first_error(error))).strip()}


# -- the tests -----------------------------------------------------------------------------------------------


def contract(job: Job) -> Iterator[Record]:
    """The suite that every backend passes, and the CUDA backend's own."""
    with tempfile.TemporaryDirectory(prefix="aspec-tests-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *SUITES]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=job.limit_s)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} and no report:\n{done.stdout}{done.stderr}")
        yield read_report(report) | ({"output": done.stdout[-4000:]} if done.returncode else {})


def read_report(report: Path) -> Record:
    """Counts of a JUnit file; the names of what failed, the reasons of what was skipped."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    reasons = [skipped.get("message", "") for case in cases if (skipped := case.find("skipped")) is not None]
    counts = {"passed": len(cases) - len(failed) - len(reasons), "failed": len(failed), "skipped": len(reasons)}
    lacking = {"skipped_without_device": sum(NO_DEVICE in reason for reason in reasons)}
    return counts | lacking | {"failed_tests": failed, "reasons": sorted(set(reasons))}


# -- the same tokens as transformers -------------------------------------------------------------------------


def equality(job: Job) -> Iterator[Record]:
    """Greedy fp32 tokens of tiny random models against transformers' own on the same device, all layers streamed."""
    runs: dict[str, Record] = {}
    for family in FAMILIES[: job.sizes.families]:
        with tempfile.TemporaryDirectory(prefix="aspec-equal-") as folder:
            made = attempt(lambda family=family, folder=folder: make_pair(Path(folder), family, job.device))
            for name, shape in SHAPES.items():
                found = made if "failure" in made else attempt(lambda shape=shape, made=made: compare(job, made, shape))
                runs[f"{family}, {name}"] = found
        equal = [one["equal"] for one in runs.values() if "equal" in one]
        yield {"compared": len(equal), "different": equal.count(False), "runs": runs}


def make_pair(folder: Path, family: str, device: str) -> Record:
    """A target, its draft, prompts, and what transformers generates from them."""
    from tests import tiny

    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, tiny.VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    for seed in itertools.count():
        target = tiny.build(folder / f"target{seed}", family, seed=seed, varied=True)
        model = tiny.reference(target).to(device)
        how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        rows = [model.generate(torch.tensor([prompt], device=device), **how)[0].tolist() for prompt in prompts]
        wanted = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        if len({token for row in wanted for token in row}) >= DISTINCT:
            draft = tiny.noisy_copy(target, folder / "draft", NOISE)
            return {"target": target, "draft": draft, "prompts": prompts, "wanted": wanted}
        if seed == 5:
            raise ValueError(f"{family}: no seed gives a text of {DISTINCT} different tokens")
    raise AssertionError("the seeds have run out")


def compare(job: Job, pair: Record, method: Record) -> Record:
    """One engine, three prompts at once."""
    models = {"target": pair["target"], "draft": pair["draft"], "dtype": "float32", "device": job.device}
    sizes = {"max_batch": len(LENGTHS), "max_context": 80, "prefill_tokens": 16, "threads": 1}
    memory = {"device_memory": TINY_BUDGET, "resident_memory": 0}

    async def main() -> Record:
        async with open_engine(**models, **sizes, **memory, **method) as engine:
            params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
            results = await generate_all(engine, pair["prompts"], params)
            streamed = len(engine.plan.streamed)
        tokens = [list(result.token_ids) for result in results]
        proposed, accepted = (sum(getattr(one.stats, key) for one in results) for key in ("proposed", "accepted"))
        more = {} if tokens == pair["wanted"] else {"tokens": tokens, "wanted": pair["wanted"]}
        known = {"equal": not more and streamed > 0, "streamed_parts": streamed}
        return known | {"proposed": proposed, "accepted": accepted} | more

    return run(main)


# -- how soon the loop hears of an event ---------------------------------------------------------------------


class HostClock:
    """A stand-in for a device on the CPU: a thread that sleeps in place of kernels."""

    uncertain_s = 0.0  # the thread notes the time itself

    def __init__(self) -> None:
        from tests.fake_device import FakeDevice

        self.device = FakeDevice(pace_s=0.0)
        self.kinds: dict[str, Callable[[], Any]] = {"stand-in": self.device.create_event}
        self.seconds_of: Callable[[Any], float] = self.device.seconds_of

    def kernel(self) -> None:
        """Keep the current stream busy for ``KERNEL_S``."""
        self.device.launch(lambda: time.sleep(KERNEL_S))


class CardClock:
    """A CUDA device, its two kinds of events, and its clock on the host's as spinning reads it."""

    def __init__(self) -> None:
        self.device = TorchDevice()
        make: Any = torch.cuda.Event
        self.kinds: dict[str, Callable[[], Any]] = {
            "blocking": lambda: make(enable_timing=True, blocking=True),
            "spinning": lambda: make(enable_timing=True, blocking=False),
        }
        start, stop = self.kinds["spinning"](), self.kinds["spinning"]()
        for _ in range(3):  # the device's clock rises to its full rate
            start.record()
            torch.cuda._sleep(TRIED_CYCLES)
            stop.record()
            stop.synchronize()
        self._cycles = round(TRIED_CYCLES * KERNEL_S / (start.elapsed_time(stop) / 1e3))
        tries = [self._look() for _ in range(EPOCH_TRIES)]
        self.uncertain_s, self._epoch, self._at_s = min(tries, key=lambda found: found[0])

    def _look(self) -> tuple[float, Any, float]:
        """An event of an idle stream, between two looks at the host's clock."""
        event = self.kinds["spinning"]()
        before = time.perf_counter()
        event.record()
        event.synchronize()
        after = time.perf_counter()
        return after - before, event, (before + after) / 2

    def seconds_of(self, event: Any) -> float:
        """When it completed, on the host's clock."""
        return self._at_s + float(self._epoch.elapsed_time(event)) / 1e3

    def kernel(self) -> None:
        """Keep the current stream busy for ``KERNEL_S``."""
        torch.cuda._sleep(self._cycles)


def events(job: Job) -> Iterator[Record]:
    """Microseconds from the end of a short kernel to the event lane's thread, and to the coroutine that waits."""
    clock = HostClock() if job.card is None else CardClock()
    record: Record = {"kernel_s": KERNEL_S, "clock_uncertain_us": clock.uncertain_s * 1e6, "runs": {}}
    try:
        for kind, make in clock.kinds.items():
            record["runs"][kind] = attempt(lambda make=make: wake_ups(clock, make, job.sizes.events))
            yield record
    finally:
        clock.device.free()


def wake_ups(clock: HostClock | CardClock, make: Callable[[], Any], count: int) -> Record:
    """That many kernels, one at a time, on the loop that aspec uses."""
    device = clock.device
    found: list[tuple[float, float, float]] = []

    async def main() -> None:
        loop, stream, event = asyncio.get_running_loop(), device.create_stream(0), make()
        lane = EventLane("check", loop)

        def conclude(error: BaseException | None) -> Completion | BaseException:
            return error or Completion(clock.seconds_of(event), time.perf_counter())

        try:
            for _ in range(FIRST_EVENTS + count):
                future: asyncio.Future[Completion] = loop.create_future()
                with device.on(stream):
                    clock.kernel()
                device.record(event, stream)
                waiting_from = time.perf_counter()
                lane.wait(event, conclude, future)
                done = await future
                resumed_s = time.perf_counter()
                if done.start_s > waiting_from:  # else it was over before anybody waited
                    off_s = device.seconds_of(event) - done.start_s
                    found.append((done.stop_s - done.start_s, resumed_s - done.start_s, off_s))
        finally:
            lane.close()

    run(main)
    to_thread, to_coroutine, off = zip(*found[FIRST_EVENTS:], strict=True)
    waits = {"thread": percentiles(to_thread), "coroutine": percentiles(to_coroutine)}
    known = {"events": len(off), "span_clock_off_us": statistics.median(off) * 1e6}  # as TorchDevice maps its clock
    return known | {f"{who}_{name}_us": us for who, cuts in waits.items() for name, us in cuts.items()}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in microseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{percent}": cuts[percent - 1] * 1e6 for percent in (50, 90, 99)}
