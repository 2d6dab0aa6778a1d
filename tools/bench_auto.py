"""What ``--speculation auto`` chooses beside every fixed choice, interleaved in one run; and the same in simulation.

    python tools/bench_auto.py BIG --draft aspec/demo/draft --device-memory 512MiB 1GiB all --rounds 3 --threads 1
    python tools/bench_auto.py --simulate

Each contender decodes the same held-out prompts greedily (or at --temperature), end tokens ignored; round r starts with
contender r. For each memory (all: everything resident) are printed medians over the rounds of decode tokens/s and
tokens per pass, the ratio of each to auto, and the share of its ceiling: tokens per pass * link rate / bytes that
stream in a pass. A last table compares auto with the best fixed contender of every prompt, and auto's speed by memory.
Where everything is resident, ``--cpu`` counts CPU seconds of the process: beside a busy neighbour wall seconds do not
compare; with several threads CPU seconds include their waiting.

In simulation a pass of 1.5 s streams over a link to a device whose layers cost the same for any number of tokens
(flat), more from 32 tokens on (knee), or more with every token (steep); a draft step costs 50 ms, the chance of
acceptance is 0.8. A last table drafts ahead and does not, with steps of 0.9 s per round and the demo pair's acceptance.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from aspec.engine.engine import open_engine
from aspec.generation.params import SamplingParams
from aspec.options import DEMO
from aspec.plan import Plan, PlannedPart, PlanRequest, Speculation
from aspec.planning.simulation import simulate
from aspec.profiling.cost_tables import SimCosts
from aspec.tasks.op import Op
from aspec.tasks.task import DRAFT_COMPUTE, Span
from aspec.units import parse_bytes, parse_rate

BUDGETS = [4, 8, 16, 32, 64, 128, 256]
CHAINS = [5, 8, 12]
AUTO = "auto"
PASS_S, NUM_LAYERS, PART_BYTES = 1.5, 32, 32_000_000
SHAPES = {
    "flat": SimCosts(layer_s=5e-3, layer_token_s=0.0),
    "knee": SimCosts(layer_s=5e-3, layer_token_s=2e-3, knee_tokens=32),
    "steep": SimCosts(layer_s=5e-3, layer_token_s=4e-3),
}
MACHINE = {"disk_bytes_per_s": NUM_LAYERS * PART_BYTES / PASS_S, "copy_bytes_per_s": 25e9, "draft_s": 0.05}


@dataclass(frozen=True)
class Run:
    """One contender in one round."""

    tokens_per_s: float
    tokens_per_pass: float
    ceiling: float = 0.0  # tokens/s
    speeds: tuple[float, ...] = ()  # tokens/s of every prompt


def contenders(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Engine options by name, auto first."""
    rows: dict[str, dict[str, Any]] = {AUTO: {}, "auto, not ahead": {"draft_ahead": False}}
    rows |= {f"chain {n}": {"speculation": "chain", "num_draft_tokens": n} for n in options.chains}
    rows |= {f"tree {n}": {"speculation": "tree", "num_draft_tokens": n} for n in options.budgets}
    return rows | {"off": {"speculation": "off"}}


async def run_once(
    options: argparse.Namespace, memory: int | None, settings: dict[str, Any], prompts: list[str]
) -> Run:
    """All prompts, one after the other."""
    passes, tokens, spent = 0, 0, []
    async with open_engine(
        target=options.target,
        draft=options.draft,
        device_memory=memory,
        link_rate=options.link_rate,
        threads=options.threads,
        exact=options.exact,
        max_batch=1,
        max_context=1024,
        **settings,
    ) as engine:
        for index, prompt in enumerate(prompts):
            params = SamplingParams(options.tokens, temperature=options.temperature, seed=index, ignore_eos=True)
            started_s = None
            async for piece in engine.stream(prompt, params):
                started_s = process_time() if started_s is None else started_s  # the prompt is behind us
                last = piece
            assert last.stats is not None
            assert started_s is not None
            passes += last.stats.passes
            tokens += last.stats.completion_tokens - 1
            spent.append(process_time() - started_s if options.cpu else last.stats.decode_s)
        streamed = engine.plan.streamed_bytes
        rate = (options.link_rate or await engine.probe_link_rate(0.5) or 0.0) if streamed else 0.0
    ceiling = tokens / passes * rate / streamed if streamed else 0.0
    own = tokens / len(prompts)
    return Run(tokens / sum(spent), tokens / passes, ceiling, tuple(own / seconds for seconds in spent))


async def measure(options: argparse.Namespace, memory: int | None) -> dict[str, list[Run]]:
    """Every contender in every round."""
    prompts = json.loads((DEMO / "heldout.json").read_text(encoding="utf-8"))[: options.prompts]
    rows = contenders(options)
    names = [name for name in rows if not options.only or name in options.only]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(options.rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            run = await run_once(options, memory, rows[name], prompts)
            runs[name].append(run)
            each = " ".join(f"{speed:.2f}" for speed in run.speeds)
            print(f"round {number}, {name}: {run.tokens_per_s:.2f} tokens/s ({each}), {run.tokens_per_pass:.2f} a pass")
            sys.stdout.flush()
    return runs


def print_verdict(measured: dict[str, dict[str, list[Run]]]) -> dict[str, Any]:
    """By memory: auto's speed, and auto beside the fixed contender that is the best for each prompt."""
    print("\nauto beside the best fixed size of every prompt")
    print("| memory | auto, tokens/s | median | worst |\n|---|---|---|---|")
    verdict = {}
    for memory, runs in measured.items():
        speeds = {
            name: [median(own) for own in zip(*(run.speeds for run in kept), strict=True)]
            for name, kept in runs.items()
        }
        fixed = [own for name, own in speeds.items() if not name.startswith(AUTO)]
        ratios = [own / max(others) for own, *others in zip(speeds[AUTO], *fixed, strict=True)]
        speed = median(run.tokens_per_s for run in runs[AUTO])
        verdict[memory] = {"tokens_per_s": speed, "median": median(ratios), "worst": min(ratios)}
        print(f"| {memory} | {speed:.2f} | {median(ratios):.3f} | {min(ratios):.3f} |")
    return verdict


def plan_of(settings: dict[str, Any], budget: int) -> Plan:
    """A model that streams whole in every pass."""
    parts = tuple(PlannedPart(i, i, PART_BYTES, PART_BYTES) for i in range(NUM_LAYERS))
    shared = {"num_rows": 1, "capacity": 4096, "max_draft_tokens": budget, "speculation": Speculation.TREE}
    return Plan(parts, NUM_LAYERS, 6, PART_BYTES, PlanRequest(**{**shared, **settings}), draft_resource=DRAFT_COMPUTE)


def simulated(plan: Plan, profile: SimCosts, new_tokens: int = 1000) -> Run:
    """One sequence from the first token to the last, in virtual time."""
    spans: list[Span] = []
    simulate(plan, profile, [(64, new_tokens)], [spans.append])
    accepts = [span for span in spans if span.task.op is Op.ACCEPT]
    seconds = accepts[-1].stop_s - accepts[0].stop_s
    return Run((new_tokens - 1) / seconds, (new_tokens - 1) / (len(accepts) - 1))


def simulate_shapes(budgets: list[int]) -> dict[str, dict[str, list[Run]]]:
    """Auto and every fixed budget on each machine."""
    tables = {}
    for shape, base in SHAPES.items():
        profile = replace(base, **MACHINE)
        rows = {AUTO: plan_of({}, 128)}
        rows |= {f"tree {n}": plan_of({"fixed_draft_tokens": n}, n) for n in budgets}
        rows |= {"off": plan_of({"max_draft_tokens": 0}, 0)}
        tables[shape] = {name: [simulated(plan, profile)] for name, plan in rows.items()}
    return tables


def simulate_ahead(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Drafts of 0.9 s beside a pass of 1.5 s that hides as little of them as two spare slots do."""
    machine = MACHINE | {"draft_s": 0.9 / options.levels, "acceptance": options.acceptance, "spread": options.spread}
    profile = replace(SHAPES["flat"], **machine)
    rows = {AUTO: {}, "auto, not ahead": {"draft_ahead": False}}
    lean = {"num_slots": 3, "max_draft_depth": options.levels}
    return {name: [simulated(replace(plan_of(row, 64), **lean), profile)] for name, row in rows.items()}


def print_table(title: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians, and how each compares with auto in the same round."""
    print(
        f"\n{title}\n| | tokens/s (min-max) | tokens per pass | share of the ceiling | this / auto |\n"
        "|---|---|---|---|---|"
    )
    table = {}
    for name, own in runs.items():
        speeds = [run.tokens_per_s for run in own]
        ratios = [run.tokens_per_s / auto.tokens_per_s for run, auto in zip(own, runs.get(AUTO, own), strict=True)]
        shares = [run.tokens_per_s / run.ceiling for run in own if run.ceiling]
        row = {
            "tokens_per_s": median(speeds),
            "tokens_per_pass": median(run.tokens_per_pass for run in own),
            "ceiling_share": median(shares) if shares else None,
            "ratio": median(ratios),
        }
        share = f"{row['ceiling_share']:.2f}" if shares else "-"
        spread = f"{row['tokens_per_s']:.2f} ({min(speeds):.2f}-{max(speeds):.2f})"
        print(f"| {name} | {spread} | {row['tokens_per_pass']:.2f} | {share} | {row['ratio']:.3f} |")
        table[name] = row
    return table


def main() -> None:
    """Parse, measure or simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", help="checkpoint folder; the demo pair without it")
    parser.add_argument("--draft")
    parser.add_argument("--simulate", action="store_true", help="virtual time only")
    parser.add_argument("--device-memory", nargs="+", default=["512MiB"], help="all: everything is resident")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction)
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds instead of wall seconds")
    parser.add_argument("--link-rate", type=parse_rate)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS)
    parser.add_argument("--chains", type=int, nargs="*", default=CHAINS)
    parser.add_argument("--only", nargs="*", metavar="CONTENDER")
    parser.add_argument("--levels", type=int, default=16, help="draft steps in the 0.9 s of a simulated round")
    parser.add_argument("--acceptance", type=float, default=0.92, help="of the simulated draft's best token")
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.simulate:
        tables = {
            name: print_table(f"{name} verify cost", runs) for name, runs in simulate_shapes(options.budgets).items()
        }
        tables["ahead"] = print_table("drafting ahead", simulate_ahead(options))
    else:
        budgets = {name: None if name == "all" else parse_bytes(name) for name in options.device_memory}
        runs = {name: asyncio.run(measure(options, memory)) for name, memory in budgets.items()}
        tables = {name: print_table(name, own) for name, own in runs.items()}
        tables["verdict"] = print_verdict(runs)
    if options.json:
        options.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
