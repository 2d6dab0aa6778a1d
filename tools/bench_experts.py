"""Experts read on demand beside whole layers, interleaved in one run; and their cache beside the best possible one.

    python tools/expand.py aspec/demo/target BIG --size 2GB --experts 64 --top-k 4
    python tools/bench_experts.py BIG --draft aspec/demo/draft --device-memory 512MiB --rounds 3

Each contender decodes the same held-out prompts greedily, end tokens ignored; round r starts with contender r. Printed
are medians over the rounds: decode tokens/s, tokens and bytes read per pass and per token, the share of touched experts
that were in the cache, of experts read ahead that were used, and the shares of decoding in which the disk read and the
target computed. The speed is at its ceiling where one of the two is busy all the time.

The second table replays the recorded routes of decoding through caches of some shares of the experts: the cache of
aspec, the least recently used, and Belady's optimum, which knows the future (1966; an expert that is wanted later than
all that are held does not enter).
"""

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from aspec.engine.engine import Engine, open_engine
from aspec.generation.params import SamplingParams
from aspec.generation.stats import RequestStats
from aspec.observe.timeline import lane_use
from aspec.options import DEMO
from aspec.tasks.experts.cache import ExpertCache
from aspec.tasks.op import Lane, Op
from aspec.tasks.task import ExpertLoad, Span
from aspec.units import parse_bytes, parse_rate

SHARES = (0.16, 0.32, 0.48)  # of a layer's experts
AUTO, OFF, WHOLE = "auto", "off", "whole layers, off"

Unions = dict[int, list[tuple[int, ...]]]
"""By layer: the experts that each pass touched, the most wanted first."""


@dataclass(frozen=True)
class Run:
    """One contender in one round."""

    tokens_per_s: float
    tokens_per_pass: float
    bytes_per_token: float
    hit_rate: float  # 0 where no expert is read on demand
    prefetch_hit_rate: float  # 0 where nothing was read ahead of its route
    disk_share: float  # of the seconds
    compute_share: float
    num_experts: int = 0  # of a layer
    routes: tuple[Unions, ...] = ()  # of every prompt


class Watch:
    """Observes one run; what happened before the first token was there does not count."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def __call__(self, span: Span) -> None:
        """Keep a span."""
        if span.outcomes and span.task.item is not None and span.task.item.prefill:
            self._spans = [span]
        self._spans.append(span)

    @property
    def unions(self) -> Unions:
        """The routes of decoding."""
        found: Unions = defaultdict(list)
        for span in self._spans:
            if span.task.op is Op.ROUTE and span.task.layer is not None:
                wanted = sorted(span.routed, key=lambda pair: (-pair[1], pair[0]))
                found[span.task.layer].append(tuple(expert for expert, _ in wanted))
        return dict(found)

    @property
    def read_bytes(self) -> int:
        """Bytes read from the disk."""
        return sum(span.task.nbytes for span in self._spans if span.task.op.lane is Lane.DISK)

    @property
    def num_missing(self) -> int:
        """Experts that had to be read when they were chosen."""
        loads = (span.task.payload for span in self._spans if span.task.op is Op.LOAD_EXPERT)
        return sum(isinstance(load, ExpertLoad) and not load.guessed for load in loads)

    def share(self, lane: Lane) -> float:
        """Share of the seconds in which a lane was busy."""
        start_s, stop_s = self._spans[0].stop_s, max(span.stop_s for span in self._spans)
        work = [(span.start_s, span.stop_s, 0) for span in self._spans if span.task.op.lane is lane]
        return lane_use(lane, work, start_s, stop_s).share


def contenders(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Engine options by name; "as it comes" also chooses between experts on demand and whole layers."""
    rows: dict[str, dict[str, Any]] = {AUTO: {}, OFF: {"speculation": "off"}}
    rows |= {f"chain {n}": {"speculation": "chain", "num_draft_tokens": n} for n in options.chains}
    rows |= {f"tree {n}": {"speculation": "tree", "num_draft_tokens": n} for n in options.trees}
    rows |= {f"{name}, prefetch": {"prefetch_experts": True, **rows[name]} for name in (AUTO, OFF)}
    rows = {name: {"experts": "on-demand", "prefetch_experts": False, **row} for name, row in rows.items()}
    rows |= {WHOLE: {"experts": "whole", "speculation": "off"}, "whole layers, auto": {"experts": "whole"}}
    return rows | {"as it comes": {}}


async def generate(engine: Engine, prompts: Sequence[str], tokens: int) -> list[RequestStats]:
    """The statistics of prompts that share their passes."""

    async def one(index: int, prompt: str) -> RequestStats:
        params = SamplingParams(tokens, temperature=0.0, seed=index, ignore_eos=True)
        last = [piece async for piece in engine.stream(prompt, params)][-1]
        assert last.stats is not None
        return last.stats

    return list(await asyncio.gather(*(one(*pair) for pair in enumerate(prompts))))


async def run_once(options: argparse.Namespace, settings: dict[str, Any], prompts: list[str]) -> Run:
    """All prompts, as many together as there are rows."""
    watch = Watch()
    passes, tokens, seconds, nbytes, missing, touched = 0, 0, 0.0, 0, 0, 0
    shares: list[tuple[float, float]] = []
    routes: list[Unions] = []
    guessed = used = 0
    async with open_engine(
        observers=[watch],
        target=options.target,
        draft=options.draft,
        device_memory=options.device_memory,
        link_rate=options.link_rate,
        threads=options.threads,
        max_batch=options.rows,
        max_context=1024,
        **settings,
    ) as engine:
        for first in range(0, len(prompts), options.rows):
            batch = await generate(engine, prompts[first : first + options.rows], options.tokens)
            passes, seconds = passes + max(one.passes for one in batch), seconds + decode_seconds(batch)
            tokens += sum(one.completion_tokens - 1 for one in batch)
            guessed, used = guessed + batch[0].experts.guessed, used + batch[0].experts.used
            nbytes, missing = nbytes + watch.read_bytes, missing + watch.num_missing
            routes.append(watch.unions)
            touched += sum(len(union) for unions in routes[-1].values() for union in unions)
            shares.append((watch.share(Lane.DISK), watch.share(Lane.TARGET)))
        plan = engine.plan
    disk, compute = (sum(own) / len(own) for own in zip(*shares, strict=True))
    hit_rate = 1.0 - missing / touched if touched else 0.0
    number = max(plan.experts.shape.num_experts) if plan.experts else 0
    ahead = used / guessed if guessed else 0.0
    return Run(
        tokens / seconds, tokens / passes, nbytes / tokens, hit_rate, ahead, disk, compute, number, tuple(routes)
    )


def decode_seconds(batch: Sequence[RequestStats]) -> float:
    """From the first prompt that has its first token to the last token of all."""
    begun_s = min(one.arrived_s + one.prefill_s for one in batch)
    return max(one.arrived_s + one.prefill_s + one.decode_s for one in batch) - begun_s


async def measure(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Every contender in every round."""
    texts = json.loads((DEMO / "heldout.json").read_text(encoding="utf-8"))
    prompts = [texts[row % len(texts)][row // len(texts) :] for row in range(options.prompts)]
    rows = contenders(options)
    names = [name for name in rows if not options.only or name in options.only]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(options.rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            run = await run_once(options, rows[name], prompts)
            runs[name].append(run)
            print(f"round {number}, {name}: {run.tokens_per_s:.2f} tokens/s, {run.tokens_per_pass:.2f} a pass")
            sys.stdout.flush()
    return runs


def print_runs(runs: dict[str, list[Run]]) -> None:
    """Medians of every contender."""
    print("\n| | tokens/s (min-max) | tokens per pass | MB per token | hits | guesses used | disk busy | target busy |")
    print("|---|---|---|---|---|---|---|---|")
    for name, own in runs.items():
        speeds = [run.tokens_per_s for run in own]
        rest = [
            median(run.tokens_per_pass for run in own),
            median(run.bytes_per_token for run in own) / 1e6,
            median(run.hit_rate for run in own),
            median(run.prefetch_hit_rate for run in own),
            median(run.disk_share for run in own),
            median(run.compute_share for run in own),
        ]
        words = " | ".join(f"{value:.2f}" for value in rest)
        print(f"| {name} | {median(speeds):.2f} ({min(speeds):.2f}-{max(speeds):.2f}) | {words} |")


# -- caches ------------------------------------------------------------------------------------------------


def segmented_hits(unions: Sequence[Sequence[int]], slots: int) -> int:
    """Hits of aspec's own cache."""
    cache = ExpertCache(range(slots))
    return sum(len(cache.place(union).held) for union in unions)


def recent_hits(unions: Sequence[Sequence[int]], slots: int) -> int:
    """Hits of a cache that drops the least recently used."""
    recent: dict[int, None] = {}
    hits = 0
    for union in unions:
        hits += sum(expert in recent for expert in union)
        for expert in reversed(union):
            recent.pop(expert, None)
            recent[expert] = None
        for expert in list(recent)[: max(0, len(recent) - slots)]:
            del recent[expert]
    return hits


def best_hits(unions: Sequence[Sequence[int]], slots: int) -> int:
    """Hits of a cache that keeps what is wanted soonest."""
    never = len(unions)
    following: list[dict[int, int]] = [{} for _ in unions]
    soonest: dict[int, int] = {}
    for at in range(len(unions) - 1, -1, -1):
        following[at] = {expert: soonest.get(expert, never) for expert in unions[at]}
        soonest |= dict.fromkeys(unions[at], at)
    held: dict[int, int] = {}  # expert -> the pass that wants it next
    hits = 0
    for at, union in enumerate(unions):
        hits += sum(expert in held for expert in union)
        held |= following[at]
        held = dict(sorted(held.items(), key=lambda pair: pair[1])[:slots])
    return hits


CACHES: dict[str, Callable[[Sequence[Sequence[int]], int], int]] = {
    "segmented (aspec)": segmented_hits,
    "least recently used": recent_hits,
    "Belady's optimum": best_hits,
}


def print_caches(name: str, run: Run) -> None:
    """The hit rates of all caches on the routes of one run."""
    print(f"\nhit rates on the routes of {name!r}\n| | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    layers = defaultdict(list)
    for routes in run.routes:  # one prompt after the other, as the cache has seen them
        for layer, unions in routes.items():
            layers[layer] += unions
    touched = sum(len(union) for unions in layers.values() for union in unions)
    for cache, hits_of in CACHES.items():
        rates = [
            sum(hits_of(unions, round(share * run.num_experts)) for unions in layers.values()) / touched
            for share in SHARES
        ]
        print(f"| {cache} | " + " | ".join(f"{rate:.3f}" for rate in rates) + " |")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="checkpoint folder of a mixture of experts")
    parser.add_argument("--draft")
    parser.add_argument("--device-memory", type=parse_bytes, default="512MiB")
    parser.add_argument("--link-rate", type=parse_rate)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1, help="prompts that are decoded together")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chains", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--trees", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--only", nargs="*", metavar="CONTENDER")
    options = parser.parse_args()
    runs = asyncio.run(measure(options))
    print_runs(runs)
    for name in (OFF, AUTO):
        if name in runs:
            print_caches(name, runs[name][-1])


if __name__ == "__main__":
    main()
