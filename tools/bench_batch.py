"""Throughput beside the alternatives: many prompts at once, same checkpoint and memory limit, interleaved in one run.

    python tools/expand.py aspec/demo/target BIG --size 2GB
    python tools/bench_batch.py BIG --draft aspec/demo/draft --rounds 3 --json batch.json
    python tools/bench_batch.py BIG --draft aspec/demo/draft --only aspec chain4 --engine chain4 num_draft_tokens=4

aspec               all prompts in one engine, as it comes
aspec, chains ...   64 rows with chains, all in one group or in two; off: without a draft
accelerate          transformers with accelerate's disk offload, one left-padded batch, greedy
accelerate, tuned   the same with weights copied out of the mapped files and passive threads, as in bench_peers.py
in memory           transformers with every weight in memory and no limit: the upper reference

--engine adds a row of aspec with other engine options, --set changes them in every row of aspec. The prompts are the
beginnings, of many lengths, of the demo pair's held-out texts.

Each runs in a child process, all but the last in a memory cgroup, loading included. Every aspec gets the same device
memory: --weight-memory and what a plan with chains holds beside weights (KV of all rows, the draft, activations).
The limit is --process-memory above that, and accelerate may keep weights up to the limit less 300 MB and the KV of all
rows; in bench_peers.py the same sums give 1.2 GB and 900 MB. Where the limit kills accelerate its batch is halved,
until it lives: a smaller batch takes the first prompts only. Each rate counts what was generated, so accelerate may
generate fewer tokens (--peer-tokens), and no child may take longer than --timeout.

Decoding begins when every row has its first token: its rate is the tokens that arrive later, by the seconds to the last
one; what is before is the prefill. "Of the roofline": the share of these seconds that the products of the same passes
take alone, timed afterwards. Then --check-rows prompts are decoded in fp32, without a limit and with about half of the
weights off memory: the exit status is 1 unless all give the same tokens.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aspec.io.memory import peak_rss_bytes
from aspec.options import EngineOptions
from aspec.plan import Workload
from aspec.units import parse_bytes, parse_rate
from tools import contest
from tools.contest import Record

WARMUP_TOKENS = 2
PROBE_S = 0.5  # one probe of the raw disk rate
SHORTEST, LENGTHS, STRIDE = 16, 48, 29  # prompts: fewest tokens, how many lengths, the step from one to the next
BESIDE = ("KV cache", "draft weights", "draft trees", "activations", "scratch")  # of a plan: all but weights
PEER_BYTES = 300_000_000  # of the limit, beside transformers' weights and KV
Arrivals = list[list[tuple[float, list[int]]]]
"""For every row what arrived, and when."""
Peer = tuple[Callable[[list[list[int]], int], Awaitable[Arrivals]], Callable[[], Awaitable[Record]]]
"""A loaded contender: what generates (prompts, number of tokens), and what else it tells."""


@dataclass(frozen=True)
class Contender:
    """A row: aspec with engine options, or transformers without."""

    engine: Record | None = None
    limited: bool = True
    copied: bool = False  # transformers' weights, out of the mapped files
    environment: dict[str, str] = field(default_factory=dict)


IN_MEMORY = "in memory"
CONTENDERS = {
    "aspec": Contender({}),
    "aspec, chains, 1 group": Contender({"speculation": "chain", "max_batch": 64, "num_groups": 1}),
    "aspec, chains, 2 groups": Contender({"speculation": "chain", "max_batch": 64, "num_groups": 2}),
    "aspec, off": Contender({"speculation": "off", "max_batch": 64}),
    "accelerate": Contender(),
    "accelerate, tuned": Contender(copied=True, environment={"OMP_WAIT_POLICY": "passive"}),
    IN_MEMORY: Contender(limited=False),
}


@dataclass(frozen=True, kw_only=True)
class Job(contest.Task):
    """What a child is asked to do; travels as JSON."""

    draft: str
    prompts: list[list[int]]
    tokens: int
    engine: Record | None = None  # options of aspec's engine; None: transformers
    memory: int | None = None  # bytes that accelerate keeps
    copied: bool = False
    dtype: str = "auto"  # the checkpoint's
    threads: int | None = None


def make_prompts(target: str, rows: int) -> list[list[int]]:
    """Tokens of that many prompts: beginnings of the held-out texts, no two the same up to 960."""
    from aspec.generation.text.tokenizer import Tokenizer
    from aspec.options import DEMO

    tokenizer = Tokenizer.load(Path(target))
    texts = json.loads((DEMO / "heldout.json").read_text(encoding="utf-8"))
    lengths = [SHORTEST + (row // len(texts) + row * STRIDE) % LENGTHS for row in range(rows)]
    return [tokenizer.encode(texts[row % len(texts)])[:length] for row, length in enumerate(lengths)]


@contextlib.asynccontextmanager
async def open_aspec(job: Job) -> AsyncIterator[Peer]:
    """aspec with the plan that is found for these prompts, as far as the engine's options leave it open."""
    from aspec.engine.engine import open_engine
    from aspec.generation.params import SamplingParams
    from tools.product_seconds import products_of

    rates, stats, spans = [0.0], [], []

    async def stream(prompt: list[int], num_tokens: int) -> list[tuple[float, list[int]]]:
        arrived = []
        async for piece in engine.stream(prompt, SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)):
            arrived.append((time.perf_counter(), list(piece.token_ids)))
        stats.append(piece.stats)
        return [(seconds, tokens) for seconds, tokens in arrived if tokens]

    async def generate(prompts: list[list[int]], num_tokens: int) -> Arrivals:
        stats.clear()
        spans.clear()
        return list(await asyncio.gather(*(stream(prompt, num_tokens) for prompt in prompts)))

    async def facts() -> Record:
        rates.append(await engine.probe_link_rate(PROBE_S) or 0.0)
        passes = [one.passes for one in stats]
        known = {"plan": engine.plan.describe(), "streamed_bytes_per_pass": engine.plan.streamed_bytes}
        known |= {"link_bytes_per_s": max(rates), "most_passes_of_a_row": max(passes)}
        took = products_of(job.target, engine.plan, spans)
        known["products_s"] = [(span.start_s, seconds) for span, seconds in took]
        decoded = sum(one.completion_tokens - 1 for one in stats)
        return known | {"tokens_per_row_and_pass": decoded / sum(passes) if sum(passes) else None}

    context = max(map(len, job.prompts)) + max(job.tokens, WARMUP_TOKENS)
    mean = round(sum(map(len, job.prompts)) / len(job.prompts))
    sizes = {"max_context": context, "reuse_prefix": False, "threads": job.threads}
    sizes["workload"] = Workload(len(job.prompts), mean, max(job.tokens, WARMUP_TOKENS))
    models = {"target": job.target, "draft": job.draft, "dtype": job.dtype}
    async with open_engine(observers=[spans.append], **{**models, **sizes, **(job.engine or {})}) as engine:
        yield generate, facts


class RowStreamer:
    """Notes when transformers has a token for every row; the prompts, which it sends first, are left out."""

    def __init__(self, rows: int) -> None:
        self.arrivals: Arrivals = [[] for _ in range(rows)]
        self._prompts_seen = False

    def put(self, tokens: Any) -> None:
        """A tensor of tokens arrives now."""
        now = time.perf_counter()
        for row, token in zip(self.arrivals, tokens.tolist() if self._prompts_seen else (), strict=False):
            row.append((now, [token]))
        self._prompts_seen = True

    def end(self) -> None:
        """Nothing more comes."""


@contextlib.asynccontextmanager
async def open_transformers(job: Job) -> AsyncIterator[Peer]:
    """transformers with all prompts in one batch, padded on the left."""
    import torch

    async def generate(prompts: list[list[int]], num_tokens: int) -> Arrivals:
        longest, streamer = max(map(len, prompts)), RowStreamer(len(prompts))
        ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        inputs = {"input_ids": torch.tensor(ids, device=job.device)}
        inputs["attention_mask"] = torch.tensor(mask, device=job.device)
        how = {"max_new_tokens": num_tokens, "streamer": streamer, "pad_token_id": 0}
        model.generate(**inputs, **how, **contest.GREEDY)
        return streamer.arrivals

    async def facts() -> Record:
        return {"device_map": getattr(model, "hf_device_map", None)}

    with contest.load_transformers(job.target, job.dtype, job.memory, job.copied, job.card) as model:
        yield generate, facts


async def measure(job: Job) -> Record:
    """A child's whole life."""
    job.join_cgroup()
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    started = time.perf_counter()
    async with (open_transformers if job.engine is None else open_aspec)(job) as (generate, facts):
        load_s = time.perf_counter() - started
        await generate(job.prompts[:1], WARMUP_TOKENS)
        await facts()  # aspec probes the disk, before and after
        if job.cold:
            contest.drop_page_cache(job.target)
        called_s = time.perf_counter()
        arrivals = await generate(job.prompts, job.tokens)
        record = rates_of(called_s, arrivals, sum(map(len, job.prompts)))
        if any(len(tokens) != job.tokens for tokens in record["tokens"]):
            raise SystemExit(f"expected {job.tokens} tokens a row, got {[len(row) for row in record['tokens']]}")
        more = {"facts": await facts(), "load_s": load_s, "threads": torch.get_num_threads()}
        later = [took for start_s, took in more["facts"].pop("products_s", ()) if start_s > record["first_s"]]
        more["of_roofline"] = sum(later) / record["decode_s"] if later else None
    return record | more | more["facts"] | {"peak_rss_bytes": peak_rss_bytes()}


def rates_of(called_s: float, arrivals: Arrivals, prompt_tokens: int) -> Record:
    """The prefill ends when the last row has its first token; decoding is what comes later."""
    first_s, last_s = max(row[0][0] for row in arrivals), max(row[-1][0] for row in arrivals)
    decoded = sum(len(tokens) for row in arrivals for seconds, tokens in row if seconds > first_s)
    tokens = [[token for _, some in row for token in some] for row in arrivals]
    return {
        "rows": len(arrivals),
        "tokens": tokens,
        "seconds": last_s - called_s,
        "prefill_s": first_s - called_s,
        "first_s": first_s,
        "decode_s": last_s - first_s,
        "prefill_tokens_per_s": prompt_tokens / (first_s - called_s),
        "decode_tokens_per_s": decoded / (last_s - first_s) if decoded else None,
        "whole_tokens_per_s": sum(map(len, tokens)) / (last_s - called_s),
    }


@dataclass(frozen=True)
class Sizes:
    """Bytes that the contenders get, derived from a plan where they were not given."""

    device_memory: int
    memory_limit: int | None
    offload_memory: int


def choose_sizes(options: argparse.Namespace, max_context: int) -> Sizes:
    """See the head of this file."""
    from aspec.engine.design import decide
    from aspec.planning.footprint import read_models
    from aspec.planning.resolve import resolve

    models = {"target": options.target, "draft": options.draft, "speculation": "chain"}
    roomy = {"device_memory": 1 << 50, "resident_memory": 0}  # of the plan alone: this machine need not have it
    asked = EngineOptions(**models, **roomy, max_batch=options.rows, max_context=max_context)
    held = decide(read_models(resolve(asked)))[1].arithmetic
    device = options.device_memory or options.weight_memory + sum(held[label] for label in BESIDE)
    limit = options.memory_limit or device + options.process_memory
    offload = options.offload_memory or limit - PEER_BYTES - held["KV cache"]
    return Sizes(device, None if options.no_limit else limit, offload)


def plan_runs(options: argparse.Namespace, sizes: Sizes, prompts: list[list[int]]) -> Iterator[tuple[str, Job]]:
    """Stage and job of every run: the rounds, then the checks in fp32."""
    common = {"draft": options.draft, "threads": options.threads}
    budget = {"device_memory": sizes.device_memory, "link_rate": options.link_rate}
    for stage, name in contest.in_turns(options.only, options.rounds):
        row = options.contenders[name]
        engine = None if row.engine is None else {**budget, **row.engine}
        tokens = options.tokens if engine is not None else options.peer_tokens
        memory = sizes.offload_memory if row.limited else None
        job = Job(contender=name, target=options.target, prompts=prompts, tokens=tokens, engine=engine, **common)
        yield stage, replace(job, memory=memory, copied=row.copied)
    target = options.check_target or options.target
    half = sum(file.stat().st_size for file in Path(target).glob("*.safetensors"))  # bf16 on disk, fp32 in memory
    for name in options.only if options.check_tokens else ():
        row = options.contenders[name]
        engine = None if row.engine is None else {"resident_memory": half, **row.engine}
        more = {"tokens": options.check_tokens, "engine": engine, "copied": row.copied, "dtype": "float32"}
        more |= {"prompts": prompts[: options.check_rows], "memory": half if row.limited else None}
        yield "fp32", Job(contender=name, target=target, **more, **common)


def run_fitting(options: argparse.Namespace, job: Job, limit: int | None, rows: dict[str, int]) -> Iterator[Record]:
    """Run with as many rows as fit in memory; yields what was killed, too. ``rows`` remembers who fits how many."""
    environment = options.contenders[job.contender].environment
    while True:
        most = rows.get(job.contender, len(job.prompts))
        fitting = replace(job, prompts=job.prompts[:most])
        record = contest.run_child(__file__, fitting, limit, environment, options.timeout)
        killed = record.get("limit_kills") or "OutOfMemoryError" in record.get("failure", "")
        too_large = killed and job.engine is None and most > 1
        yield record | {"rows": len(fitting.prompts), "new_tokens": job.tokens, "tried": bool(too_large)}
        if not too_large:
            return
        rows[job.contender] = most // 2


COLUMNS: tuple[contest.Column, ...] = (
    ("rows", "rows", 1, 0),
    ("decode_tokens_per_s", "decode tokens/s (min-max)", 1, 2),
    ("tokens_per_row_and_pass", "tokens per row and pass", 1, 2),
    ("of_roofline", "of the roofline", 1, 2),
    ("prefill_s", "prefill s", 1, 1),
    ("prefill_tokens_per_s", "prompt tokens/s", 1, 1),
    ("load_s", "load s", 1, 1),
    ("peak_rss_bytes", "peak RSS MB", 1e6, 0),
    ("ratio", "aspec / this", 1, 2),
)


def parse_settings(pairs: Sequence[str]) -> Record:
    """Engine options of KEY=VALUE pairs, values as in JSON or plain text; ValueError for an unknown key."""
    known = {entry.name for entry in fields(EngineOptions)}
    settings: Record = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key not in known or not text:
            raise ValueError(f"{pair!r} is no KEY=VALUE of an engine option; expected a key of {sorted(known)}")
        try:
            settings[key] = json.loads(text)
        except json.JSONDecodeError:
            settings[key] = text
    return settings


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with ``contenders``: every row there is, by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target", help="folder of the checkpoint")
    add("--draft", required=True, help="folder of the draft")
    add("--rows", type=int, default=64, help="prompts at once (%(default)s)")
    add("--tokens", type=int, default=64, help="new tokens of each in aspec (%(default)s)")
    add("--peer-tokens", type=int, default=16, help="the same in transformers (%(default)s)")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--only", nargs="+", metavar="CONTENDER", help="rows to run, in this order; default: all")
    add("--engine", nargs="+", action="append", default=[], metavar="NAME|KEY=VALUE", help="a row more of aspec")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="engine options of every row of aspec")
    add("--link-rate", type=parse_rate, help="throttles aspec's disk lane, and nobody else's")
    add("--weight-memory", type=parse_bytes, default="512MiB", help="of aspec's device memory (%(default)s)")
    add("--process-memory", type=parse_bytes, default="650MB", help="of the limit, beside a plan (%(default)s)")
    add("--device-memory", type=parse_bytes, help="aspec's whole budget; default: see above, as for the next two")
    add("--memory-limit", type=parse_bytes, help="of the cgroup")
    add("--offload-memory", type=parse_bytes, help="what accelerate keeps in memory")
    add("--no-limit", action="store_true", help="no cgroup")
    add("--threads", type=int, help="compute threads of all; default: each one's own choice")
    add("--timeout", type=float, default=900.0, help="seconds that a child may take (%(default)s)")
    add("--check-rows", type=int, default=8, help="prompts of the fp32 check (%(default)s)")
    add("--check-tokens", type=int, default=8, help="of the fp32 check; 0: none (%(default)s)")
    add("--check-target", help="checkpoint of the fp32 check; default: the same")
    add("--json", type=Path, help="write every figure here")
    options = parser.parse_args(arguments)
    try:
        rows = CONTENDERS | {name: Contender(parse_settings(pairs)) for name, *pairs in options.engine}
        changed = parse_settings(options.set)
    except ValueError as error:
        parser.error(str(error))
    engines = {name: {**changed, **row.engine} for name, row in rows.items() if row.engine is not None}
    options.contenders = {name: replace(row, engine=engines.get(name)) for name, row in rows.items()}
    options.only = options.only or list(options.contenders)
    if unknown := set(options.only) - set(options.contenders):
        parser.error(f"--only names {sorted(unknown)}; expected some of {list(options.contenders)}")
    if min(options.tokens, options.peer_tokens) < 2:
        parser.error("decoding has no rate with fewer than 2 tokens: raise --tokens and --peer-tokens")
    return options


def main() -> int:
    options = parse_options()
    prompts = make_prompts(options.target, options.rows)
    sizes = choose_sizes(options, max(map(len, prompts)) + max(options.tokens, WARMUP_TOKENS))
    machine = contest.machine_facts(options.target, sizes.memory_limit)
    lengths = list(map(len, prompts))
    task = (
        f"{len(prompts)} prompts of {min(lengths)}-{max(lengths)} tokens, {sum(lengths)} in all; new tokens of each: "
    )
    task += f"aspec {options.tokens}, transformers {options.peer_tokens}"
    print(json.dumps(machine), sizes, task, sep="\n", file=sys.stderr)
    said = (
        "{decode_tokens_per_s:.2f} tokens/s, prefill {prefill_s:.1f} s, all {seconds:.1f} s, loaded in {load_s:.1f} s"
    )
    records: list[Record] = []
    fitting: dict[str, int] = {}
    with contextlib.suppress(KeyboardInterrupt):
        for stage, job in plan_runs(options, sizes, prompts):
            limit = sizes.memory_limit if stage != "fp32" and options.contenders[job.contender].limited else None
            for record in run_fitting(options, job, limit, fitting):
                records.append(record | {"stage": "search" if record["tried"] else stage})
                found = record.get("failure") or said.format(**record)
                print(f"{stage}, {job.contender}, {record['rows']} rows: {found}", file=sys.stderr)
    rows = contest.summarise(contest.timed_runs(records, options.only), COLUMNS, "decode_tokens_per_s", "aspec")
    same = contest.same_tokens(records)
    print(f"{contest.table(rows, COLUMNS)}\n{task}\nmemory limit: {machine['memory_limit']}\n{sizes}")
    for name, equal in same.items():
        print(f"same tokens: {'yes' if equal else 'no'} ({name}, fp32)")
    if options.json:
        everything = {"machine": machine, "sizes": vars(sizes), "summary": rows, "same_tokens": same, "runs": records}
        options.json.write_text(json.dumps(everything | {"options": vars(options)}, indent=1, default=str) + "\n")
    return int(not all(same.get(name) for name in options.only if options.check_tokens))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(asyncio.run(measure(Job(**json.loads(sys.argv[2]))))))
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.exit(main())
