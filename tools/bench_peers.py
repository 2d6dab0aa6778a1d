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
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aspec.io.memory import peak_rss_bytes
from aspec.units import parse_bytes
from tools import contest
from tools.contest import Record, drop_page_cache, same_tokens

PROMPT = "class Reader:\n    def __init__(self, path):\n        self.path = path\n"
WARMUP_TOKENS = 2
PROBE_S = 0.5  # one probe of the raw disk rate


@dataclass(frozen=True, kw_only=True)
class Job(contest.Task):
    """What a child is asked to do; travels as JSON."""

    draft: str
    prompts: list[str]
    tokens: int
    memory: int | None = None  # bytes: aspec's device memory, or what accelerate keeps
    resident: int | None = None  # bytes of weights that aspec keeps resident at most
    dtype: str = "auto"  # the checkpoint's
    threads: int | None = None


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
    from aspec.engine.engine import open_engine
    from aspec.generation.params import SamplingParams

    rates, stats = [0.0], []

    async def generate(prompt: list[int], num_tokens: int, arrivals: Arrivals) -> None:
        arrivals.put(prompt)
        async for piece in engine.stream(prompt, SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)):
            arrivals.put(piece.token_ids)
        stats[:] = [piece.stats]

    async def facts() -> Record:
        rates.append(await engine.probe_link_rate(PROBE_S) or 0.0)
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
        ids = torch.tensor([prompt], device=job.device)
        how = {"max_new_tokens": num_tokens, "assistant_model": draft, "streamer": arrivals, **contest.GREEDY}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)

    async def facts() -> Record:
        return {"device_map": getattr(model, "hf_device_map", None)}

    with contest.load_transformers(job.target, job.dtype, job.memory, copied, job.card) as model:
        draft = None
        if assistant is not None:
            draft = AutoModelForCausalLM.from_pretrained(job.draft, dtype=job.dtype).to(job.device)
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
    job.join_cgroup()
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
            if job.cold:
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


def run_child(job: Job, limit: int | None) -> Record:
    """Run a job in a process of its own; the record has ``failure`` where there is no result."""
    return contest.run_child(__file__, job, limit, CONTENDERS[job.contender].environment)


def plan_runs(options: argparse.Namespace) -> Iterator[tuple[str, Job, int | None]]:
    """Stage, job and memory limit of every run: the rounds, then the checks in fp32."""
    common = {"draft": options.draft, "prompts": options.prompt or [PROMPT], "threads": options.threads}
    for stage, name in contest.in_turns(options.only, options.rounds):
        option = CONTENDERS[name].memory_option
        memory = vars(options).get(option)
        job = Job(contender=name, target=options.target, tokens=options.tokens, memory=memory, **common)
        yield stage, job, options.memory_limit if option else None
    target, tokens = options.check_target or options.target, options.check_tokens
    half = sum(file.stat().st_size for file in Path(target).glob("*.safetensors"))  # bf16 on disk, fp32 in memory
    for name in options.only if tokens else ():
        memory = {"memory": half if CONTENDERS[name].memory_option == "offload_memory" else None, "resident": half}
        job = Job(contender=name, target=target, tokens=tokens, dtype="float32", **memory, **common)
        yield "fp32", job, None


def summarise(records: Sequence[Record]) -> dict[str, Record]:
    """A row per contender, and one for the better assistant; ``ratio`` is aspec's speed over its own."""
    runs = contest.timed_runs(records, CONTENDERS)
    speeds = {name: [run["whole_tokens_per_s"] for run in runs[name] if "failure" not in run] for name in ASSISTED}
    assisted = [name for name in ASSISTED if speeds[name]]
    if assisted:
        runs[BEST_ASSISTED] = runs[max(assisted, key=lambda name: statistics.median(speeds[name]))]
    return contest.summarise(runs, COLUMNS, speed="whole_tokens_per_s", base="aspec")


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
    return contest.table(rows, COLUMNS)


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
    machine, records = contest.machine_facts(options.target, options.memory_limit), []
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
