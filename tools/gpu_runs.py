"""The steps of gpu_check.py that need its checkpoint: the link, aspec's runs over it, the alternatives, a trace."""

import asyncio
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aspec.api import run
from aspec.backends.cuda import TorchDevice
from aspec.cli.bench import Run
from aspec.engine.design import decide, design
from aspec.engine.engine import Engine, open_engine
from aspec.generation.params import SamplingParams
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.memory import peak_rss_bytes
from aspec.io.pinned import PinnedMemory
from aspec.observe.recorder import Recorder
from aspec.observe.summary import summarise
from aspec.observe.timeline import LINKS, TARGET, LaneUse, Timeline, decode_stretch, hidden_share
from aspec.options import EngineOptions
from aspec.planning.footprint import read_models
from aspec.planning.resolve import resolve
from tools import bench_batch, bench_peers, contest
from tools.contest import Record
from tools.gpu_steps import ROOT, Job, attempt

WARM_UP_TOKENS = 8
WEIGHT_SHARE = 0.8  # of the budget, that accelerate may fill with weights; KV and activations take of the rest
LINK_COPIES, LINK_TRIES = 8, 5
ASSISTED = bench_peers.ASSISTED
ONE, ASSISTANT, BATCH = "one prompt", "assistant", "batch"  # what the alternatives are held against in
LEAST_RUN_S = 10.0  # no alternative is started with less of the step's time


@dataclass(frozen=True, slots=True)
class Shape:
    """A run of the engine: how it speculates, for how many prompts."""

    speculation: str
    batch: bool = False


SHAPES = {"off": Shape("off"), "chain": Shape("chain"), "tree": Shape("tree"), "batch": Shape("chain", batch=True)}


# -- what the link can do ------------------------------------------------------------------------------------

Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Targets and sources, in the order of a stream."""


def links(job: Job) -> Iterator[Record]:
    """Bytes per second each way and both ways at once: pageable and pinned memory, large copies and a plan's parts."""
    options = job.engine(speculation="off", max_batch=1, max_context=256)
    planned = attempt(lambda: {"slot_bytes": design(resolve(EngineOptions(**options))).plan.slot_bytes})
    sizes = {f"{job.sizes.link_bytes >> 20} MiB": job.sizes.link_bytes}
    if part := planned.get("slot_bytes"):
        sizes[f"part of {part / 2**20:.1f} MiB"] = part
    record: Record = {"h2d_pinned_bytes_per_s": None, "runs": {"plan": planned}}
    for (size, nbytes), kind in itertools.product(sizes.items(), ("pageable", "pinned", "registered")):
        found = attempt(lambda kind=kind, nbytes=nbytes: link_rates(job.device, kind, nbytes))
        record["runs"][f"{kind}, {size}"] = found
        if found.get("pinned") or (job.card is None and kind == "registered"):
            best = max(record["h2d_pinned_bytes_per_s"] or 0.0, found["h2d_bytes_per_s"])
            record["h2d_pinned_bytes_per_s"] = best
        yield record


def link_rates(device: str, kind: str, nbytes: int) -> Record:
    """Medians of a few tries of ``LINK_COPIES`` copies."""
    if device == "cpu":
        torch.set_num_threads(1)
    host, free = host_buffers(device, kind, nbytes)
    try:
        there, back = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        h2d, d2h = [(there, host[0])] * LINK_COPIES, [(host[1], back)] * LINK_COPIES
        ways = {"h2d": [h2d], "d2h": [d2h]} | ({} if kind == "pageable" else {"both": [h2d, d2h]})
        timed = seconds_on_host if device == "cpu" else seconds_on_card
        rates: Record = {"pinned": kind != "pageable" and device != "cpu" and all(one.is_pinned() for one in host)}
        for way, streams in ways.items():
            timed(streams)
            seconds = [timed(streams) for _ in range(LINK_TRIES)]
            total = len(streams) * LINK_COPIES * nbytes
            rates[f"{way}_bytes_per_s"] = total / statistics.median(seconds)
            rates[f"{way}_most_bytes_per_s"] = total / min(seconds)
        return rates
    finally:
        free()


def host_buffers(device: str, kind: str, nbytes: int) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Two touched buffers, and what frees them; registered ones are as aspec pins them."""
    if kind == "registered" and device != "cpu":
        card = TorchDevice()
        return [card.allocate_host(nbytes).tensor[:nbytes] for _ in range(2)], card.free
    if kind == "registered":
        memory = PinnedMemory(lambda address, nbytes: True, lambda address: None)
        return [memory.allocate(nbytes).tensor[:nbytes] for _ in range(2)], memory.close
    buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)]
    pinned = kind == "pinned" and device != "cpu"
    return [one.pin_memory() for one in buffers] if pinned else buffers, lambda: None


def seconds_on_card(streams: Sequence[Copies]) -> float:
    """From the first copy's start to the last one's end, each list on a side stream, by the device's clock."""
    make: Any = torch.cuda.Event
    side: list[Any] = [torch.cuda.Stream() for _ in streams]
    begin, ends = make(enable_timing=True), [make(enable_timing=True) for _ in side]
    begin.record(side[0])
    for other in side[1:]:
        other.wait_event(begin)
    for copies, stream, end in zip(streams, side, ends, strict=True):
        with torch.cuda.stream(stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
        end.record(stream)
    for end in ends:
        end.synchronize()
    return max(begin.elapsed_time(end) for end in ends) / 1e3


def seconds_on_host(streams: Sequence[Copies]) -> float:
    """The same where the device is the host: one list after the other."""
    started = time.perf_counter()
    for target, source in itertools.chain.from_iterable(streams):
        target.copy_(source)
    return time.perf_counter() - started


# -- aspec's runs --------------------------------------------------------------------------------------------


def stream(job: Job) -> Iterator[Record]:
    """The checkpoint under its budget, without speculation, with chains, with trees, and many rows with chains."""
    record: Record = {"weight_bytes": job.weight_bytes, "budget_bytes": job.budget}
    record |= {"link_bytes_per_s": job.link_bytes_per_s, "runs": {}}
    for name, shape in SHAPES.items():
        record["runs"][name] = attempt(lambda shape=shape, name=name: run(partial(one_run, job, shape, name)))
        yield record


def prompts_of(job: Job, batch: bool) -> list[list[int]]:
    """One prompt, or the batch's of many lengths; the same that the alternatives get."""
    if batch:
        return bench_batch.make_prompts(job.target, job.sizes.rows)
    return [Tokenizer.load(Path(job.target)).encode(bench_peers.PROMPT)]


async def one_run(job: Job, shape: Shape, name: str) -> Record:
    """Open, warm up, generate, and hold what came against the link."""
    prompts, num_tokens = prompts_of(job, shape.batch), job.sizes.tokens[name]
    sizes = {"max_batch": len(prompts), "max_context": max(map(len, prompts)) + max(num_tokens, WARM_UP_TOKENS)}
    options = job.engine(speculation=shape.speculation, reuse_prefix=False, **sizes)
    recorder, started = Recorder(), time.perf_counter()
    async with open_engine(observers=[recorder], **options) as engine:
        load_s = time.perf_counter() - started
        await generate(engine, prompts, WARM_UP_TOKENS)
        recorder.clear()
        called_s = time.perf_counter()
        arrivals = await generate(engine, prompts, num_tokens)
        rates = bench_batch.rates_of(called_s, arrivals, sum(map(len, prompts)))
        peak = engine.device_peak_bytes
        plan = engine.plan
    timeline = recorder.timeline({"bytes_per_pass": plan.streamed_bytes})
    known = {"rows": len(prompts), "new_tokens": num_tokens, "load_s": load_s, "plan": plan.describe()}
    known |= {"host": plan.describe_host(), "shape": plan.shape, "streamed_parts": len(plan.streamed)}
    known |= {"parts": len(plan.parts), "peak_rss_bytes": peak_rss_bytes()}
    known |= {key: rates[key] for key in ("prefill_s", "decode_tokens_per_s", "whole_tokens_per_s")}
    known |= {"device_peak_bytes": peak, "peak_share": peak / job.budget if peak else None}
    return known | against_the_link(timeline, plan.streamed_bytes, job.link_bytes_per_s, rates["prefill_s"])


async def generate(engine: Engine, prompts: list[list[int]], num_tokens: int) -> bench_batch.Arrivals:
    """All prompts at once, past end tokens: what arrived, and when."""

    async def one(prompt: list[int]) -> list[tuple[float, list[int]]]:
        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        arrived = [(time.perf_counter(), list(piece.token_ids)) async for piece in engine.stream(prompt, params)]
        return [(seconds, tokens) for seconds, tokens in arrived if tokens]

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def against_the_link(timeline: Timeline, bytes_per_pass: int, link: float | None, prefill_s: float) -> Record:
    """What decoding made of the link: the stream's rate, the share of the ceiling, what of the drafts it hid."""
    summary = summarise(timeline)
    measured = Run(summary, link, prefill_s, bytes_per_pass)
    work = timeline.work(*decode_stretch(timeline))
    nearest = max((use for use in summary.lanes if use.lane in LINKS and use.nbytes), default=None, key=place)
    rate = nearest.nbytes / summary.decode_s if nearest and summary.decode_s else None
    return {
        "passes": summary.rounds - 1,
        "tokens_per_pass": summary.tokens_per_pass,
        "bytes_per_pass": bytes_per_pass,
        "stream_bytes_per_s": rate,
        "link_share": rate / link if rate and link else None,
        "ceiling_tokens_per_s": measured.ceiling_tokens_per_s,
        "ceiling_share": measured.ceiling_fraction,
        "draft_hidden": hidden_share({lane: slices for lane, slices in work.items() if lane != TARGET}),
        "hidden": summary.hidden,
        "bottleneck": summary.bottleneck,
        "lanes": {use.lane: {"share": use.share, "busy_bytes_per_s": use.busy_bytes_per_s} for use in summary.lanes},
        "stalls": summary.as_dict()["stalls"],
    }


def place(use: LaneUse) -> int:
    """How near to the device a link is."""
    return LINKS.index(use.lane)


# -- the alternatives ----------------------------------------------------------------------------------------


def peers(job: Job) -> Iterator[Record]:
    """transformers with accelerate's offload under the same budget: one prompt, with an assistant, its best batch."""
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeError("accelerate is not installed, so there is nothing to compare with: pip install accelerate")
    until_s = time.monotonic() + job.limit_s
    record: Record = {"most_tokens_per_s": {}, "runs": {}}
    models = {"target": job.target, "draft": job.draft, "card": job.card, "cold": False}
    weights = int(job.budget * WEIGHT_SHARE)
    for name in ("accelerate", *ASSISTED):
        tokens = job.sizes.assisted_tokens if name in ASSISTED else job.sizes.peer_tokens
        one = bench_peers.Job(contender=name, prompts=[bench_peers.PROMPT], tokens=tokens, memory=weights, **models)
        environment = bench_peers.CONTENDERS[name].environment
        found = contest.run_child(bench_peers.__file__, one, None, environment, left(until_s))
        noted(record, ASSISTANT if name in ASSISTED else ONE, name, found)
        yield record
    prompts = prompts_of(job, batch=True)
    room = weights - kv_bytes(job, prompts)
    more = {"prompts": prompts, "tokens": job.sizes.peer_batch_tokens, "memory": room}
    batch = bench_batch.Job(contender="accelerate", **more, **models)
    fitting = Namespace(contenders=bench_batch.CONTENDERS, timeout=left(until_s))
    for found in bench_batch.run_fitting(fitting, batch, None, {}):
        noted(record, BATCH, f"accelerate, batch of {found['rows']}", found)
        yield record
        fitting.timeout = left(until_s)


def left(until_s: float) -> float:
    """Seconds that a child may take; raises where too few are left to start one."""
    seconds = until_s - time.monotonic()
    if seconds < LEAST_RUN_S:
        raise TimeoutError("the step's time is over; what ran before stands")
    return seconds


def noted(record: Record, kind: str, name: str, found: Record) -> None:
    """Adds a run without its tokens, its modules by device counted; the fastest of a kind counts."""
    places = list(((found.get("facts") or {}).get("device_map") or {}).values())
    kept = {key: value for key, value in found.items() if key not in ("tokens", "facts", "device_map", "contender")}
    record["runs"][name] = kept | {"modules_on": {str(place): places.count(place) for place in dict.fromkeys(places)}}
    if speed := found.get("decode_tokens_per_s"):
        fastest = record["most_tokens_per_s"]
        fastest[kind] = max(speed, fastest.get(kind, 0.0))


def kv_bytes(job: Job, prompts: list[list[int]]) -> int:
    """Of all rows, as aspec's plan counts it."""
    context = max(map(len, prompts)) + job.sizes.peer_batch_tokens
    roomy = {"device_memory": 1 << 50, "resident_memory": 0, "max_batch": len(prompts), "max_context": context}
    asked = EngineOptions(target=job.target, device="cpu", speculation="off", **roomy)
    return decide(read_models(resolve(asked)))[1].arithmetic["KV cache"]


# -- a trace -------------------------------------------------------------------------------------------------


def trace(job: Job) -> Iterator[Record]:
    """One streamed run as ``aspec trace`` records it, and what it says of it."""
    options = {"--target": job.target, "--draft": job.draft, "--device": job.device, "--prompt": bench_peers.PROMPT}
    options |= {"--device-memory": f"{job.budget}", "-n": f"{job.sizes.tokens['tree']}", "-o": job.trace}
    command = [sys.executable, "-m", "aspec", "trace", "--summary", "--json", "--quiet", "--ignore-eos"]
    command += [word for pair in options.items() for word in pair]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=job.limit_s)
    if done.returncode:
        raise RuntimeError(f"aspec trace ended with {done.returncode}:\n{done.stderr.strip()}")
    (summary,) = json.loads(done.stdout.splitlines()[-1]).values()
    yield {"file": job.trace, "file_bytes": Path(job.trace).stat().st_size, "summary": summary}
